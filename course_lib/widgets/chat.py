"""Ask several models the same question, side by side."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from course_lib.conversations import Message
from course_lib.plots.chat import chat_figure
from course_lib.rendering import parse_completion, render_prompt, stop_token_ids
from course_lib.widgets.display import show_live

if TYPE_CHECKING:
    import tinker
    from matplotlib.figure import Figure

MAX_TOKENS = 64


class Chat:
    """`models`: a name for each sampling client, e.g. base, SFT and GRPO."""

    def __init__(
        self, models: Mapping[str, tinker.SamplingClient], tokenizer: Any, question: str
    ) -> None:
        import ipywidgets

        self.models, self.tokenizer = dict(models), tokenizer
        self.question = ipywidgets.Text(value=question, layout={"width": "420px"})
        self.question.description = "question"
        self.question.continuous_update = False  # changes when Enter is pressed, or the box left
        self.question.observe(self._ask, "value")
        self.greedy = ipywidgets.Checkbox(value=True, description="always the likeliest token")
        self.send = ipywidgets.Button(description="Ask", tooltip="ask all models")
        self.send.on_click(self._ask)
        self.answers: dict[str, str] = {}
        self.table = ipywidgets.HTML()
        row = ipywidgets.HBox([self.question, self.send, self.greedy])
        self.box = ipywidgets.VBox([row, self.table])
        self._ask()

    def figure(self) -> Figure:
        """The question and the answers as a picture."""
        return chat_figure(self.question.value, self.answers)

    def show(self) -> None:
        """Display it; in places without widgets the first question's answers are shown."""
        show_live(self.box, self.figure())

    def _ask(self, _: Any = None) -> None:
        if not self.question.value.strip():
            self.table.value = "Write a question first."
            return
        messages = (Message("user", self.question.value),)
        self.answers = ask(self.models, self.tokenizer, messages, self.greedy.value)
        rows = "".join(
            f'<tr><th style="text-align:left;padding-right:1em">{html.escape(name)}</th>'
            f'<td style="text-align:left">{html.escape(text)}</td></tr>'
            for name, text in self.answers.items()
        )
        asked = f"<caption>{html.escape(self.question.value)}</caption>"
        self.table.value = f'<table style="text-align:left">{asked}{rows}</table>'


def ask(
    models: Mapping[str, tinker.SamplingClient],
    tokenizer: Any,
    messages: tuple[Message, ...],
    greedy: bool = True,
) -> dict[str, str]:
    """One answer from each model; all are asked before the first is awaited."""
    import tinker

    prompt = tinker.ModelInput.from_ints(render_prompt(messages, tokenizer))
    settings = tinker.SamplingParams(
        max_tokens=MAX_TOKENS, temperature=0.0 if greedy else 1.0, stop=stop_token_ids(tokenizer)
    )
    futures = {
        name: client.sample(prompt=prompt, num_samples=1, sampling_params=settings)
        for name, client in models.items()
    }
    return {
        name: parse_completion(future.result().sequences[0].tokens, tokenizer)
        for name, future in futures.items()
    }
