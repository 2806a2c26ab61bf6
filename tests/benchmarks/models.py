"""What is trained in the bench: two Llamas with random weights, the shipped model, rows of tokens.

Weights and rows follow from seeds, so that every contender has the same ones.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
SHIPPED = PROJECT / "data" / "base-model"
HOME = PROJECT / "runs" / "bench"  # git ignores it
RANK = 16
SHAPES = {
    "0.9M": {
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 1024,
        "max_position_embeddings": 1024,
    },
    "135M": {  # the shape of the small models that people post-train
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49_152,
        "max_position_embeddings": 2048,
    },
}


@dataclass(frozen=True)
class Row:
    """One conversation: its tokens, and how many of them at the end are trained on."""

    tokens: list[int]
    trained: int


def model_folder(name: str) -> str:
    """The folder of a model; random ones are made at the first call."""
    if name == "shipped":
        return str(SHIPPED)
    folder = HOME / "models" / name
    if not (folder / "model.safetensors").is_file():
        make(folder, SHAPES[name])
    return str(folder)


def make(folder: Path, shape: dict[str, int]) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            **shape,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
            dtype="float32",
        )
    )
    model.save_pretrained(folder)
    for file in (*SHIPPED.glob("tokenizer*"), *SHIPPED.glob("*.jinja")):
        shutil.copyfile(file, folder / file.name)


def short_rows(count: int) -> list[Row]:
    """Conversations about sums; the answer is trained on, as in the course and in TRL."""
    from course_lib.conversations import Conversation, Message
    from course_lib.rendering import render_conversation
    from course_lib.world import direct_answer, sum_problem

    rng, tokenizer, rows = random.Random(0), shipped_tokenizer(), []
    for _ in range(count):
        problem = sum_problem(rng, heldout=False)
        answer = direct_answer(problem.operands)
        messages = (Message("user", problem.question), Message("assistant", answer))
        rendered = render_conversation(Conversation(messages, "bench"), tokenizer)
        rows.append(Row(rendered.tokens, sum(weight > 0 for weight in rendered.weights)))
    return rows


def long_rows(count: int, length: int, vocabulary: int) -> list[Row]:
    """Random tokens, all of them trained on."""
    rng = random.Random(0)
    return [
        Row([rng.randrange(1, vocabulary) for _ in range(length)], length - 1) for _ in range(count)
    ]


def questions(count: int) -> list[str]:
    """Prompts of some 15 tokens, in the words of the chat template."""
    from course_lib.world import sum_problem

    rng = random.Random(1)
    return [
        f"<|user|>{sum_problem(rng, heldout=False).question}<|end|><|assistant|>"
        for _ in range(count)
    ]


def long_questions(count: int, length: int) -> list[str]:
    """Prompts of `length` tokens or one more: many questions in one."""
    from course_lib.world import sum_problem

    rng, tokenizer, made = random.Random(2), shipped_tokenizer(), []
    for _ in range(count):
        text = ""
        while len(tokenizer(text)["input_ids"]) < length:
            if not text.endswith("+ 1"):
                text += " " + sum_problem(rng, heldout=False).question
            words = text.split(" ")
            while len(words) > 1 and len(tokenizer(" ".join(words))["input_ids"]) > length + 1:
                words.pop()
            text = " ".join(words)
        made.append(text)
    return made


def shipped_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SHIPPED)


def reward(text: str) -> float:
    """A reward that costs nothing and differs between siblings."""
    return sum(text.encode()) % 10 / 10
