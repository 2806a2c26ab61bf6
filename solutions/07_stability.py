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
rl_config = replace(rl_config, steps=12, learning_rate=1e-3, schedule="constant")
environment = sums_environment()

# %% id="quick-sft"
client, tokenizer, _ = quick_sft(service)
start = client.save_state("after-sft").result().path
reference = client.save_weights_and_get_sampling_client().result()


def fresh():
    """A training client with the weights after SFT: every experiment begins here."""
    return service.create_training_client_from_state(start).result()


# %% [markdown] id="ordinary-note"
# ## An ordinary run, to compare with
#
# Twelve steps of GRPO, as in lesson 05. While it trains we write down three things for later: its
# distance from the start, the length of its answers, and what it makes of a batch of answers that
# was sampled before the first step and laid aside.

# %% id="old-batch"
from course_lib.advantages import group_advantages
from course_lib.batches import make_rl_datum
from course_lib.grpo import credited, rl_datum, step_ratios, train_grpo
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


# %% id="lay-aside"
old_pairs, old_datums = batch(reference, seed=1)

# %% id="ordinary-run"
learner, seen_later = fresh(), []


def look_back(step, total, metrics):
    """The ratios of the batch that was laid aside, under the model of this step."""
    result = learner.forward(old_datums, "importance_sampling").result()
    seen_later.append(step_ratios(old_pairs, result, rl_config))


common = {"tokenizer": tokenizer, "reference": reference}  # the reference only to measure the KL
ordinary = train_grpo(learner, environment, rl_config, **common, on_step=look_back)
measured("reward of the first batch", ordinary.rewards[0])
measured("reward of the last four", sum(ordinary.rewards[-4:]) / 4)
band("It learns", sum(ordinary.rewards[-4:]) / 4 > ordinary.rewards[0] + 0.1)

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
# wrong on purpose: the ratio is upside down, a slip that is easily made. **Predict**: which rows
# equal the exact KL?

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
# sliders: when is k2 good? Which one spreads most? (The wider a shape, the more of the 300
# estimates lie there; the mark in its middle is their mean.)

# %% id="kl-widget"
from course_lib.widgets import kl_sampler, show, show_source

kl_sampler().show()

# %% [markdown] id="kl-widget-answer"
# k1 spreads most here, and some of its estimates are negative. (Not everywhere: k3 holds $q/p$, and
# explodes where the reference likes what the policy hardly says.) k2 is as good as k3 while the
# reference is near. Far away its mean misses the exact value, however many tokens there are; k3's
# does not, at any distance.
#
# The library works with the same three. (In its words $r$ is $q/p$, so that $d = \ln r$.)

# %% id="source-kl"
from course_lib.metrics import kl_k1, kl_k2

show_source(kl_k1, kl_k2)

# %% [markdown] id="penalty-question"
# ## A leash: the KL penalty
#
# One can charge for the distance: reward minus $\beta$ times the KL to the reference (Ouyang et
# al. 2022). Here is the ordinary run again, and beside it one on a leash, on the same problems.
# **Predict** both pictures: the KL and the reward.

# %% id="penalty-run"
from course_lib.plots.curves import curves_figure, two_curves_figure

BETA = 0.3  # reward lost per nat
leashed = train_grpo(fresh(), environment, replace(rl_config, kl_penalty=BETA), **common)
runs = {"no penalty": ordinary, f"penalty {BETA}": leashed}
kls = {name: [row["kl/reference"] for row in run.metrics] for name, run in runs.items()}
show(curves_figure(kls, "Distance from the start", "KL (nats per answer)"))
late = {name: sum(values[-6:]) / 6 for name, values in kls.items()}
band("The leash holds", late[f"penalty {BETA}"] < 0.8 * late["no penalty"])

# %% id="penalty-reward"
rewards = {name: run.rewards for name, run in runs.items()}
show(curves_figure(rewards, "Share of right answers, the penalty not counted", "reward (mean)"))
for name, values in rewards.items():
    measured(f"{name}: reward over the last six steps", sum(values[-6:]) / 6)

# %% [markdown] id="penalty-lesson"
# A leash pulls back, it does not forbid: from some starts single steps lie as far out as without
# it.
#
# What does the leash cost? It depends on how far away lies what pays. Here the worked answers are
# rare after SFT, so preferring them *is* a distance. But the leash itself would allow most of it:
# reward minus $\beta$ KL is largest where the *odds* of a right answer are $e^{1/\beta}$ = 28 times
# what they were (Rafailov et al. 2023, equation 4). That turns one right answer in seven into five
# in six, and lies a little over one nat away. Twelve large, noisy steps need not find it. A nat
# costs 0.3 of a reward that is 1 at most, so the leashed run learns more slowly; and one that has
# gone two or three nats out is paid for coming back, and gives up what it had found on the way.
#
# A leash is worth its price where the reward can be cheated (lesson 04), or where the model must
# keep what it knew. With a reward that is the truth itself many recipes leave it out; the course's
# default is 0.
#
# A detail that costs people days: inside the *reward* use k1, as the library does by default. k3
# is the better estimate of the KL's value, but charging it to the reward does not give the KL's
# gradient.
#
# ## Sampler and trainer must agree
#
# In lesson 06 every ratio was 1 before the first step. Here is the most common way to break it:
# sample at a temperature other than 1. The sampler divides its logits by the temperature. The
# trainer does not know.
#
# **Write** what the log ratio of an untouched model then is, for one token, which is given as an
# index into the logits.


# %% id="write-log-ratio" exercise="07.2"
def log_ratio_at_start(logits, token, temperature):
    """log(trainer's probability / sampler's probability) of one token; the weights are equal."""

    def logprob(values):
        return values[token] - math.log(sum(math.exp(value) for value in values))

    return logprob(logits) - logprob([value / temperature for value in logits])


# %% id="check-log-ratio"
log_ratio_at_start = check("07.2", log_ratio_at_start)

# %% [markdown] id="temperature-probe-note"
# Three tokens with logits 2, 1 and 0, sampled at temperature 0.5. **Predict** for the likeliest
# and for the rarest: is its ratio above or below 1?

# %% id="temperature-probe"
for token, name in enumerate(("likeliest", "middle", "rarest")):
    ratio = math.exp(log_ratio_at_start([2.0, 1.0, 0.0], token, 0.5))
    print(f"{name:10} ratio {ratio:.2f}")

# %% [markdown] id="temperature-run-note"
# And our model, untouched, with answers sampled at three temperatures:

# %% id="temperature-run"
from course_lib.plots.ratios import ratio_histogram

untouched = fresh()
for temperature in (1.0, 1.3, 0.7):
    pairs, datums = batch(reference, seed=1, temperature=temperature)
    result = untouched.forward(datums, "importance_sampling").result()
    largest = step_ratios(pairs, result, rl_config)["ratio/max_deviation"]
    measured(f"temperature {temperature}: largest |ratio - 1|", largest)
    band(f"Sampled at {temperature}, all ratios are 1", largest < 1e-3)

# %% id="temperature-figure"
ratios, advantages = [], []
for (turn, advantage), output in zip(pairs, result.loss_fn_outputs, strict=True):
    target = output["logprobs"].data[-len(turn.logprobs) :]
    ratios += [math.exp(p - q) for p, q in zip(target, turn.logprobs, strict=True)]
    advantages += [advantage] * len(turn.logprobs)
title = "Sampled at 0.7: ratios before the first step"
show(ratio_histogram(ratios, advantages, title=title))

# %% [markdown] id="temperature-lesson"
# Most tokens are sure at any temperature. The disagreement sits on the few at which the model
# hesitates, and those are the ones that decide an answer. Nothing crashes. Each ratio is still the
# right weight for its own token (lesson 06), but not for the tokens before it; rare tokens carry
# large weights; PPO's clip may silence tokens before anything has moved; and the reward that you
# watch is earned by another policy than the one you train. A sampler with rounded weights, or a
# chat template that differs by one space, does the same. So: look at the ratio before the first
# step. It must be 1.
#
# It does not see everything, since it knows only what the sampler *reports*. Top-p and top-k
# sampling leave out the unlikely tokens, but our engine reports the logprobs from before that cut:
# the ratio stays 1, although the samples come from elsewhere. (vLLM, unless told otherwise, reports
# them from before the temperature as well, and hides even that.) Leave both off while you train,
# and the temperature at 1.
#
# ## How stale may a batch be?
#
# Large systems sample and train at the same time. Then each batch is a few steps old when it is
# used. Remember the batch that we laid aside. **Predict**: what is it worth to the model twelve
# steps later, as a share of its tokens?

# %% id="staleness-figure"
worth = [each["ratio/ess"] for each in seen_later]
away = [each["kl/sample_train_k3"] for each in seen_later]
names = ("effective samples (share)", "KL (nats per token)")
show(two_curves_figure(worth, away, names, "The batch of step 0, seen later", "steps later"))
silent = seen_later[-1]["ratio/clipped_up"] + seen_later[-1]["ratio/clipped_down"]
measured("tokens that PPO would silence after twelve steps:", silent, "%")
band("The batch has lost some of its worth", worth[-1] < 0.97)
band("The model has moved on from it", away[-1] > 2 * away[0])

# %% [markdown] id="staleness-lesson"
# Read both curves. The worth may even rise again while the model moves on: a token that has
# vanished costs one sample and no more, however much further it falls (lesson 06), and large ratios
# may come down again.
#
# It is the *model's* movement that makes a batch old, not time: under a smaller learning rate it
# lasts longer. Large systems set a limit in steps, and watch the ratio beside it. (The tokens are
# the old model's, so the KL here is that from the old model to the new one.)
#
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
# choose. (How large that constant is hardly matters: Adam divides its step by the size of the
# gradients anyway.)


# %% id="mend-length" exercise="07.3"
def token_advantages(advantages_G, lengths_G, max_tokens):
    """For each completion the advantage that each of its tokens carries, with no length bias."""
    return [advantage / max_tokens for advantage in advantages_G]


# %% id="check-length"
token_advantages = check("07.3", token_advantages)

# %% [markdown] id="length-run-note"
# Does it matter for our task? The ordinary run divides by nothing that depends on the answer.
# Beside it, the same run with each answer divided by its own length. **Predict** how the lengths
# develop.

# %% id="length-run"
config = replace(rl_config, length_normalise=True)
by_length = train_grpo(fresh(), environment, config, tokenizer=tokenizer)
runs = {"one constant for all": ordinary, "by its own length": by_length}
lengths = {
    name: [row["env/completion_tokens"] for row in run.metrics] for name, run in runs.items()
}
show(curves_figure(lengths, "Length of the answers", "tokens"))
for name, run in runs.items():
    measured(f"{name}: reward over the last six steps", sum(run.rewards[-6:]) / 6)

# %% [markdown] id="length-trap"
# Both grow, since here the longer, worked answers are the right ones: what is good for the reward
# and what the bias favours lie in the same direction. So this picture cannot tell the two apart.
# **Before you go on**: what would you change to see the bias alone?

# %% [markdown] id="length-alone-note"
# Take the reason to grow away. We lay the right answers aside and punish the *wrong* ones, all
# with the same advantage of -1, by both rules. Some are short and direct, some long and worked.
# **Predict** for each rule: who becomes rarer, the short wrong answers or the long ones?

# %% id="wrong-answers"
problems = environment.sample(16, seed=2)
groups = sample_groups(reference, problems, tokenizer, **settings, seed=2)
wrong = [each for group in groups for each in group.rollouts if each.score.value == 0]
measured("wrong answers", len(wrong))

# %% id="punish"
import tinker


def punish(per_token):
    """Three steps against the wrong answers; gives each one's change of logprob, in nats."""
    learner, datums = fresh(), []
    for each in wrong:
        advantages = [per_token(len(each.logprobs))] * len(each.logprobs)
        answer = (each.prompt_tokens, each.completion_tokens, each.logprobs)
        datums.append(make_rl_datum(*answer, advantages))
    for _ in range(3):
        backward = learner.forward_backward(datums, "importance_sampling")
        learner.optim_step(tinker.AdamParams(learning_rate=3e-4)).result()
        backward.result()
    after = learner.forward(datums, "importance_sampling").result().loss_fn_outputs
    return [
        sum(output["logprobs"].data[-len(each.logprobs) :]) - sum(each.logprobs)
        for output, each in zip(after, wrong, strict=True)
    ]


# %% id="length-alone-run"
from course_lib.plots.bars import stacked_figure

rules = {"one constant": lambda n: -1 / rl_config.max_tokens, "own length": lambda n: -1 / n}
is_long = [len(each.completion_tokens) > 15 for each in wrong]
fall = {}
for name, per_token in rules.items():
    changes = punish(per_token)
    for kind in (False, True):
        chosen = [c for c, long in zip(changes, is_long, strict=True) if long == kind]
        fall[f"{name}, {'long' if kind else 'short'} ones"] = sum(chosen) / max(1, len(chosen))
part = {"change of the answer's logprob (nats)": list(fall.values())}
show(stacked_figure(list(fall), part, "Wrong answers, all punished with -1", "nats"))
band(
    "Divided by its own length, a long wrong answer loses much less",
    fall["own length, long ones"] > fall["one constant, long ones"] + 0.2,
)

# %% [markdown] id="length-alone-lesson"
# With one constant the long wrong answers lose most: each of their tokens is pushed down as hard as
# one of a short answer, and they have more of them. Divided by their own length it is the other way
# round: the short ones lose more than before, and the long ones less than the short ones, if they
# lose at all. (What is taken from the short answers goes to others, some of it to the long ones.)
# They are all just as wrong. That is the mechanism. What it does over thousands of steps on
# problems that a model cannot solve, wrong answers that grow longer and longer, is shown by Liu et
# al. (2025).

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
# $\sigma(x) = 1 / (1 + e^{-x})$ is the sigmoid, and $\beta$ is again a leash. **Write it** for one
# pair; the logprobs are sums over the whole answer.


# %% id="write-dpo" exercise="07.4"
def dpo_loss(policy, reference, beta):
    """policy and reference are (logprob of chosen, logprob of rejected), summed over tokens."""
    gains = [p - q for p, q in zip(policy, reference, strict=True)]
    return math.log1p(math.exp(-beta * (gains[0] - gains[1])))


# %% id="check-dpo"
dpo_loss = check("07.4", dpo_loss)

# %% [markdown] id="dpo-run-note"
# We make pairs from the model's own answers: in each group that is not dead, up to three pairs of a
# right and a wrong one. It is the same information that GRPO gets, gathered once, without fresh
# samples. **Predict**: the loss falls; do the chosen answers become *likelier*?

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
gaps = [a - b for a, b in zip(gains["chosen"], gains["rejected"], strict=True)]
band("The gap opened", sum(gaps[-4:]) / 4 > 1)
band("The chosen answers became clearly likelier", sum(gains["chosen"][-4:]) / 4 > 2)

# %% id="dpo-judged"
from course_lib.evaluation import evaluate

heldout = environment.heldout(60, seed=0)
accuracies = []
for name, sampler in (
    ("before", reference),
    ("after DPO", learner.save_weights_and_get_sampling_client().result()),
):
    result = evaluate(sampler, tokenizer, environment, heldout, max_tokens=40)
    measured(f"{name}: held-out accuracy", result.accuracy, "%")
    measured(f"{name}: worked answers", result.worked_share, "%")
    accuracies.append(result.accuracy)
band("DPO helped", accuracies[1] > accuracies[0] + 0.1)

# %% [markdown] id="dpo-lesson"
# Look at the curve of the chosen answers again: they were chosen, and they did not gain. At first
# their curve wanders about zero; later they are mostly rarer than before training, too. The
# rejected ones only fell much further. DPO asks for a *gap*, and a gap opens just as well if both
# fall and the rejected ones fall faster. Nearly every word of a rejected answer ("The answer is
# ...") stands in the chosen one, too, so what pushes it down pulls there as well. (Each point of
# the curves is another batch of eight pairs, so they tremble.) The accuracy rises a little, because
# every answer now shows its working. But compare the shares above: before, there were more than
# half as many right answers as worked ones, now about a quarter as many. DPO has learned how the
# chosen answers *look*, and not to add better.
#
# GRPO would have taken one step with these answers, and then asked the model anew. DPO stays with
# what is on file: cheaper, simpler, and blind to what the model does by now.

# %% id="progress"
progress()

# %% [markdown] id="take-away"
# ## What to take away
#
# - KL is estimated from the policy's own samples; $d$ is reference minus policy. k3 is right on
#   average and never negative.
# - A KL penalty is a leash. It costs reward where what pays is far from the start.
# - Ratio not 1 before the first step: sampler and trainer disagree. Stop and find out why.
# - A batch grows old by the model's movement. Watch what it is worth.
# - Divide by a constant, never by a number that the model can choose.
# - DPO needs pairs and no sampling. It learns from what is on file, and only from that.
#
# ## What next
#
# [08 Evaluate and scale](08_evaluate.ipynb): is the model better, or was it luck?
