"""What is wrong with this RL run, in a sentence? Rules over its metrics, the most telling first.

    for found in diagnose(read_metrics("runs/…/metrics.jsonl")):
        print(found)

Each rule looks at one way in which RL fails and says what to do. A run that is too short to tell
(`ENOUGH` steps) or that reaches its goal is not accused. The thresholds were set on recorded runs
of the shipped model; another model may need others. `data/results/diagnosis.json` holds how often
the rules are right on runs that they had not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from course_lib.rl_metrics import mean

ENOUGH = 20  # RL steps before a slow change can be told from noise
SOLVED = 0.8  # a run that ends with this share of right answers is well

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Diagnosis:
    """A kind of failure, what the metrics show, and what to try."""

    kind: str
    finding: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.finding}; {self.remedy}"


def diagnose(rows: Rows) -> list[Diagnosis]:
    """Everything that the rules find wrong with the RL part of a run; the first is the likeliest
    cause.

    A cause comes before what it brings about: a rate that is too high ends in dead groups, too.
    """
    rl = rl_steps(rows)
    return [found for rule in RULES if rl and (found := rule(_Run(rl)))]


def rl_steps(rows: Rows) -> Rows:
    """The rows that an RL step measured; only they are judged."""
    return [
        row
        for row in rows
        if row.get("phase", "rl") == "rl" and _is_number(row.get("reward/total"))
    ]


def _is_number(value: Any) -> bool:
    """Whether a metric can be reckoned with: a log that others wrote may hold anything."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) < 2**63


class _Run:
    """The beginning and the end of each metric: means over a fifth of the steps, at least five."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.steps = len(rows)
        self.window = max(min(5, self.steps), self.steps // 5)

    def values(self, name: str) -> list[float]:
        return [row[name] for row in self.rows if _is_number(row.get(name))]

    def early(self, name: str) -> float | None:
        values = self.values(name)[: self.window]
        return mean(values) if values else None

    def late(self, name: str) -> float | None:
        values = self.values(name)[-self.window :]
        return mean(values) if values else None

    def best(self, name: str) -> float | None:
        """The best mean of a window anywhere in the run."""
        values, width = self.values(name), self.window
        windows = [mean(values[i : i + width]) for i in range(max(1, len(values) - width + 1))]
        return max(windows) if values else None

    def rise(self, name: str) -> float:
        return (self.late(name) or 0.0) - (self.early(name) or 0.0)

    def noise(self, name: str) -> float:
        """The standard error of `rise`, from how much neighbouring steps differ."""
        values = self.values(name)
        jumps = [(b - a) * (b - a) / 2 for a, b in pairwise(values)]
        return (2 * mean(jumps) / self.window) ** 0.5 if jumps else 0.0

    def fall(self, name: str) -> tuple[float, float]:
        """How far it fell from step 1, which the untouched policy sampled, to the end; its error.

        A policy can be spoilt within a few steps, before a window is full.
        """
        values = self.values(name)
        if not values:
            return 0.0, 0.0
        one_step = self.noise(name) * (self.window / 2) ** 0.5
        return values[0] - (self.late(name) or 0.0), one_step * (1 + 1 / self.window) ** 0.5

    @property
    def dead_share(self) -> list[float]:
        counts = [(row.get("env/dead_groups"), row.get("env/groups")) for row in self.rows]
        return [dead / n for dead, n in counts if _is_number(dead) and _is_number(n) and n]

    @property
    def solved(self) -> bool:
        return (self.late("env/correct") or 0.0) >= SOLVED

    @property
    def reward_rises(self) -> bool:
        return self.rise("reward/total") > 2 * self.noise("reward/total")

    @property
    def flat(self) -> bool:
        """No trend in the reward, though most groups differ within and the goal is not reached."""
        zero_sum = bool(self.values("reward/tournament"))  # its mean is one half by construction
        if self.steps < ENOUGH or self.solved or zero_sum or mean(self.dead_share) > 0.9:
            return False
        return abs(self.rise("reward/total")) < 2 * self.noise("reward/total")

    @property
    def still(self) -> bool:
        """Whether the policy has not moved: by its KL where that was measured, else by its rate."""
        kl = self.late("kl/reference")
        return kl < 0.01 if kl is not None else (self.early("optim/lr") or 0.0) < 2e-5


def ratio_off(run: _Run) -> Diagnosis | None:
    """Before the first update of a batch the importance ratio is 1, whatever the algorithm."""
    values = sorted(run.values("ratio/max_deviation"))
    if not values or (middle := values[len(values) // 2]) < 0.02:
        return None
    finding = f"before any update the importance ratio is off by up to {middle:.2g}, it should be 1"
    remedy = (
        "sample at temperature 1, and from a sampling client made after the last optimizer step"
    )
    return Diagnosis("ratio_off", finding, remedy)


def dead_groups(run: _Run) -> Diagnosis | None:
    """A group whose completions all earn the same teaches nothing.

    Where the first groups were alive, it is ruin that killed the others: another rule's case.
    """
    share = mean(run.dead_share[: run.window])
    if share < 0.9 or run.dead_share[0] < 0.5 or (run.early("env/correct") or 0.0) >= SOLVED:
        return None
    finding = f"from the start {share:.0%} of the groups are dead: all their rewards are equal"
    remedy = "start from an SFT checkpoint, ask easier problems, or enlarge group_size"
    return Diagnosis("dead_groups", finding, remedy)


def length_explosion(run: _Run) -> Diagnosis | None:
    """Completions grow until `max_tokens` cuts them, and earn by it."""
    before, after = run.early("env/completion_tokens"), run.late("env/completion_tokens")
    stops = run.late("env/stop_share")
    if before is None or after is None or stops is None or not run.reward_rises:
        return None
    if after < 1.5 * before or stops > 0.7:
        return None
    finding = f"completions grow from {before:.0f} to {after:.0f} tokens, {stops:.0%} still stop"
    remedy = "let length earn nothing, or charge for it; look at what the reward adds up"
    return Diagnosis("length_explosion", finding, remedy)


def entropy_collapse(run: _Run) -> Diagnosis | None:
    """The policy always says the same, and it is not the right thing."""
    before, after = run.early("optim/entropy"), run.late("optim/entropy")
    if before is None or after is None or run.steps < ENOUGH:
        return None
    if after > 0.02 or after > 0.2 * before or (run.late("env/correct") or 0.0) > 0.5:
        return None
    finding = f"entropy falls from {before:.2f} to {after:.3f} nats a token without right answers"
    remedy = "lower the learning rate, add kl_penalty, and see which single reply is paid for"
    return Diagnosis("entropy_collapse", finding, remedy)


def hacked_reward(run: _Run) -> Diagnosis | None:
    """The reward rises and what it stands for falls."""
    falls, error = run.fall("env/correct")
    if run.steps < ENOUGH or not run.reward_rises or falls < max(0.05, 2 * error):
        return None
    rises, points = run.rise("reward/total"), 100 * falls
    finding = f"the reward rises by {rises:.2f} while right answers fall by {points:.0f} points"
    remedy = "read completions, and pay for what you want instead of a sign of it"
    return Diagnosis("hacked_reward", finding, remedy)


def kl_runaway(run: _Run) -> Diagnosis | None:
    """The policy leaves the region where it could speak, and the reward goes with it."""
    best, late = run.best("reward/total"), run.late("reward/total")
    if best is None or late is None or run.solved or run.reward_rises:
        return None
    kl = run.late("kl/reference")
    lost = best - late > max(0.5 * abs(best), 2 * run.noise("reward/total"))
    if kl is not None and not lost:  # it may be gone within two steps, before a window is full
        best = run.values("reward/total")[0]
        fall, error = run.fall("reward/total")
        lost = fall > max(0.5 * abs(best), 2 * error)
    if not lost or (kl is not None and kl < 8):
        return None
    where = "" if kl is None else f", {kl:.0f} nats per completion from where it started"
    finding = f"the reward fell from {best:.2f} to {late:.2f}{where}"
    remedy = "lower the learning rate or the sub-steps, clip (loss_fn ppo), or set kl_penalty"
    return Diagnosis("kl_runaway", finding, remedy)


def tiny_rate(run: _Run) -> Diagnosis | None:
    """Nothing moves, because the steps are too small."""
    if not run.flat or not run.still:
        return None
    rate = run.early("optim/lr") or 0.0
    finding = f"after {run.steps} steps at a learning rate of {rate:.1e} nothing has moved"
    remedy = "raise it: LoRA wants about ten times what full fine-tuning does, 1e-4 to 1e-3 here"
    return Diagnosis("tiny_rate", finding, remedy)


def flat_reward(run: _Run) -> Diagnosis | None:
    """The policy moves and the reward does not care."""
    if not run.flat or run.still:
        return None
    finding = (
        f"the reward is {run.early('reward/total'):.2f} at the start and after {run.steps} steps"
    )
    remedy = "grade a right and a wrong completion by hand: does the reward tell them apart?"
    return Diagnosis("flat_reward", finding, remedy)


# Causes before consequences: exploding length hacks a reward, a runaway ends in dead groups.
RULES: tuple[Callable[[_Run], Diagnosis | None], ...] = (
    ratio_off,
    dead_groups,
    length_explosion,
    entropy_collapse,
    hacked_reward,
    kl_runaway,
    tiny_rate,
    flat_reward,
)
