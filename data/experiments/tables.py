"""What the experiments measured, as tables and figures: data/results/README.md and its pictures.

    python data/experiments/tables.py         # reads data/results/*.json; runs nothing

Also writes the table of discovery into the base model's card, and that of `posttrain all --config
quick` into the project's README: quick.json is the report.json that the command leaves, copied. The
tests fail when a table is not what this script makes of the stored results.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from course_lib.cli.tables import percent as whole_percent
from course_lib.plots.run import accuracy_figure, describe_accuracy
from course_lib.plots.seeds import seeds_figure
from course_lib.plots.style import save_figure
from course_lib.plots.words import description

DATA = Path(__file__).resolve().parent.parent
RESULTS = DATA / "results"
CARD = DATA / "base-model" / "README.md"
CARD_BLOCK = re.compile(r"(<!-- discovery -->\n).*?(<!-- end -->)", re.DOTALL)
FRONT = DATA.parent / "README.md"
FRONT_BLOCK = re.compile(r"(<!-- quick -->\n).*?(<!-- end -->)", re.DOTALL)
Arms = dict[str, list[float]]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(value: float) -> str:
    return f"{value:.1%}".replace("%", " %")


def by_seed(arms: Arms, shown: Callable[[float], str] = percent) -> str:
    """One line per arm, one column per seed, then mean and median."""
    count = len(next(iter(arms.values())))
    head = ["", *(f"seed {number}" for number in range(count)), "mean", "median"]
    rows = [
        [
            name,
            *map(shown, values),
            shown(statistics.fmean(values)),
            shown(statistics.median(values)),
        ]
        for name, values in arms.items()
    ]
    return markdown(head, rows)


def discovery(found: dict[str, Any]) -> tuple[str, Arms]:
    """Sampled and greedy accuracy and the share of worked answers, stage by stage."""
    names = {"base": "base, chat format", "sft": "SFT", "rl": "SFT, then GRPO"}
    arms = {
        f"{name}, {words}": [row[stage][key] for row in found["seeds"]]
        for stage, name in names.items()
        for key, words in (
            ("accuracy", "sampled"),
            ("greedy_accuracy", "greedy"),
            ("worked_share", "worked answers"),
        )
    }
    arms["GRPO without SFT, sampled"] = [row["without_sft"]["accuracy"] for row in found["seeds"]]
    text = (
        f'Preset {found["preset"]}, {found["problems"]} held-out sums of three numbers; "sampled" '
        "is at temperature 1. The reward pays for right answers only."
    )
    return f"{text}\n\n{by_seed(arms)}", arms


def preferences(found: dict[str, Any]) -> tuple[str, Arms]:
    """Reward model, and what GRPO and DPO made of the same preferences."""
    seeds = found["seeds"]
    arms = {
        f"reward model by {name}: held-out pairs right": [
            s["reward_models"][name]["accuracy"] for s in seeds
        ]
        for name in ("verdict", "reply")
    }
    arms_of = {"grpo": "tournament GRPO", "dpo": "DPO", "dpo_nll": "DPO with dpo_nll 0.2"}
    for name, words in arms_of.items():
        arms[f"{words}: win rate against SFT"] = [s[name]["win_rate_by_rule"] for s in seeds]
        arms[f"{words}: quality"] = [s[name]["quality"] for s in seeds]
    arms["SFT: quality"] = [s["sft"]["quality"] for s in seeds]
    text = (
        f"Village questions, {found['problems']} of them held out. The tournament's judge is the "
        "reward model by reply; win rate and quality come from a rule that nothing was trained on "
        "(`village_quality`; a draw counts half)."
    )
    return f"{text}\n\n{by_seed(arms)}", arms


def hacking(found: dict[str, Any]) -> tuple[str, Arms]:
    """Reward and true quality of both arms, first and last step."""
    arms = {}
    for arm, words in (("proxy", f"proxy `{found['proxy']}`"), ("repaired", "repaired reward")):
        runs = [row[arm] for row in found["seeds"]]
        arms[f"{words}: reward, last step"] = [run["reward"][-1] for run in runs]
        arms[f"{words}: true quality, last step"] = [run["quality"][-1] for run in runs]
    arms["true quality, first step"] = [row["proxy"]["quality"][0] for row in found["seeds"]]
    steps = len(found["seeds"][0]["proxy"]["reward"])
    text = (
        f"{steps} GRPO steps on village questions, both arms from one SFT model. True quality is "
        "a rule that neither reward is made of."
    )
    return f"{text}\n\n{by_seed(arms, '{:.2f}'.format)}", arms


def staleness(found: dict[str, Any]) -> tuple[str, Arms]:
    """Accuracy by loss and delay; then what the ratios looked like."""
    runs = [row["runs"] for row in found["seeds"]]
    names = [
        f"{each['loss_fn']}, {each['delay']} late" if each["delay"] else "on time"
        for each in runs[0]
    ]
    arms = {name: [run[at]["accuracy"] for run in runs] for at, name in enumerate(names)}
    watched = {
        "ratio/ess": "effective sample size",
        "ratio/clipped_up": "above the clip range, A > 0",
        "ratio/clipped_down": "below it, A < 0",
    }
    rows = [
        [name, *(percent(statistics.fmean(run[at][key] for run in runs)) for key in watched)]
        for at, name in enumerate(names)
    ]
    text = (
        f"{found['steps']} steps; every step trains on the batch sampled that many steps before. "
        f"Accuracy on {found['problems']} held-out sums at temperature 1."
    )
    shares = markdown(["mean over the second half", *watched.values()], rows)
    return f"{text}\n\n{by_seed(arms)}\n\n{shares}", arms


def forgetting(found: dict[str, Any]) -> tuple[str, Arms]:
    """What each run made of the skill that it was trained for, and of the other one."""
    runs = [row["runs"] for row in found["seeds"]]
    arms = {
        f"{name}: {words}": [run[name][world] for run in runs]
        for world, words in (("village", "village"), ("sums", "sums"))
        for name in runs[0]
    }
    lost = {
        name: sum(
            run[name]["village"] < run["SFT"]["village"] and "hardly luck" in run[name]["verdict"]
            for run in runs
        )
        for name in runs[0]
        if name != "SFT"
    }
    text = (
        f"{found['steps']} GRPO steps on sums. {found['questions']} questions about the village, "
        f"which no reward asks for, and {found['problems']} held-out sums, {found['samples']} "
        "answers to each. Seeds of five in which the loss in the village is hardly luck: "
        + "; ".join(f"{name} {count}" for name, count in lost.items())
        + "."
    )
    return f"{text}\n\n{by_seed(arms)}", arms


def optimizers(found: dict[str, Any]) -> tuple[str, Arms]:
    """How much of a full fine-tune's change a few ranks hold, by optimizer."""
    seeds, arms = found["seeds"], {}
    for name in seeds[0]["runs"]:
        for rank in (2, 16):
            at = seeds[0]["cuts"].index(rank)
            for key, words in (("energy", "energy"), ("gained", "improvement")):
                arms[f"{name}, rank {rank}: {words}"] = [
                    row["runs"][name][key][at] for row in seeds
                ]
    rows = [
        [name, *(f"{row['runs'][name]['loss']:.2f}" for row in seeds)] for name in seeds[0]["runs"]
    ]
    head = ["held-out loss, nats per token", *(f"seed {row['seed']}" for row in seeds)]
    text = (
        "Lesson 02's full fine-tune, the rows in five orders. Energy: the share of the change's "
        "squares that the largest singular values of each matrix hold; improvement: the share of "
        f"the held-out loss's fall (from {seeds[0]['base']:.2f} nats) that is left when the rest "
        "is cut off."
    )
    return f"{text}\n\n{by_seed(arms)}\n\n{markdown(head, rows)}", arms


def schedules(found: dict[str, Any]) -> tuple[str, Arms]:
    """The held-out loss after each schedule."""
    runs = [row["runs"] for row in found["seeds"]]
    arms = {name: [run[name] for run in runs] for name in runs[0]}
    text = (
        "Lesson 03's 30 steps with a high peak, the rows in five orders; held-out loss in nats per "
        "token."
    )
    return f"{text}\n\n{by_seed(arms, '{:.2f}'.format)}", arms


def quick(report: dict[str, Any]) -> str:
    """The before-and-after table of one run, as README shows it. Its times are left out: they say
    what else the machine did.
    """
    names = {"base": "base, in chat format", "sft": "SFT", "rl": "GRPO"}
    rows = []
    for stage, name in names.items():
        found = report[stage]
        low, high = (f"{100 * end:.0f}" for end in found["interval"])
        shares = (found["greedy"]["accuracy"], found["worked_share"])
        interval = f"{whole_percent(found['accuracy'])} ({low}-{high})"
        rows.append([name, interval, *map(whole_percent, shares)])
    first = f"seed {report['seed']}, {report['base']['problems']} held-out sums"
    return markdown([first, "accuracy (95 % interval)", "greedy", "worked answers"], rows) + "\n"


def lesson_claims(found: dict[str, Any]) -> str:
    """How many of each lesson's printed claims hold for other seeds, and which do not always."""
    rows = []
    for lesson, counted in sorted(found.items()):
        held, seeds = counted["held"], len(counted["seeds"])
        short = [f"{claim}: {count}" for claim, count in held.items() if count < seeds]
        always = f"{len(held) - len(short)} of {len(held)}"
        rows.append([lesson, counted["preset"], always, "; ".join(short) or "none"])
    text = (
        "`python data/experiments/lesson_claims.py 00 01 02 03 04 05 06 07 08 09 10 --preset quick`"
        " → `lesson_claims.json`\n\nA claim is a line that a lesson prints with a yes or a no. "
        "Each lesson was run with five further seeds in all cells; a claim holds if its verdict is "
        "the stored notebook's."
    )
    head = ["lesson", "preset", "claims that held for all five", "the others, seeds of five"]
    return f"## The lessons' claims\n\n{text}\n\n{markdown(head, rows)}\n"


def diagnosis(found: dict[str, Any]) -> str:
    """Which broken runs the rules name, and whether they accuse a healthy one."""
    unseen = found["unseen"]
    done = {**found["how"]} | {
        name: f"`posttrain all --config {name}`, its first {steps} RL steps"
        for name, steps in found["healthy_presets_rl_steps"].items()
    }
    rows = [[f"`{kind}`", done[kind], right] for kind, right in unseen["by_kind"].items()]
    text = (
        f"`{found['command']}` → `diagnosis.json`\n\nFive unseen seeds each. Of "
        f"{unseen['broken_runs']} broken runs {unseen['named_right']} are named right; of "
        f"{unseen['healthy_runs']} healthy ones {unseen['accused']} are accused of anything."
    )
    table = markdown(["kind", "what was done", "judged right"], rows)
    return f"## Diagnosis of broken runs\n\n{text}\n\n{table}\n"


LISTS = {"diagnosis": diagnosis, "lesson_claims": lesson_claims}
SECTIONS = {
    "discovery": ("Worked answers are discovered", "share", discovery),
    "preferences": ("Preferences: reward model, tournament, DPO", "share or quality", preferences),
    "hacking": ("A reward that is hacked, and its repair", "reward or quality", hacking),
    "staleness": ("Rollouts trained late", "held-out accuracy", staleness),
    "forgetting": ("What GRPO on sums costs elsewhere", "share of true answers", forgetting),
    "optimizers": ("The width of a full fine-tune's change", "share", optimizers),
    "schedules": ("Three schedules of the learning rate", "held-out loss (nats)", schedules),
}


def make(folder: Path) -> tuple[str, str]:
    """Write the figures into `folder`; return the README's text and the card's table."""
    parts = [
        "# Results\n",
        "Made by `python data/experiments/tables.py` from the JSON files beside it; each names the "
        "command that measured it. Five seeds each, on two CPU cores. `quick.json` is one run's "
        "report, which the project's README shows.\n",
    ]
    card = ""
    for name, (title, unit, table) in SECTIONS.items():
        file = RESULTS / f"{name}.json"
        if not file.exists():
            continue
        found = json.loads(file.read_text(encoding="utf-8"))
        text, arms = table(found)
        figure = seeds_figure(arms, title, unit)
        save_figure(figure, folder / f"{name}.png", description(figure))
        seconds = [row["seconds"] for row in found["seeds"] if "seconds" in row]
        time = f", {min(seconds):.0f} to {max(seconds):.0f} s a seed" if seconds else ""
        source = f"`{found['command']}`{time} → `{name}.json`"
        picture = f"![{description(figure)}]({name}.png)"
        parts.append(f"## {title}\n\n{source}\n\n{text}\n\n{picture}\n")
        if name == "discovery":
            card = f"{text}\n\n(`{found['command']}`)\n"
    for name, listed in LISTS.items():
        parts.append(listed(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))))
    return "\n".join(parts), card


def main() -> None:
    text, card = make(RESULTS)
    (RESULTS / "README.md").write_text(text, encoding="utf-8")
    old = CARD.read_text(encoding="utf-8")
    CARD.write_text(CARD_BLOCK.sub(lambda m: m[1] + card + m[2], old), encoding="utf-8")
    report = json.loads((RESULTS / "quick.json").read_text(encoding="utf-8"))
    save_figure(accuracy_figure(report), RESULTS / "quick.png", describe_accuracy(report))
    old = FRONT.read_text(encoding="utf-8")
    new = FRONT_BLOCK.sub(lambda m: m[1] + quick(report) + m[2], old)
    FRONT.write_text(new, encoding="utf-8")
    print(f"{RESULTS / 'README.md'}, the card in {CARD} and the table in {FRONT} are up to date")


if __name__ == "__main__":
    main()
