"""The model card: what the model is, how it was made, what was measured, and what it cannot do.

The front matter is written by huggingface_hub, so that the Hub can read it; the text below says
only what the run's own report and the deploy's own proof say.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from course_lib.export.base import SHIPPED, BaseFolder
from course_lib.export.verify import Verification
from course_lib.files import write_whole

STAGES = {"base": "base model", "sft": "after SFT", "rl": "after GRPO"}


@dataclass(frozen=True)
class CardFacts:
    """Everything a card tells that the model folder does not know."""

    name: str
    checkpoint: str
    base_model: str  # the SDK's name, or the hub's
    rank: int
    alpha: float
    modules: list[str]
    verification: Verification
    report: dict[str, Any] | None = None  # the run's report.json, if the run is on this machine
    config: dict[str, Any] | None = None  # the run's config.json


def write_model_card(path: Path, base: BaseFolder, facts: CardFacts) -> str:
    """Write README.md to `path` and return its text."""
    from huggingface_hub import ModelCard

    licence = base_licence(base)
    text = f"---\n{_metadata(facts, licence)}\n---\n\n{_body(facts, licence)}"
    ModelCard(text)  # parses the front matter again: a card that the Hub cannot read fails here
    write_whole(path, text)
    return text


def base_licence(base: BaseFolder) -> str:
    """The licence that the base's own card states; `other` where there is none to read."""
    from huggingface_hub import ModelCard

    readme = base.path / "README.md"
    if not readme.exists():
        return "other"
    return str(ModelCard(readme.read_text(encoding="utf-8")).data.get("license") or "other")


def _metadata(facts: CardFacts, licence: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="generated",
            dataset_name="held-out problems",
            metric_type="accuracy",
            metric_name="held-out accuracy",
            metric_value=round(100 * accuracy, 1),
        )
        for accuracy in [_last_accuracy(facts.report)]
        if accuracy is not None
    ]
    # Only a model that is on the Hub may be named there as the base.
    on_hub = facts.base_model.count("/") == 1 and facts.base_model != SHIPPED
    data = ModelCardData(
        model_name=facts.name if results else None,
        base_model=facts.base_model if on_hub else None,
        license=licence,
        language="en",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["tinker", "lora", "merged", "post-training"],
        eval_results=results or None,
    )
    if on_hub:
        data["base_model_relation"] = "finetune"
    return data.to_yaml()


def _last_accuracy(report: dict[str, Any] | None) -> float | None:
    stages = [report[key] for key in ("rl", "sft") if report and report.get(key)]
    return next((stage["accuracy"] for stage in stages if stage.get("accuracy") is not None), None)


def _body(facts: CardFacts, licence: str) -> str:
    proof = facts.verification
    parts = [
        f"# {facts.name}",
        f"`{facts.base_model}` after post-training with the Tinker SDK: a LoRA adapter "
        f"(rank {facts.rank}, alpha {facts.alpha:g}) merged into the base's weights.",
        "## Made from",
        f"- Checkpoint: `{facts.checkpoint}`\n- Base model: `{facts.base_model}`\n"
        f"- Adapted matrices: {', '.join(facts.modules)}\n- Licence: {licence} (the base model's)",
        "## Training",
        _training(facts),
        "## Measured results",
        _results(facts.report),
        "## Proof of the merge",
        f"{proof.tensors} tensors compared with base + adapter as peft computes it. Logits differ "
        f"from the adapter's by at most {proof.error:.1e} (allowed {proof.tolerance:.1e}) and from "
        f"the base's by up to {proof.effect:.1e}. {_service_line(proof)}",
        "## Limits",
        "It was measured on the problems above and on nothing else. It was not tested for safety, "
        "bias or facts, and it inherits every limit of its base model. Do not rely on its answers "
        "without checking them.",
        "## Use",
        "```python\nfrom transformers import pipeline\n\n"
        f'chat = pipeline("text-generation", "{facts.name}")\n'
        'print(chat([{"role": "user", "content": "What is 23 + 45 + 61?"}]))\n```',
    ]
    return "\n\n".join(parts) + "\n"


def _training(facts: CardFacts) -> str:
    if not facts.config:
        return "The run's configuration is not on the machine that deployed it."
    lines = [f"Preset `{facts.config.get('preset')}`, seed {facts.config.get('seed')}."]
    for section, title in (("sft", "Supervised fine-tuning"), ("rl", "GRPO")):
        values = facts.config.get(section) or {}
        shown = {key: value for key, value in values.items() if _public(value)}
        lines.append(f"{title}: " + ", ".join(f"{k} {v}" for k, v in shown.items()))
    return "\n\n".join(lines)


def _public(value: Any) -> bool:
    """Leave out empty fields, and paths of the machine that trained it."""
    if isinstance(value, str):
        return bool(value) and not Path(value).is_absolute()
    return value not in (None, {}, [])


def _results(report: dict[str, Any] | None) -> str:
    rows = []
    for key, title in STAGES.items():
        stage = (report or {}).get(key)
        if stage and stage.get("accuracy") is not None:
            low, high = stage["interval"]
            worked = stage.get("worked_share")
            rows.append(
                f"| {title} | {stage['accuracy']:.1%} | {low:.1%} to {high:.1%} | "
                f"{'' if worked is None else f'{worked:.1%}'} |"
            )
    if not rows:
        return "None were recorded with this checkpoint."
    head = "| model | held-out accuracy | 95 % interval | answers with working |\n|---|---|---|---|"
    return "\n".join([head, *rows])


def _service_line(proof: Verification) -> str:
    if proof.service_error_nats is None:
        return "The training service was not asked."
    return (
        f"Its logprobs differ from the training service's by {proof.service_error_nats:.1e} nats "
        "a token on average."
    )


def run_of_checkpoint(checkpoint: str, runs: Path) -> tuple[dict | None, dict | None]:
    """(report.json, config.json) of the run below `runs` that saved `checkpoint`, else (None,
    None).
    """
    for path in sorted(runs.glob("*/report.json"), reverse=True):
        text = path.read_text(encoding="utf-8")
        if json.dumps(checkpoint) in text:
            config = path.with_name("config.json")
            return json.loads(text), json.loads(config.read_text()) if config.exists() else None
    return None, None
