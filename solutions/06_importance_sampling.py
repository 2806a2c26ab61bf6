# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown] id="title"
# # 06 · Importance sampling: learn from what an older self said
#
# In lesson 05 each batch of answers was used for one step and thrown away. Answers are expensive:
# they are made token by token. Can one batch serve for several steps? After the first of them, the
# model that learns is no longer the model that answered.
#
# After this notebook you can
#
# - correct for that with the importance ratio, and check that it is 1 when it must be;
# - write the losses `importance_sampling` and `ppo`, and match the engine's numbers;
# - say which tokens PPO's clip silences, and what CISPO does instead;
# - tell from the effective sample size when a batch is used up.
#
# You need lesson 05.

# %% [markdown] id="card"
# The builder writes the measured card here.

# %% id="connect"
from course_lib import connect, check, hint, progress, preset

service = connect()

# %% id="settings"
import math
from dataclasses import replace

SUBSTEPS = 8  # optimizer steps on one batch of answers
GENTLE, HARD = 4e-4, 1e-3  # learning rates
rl_config = replace(preset().rl, prompts_per_step=8, group_size=8, max_tokens=40, save_every=0)
rl_config = replace(rl_config, steps=6, schedule="constant")

# %% id="quick-sft"
from course_lib.environments import sums_environment
from course_lib.lessons import band, measured, quick_sft, quote

client, tokenizer, _ = quick_sft(service)
environment = sums_environment()
start = client.save_state("after-sft").result().path

# %% [markdown] id="bandit-question"
# ## What goes wrong with old samples?
#
# First without a language model. Three buttons pay 1, 0 and 5. The **policy** presses them with
# probabilities 0.6, 0.3 and 0.1. But the presses that we have on file come from another player,
# the **sampler**: 0.2, 0.3, 0.5. What does the policy earn on average?
#
# **Predict** what you get if you just take the mean of the payments on file.

# %% id="bandit"
import random

policy, sampler_p, pays = [0.6, 0.3, 0.1], [0.2, 0.3, 0.5], [1.0, 0.0, 5.0]
exact = sum(p * pay for p, pay in zip(policy, pays, strict=True))
pressed = random.Random(0).choices(range(3), sampler_p, k=2000)
plain = [pays[i] for i in pressed]
weighted = [pays[i] * policy[i] / sampler_p[i] for i in pressed]
print(f"exact {exact:.2f}, mean of the file {sum(plain) / 2000:.2f}", end=", ")
print(f"weighted mean {sum(weighted) / 2000:.2f}")

# %% id="bandit-figure"
from course_lib.plots.curves import curves_figure
from course_lib.widgets import show, show_source

counts = list(range(20, 2001, 20))
running = {
    name: [sum(values[:n]) / n for n in counts]
    for name, values in (("plain mean", plain), ("weighted by the ratio", weighted))
}
level = (exact, "what the policy really earns")
show(curves_figure(running, "Two estimates", "payment", "presses", steps=counts, level=level))

# %% [markdown] id="ratio-note"
# The plain mean answers another question: what did the *sampler* earn? To mend it, weigh each
# press by how much likelier the policy is to make it. That is **importance sampling**:
#
# $$\mathbb{E}_{x \sim p}[f(x)] = \mathbb{E}_{x \sim q}\left[\frac{p(x)}{q(x)}\, f(x)\right]$$
#
# ($q$ must give some chance to everything that $p$ does.) For a language model, $x$ is a token, $q$
# the model that sampled it, and $p$ the model that we train:
#
# $$r = \frac{p(\text{token})}{q(\text{token})}
# = e^{\,\text{target logprob} - \text{sampling logprob}}$$
#
# One thing is given up here. For a whole answer the exact weight is the *product* of its tokens'
# ratios, which soon explodes or vanishes. To weigh each token by its own ratio ignores that the
# words before it came from the old model, too. That is a good approximation while the two models
# are close, and one more reason to stay close.
#
# ## Is the ratio 1 when it must be?
#
# Before the first step, $p$ and $q$ are one model, so every ratio must be 1. We sample a batch,
# and let the trainer compute the logprobs of the same tokens. (Of the library's loop, `credited`
# puts to each answer its advantage, and `rl_datum` makes lesson 05's datum of the two.)

# %% id="sample-batch"
from course_lib.advantages import group_advantages
from course_lib.grpo import credited, rl_datum
from course_lib.rollouts import sample_groups

sampler = client.save_weights_and_get_sampling_client().result()
settings = {"group_size": 8, "max_tokens": 40, "grade": environment.grade}
groups = sample_groups(sampler, environment.sample(8, seed=1), tokenizer, **settings, seed=1)
pairs = []  # an answer and its advantage
for group in groups:
    advantages_G = group_advantages(group.rewards_G)
    pairs += [pair for pair in credited(group, advantages_G, rl_config) if pair[1]]
datums = [rl_datum(turn, advantage, rl_config) for turn, advantage in pairs]


# %% id="measure-ratios"
def token_ratios(result):
    """For each token of each answer: ratio of trainer to sampler. A list per answer."""
    ratios = []
    for (turn, _), output in zip(pairs, result.loss_fn_outputs, strict=True):
        target = output["logprobs"].data[-len(turn.logprobs) :]
        ratios.append([math.exp(p - q) for p, q in zip(target, turn.logprobs, strict=True)])
    return ratios


first = client.forward(datums, "importance_sampling").result()
largest = max(abs(ratio - 1) for ratios in token_ratios(first) for ratio in ratios)
band("Every ratio is 1, to a thousandth", largest < 1e-3)

# %% [markdown] id="ratio-lesson"
# This check is the first thing to look at in any RL run. If sampler and trainer disagree before
# the first step (another temperature, another tokenization, other weights, rounding), the batch is
# off-policy before you begin. Later ratios mix that with what training has done, and the training
# may still look as if it worked. Lesson 07 breaks it on purpose.
#
# ## The loss
#
# To raise the expected advantage under $p$, with samples from $q$, minimise
#
# $$L = -\sum_t r_t A_t$$
#
# summed over the answers' tokens (Kakade and Langford 2002). **Write it.** The lists have an entry
# for every position; `mask` is 1 on the tokens of the answer and 0 on the question's.


# %% id="write-is-loss" exercise="06.1"
def is_loss(target_logprobs, sampling_logprobs, advantages, mask):
    """A float, summed over tokens; four lists of equal length, mask is 1.0 on completion tokens."""
    total = 0.0
    for target, sampling, advantage, counts in zip(
        target_logprobs, sampling_logprobs, advantages, mask, strict=True
    ):
        total -= counts * advantage * math.exp(target - sampling)
    return total


# %% id="check-is-loss"
is_loss = check("06.1", is_loss)

# %% [markdown] id="engine-note"
# Does it give what the engine gives? We take three steps on the batch, so that the ratios are no
# longer 1, and compare. These are the engine's own functions:

# %% id="source-is"
from course_lib.losses import cispo, importance_ratio, importance_sampling, ppo

show_source(importance_ratio, importance_sampling)

# %% id="several-steps"
import tinker


def reuse(client, loss_fn, times, config=None, learning_rate=HARD):
    """`times` steps on the one batch; the results of forward_backward, each before its step."""
    calls = []
    for _ in range(times):
        backward = client.forward_backward(datums, loss_fn, config)
        calls.append((backward, client.optim_step(tinker.AdamParams(learning_rate=learning_rate))))
    return [(backward.result(), update.result())[0] for backward, update in calls]


# %% id="match-engine"
moved = reuse(client, "importance_sampling", 4)[-1]
mine = 0.0
for datum, output, (turn, _) in zip(datums, moved.loss_fn_outputs, pairs, strict=True):
    fields = [list(datum.loss_fn_inputs[name].data) for name in ("logprobs", "advantages")]
    n, answer = len(fields[0]), len(turn.logprobs)
    mine += is_loss(list(output["logprobs"].data), *fields, [0.0] * (n - answer) + [1.0] * answer)
theirs = moved.metrics["loss:sum"]
band("Your loss is the engine's", abs(mine - theirs) < 1e-3 * abs(theirs))

# %% [markdown] id="reuse-question"
# ## How long is a batch good for?
#
# Eight steps on the same answers. **Predict**: how does the largest ratio change from step to
# step?

# %% id="reuse-run"
client = service.create_training_client_from_state(start).result()
results = reuse(client, "importance_sampling", SUBSTEPS)
ratios_S = [[ratio for ratios in token_ratios(result) for ratio in ratios] for result in results]
advantages = [a for turn, a in pairs for _ in turn.logprobs]
largest = [max(ratios) for ratios in ratios_S]
sampled = [math.exp(logprob) for turn, _ in pairs for logprob in turn.logprobs]
rare = sampled[ratios_S[-1].index(largest[-1])]
show(
    curves_figure(
        {"largest ratio": largest}, "One batch, eight steps", "ratio", "step on the batch"
    )
)
band("At the first step the largest ratio is 1", abs(largest[0] - 1) < 1e-3)
band("At the last one some token is over twice as likely", largest[-1] > 2)
measured("the token of the last largest ratio was sampled with probability", rare)
measured("so its ratio cannot exceed", 1 / rare)

# %% id="ratio-histogram"
from course_lib.plots.ratios import ratio_histogram

title = "After seven steps on the same answers"
show(ratio_histogram(ratios_S[-1], advantages, clip=None, title=title))

# %% [markdown] id="ess-question"
# Two pictures. In the first, the largest ratio rises within a few steps, and then hardly changes.
# It belongs to a token that the sampler found unlikely. A few steps later its probability is
# nearly 1, and then the ratio is nearly $1 / q$, which is as far as it can go: see the two numbers
# under the first picture.
#
# The histogram shows all tokens. Above the line: tokens of good answers; below it: tokens of bad
# ones. (The outermost bars hold everything beyond them.) Most have hardly moved. Of the others,
# good ones were pushed to the right and bad ones to the left, but not all went there: where a good
# and a bad answer begin alike, they share their first tokens, and those can only go one way.
#
# If a few tokens carry huge ratios, the sum hangs on them, and the rest hardly counts. How many
# samples is the batch still worth? With $n$ equal ratios: $n$. With one huge ratio: 1. The
# **effective sample size** (Kish 1965) is
#
# $$n_\text{eff} = \frac{\left(\sum_t r_t\right)^2}{\sum_t r_t^2}$$


# %% id="write-ess" exercise="06.2"
def effective_sample_size(ratios):
    """Between 1 and len(ratios)."""
    return sum(ratios) ** 2 / sum(ratio**2 for ratio in ratios)


# %% id="check-ess"
effective_sample_size = check("06.2", effective_sample_size)

# %% id="ess-figure"
shares = [effective_sample_size(ratios) / len(ratios) for ratios in ratios_S]
show(
    curves_figure(
        {"share of the tokens": shares},
        "What the batch is still worth",
        "effective sample size / tokens",
        "step on the batch",
    )
)
band("The batch loses worth", shares[-1] < 0.97 * shares[0])

# %% [markdown] id="ess-lesson"
# Most tokens have hardly moved, and still the batch is worth clearly less than their number. Two
# kinds cost it: one with a large ratio outweighs many others, and one that has all but vanished is
# itself lost.
#
# Mind what this number cannot see. A vanished token counts as one lost sample, whether it became
# ten times rarer or a million times. How far such tokens fell only the histogram tells.

# %% [markdown] id="ppo-question"
# ## PPO: a limit to trust
#
# The ratio mends the average. But the loss $-rA$ has no end: a token with $A > 0$ is pushed up, and
# then up again, on the evidence of one old batch. PPO (proximal policy optimisation, Schulman
# et al. 2017, equation 7) stops paying for it once the ratio leaves a range around 1:
#
# $$L = -\sum_t \min\left(r_t A_t,\ \text{clip}(r_t, \text{low}, \text{high})\, A_t\right)$$
#
# In the SDK the range is given as ratios: `clip_low_threshold` 0.8, `clip_high_threshold` 1.2.


# %% id="write-ppo-loss" exercise="06.3"
def ppo_loss(ratio, advantage, low, high):
    """The loss of one token; low and high are ratios, e.g. 0.8 and 1.2."""
    clipped = min(max(ratio, low), high)
    return -min(ratio * advantage, clipped * advantage)


# %% id="check-ppo-loss"
ppo_loss = check("06.3", ppo_loss)

# %% [markdown] id="ppo-probe-note"
# Four probes, all at the clip range 0.8 to 1.2. In which of them does the loss still change if the
# ratio changes a little? Say it for each before you run the cell; the slope is measured by a small
# step to both sides.

# %% id="ppo-probes"
print("ratio  advantage   loss  slope")
for ratio, advantage in ((1.5, 1.0), (0.5, 1.0), (1.5, -1.0), (0.5, -1.0)):
    loss = ppo_loss(ratio, advantage, 0.8, 1.2)
    sides = [ppo_loss(ratio + shift, advantage, 0.8, 1.2) for shift in (-0.01, 0.01)]
    slope = (sides[1] - sides[0]) / 0.02 + 0.0  # + 0.0: no "-0.0"
    print(f"{ratio:5.1f} {advantage:10.1f} {loss:6.2f} {slope:6.2f}")

# %% [markdown] id="ppo-learns-note"
# The minimum is one-sided. A good token that became *rarer* ($r = 0.5$, $A > 0$) keeps its
# gradient: it went the wrong way, and must come back. Silent are only tokens that went too far in
# the direction in which they were pushed. **Say it as a function.**


# %% id="predict-ppo-gradient" exercise="06.4"
def ppo_learns(ratio, advantage, low, high):
    """True if the PPO loss of this token has a gradient (the advantage is not 0)."""
    if advantage > 0:
        return ratio < high
    return ratio > low


# %% id="check-ppo-gradient"
ppo_learns = check("06.4", ppo_learns)

# %% id="silent-tokens"
tokens = list(zip(ratios_S[-1], advantages, strict=True))
silent = [not ppo_learns(ratio, a, 0.8, 1.2) for ratio, a in tokens]
measured("tokens of our batch that PPO would silence now:", sum(silent) / len(silent), "%")
band("Some are silent, and most are not", 0 < sum(silent) < len(silent) / 2)

# %% [markdown] id="token-map-note"
# Which tokens move? Two strips show the logarithm of each token's ratio, 0 meaning as likely as
# before, in two answers: the good and the bad one whose tokens went farthest where they were
# pushed. The more of a token's band is filled, the farther it went. **Predict**: all tokens of an
# answer alike, or a few?

# %% id="token-map"
from course_lib.plots.tokens import value_strip

LIMIT = 3.0  # in the picture: one runaway token would make all others invisible
logs_D = [
    [max(-LIMIT, min(LIMIT, math.log(ratio))) for ratio in ratios]
    for ratios in token_ratios(results[-1])
]
for sign in (1, -1):
    chosen = max(
        (d for d, (_, advantage) in enumerate(pairs) if sign * advantage > 0),
        key=lambda d: sum(max(0, sign * value) for value in logs_D[d]),
    )
    turn, advantage = pairs[chosen]
    words = [tokenizer.decode([token]) for token in turn.completion_tokens]
    title = f"An answer with advantage {advantage:+.2f}: log ratios, cut at {LIMIT:g}"
    show(value_strip(words, logs_D[chosen], title, names=("likelier now", "rarer now")))

# %% [markdown] id="token-map-lesson"
# Most tokens of an answer follow from those before, whatever one thinks of the answer; their
# ratios stay near 1. A few tokens *decide*: whether the answer comes at once or the working begins,
# or a digit of a sum. It is these that move; and those of them that went where they were pushed are
# the ones that the clip silences.
#
# ## CISPO: a limit to the weight, a gradient for all
#
# That bothered the authors of MiniMax-M1 (2025): the rare, deciding tokens are the first that PPO
# drops. Their CISPO (equation 4) clips only the *weight* and keeps a gradient for every token:
#
# $$L = -\sum_t \text{sg}\left[\text{clip}(r_t, \text{low}, \text{high})\right] A_t \ln p_t$$
#
# `sg` (stop-gradient) means: take the number, and let no gradient flow through it. In the source
# it is the word `detach`. (With a weight of 1 everywhere the loss is $-A \ln p$, that of
# REINFORCE, Williams 1992.)

# %% id="source-ppo-cispo"
show_source(ppo, cispo)

# %% [markdown] id="clip-widget-note"
# Compare the three. Set the ratio to 1.5 and the advantage to +1, then to -1. The engine's default
# for CISPO is 0 to 4; here all use the same range. CISPO stands on the right only: its gradient is
# not the slope of its loss, since `sg` hides the weight from the derivative. (On the right the
# gradient is by the token's *logprob*, which is what training moves. It is the slope by the ratio,
# as you measured it above, times the ratio, since $dr/d\ln p = r$: a token that has become rare is
# pushed less.)

# %% id="clip-widget"
from course_lib.widgets import clip_explorer

clip_explorer().show()

# %% [markdown] id="same-batch-note"
# ## Why not leave the ratio out?
#
# Eight steps each, from the same start, on the same answers, with four losses. "no ratio" is CISPO
# with both thresholds at 1: every weight is 1, as if the answers were always fresh. We look at the
# tokens of the bad answers, and how much rarer they have become. **Predict**: which loss pushes
# them furthest?

# %% id="recipes"
WEIGHT_ONE = {"clip_low_threshold": 1.0, "clip_high_threshold": 1.0}
RECIPES = {
    "no ratio": ("cispo", WEIGHT_ONE),
    "importance_sampling": ("importance_sampling", None),
    "cispo": ("cispo", None),
    "ppo": ("ppo", None),
}


def fall_of_bad_tokens(result):
    """Mean of -ln(ratio) over the tokens of answers with a negative advantage, in nats."""
    logs = [-math.log(ratio) for ratios in token_ratios(result) for ratio in ratios]
    bad = [fall for fall, advantage in zip(logs, advantages, strict=True) if advantage < 0]
    return sum(bad) / len(bad)


# %% id="same-batch"
falls = {}
for name, (loss_fn, clip) in RECIPES.items():
    learner = service.create_training_client_from_state(start).result()
    steps = reuse(learner, loss_fn, SUBSTEPS, clip)
    falls[name] = [fall_of_bad_tokens(result) for result in steps]
title = "How much rarer do bad answers become?"
show(curves_figure(falls, title, "mean -ln(ratio) (nats per token)", "step on the batch"))
ends = {name: values[-1] for name, values in falls.items()}
band("Without the ratio it goes furthest", ends["no ratio"] == max(ends.values()))
band("PPO stops much earlier", ends["ppo"] < 0.8 * ends["no ratio"])

# %% [markdown] id="same-batch-lesson"
# *No ratio*: a bad answer that has already become rare is pushed down as hard as at first, and
# again, and again. With the ratio, a token that is ten times rarer has a tenth of the push: the
# matter is settled, and the loss knows it.
#
# *CISPO* with the engine's default range, 0 to 4, weighs every token as importance sampling does,
# but for the few whose ratio exceeds 4. Where the two curves part, those few are the reason.
#
# *PPO* moves least, but it does not stop the model *at* the edge of its range: silent tokens are
# still carried along by the others, since they share all the weights. The clip is a brake, not a
# wall.
#
# ## Does it pay to use a batch again?
#
# Now whole training runs, from the same start, with the same six batches of problems. First gently,
# at a small learning rate: each batch used once, or four times. **Predict** both curves. And the
# third: each batch used once, at four times the learning rate.


# %% id="train-gentle"
from course_lib.grpo import train_grpo


def train(**changes):
    """Six batches of answers, from the weights after SFT."""
    learner = service.create_training_client_from_state(start).result()
    config = replace(rl_config, **changes)
    return train_grpo(learner, environment, config, tokenizer=tokenizer)


runs = {f"used {n}x": train(learning_rate=GENTLE, substeps=n) for n in (1, 4)}
runs["used 1x, four times the rate"] = train(learning_rate=4 * GENTLE)
curves = {name: run.rewards for name, run in runs.items()}
show(curves_figure(curves, "The same number of answers", "reward (mean)", "batch of answers"))
gentle_late = sum(curves["used 4x"][-3:]) / 3
gentle = {name: sum(values[1:]) / 5 for name, values in curves.items()}
for name, reward in gentle.items():
    measured(f"{name}: mean reward from the second batch on", reward)
band("At this rate four uses learn more than one", gentle["used 4x"] > gentle["used 1x"])

# %% [markdown] id="hard-note"
# Four uses learn more from the same answers. But four steps also move the model farther than one,
# and a larger learning rate does that, too. So the third curve is the control: one step, about as
# long as the four together. From some starts it does well, from others it rises at once and falls
# back: one start cannot tell what reuse adds. Below, five are asked.
#
# And if more movement is good, is eight times, with two and a half times the learning rate, better?
# **Predict** where the two losses end.

# %% id="train-hard"
hard = {"learning_rate": HARD, "substeps": SUBSTEPS}
runs = {name: train(loss_fn=name, **hard) for name in ("importance_sampling", "ppo")}
curves = {name: run.rewards for name, run in runs.items()}
show(curves_figure(curves, "Eight hard steps on each batch", "reward (mean)", "batch of answers"))
for name, rewards in curves.items():
    measured(f"{name}: mean reward of the last three batches", sum(rewards[-3:]) / 3)
measured("used 4x, gently: the same", gentle_late)


# %% id="hard-drift"
def mean_drift(metrics):
    """How far the model was from its batch before the last of the eight steps, on average."""
    moved = [row["kl/sample_train_k3_late"] for row in metrics if "optim/loss" in row]
    return sum(moved) / len(moved)


for name, run in runs.items():
    measured(f"{name}: distance before the eighth step", mean_drift(run.metrics), "nats per token")
    quote(run.groups[0].rollouts[0].text, run.groups[0].problem.messages[0].content)
band(
    "PPO stays nearer to its answers",
    mean_drift(runs["ppo"].metrics) < mean_drift(runs["importance_sampling"].metrics),
)

# %% [markdown] id="hard-lesson"
# The distance is an estimate of the KL divergence, which lesson 07 explains: 0 means that the
# model still says what it said when it was sampled.
#
# Fast gains, and set-backs: eight times the full push on one batch is much. PPO stays nearer to its
# answers. Does that help the reward? By the numbers of this one start it may even seem to hurt; but
# one run is one draw. So here is a **recording** of these settings, and of `cispo` pushed as hard,
# from five starts, made by `python data/experiments/reuse.py`.

# %% id="recording"
import json

from course_lib.config import find_file
from course_lib.plots.groups import intervals_figure

recorded = json.loads(find_file("data/results/reuse.json").read_text())["starts"]
late = {name: [sum(row[name][-3:]) / 3 for row in recorded] for name in recorded[0]}
middles = [sorted(values)[len(values) // 2] for values in late.values()]
ranges = [(min(values), max(values)) for values in late.values()]
title = "Recorded: five starts, median and range"
show(intervals_figure(list(late), middles, ranges, title, "mean reward of the last three batches"))

# %% [markdown] id="recording-note"
# The ranges are wide: the starts differ, and 64 answers a batch are few. So compare start by
# start, with each start's own runs. Which of these orders hold in all five?

# %% id="recording-paired"
pairs_to_compare = [
    ("gentle, used 4x", "gentle, used 1x"),
    ("gentle, used 4x", "fast, used 1x"),
    ("gentle, used 4x", "hard, importance_sampling"),
    ("gentle, used 4x", "hard, ppo"),
    ("hard, ppo", "hard, importance_sampling"),
]
for one, other in pairs_to_compare:
    wins = sum(a > b for a, b in zip(late[one], late[other], strict=True))
    print(f"{one} beats {other}: {wins} of {len(recorded)}")

# %% [markdown] id="recording-lesson"
# Using a batch again, gently, paid every time. Some of that is mere movement: "fast", one use at
# four times the rate, does better than one gentle use, too. But four uses beat that as well, from
# every start: four short steps, each with a gradient taken anew, get farther than a long one.
#
# In the recording, pushing hard with importance sampling lost to the gentle run from every start.
# PPO's clip mends a part of that: it beats importance sampling from every start. Four gentle uses
# beat both, with half as many training steps, though PPO only by a little from three of the five.
# The recording's first start is the one of this lesson, with the same seed. Where your numbers
# above say otherwise, that is another draw: eight hard steps make much of a difference in rounding.
# Five of five is strong, and not certain. CISPO's default range, 0 to 4, caps only the few largest
# weights: its starts overlap with those of importance sampling, and five of them do not rank the
# two. That is no verdict on CISPO, which was made for other sizes; it says that eight hard steps
# need a brake.
#
# So: no clip replaces a sensible learning rate. And if the ratios tell that a batch is used up,
# take a new one.

# %% id="progress"
progress()

# %% [markdown] id="take-away"
# ## What to take away
#
# - Samples of another model answer another question. The ratio $p/q$ puts that right: on average
#   for a single draw, nearly so for the tokens of an answer while the two models are close.
# - Before the first step every ratio is 1. Check it first, in every run.
# - A batch may be used more than once, gently. Watch the ratios: they tell when it is used up.
# - PPO silences tokens that went too far where they were pushed, and only those. It brakes; it
#   does not stop.
# - CISPO limits the weight and silences nothing.
#
# ## The family
#
# | loss | what it limits | |
# | --- | --- | --- |
# | `importance_sampling` | nothing | nearly right while models are close; else wild |
# | `ppo` | the pay: none beyond the range, token by token | Schulman et al. 2017 |
# | `cispo` | the weight: capped, every token keeps a gradient | MiniMax-M1 2025 |
# | `gspo` | as PPO, with *one* ratio per answer, $e^{\overline{\ln r}}$ | Zheng et al. 2025 |
# | `dro` | the distance: a square of $\ln r$ is charged for | Richemond et al. 2024 |
#
# Each is a word in `forward_backward`, and in `posttrain all --set rl.loss_fn=gspo`. On fresh
# answers all of them push alike; they differ in what they do when answers grow old. Begin with
# `importance_sampling` and one use; if you use batches again, take `ppo` and watch the ratios.
#
# ## What next
#
# [07 Stability](07_stability.ipynb): KL, length, temperature, and how stale is too stale.
