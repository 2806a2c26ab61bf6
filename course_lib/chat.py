"""Talk to a checkpoint, or to several side by side: each speaker remembers its own conversation.

base, tuned = open_speakers(service, ["base", "tinker://.../sampler_weights/rl-00100"])
print(tuned.say("What is 23 + 45 + 61?"))
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from course_lib.checkpoints import one_line, training_client_from
from course_lib.conversations import Message
from course_lib.errors import CourseError
from course_lib.rendering import parse_completion, render_prompt, stop_token_ids

if TYPE_CHECKING:
    import tinker

    from course_lib.client import CourseService

BASE = "base"  # the model as it was before any training
_TOO_LONG = re.compile(r"context (window|length)", re.IGNORECASE)


class MessageTooLong(CourseError):
    """One message and the longest answer do not fit into the model's context window together."""


@dataclass
class Speaker:
    """One model in a conversation. Temperature 0 always picks the likeliest token."""

    name: str
    client: tinker.SamplingClient
    tokenizer: Any
    max_tokens: int = 128
    temperature: float = 0.7
    seed: int | None = None  # None: another answer each time
    messages: list[Message] = field(default_factory=list)
    has_forgotten: bool = field(default=False, init=False)  # the person has been told

    @property
    def short_name(self) -> str:
        """The checkpoint's own name, without the run it belongs to."""
        return self.name.rpartition("/")[2]

    def say(self, text: str) -> str:
        """Answer the next user message and remember both.

        Where the back end finds the conversation too long, its oldest exchanges are forgotten.

        Raises:
            MessageTooLong: `text` alone is too long; it is not remembered, nor anything forgotten.
        """
        whole = asked = [*self.messages, Message("user", text)]
        answer = None
        while answer is None:
            try:
                answer = self._answer(asked)
            except MessageTooLong:
                asked = without_oldest(asked)
                if not asked:
                    raise
        if asked != whole and not self.has_forgotten:
            self.has_forgotten = True
            print(f"({self.short_name}: too long a conversation, its oldest messages are left out)")
        self.messages = [*asked, Message("assistant", answer)]
        return answer

    def _answer(self, messages: Sequence[Message]) -> str:
        import tinker

        request = self.client.sample(
            tinker.ModelInput.from_ints(render_prompt(messages, self.tokenizer)),
            num_samples=1,
            sampling_params=tinker.SamplingParams(
                max_tokens=self.max_tokens,
                temperature=self.temperature,
                seed=self.seed,
                stop=stop_token_ids(self.tokenizer),
            ),
        )
        try:
            result = request.result()
        except Exception as error:
            if not _TOO_LONG.search(str(error)):
                raise
            finding = f"your message is too long ({one_line(error)})"
            remedy = f"write less, or choose a smaller --max-tokens than {self.max_tokens}"
            raise MessageTooLong(self.short_name, finding, remedy) from error
        return parse_completion(list(result.sequences[0].tokens), self.tokenizer)


def without_oldest(messages: Sequence[Message]) -> list[Message]:
    """The messages without the first question and its answer; none if there is one question."""
    asked = [index for index, message in enumerate(messages) if message.role == "user"]
    if len(asked) < 2:
        return []
    return [*messages[: asked[0]], *messages[asked[1] :]]


def open_speakers(
    service: CourseService, checkpoints: Sequence[str], **options: Any
) -> list[Speaker]:
    """A speaker for each tinker:// path, or for `base`; options are `Speaker`'s fields."""
    speakers = []
    for checkpoint in checkpoints:
        client = _sampling_client(service, checkpoint)
        speakers.append(Speaker(checkpoint, client, client.get_tokenizer(), **options))
    return speakers


def _sampling_client(service: CourseService, checkpoint: str) -> tinker.SamplingClient:
    if checkpoint == BASE:
        return service.create_sampling_client(base_model=service.base_model).result()
    if "/weights/" in checkpoint:  # saved to train on: only a training client can open it
        trained = training_client_from(service, checkpoint, optimizer=False)
        return trained.save_weights_and_get_sampling_client().result()
    if not checkpoint.startswith("tinker://"):
        remedy = "give tinker://RUN/sampler_weights/NAME from the run's report.json, or base"
        raise CourseError(checkpoint, "is no checkpoint", remedy)
    try:
        return service.create_sampling_client(model_path=checkpoint).result()
    except Exception as error:
        remedy = "look in the run's checkpoints.jsonl, and use the --store that it was saved in"
        raise CourseError(checkpoint, f"cannot be loaded ({one_line(error)})", remedy) from error
