"""How good is the model after each stage? Base, SFT and RL on the same held-out problems, once per
run.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.checkpoints import Checkpoint, StepHook, training_client_from
from course_lib.config import RunConfig
from course_lib.environments import derive_seed
from course_lib.evaluation import Evaluation, evaluate, nll, record_dicts
from course_lib.files import write_whole
from course_lib.judges import Judge, win_rate
from course_lib.metrics import read_metrics
from course_lib.rewards import Problem
from course_lib.run_data import RunData
from course_lib.run_judge import needs_judge, run_reward
from course_lib.sft import sft_datums

if TYPE_CHECKING:
    import tinker

    from course_lib.client import CourseService

STAGES = ("base", "sft", "rl")
EVALUATIONS = 2 * len(STAGES)  # of a whole run: each stage at temperature 1 and greedily
SHOWN_SAMPLES = 10  # problems in samples.jsonl


@dataclass(frozen=True)
class StageJudge:
    """Evaluates a stage on the same held-out problems as every other one, once per run."""

    service: CourseService
    config: RunConfig
    out: Path
    data: RunData
    on_step: StepHook | None

    def stage(self, name: str, model: tinker.TrainingClient | Checkpoint) -> dict[str, Any]:
        """The stage's numbers, read from the run's folder if an earlier process measured them."""
        file = self.out / "evaluations" / f"{name}.json"
        if file.exists():
            return json.loads(file.read_text(encoding="utf-8"))["summary"]
        began = time.monotonic()
        if isinstance(model, Checkpoint):
            model = training_client_from(self.service, model, optimizer=False)
        sampled, greedy = self._evaluate(name, model, 1.0), self._evaluate(name, model, 0.0)
        summary = {**sampled.summary(), "greedy": greedy.summary(), "heldout_nll": None}
        if self.data.heldout:
            datums = sft_datums(self.data.heldout, self.config.sft, model.get_tokenizer())
            summary["heldout_nll"] = nll(model, datums)
        summary["training_s"] = _training_seconds(self.out, name)
        summary["evaluation_s"] = time.monotonic() - began
        summary["seconds"] = summary["training_s"] + summary["evaluation_s"]
        records = {"sampled": record_dicts(sampled), "greedy": record_dicts(greedy)}
        write_whole(file, json.dumps({"summary": summary, **records}) + "\n")
        return summary

    def win_rate(self, name: str, other: str, judge: Judge) -> float:
        """How often stage `name` beats stage `other` on the held-out problems, at temperature 1.

        Read from the run's folder, too, if an earlier process let the judge decide.
        """
        file = self.out / "evaluations" / f"{name}-{other}.txt"
        if file.exists():
            return float(file.read_text(encoding="utf-8"))
        texts, others = (
            [record["completions"][0] for record in _sampled(self.out, each)]
            for each in (name, other)
        )
        rate = win_rate(judge, self._problems(), texts, others)
        write_whole(file, repr(rate))
        return rate

    def _problems(self) -> list[Problem]:
        return self.data.environment.heldout(self.config.eval_problems, 0)  # whatever the seed

    def _evaluate(self, name: str, model: tinker.TrainingClient, temperature: float) -> Evaluation:
        environment, rl = self.data.environment, self.config.rl
        judged = needs_judge(self.config, self.data)  # a judge compares; it has no mean to report
        if self.on_step:
            step = 2 * STAGES.index(name) + (1 if temperature else 2)
            self.on_step(step, EVALUATIONS, {"phase": "eval", "stage": name})
        return evaluate(
            model.save_weights_and_get_sampling_client().result(),
            model.get_tokenizer(),
            environment,
            self._problems(),
            temperature=temperature,
            max_tokens=rl.max_tokens,
            seed=derive_seed(self.config.seed, "evaluation"),
            reward=None if judged else run_reward(self.config, self.data, None),
        )


def write_samples(out: Path, stages: list[str]) -> None:
    """The first problems with what each stage answered, one JSON object a line."""
    lines = []
    by_stage = {stage: _sampled(out, stage) for stage in stages}
    for index, record in enumerate(by_stage[stages[0]][:SHOWN_SAMPLES]):
        answers = {stage: by_stage[stage][index]["completions"][0] for stage in stages}
        row = {"prompt": record["prompt"], "answer": record["answer"], **answers}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_whole(out / "samples.jsonl", "".join(lines))


def seconds_so_far(out: Path) -> float:
    """What earlier processes of this run spent on training and evaluation."""
    summaries = [
        json.loads(file.read_text(encoding="utf-8"))["summary"]
        for file in out.glob("evaluations/*.json")
    ]
    spent = sum(summary["evaluation_s"] for summary in summaries)
    return spent + sum(_training_seconds(out, phase) for phase in ("sft", "preference", "rl"))


def _training_seconds(out: Path, phase: str) -> float:
    if not (out / "metrics.jsonl").exists():
        return 0.0
    rows = read_metrics(out / "metrics.jsonl")
    return sum(row.get("time/total", 0.0) for row in rows if row.get("phase") == phase)


def _sampled(out: Path, stage: str) -> list[dict[str, Any]]:
    file = out / "evaluations" / f"{stage}.json"
    return json.loads(file.read_text(encoding="utf-8"))["sampled"]
