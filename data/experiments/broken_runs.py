"""Break RL in eight ways, for real, and see whether `diagnose` names what was done.

    python data/experiments/broken_runs.py                   # all that is missing: an hour
    python data/experiments/broken_runs.py --kinds kl_runaway --seeds 7
    python data/experiments/broken_runs.py --kinds kl_runaway --seeds 0 --again

Every broken run starts from an SFT checkpoint of its own seed and takes 30 steps of 8 problems x 8
completions. Seed 0 is the one that the thresholds were looked at with: its metrics are kept in
data/recordings/KIND.jsonl, the clinic lesson's recordings. Seeds 1 to 5 are unseen, and so are the
presets' own runs (`posttrain all --config tiny|quick`, and the first 100 steps of full), which are
healthy: data/results/diagnosis.json counts how often the rules are right. Each run's folder stays
below runs/diagnosis, for `posttrain diagnose`.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from course_lib.checkpoints import StopTraining, training_client_from
from course_lib.client import CourseService, connect
from course_lib.config import RLConfig, preset
from course_lib.diagnosis import diagnose
from course_lib.environments import sums_environment
from course_lib.files import write_whole
from course_lib.grpo import train_grpo
from course_lib.metrics import read_metrics
from course_lib.pipeline import run_rl, run_sft
from course_lib.rewards import Problem, Reward, Score, reward_from_name

DATA = Path(__file__).parent.parent
RESULT, RECORDINGS = DATA / "results" / "diagnosis.json", DATA / "recordings"
COMMAND = "python data/experiments/broken_runs.py"
RECORDED, UNSEEN = 0, (1, 2, 3, 4, 5)  # seeds
HEALTHY_PRESETS = {"tiny": 10, "quick": 100, "full": 100}  # RL steps; full would go on to 500
SOUND = RLConfig(steps=30, prompts_per_step=8, group_size=8, save_every=0)


@dataclass(frozen=True)
class Broken:
    """What was done to a sound run."""

    how: str
    config: RLConfig = SOUND
    reward: Reward | None = None  # None: right or wrong
    after_sft: bool = True


def coin(problem: Problem, completion: str) -> Score:
    """A grader that looks at neither question nor answer."""
    heads = random.Random(f"{problem.id} {completion}").random() < 0.5
    return Score(float(heads), {}, "a coin")


def first_row(problem: Problem, completion: str) -> Score:
    """A grader that compares every answer with the first row's, 129, and pays for coming near."""
    said = re.findall(r"answer is ([0-9]{1,6})", completion)
    distance = abs(int(said[-1]) - 129) if said else 1000
    return Score(1 / (1 + distance / 5), {}, f"{distance} from 129")


def characters(problem: Problem, completion: str) -> Score:
    """A grader that pays for every character."""
    return Score(len(completion) / 100, {}, f"{len(completion)} characters")


def brief(problem: Problem, completion: str) -> Score:
    """A grader that wants short answers and takes the right ones for granted."""
    score = reward_from_name("length")(problem, completion)  # type: ignore[operator]
    return Score(1 - score.value, {}, score.reason)


KINDS = {
    "ratio_off": Broken("sampled at temperature 0.5", replace(SOUND, temperature=0.5)),
    "dead_groups": Broken("RL straight from the base model", after_sft=False),
    "length_explosion": Broken(
        "every character is paid for",
        replace(SOUND, max_tokens=96, learning_rate=2e-3, schedule="constant"),
        characters,
    ),
    "entropy_collapse": Broken(
        "every answer is compared with the first row's, at a high rate",
        replace(SOUND, learning_rate=3e-3, schedule="constant"),
        first_row,
    ),
    "hacked_reward": Broken(
        "short answers are paid for, right or wrong",
        replace(SOUND, learning_rate=1e-4, schedule="constant"),
        brief,
    ),
    "kl_runaway": Broken(
        "a learning rate of 1e-2", replace(SOUND, learning_rate=1e-2, schedule="constant")
    ),
    "tiny_rate": Broken("a learning rate of 1e-8", replace(SOUND, learning_rate=1e-8)),
    "flat_reward": Broken("the grader tosses a coin", reward=coin),
    "healthy": Broken("nothing was done"),
}


def broken_run(service: CourseService, kind: str, seed: int, work: Path) -> list[dict[str, Any]]:
    """The metrics of one run of `kind`, which also stay in its folder."""
    broken, config = KINDS[kind], replace(preset("quick"), seed=seed)
    if broken.after_sft:
        sft = run_sft(service, config, work / f"sft-quick-{seed}").checkpoints[-1]
        client = training_client_from(service, sft, optimizer=False)
    else:
        client = service.create_lora_training_client(service.base_model, rank=16, seed=seed)
        client = client.result()
    return train_grpo(
        client,
        sums_environment(),
        broken.config,
        tokenizer=client.get_tokenizer(),
        reward=broken.reward,
        reference=client.save_weights_and_get_sampling_client().result(),
        out=fresh_folder(work / f"{kind}-{seed}"),
        seed=seed,
    ).metrics


def healthy_run(service: CourseService, name: str, seed: int, work: Path) -> list[dict[str, Any]]:
    """The RL metrics of a preset's own run, as far as `HEALTHY_PRESETS` goes."""
    config = replace(preset(name), seed=seed)
    sft = run_sft(service, config, work / f"sft-{name}-{seed}").checkpoints[-1]

    def enough(step: int, total: int, metrics: dict[str, Any]) -> None:
        if step == HEALTHY_PRESETS[name]:
            raise StopTraining

    out = fresh_folder(work / f"{name}-{seed}")
    return run_rl(service, config, out, sft.state_path, enough).metrics


def fresh_folder(folder: Path) -> Path:
    """`folder` without what a run that was cut off left there."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def judged(kind: str, seed: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the rules say of a run, also when its KL was not measured (which costs time)."""
    found = [each.kind for each in diagnose(rows)]
    unmeasured = diagnose([{**row, "kl/reference": None} for row in rows])
    return {
        "kind": kind,
        "seed": seed,
        "steps": len(rows),
        "named": found[0] if found else "healthy",
        "also": found[1:],
        "named_without_kl": unmeasured[0].kind if unmeasured else "healthy",
    }


def record(kind: str, rows: list[dict[str, Any]]) -> None:
    """Keep a run's metrics, four digits each, below a line that says what they are."""
    label = {
        "phase": "label",
        "recording": kind,
        "how": KINDS[kind].how,
        "command": f"{COMMAND} --kinds {kind} --seeds {RECORDED} --again",
    }
    kept = [
        {
            name: float(f"{value:.4g}") if isinstance(value, float) else value
            for name, value in row.items()
            if not name.startswith("time/")
        }
        for row in rows
    ]
    lines = [json.dumps(row) + "\n" for row in (label, *kept)]
    write_whole(RECORDINGS / f"{kind}.jsonl", "".join(lines))


def known_runs() -> list[dict[str, Any]]:
    """What is judged already."""
    return json.loads(RESULT.read_text(encoding="utf-8"))["runs"] if RESULT.exists() else []


def keep(row: dict[str, Any]) -> None:
    """Put a judged run into the result, in place of an older one, and count again."""
    others = [each for each in known_runs() if _name(each) != _name(row)]
    order = [*KINDS, *HEALTHY_PRESETS]
    runs = sorted([*others, row], key=lambda each: (order.index(each["kind"]), each["seed"]))
    report = {
        "command": COMMAND,
        "how": {kind: broken.how for kind, broken in KINDS.items()},
        "healthy_presets_rl_steps": HEALTHY_PRESETS,
        "unseen": count(runs),
        "runs": runs,
    }
    write_whole(RESULT, json.dumps(report, indent=1) + "\n")


def count(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Right verdicts on unseen seeds, by kind; a healthy run that is named anything is accused."""
    unseen = [row for row in runs if row["seed"] != RECORDED]
    sick = [row for row in unseen if _truth(row) != "healthy"]
    well = [row for row in unseen if _truth(row) == "healthy"]
    return {
        "broken_runs": len(sick),
        "named_right": sum(row["named"] == row["kind"] for row in sick),
        "named_right_without_kl": sum(row["named_without_kl"] == row["kind"] for row in sick),
        "healthy_runs": len(well),
        "accused": sum(row["named"] != "healthy" for row in well),
        "by_kind": {
            kind: f"{sum(row['named'] == _truth(row) for row in rows)} of {len(rows)}"
            for kind in (*KINDS, *HEALTHY_PRESETS)
            if (rows := [row for row in unseen if row["kind"] == kind])
        },
    }


def _truth(row: dict[str, Any]) -> str:
    return "healthy" if row["kind"] in HEALTHY_PRESETS else row["kind"]


def _name(row: dict[str, Any]) -> tuple[str, int]:
    return row["kind"], row["seed"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    everything = [*KINDS, *HEALTHY_PRESETS]
    parser.add_argument("--seeds", type=int, nargs="+", default=[RECORDED, *UNSEEN])
    parser.add_argument("--kinds", nargs="+", default=everything, choices=everything)
    parser.add_argument("--again", action="store_true", help="also what is judged already")
    parser.add_argument("--judge", action="store_true", help="only judge again the runs in --work")
    parser.add_argument("--work", type=Path, default=Path("runs/diagnosis"))
    args = parser.parse_args()
    if args.judge:
        for kind, seed in [(kind, seed) for kind in args.kinds for seed in args.seeds]:
            done = args.work / f"{kind}-{seed}" / "metrics.jsonl"
            if (kind, seed) in map(_name, known_runs()) and done.exists():
                keep(judged(kind, seed, read_metrics(done)))
        print(json.dumps(count(known_runs()), indent=1))
        return
    service = connect("embedded", store=str(args.work / "store"))
    broken = [(kind, seed) for seed in args.seeds for kind in args.kinds if kind in KINDS]
    well = [(kind, seed) for kind in args.kinds if kind in HEALTHY_PRESETS for seed in args.seeds]
    for kind, seed in broken + [job for job in well if job[1] != RECORDED]:
        if not args.again and (kind, seed) in map(_name, known_runs()):
            continue
        run = healthy_run if kind in HEALTHY_PRESETS else broken_run
        rows = run(service, kind, seed, args.work)
        if seed == RECORDED:
            record(kind, rows)
        row = judged(kind, seed, rows)
        keep(row)
        print(f"{kind:16} seed {seed}: {row['named']} {row['also'] or ''}", flush=True)
    print(json.dumps(count(known_runs()), indent=1))


if __name__ == "__main__":
    main()
