"""Which data does a run train on, hold out, and practise in? The configuration's names as data."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from course_lib.batches import plan_batches
from course_lib.config import RunConfig, SFTConfig, find_file
from course_lib.conversations import Conversation, dataset_type_of, load_conversations
from course_lib.environments import (
    Environment,
    conversations_as_prompts,
    environment_from_file,
    sums_environment,
    village_environment,
)
from course_lib.errors import CourseError

SHIPPED_DATA = SFTConfig().data_path
SHIPPED_HELDOUT = "data/heldout.jsonl"


@dataclass(frozen=True)
class RunData:
    """What a run trains and is judged on."""

    train: list[Conversation]
    heldout: list[Conversation]
    environment: Environment
    judged_on_training: bool = False  # no row stands aside, so the problems are those trained on


def load_run_data(config: RunConfig) -> RunData:
    """The conversations to train on, those held out, and the environment to practise in."""
    sft = config.sft
    source = sft.data_path if sft.dataset_type == "huggingface" else str(find_file(sft.data_path))
    train = load_conversations(source, sft.dataset_type)
    shipped = sft.data_path == SHIPPED_DATA
    eval_path = SHIPPED_HELDOUT if sft.eval_path == "auto" and shipped else sft.eval_path
    if eval_path == "auto":  # by content, so that a duplicate cannot stand on both sides
        everything = train
        heldout = [each for each in everything if _stands_aside(each)]
        train = [each for each in everything if not _stands_aside(each)]
        if not train:
            finding = (
                "every row stands aside for evaluation (1 in 10, by its content): none is left"
            )
            remedy = "add rows, or set sft.eval_path to another file, or to none"
            raise CourseError(sft.data_path, finding, remedy)
    elif eval_path:
        kind = "jsonl" if dataset_type_of(eval_path) == "jsonl" else sft.dataset_type
        heldout = load_conversations(str(find_file(eval_path)), kind)
    else:
        heldout = []
    name = config.rl.environment
    own = name == "conversations" or (name == "auto" and not shipped)
    if name == "sums" or (name == "auto" and shipped):
        environment = sums_environment()
    elif name == "village":
        environment = village_environment()
    elif own:
        environment = conversations_as_prompts(train, heldout or train, sft.data_path)
    else:
        environment = environment_from_file(name)
    return RunData(train, heldout, environment, judged_on_training=own and not heldout)


def planned_steps(config: RunConfig, conversations: int) -> dict[str, int]:
    """How many optimizer batches each phase will take, for estimates and progress."""
    return {"sft": len(plan_batches(conversations, config.sft, 0)), "rl": config.rl.steps}


def _stands_aside(conversation: Conversation) -> bool:
    content = repr([(message.role, message.content) for message in conversation.messages])
    return zlib.crc32(content.encode()) % 10 == 0
