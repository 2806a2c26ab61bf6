# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown] id="title"
# # 07 · Stability: what goes wrong slowly
#
# An RL run seldom crashes. It drifts: away from the model it started from, towards long answers,
# towards samples that are too old. Each of these has a number that shows it, and a setting that
# holds it.
#
# After this notebook you can
#
# - estimate a KL with the right estimator, in the right direction, and use it as a leash;
# - find a disagreement between sampler and trainer before the first step;
# - say how stale a batch may be;
# - take the length bias out of GRPO;
# - explain DPO, which needs no sampling at all, and what it gives up.
#
# You need lessons 05 and 06.

# %% [markdown] id="card"
# The builder writes the measured card here.

# %% id="connect"
from course_lib import connect, check, hint, progress, preset

service = connect()

# %% id="settings"
import math
from dataclasses import replace

from course_lib.environments import sums_environment
from course_lib.lessons import band, measured, quick_sft

rl_config = replace(preset().rl, prompts_per_step=8, group_size=8, max_tokens=40, save_every=0)
rl_config = replace(rl_config, steps=12, learning_rate=1e-3)
environment = sums_environment()

# %% id="quick-sft"
client, tokenizer, _ = quick_sft(service)
start = client.save_state("after-sft").result().path
reference = client.save_weights_and_get_sampling_client().result()


def fresh():
    """A training client with the weights after SFT: every experiment begins here."""
    return service.create_training_client_from_state(start).result()


# %% [markdown] id="kl-question"
# ## How far has the model moved?
#
# The usual measure is the Kullback-Leibler divergence from the **policy** $p$, the model we train,
# to a **reference** $q$, the model we started from:
#
# $$\text{KL}(p \,\|\, q) = \sum_x p(x) \ln\frac{p(x)}{q(x)}$$
#
# It is 0 if the two agree, and never negative. For three outcomes one can add it up. For a
# language model the sum would run over all texts. So one *estimates* it from tokens that the
# policy sampled (Schulman 2020, "Approximating KL divergence"). With $d = \ln q(x) - \ln p(x)$:
#
# | estimator | of one token | |
# | --- | --- | --- |
# | k1 | $-d$ | right on average, often negative |
# | k2 | $d^2 / 2$ | never negative, not quite right on average |
# | k3 | $e^d - 1 - d$ | right on average, never negative |
#
# **Write k3**, as a mean over tokens. Mind which of the two is subtracted.


# %% id="write-kl" exercise="07.1"
def kl_k3(policy_logprobs, reference_logprobs):
    """Estimate of KL(policy || reference) per token, from tokens that the policy sampled."""
    total = 0.0
    for policy, reference in zip(policy_logprobs, reference_logprobs, strict=True):
        d = reference - policy
        total += math.exp(d) - 1 - d
    return total / len(policy_logprobs)


# %% id="check-kl"
kl_k3 = check("07.1", kl_k3)

# %% [markdown] id="kl-probe-note"
# With three outcomes we know the truth, and what each estimator gives on average. The last row is
# wrong on purpose: the ratio is upside down, as in a published textbook's code. **Predict**: which
# rows equal the exact KL?

# %% id="kl-probe"
from course_lib.plots.estimators import exact_kl

p, q = [0.7, 0.2, 0.1], [0.2, 0.3, 0.5]
estimators = {
    "k1": lambda d: -d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: math.exp(d) - 1 - d,
    "k3 upside down": lambda d: math.exp(-d) - 1 + d,
}
print(f"{'exact':16}{exact_kl(p, q):.3f}")
for name, estimate in estimators.items():
    mean = sum(a * estimate(math.log(b / a)) for a, b in zip(p, q, strict=True))
    print(f"{name:16}{mean:.3f}")

# %% [markdown] id="kl-widget-note"
# Right on average is not enough: an estimate from few tokens should also be near. Move the
# sliders: when is k2 good? Which one spreads most?

# %% id="kl-widget"
from course_lib.widgets import kl_sampler, show, show_source

kl_sampler().show()

# %% id="source-kl"
from course_lib.metrics import kl_k1, kl_k2

show_source(kl_k1, kl_k2)

# %% [markdown] id="penalty-question"
# ## A leash: the KL penalty
#
# One can charge for the distance: reward minus $\beta$ times the KL to the reference. Here are two
# runs on the same problems, one with and one without. **Predict** both pictures: the KL and the
# reward.

# %% id="penalty-run"
from course_lib.grpo import train_grpo
from course_lib.plots.curves import curves_figure, two_curves_figure

BETA = 0.2  # reward lost per nat
runs = {}
for name, beta in (("free", 0.0), (f"penalty {BETA}", BETA)):
    config = replace(rl_config, kl_penalty=beta)
    runs[name] = train_grpo(fresh(), environment, config, tokenizer=tokenizer, reference=reference)
kls = {name: [row["kl/reference"] for row in run.metrics] for name, run in runs.items()}
show(curves_figure(kls, "Distance from the start", "KL (nats per answer)"))

# %% id="penalty-reward"
rewards = {name: run.rewards for name, run in runs.items()}
show(curves_figure(rewards, "Share of right answers", "reward (mean)"))
late = {name: sum(values[-4:]) / 4 for name, values in kls.items()}
for name, value in late.items():
    measured(f"{name}: KL over the last four steps", value, "nats per answer")
band("The leash holds", late[f"penalty {BETA}"] < late["free"])

# %% [markdown] id="penalty-lesson"
# The leash costs reward if what pays is far from the start, as here: the worked answers are rare
# after SFT, so preferring them *is* a distance. It is worth its price where the reward can be
# cheated (lesson 04), or where the model must keep what it knew. With a reward that is the truth
# itself many recipes leave it out. The course's default is 0.
#
# ## Sampler and trainer must agree
#
# In lesson 06 every ratio was 1 before the first step. Here is the most common way to break it:
# sample at a temperature other than 1. The sampler divides its logits by the temperature. The
# trainer does not know.
#
# **Write** what the log ratio of an untouched model then is.


# %% id="write-log-ratio" exercise="07.3"
def log_ratio_at_start(logits, token, temperature):
    """log(trainer's probability / sampler's probability) of one token; the weights are equal."""

    def logprob(values):
        return values[token] - math.log(sum(math.exp(value) for value in values))

    return logprob(logits) - logprob([value / temperature for value in logits])


# %% id="check-log-ratio"
log_ratio_at_start = check("07.3", log_ratio_at_start)

# %% id="temperature-probe"
from course_lib.advantages import group_advantages
from course_lib.grpo import credited, rl_datum
from course_lib.rollouts import sample_groups

settings = {"group_size": 8, "max_tokens": 40, "grade": environment.grade}


def batch(sampler, seed, **changes):
    """Answers with their advantages, and the same as datums; dead groups left out."""
    problems = environment.sample(8, seed)
    groups = sample_groups(sampler, problems, tokenizer, **{**settings, **changes}, seed=seed)
    pairs = []
    for group in groups:
        advantages_G = group_advantages(group.rewards_G)
        pairs += [pair for pair in credited(group, advantages_G, rl_config) if pair[1]]
    return pairs, [rl_datum(turn, advantage, rl_config) for turn, advantage in pairs]


# %% id="temperature-run"
from course_lib.grpo import step_ratios

untouched = fresh()
for temperature in (1.0, 0.7, 1.3):
    pairs, datums = batch(reference, seed=1, temperature=temperature)
    result = untouched.forward(datums, "importance_sampling").result()
    ratios = step_ratios(pairs, result, rl_config)
    measured(f"temperature {temperature}: largest |ratio - 1|", ratios["ratio/max_deviation"])
    band(f"Sampled at {temperature}, all ratios are 1", ratios["ratio/max_deviation"] < 1e-3)

# %% [markdown] id="temperature-lesson"
# Nothing crashes. The run just learns from weights that are wrong. Top-p and top-k sampling do the
# same, and so do a sampler with rounded weights and a chat template that differs by one space. So:
# look at the ratio before the first step. It must be 1.
#
# ## How stale may a batch be?
#
# Large systems sample and train at the same time. Then each batch is a few steps old when it is
# used. We keep one batch from step 0 and look at it again after each step of an ordinary run.
# **Predict**: after how many steps is the batch worth only half?

# %% id="staleness-run"
learner = fresh()
pairs, datums = batch(reference, seed=1)
worth, drift = [1.0], [0.0]


def look_back(step, total, metrics):
    """What is the batch of step 0 worth to the model of this step?"""
    result = learner.forward(datums, "importance_sampling").result()
    ratios = step_ratios(pairs, result, rl_config)
    worth.append(ratios["ratio/ess"])
    drift.append(ratios["kl/sample_train_k3"])


train_grpo(learner, environment, rl_config, tokenizer=tokenizer, on_step=look_back)
names = ("effective samples (share)", "KL (nats per token)")
show(two_curves_figure(worth, drift, names, "The batch of step 0, seen later", "steps later"))
band("The batch loses worth", worth[-1] < 0.9)

# %% [markdown] id="length-question"
# ## Do answers grow long because length pays?
#
# The original GRPO divides each answer's loss by its own length. It sounds fair. **Find the bug**:
# two wrong answers, one of 5 tokens and one of 50, both with advantage -0.5. What does each
# *token* lose?

# %% id="length-demo"


def broken_token_advantages(advantages_G, lengths_G):
    return [advantage / n for advantage, n in zip(advantages_G, lengths_G, strict=True)]


print(broken_token_advantages([-0.5, -0.5], [5, 50]))

# %% [markdown] id="length-exercise"
# The long wrong answer is told off ten times more gently. Who must be wrong is better off being
# wrong at length (Liu et al. 2025, section 3). **Mend it**: divide by something that no answer can
# choose.


# %% id="mend-length" exercise="07.2"
def token_advantages(advantages_G, lengths_G, max_tokens):
    """For each completion the advantage that each of its tokens carries, with no length bias."""
    return [advantage / max_tokens for advantage in advantages_G]


# %% id="check-length"
token_advantages = check("07.2", token_advantages)

# %% [markdown] id="length-run-note"
# Does it matter for our task? Two runs, with and without the division. **Predict** how the length
# of the answers develops.

# %% id="length-run"
lengths = {}
for name, own_length in (("one constant for all", False), ("by its own length", True)):
    config = replace(rl_config, length_normalise=own_length)
    run = train_grpo(fresh(), environment, config, tokenizer=tokenizer)
    lengths[name] = [row["env/completion_tokens"] for row in run.metrics]
    measured(f"{name}: reward over the last four steps", sum(run.rewards[-4:]) / 4)
show(curves_figure(lengths, "Length of the answers", "tokens"))

# %% [markdown] id="dpo-question"
# ## DPO: no sampling at all
#
# Suppose that we have pairs: for one question a better and a worse answer. Direct preference
# optimisation (Rafailov et al. 2023, equation 7) raises the better one *relative to the worse
# one*, both measured against the reference:
#
# $$L = -\ln\sigma\!\left(\beta\left[\ln\frac{p(\text{chosen})}{q(\text{chosen})} -
# \ln\frac{p(\text{rejected})}{q(\text{rejected})}\right]\right)$$
#
# $\beta$ is again a leash. **Write it** for one pair; the logprobs are sums over the whole answer.


# %% id="write-dpo" exercise="07.4"
def dpo_loss(policy, reference, beta):
    """policy and reference are (logprob of chosen, logprob of rejected), summed over tokens."""
    gains = [p - q for p, q in zip(policy, reference, strict=True)]
    return math.log1p(math.exp(-beta * (gains[0] - gains[1])))


# %% id="check-dpo"
dpo_loss = check("07.4", dpo_loss)

# %% [markdown] id="dpo-run-note"
# We make pairs from the model's own answers: in each group that is not dead, a right and a wrong
# one. It is the same information that GRPO gets, used once, without fresh samples. **Predict**:
# the loss falls; do the chosen answers become *likelier*?

# %% id="dpo-pairs"
from course_lib.preferences import Pair, train_dpo

problems = environment.sample(60, seed=7)
groups = sample_groups(reference, problems, tokenizer, **settings, seed=7)
pairs = []
for group in groups:
    right = [r.text for r in group.rollouts if r.score.value == 1]
    wrong = [r.text for r in group.rollouts if r.score.value == 0]
    pairs += [
        Pair(group.problem.messages, a, b) for a, b in list(zip(right, wrong, strict=False))[:3]
    ]
measured("pairs", len(pairs))

# %% id="dpo-run"
learner = fresh()
config = replace(preset().preference, batch_size=8, epochs=2, max_steps=16)
found = train_dpo(learner, pairs, config, tokenizer=tokenizer)
gains = {
    name: [row[f"preference/{name}_gain"] for row in found.metrics]
    for name in ("chosen", "rejected")
}
show(curves_figure(gains, "How much likelier than before?", "log ratio (nats per answer)"))
band("The gap opened", gains["chosen"][-1] > gains["rejected"][-1])

# %% id="dpo-judged"
from course_lib.evaluation import evaluate

heldout = environment.heldout(60, seed=0)
for name, sampler in (
    ("before", reference),
    ("after DPO", learner.save_weights_and_get_sampling_client().result()),
):
    result = evaluate(sampler, tokenizer, environment, heldout, max_tokens=40)
    measured(f"{name}: held-out accuracy", result.accuracy, "%")
    measured(f"{name}: worked answers", result.worked_share, "%")

# %% id="progress"
progress()

# %% [markdown] id="take-away"
# ## What to take away
#
# - KL is estimated from the policy's own samples; $d$ is reference minus policy. k3 is right on
#   average and never negative.
# - A KL penalty is a leash. It costs reward where what pays is far from the start.
# - Ratio not 1 before the first step: sampler and trainer disagree. Stop and find out why.
# - Watch what a batch is worth when it is used late.
# - Divide by a constant, never by a number that the model can choose.
# - DPO needs pairs and no sampling. It learns from what is on file, and only from that.
#
# ## What next
#
# [08 Evaluate and scale](08_evaluate.ipynb): is the model better, or was it luck?
