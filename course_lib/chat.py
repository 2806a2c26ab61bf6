"""Talk to a checkpoint, or to several side by side: each speaker remembers its own conversation.

base, tuned = open_speakers(service, ["base", "tinker://.../sampler_weights/rl-00100"])
print(tuned.say("What is 23 + 45 + 61?"))
"""

from __future__ import annotations

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

    @property
    def short_name(self) -> str:
        """The checkpoint's own name, without the run it belongs to."""
        return self.name.rpartition("/")[2]

    def say(self, text: str) -> str:
        """Answer the next user message and remember both."""
        import tinker

        asked = [*self.messages, Message("user", text)]
        result = self.client.sample(
            tinker.ModelInput.from_ints(render_prompt(asked, self.tokenizer)),
            num_samples=1,
            sampling_params=tinker.SamplingParams(
                max_tokens=self.max_tokens,
                temperature=self.temperature,
                seed=self.seed,
                stop=stop_token_ids(self.tokenizer),
            ),
        ).result()
        answer = parse_completion(list(result.sequences[0].tokens), self.tokenizer)
        self.messages = [*asked, Message("assistant", answer)]
        return answer


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
