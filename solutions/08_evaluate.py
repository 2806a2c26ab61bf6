# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown] id="title"
# # 08 · Evaluate and scale: better, or lucky?
#
# A model answered 31 of 60 questions before training and 34 after. Did it learn something? Most
# announcements of progress stop there. This notebook goes on from there.
#
# After this notebook you can
#
# - say what an accuracy is an estimate of, and how far luck may carry it;
# - choose between greedy answers, sampled answers and pass@k, and compute pass@k without bias;
# - compare two models on the same problems, and decide what may be claimed;
# - look for what training took away;
# - say what a larger run would cost, and send the same cells to a larger machine.
#
# You need lessons 03 and 05.

# %% [markdown] id="card"
# The builder writes the measured card here.

# %% id="connect"
from course_lib import connect, check, hint, progress, preset

service = connect()

# %% [markdown] id="candidates-note"
# ## Three models to judge
#
# We judge three models. `SFT` is where GRPO starts. `nudged` is the same model after two tiny
# steps that hardly change it: whatever looks different about it is luck. `GRPO` has had some steps
# of reinforcement learning.

# %% id="settings"
from dataclasses import replace

PROBLEMS = 120  # held-out problems; an accuracy is a mean over them
SAMPLES = 4  # answers to each
MAX_TOKENS = 40  # per answer
rl_config = replace(preset().rl, steps=15, prompts_per_step=8, save_every=0)
rl_config = replace(rl_config, learning_rate=1e-3, max_tokens=MAX_TOKENS)
nudge_config = replace(rl_config, steps=2, learning_rate=1e-6)

# %% id="train-candidates"
from course_lib.environments import sums_environment
from course_lib.grpo import train_grpo
from course_lib.lessons import band, measured, quick_sft, quote

client, tokenizer, _ = quick_sft(service)
environment = sums_environment()
start = client.save_state("after-sft").result().path
nudged = service.create_training_client_from_state(start).result()
train_grpo(nudged, environment, nudge_config, tokenizer=tokenizer)
trained = service.create_training_client_from_state(start).result()
train_grpo(trained, environment, rl_config, tokenizer=tokenizer)
clients = {"SFT": client, "nudged": nudged, "GRPO": trained}
samplers = {
    name: each.save_weights_and_get_sampling_client().result() for name, each in clients.items()
}

# %% [markdown] id="accuracy-question"
# ## What is an accuracy?
#
# There are 729,000 sums of three two-digit numbers, and one in ten is held out. We ask a few of
# those, and every answer is drawn at random as well. What we get is an *estimate*: ask others, or
# the same again, and it changes.
#
# **Predict.** The same model, the same 60 problems, four different seeds of sampling. How far
# apart are the best and the worst accuracy? One point, five, ten?

# %% id="four-seeds"
from course_lib.evaluation import evaluate

heldout = environment.heldout(PROBLEMS, seed=0)


def judge(name, problems=heldout, **options):
    """One of the three models on held-out problems."""
    return evaluate(
        samplers[name], tokenizer, environment, problems, max_tokens=MAX_TOKENS, **options
    )


again = [judge("GRPO", heldout[:60], seed=seed).accuracy for seed in range(4)]
measured("lowest of four", min(again), "%")
measured("highest of four", max(again), "%")
band("The same model gave different accuracies", max(again) > min(again))

# %% [markdown] id="interval-question"
# ## How far may luck carry it?
#
# Nothing had changed between the four, and still they lie some points apart. New problems would
# have spread them further. If we could draw new problems two thousand times, we would see how far.
# We cannot, but the problems that we have stand in for the population: draw 60 of the 60 *with
# replacement*, two thousand times, and look at the means. That is the **bootstrap** (Efron 1979).
# The middle 95 % of the means is an interval for the accuracy.

# %% id="interval-source"
from course_lib.metrics import bootstrap_interval
from course_lib.widgets import show, show_source

show_source(bootstrap_interval)

# %% [markdown] id="interval-probe-note"
# Three probes. The last one is wrong on purpose: ten problems, all answered rightly. **Predict**
# its interval before you run the cell.

# %% id="interval-probe"
for right, n in ((5, 10), (50, 100), (10, 10)):
    low, high = bootstrap_interval([1.0] * right + [0.0] * (n - right))
    print(f"{right} of {n} right: {low:.2f} to {high:.2f}")

# %% [markdown] id="interval-answer"
# Ten times the problems make the interval about three times narrower ($\sqrt{10}$). And ten out of
# ten gives an interval of no width, as if the model could not fail: the bootstrap cannot imagine
# what it has not seen. Do not believe it at 0 % or 100 %. There the **rule of three** helps: if all
# $n$ were right, the model may still be wrong $3/n$ of the time (then all would come out right in
# $(1 - 3/n)^n$, about one case of twenty). For 10 of 10 that is 30 %.
#
# The model of the first paragraph had 31 of 60 right, then 34. With 60 problems such an interval is
# some 25 points wide, and the five points that were gained lie well inside it.

# %% id="interval-figure"
from course_lib.plots.groups import intervals_figure

found = {  # each model with a sampling seed of its own: one seed for all would share its luck
    name: judge(name, samples=SAMPLES, seed=seed) for seed, name in enumerate(samplers)
}
sizes = (15, 30, 60, 120)
shares = [sum(each.correct) / SAMPLES for each in found["GRPO"].records]
values = [sum(shares[:n]) / n for n in sizes]
intervals = [bootstrap_interval(shares[:n]) for n in sizes]
names = [f"{n} problems" for n in sizes]
show(intervals_figure(names, values, intervals, "One model, more problems", "accuracy (share)"))
widths = [high - low for low, high in intervals]
band("More problems, narrower interval", widths[-1] < widths[0])

# %% [markdown] id="greedy-question"
# ## Greedy or sampled?
#
# At temperature 0 the likeliest token is taken every time: **greedy**. At temperature 1 the model
# is sampled as it was trained. **Predict** which of the two is better for the SFT model, and which
# for the GRPO model.

# %% id="greedy-run"
for name in ("SFT", "GRPO"):
    greedy = judge(name, temperature=0.0)
    measured(f"{name}: sampled", found[name].accuracy, "%")
    measured(f"{name}: greedy", greedy.accuracy, "%")
    measured(f"{name}: worked answers, sampled", found[name].worked_share, "%")
    measured(f"{name}: worked answers, greedy", greedy.worked_share, "%")

# %% [markdown] id="greedy-lesson"
# Neither is "the" accuracy. Greedy decoding follows the habit of the majority. After SFT most
# answers are given at once, so greedy decoding gives nearly all of them at once, and loses the
# worked answers that are right. After GRPO the habit is the better way, and greedy decoding takes
# away the slips. Report both, or say which one you mean.
#
# ## At least one of k
#
# Sometimes one right answer among several is enough: a program that a test will check, a proof that
# a verifier will read. pass@k is the chance that at least one of $k$ answers is right. With $n$
# answers, $c$ of them right, Chen et al. (2021, eq. 1) estimate it without bias:
#
# $$\text{pass@}k = 1 - \binom{n-c}{k} \Big/ \binom{n}{k}$$
#
# In words: one minus the chance that all $k$ are taken from the wrong ones.


# %% id="write-pass-at-k" exercise="08.1"
def pass_at_k(n, c, k):
    """n answers were sampled, c of them are right; the unbiased pass@k."""
    import math

    return 1 - math.comb(n - c, k) / math.comb(n, k)


# %% id="check-pass-at-k"
pass_at_k = check("08.1", pass_at_k)

# %% [markdown] id="pass-probe-note"
# Why not simply $1 - (1 - c/n)^k$? Here is a model that is right half of the time. We draw 4
# answers, very often, and estimate pass@4 both ways. The truth is $1 - 0.5^4 = 0.9375$.

# %% id="pass-probe"
import random

rng = random.Random(0)
counts = [sum(rng.random() < 0.5 for _ in range(4)) for _ in range(4000)]
unbiased = sum(pass_at_k(4, c, 4) for c in counts) / len(counts)
plugged_in = sum(1 - (1 - c / 4) ** 4 for c in counts) / len(counts)
print(f"truth 0.938, unbiased {unbiased:.3f}, with c/n put in for p {plugged_in:.3f}")

# %% id="pass-figure"
from course_lib.plots.curves import curves_figure

ks = list(range(1, SAMPLES + 1))
curves = {}
for name in ("SFT", "GRPO"):
    rights = [int(sum(each.correct)) for each in found[name].records]
    curves[name] = [sum(pass_at_k(SAMPLES, c, k) for c in rights) / len(rights) for k in ks]
show(curves_figure(curves, "One of k answers is right", "pass@k", "k", steps=ks))
gap = [after - before for before, after in zip(*curves.values(), strict=True)]
band("The lead of GRPO is smaller at the largest k", gap[-1] < gap[0])

# %% [markdown] id="paired-question"
# GRPO's lead shrinks as $k$ grows: with four answers the SFT model is right about three times as
# often as with one. GRPO has above all made a habit of what SFT could do now and then.
#
# ## Better than what? The paired comparison
#
# Two intervals that overlap can still belong to two models of which one is surely better. Overlap
# asks too much in any case, and here there is more to gain: both were asked the *same* problems.
# Hard problems are hard for both. So look at each problem's **gain**, after minus before, and only
# then take the mean.
#
# The mean gain is an estimate, too. Its **standard error** says how far such a mean spreads from
# one set of $n$ problems to another: $s / \sqrt{n}$, with $s$ the standard deviation of the gains
# (the one that divides by $n - 1$).
#
# **Write it**: the mean gain, and its standard error.


# %% id="write-paired" exercise="08.2"
def paired_difference(before, after):
    """(mean gain, standard error of that mean); scores of two models, problem by problem."""
    import statistics

    gains = [b - a for a, b in zip(before, after, strict=True)]
    return statistics.mean(gains), statistics.stdev(gains) / len(gains) ** 0.5


# %% id="check-paired"
paired_difference = check("08.2", paired_difference)

# %% id="paired-run"
from course_lib.comparison import compare

scores = {
    name: [sum(each.correct) / SAMPLES for each in result.records] for name, result in found.items()
}
for name in ("nudged", "GRPO"):
    gain, error = paired_difference(scores["SFT"], scores[name])
    measured(f"{name} minus SFT, gain", 100 * gain, "points")
    measured(f"{name} minus SFT, standard error", 100 * error, "points")
verdicts = {name: compare(found["SFT"], found[name]).interval for name in ("nudged", "GRPO")}
band("GRPO's interval lies above 0", verdicts["GRPO"][0] > 0)
band("nudged's interval holds 0", verdicts["nudged"][0] <= 0 <= verdicts["nudged"][1])

# %% id="paired-figure"
names = list(verdicts)
gains = [compare(found["SFT"], found[name]).difference for name in names]
intervals = list(verdicts.values())
title = "Gain over SFT on the same problems"
show(intervals_figure(names, gains, intervals, title, "gain (share of problems)", zero=True))

# %% [markdown] id="luck-note"
# ## Could this be luck?
#
# The widget takes some of our problems and asks the question of them alone. Begin with all 120,
# then take 20, and change the seed. **Predict**: with 20 problems, does the nudged model ever look
# better, or worse, for certain? Then put `"GRPO"` in its place, run the cell again, and ask whether
# it ever looks as if it had learned nothing.

# %% id="luck-widget"
from course_lib.widgets import luck_explorer

luck_explorer(scores["SFT"], scores["nudged"]).show()

# %% [markdown] id="decide-note"
# With 20 problems nearly every seed leaves it open. Where one makes the nudged model look better or
# worse for certain (with 10 problems you may find one, too), it is neither: an interval of 95 %
# misses about once in twenty times. GRPO looks better with every seed; a gain of that size needs no
# more than ten problems to show.
#
# ## What may be said?
#
# Four runs report the 95 % interval of their gain. Decide for each: `"better"`, `"worse"` or
# `"no evidence"`.

# %% id="decide-runs"
runs = {"A": (-0.03, 0.11), "B": (0.05, 0.24), "C": (-0.11, 0.03), "D": (-0.25, -0.04)}
for name, (low, high) in runs.items():
    print(f"run {name}: {low:+.2f} to {high:+.2f}")

# %% id="decide" exercise="08.3"
decided = {"A": "no evidence", "B": "better", "C": "no evidence", "D": "worse"}

# %% id="check-decide"
decided = check("08.3", decided, intervals=runs)

# %% [markdown] id="decide-lesson"
# "No evidence" is not "no difference": with more problems run A may turn out better. And whoever
# tries twenty settings and reports the best has, on average, one interval of 95 % that misses by
# luck alone. Keep a second set of problems for the setting that won.
#
# ## What was lost?
#
# GRPO was paid for sums only. Does the model still know the village? We ask it what SFT taught:
# questions about people. **Predict**: unchanged, a little worse, or gone?

# %% id="village-environment"
from course_lib.conversations import Message
from course_lib.environments import Environment, Problem
from course_lib.rewards import Score
from course_lib.world import fact_question


def village_problems(n, seed):
    """Questions about people, each with the word that a true answer must hold."""
    rng, problems = random.Random(seed), {}
    while len(problems) < n:
        villager, fact, question = fact_question(rng)
        answer = getattr(villager, fact)
        problems[question] = Problem((Message("user", question),), answer, "fact", question)
    return list(problems.values())


def states_fact(problem, text):
    """1 if the right word is in the answer."""
    return Score(float(problem.answer in text), {}, "the word is there or not")


village = Environment("village", village_problems, village_problems, states_fact)

# %% id="village-run"
questions = village.heldout(60, 0)
asked = {"max_tokens": MAX_TOKENS, "samples": SAMPLES}
old_skill = {
    name: evaluate(samplers[name], tokenizer, village, questions, seed=seed, **asked)
    for seed, name in enumerate(("SFT", "GRPO"))
}
for name, result in old_skill.items():
    measured(f"{name}: village questions answered truly", result.accuracy, "%")
change = compare(old_skill["SFT"], old_skill["GRPO"])
quote(str(change), "GRPO against SFT, in the village")
band("Nothing says that it knows the village better", change.interval[0] <= 0)

# %% [markdown] id="village-lesson"
# The last number, p, is an exact sign test: if the questions that changed were coins, how often
# would they fall at least so unevenly?
#
# A regression test like this one costs a minute and belongs in every evaluation: what you do not
# measure, training is free to give away. How much it gives away is a matter of luck as well: of
# five such runs with different seeds three lost clearly (10, 13 and 18 points), and two could not
# be told from no change (`data/results/README.md`, "What GRPO on sums costs elsewhere").
#
# The same page shows what the leash of lesson 07 buys. With a KL penalty of 0.3 the village lost 4
# points on average instead of 10, and the sums reached 45 % instead of 61 %. But half as many steps
# without any leash did about the same: 5 points lost, 48 % right. With a penalty of 1 the village
# kept nearly all, and next to nothing was learned about sums. On average, whatever learned more of
# the sums lost more of the village. What people do about it besides: mix some of the old data into
# the training ("replay"), or let both tasks stand in one environment, each with its own reward.
#
# Read the whole interval. Where it holds 0 there is no evidence of a loss, but a loss as large as
# its lower end may have passed unseen. With one answer to each question instead of four, that is
# what happened to us in this very cell.
#
# But see how small the old skill was: after eighty steps of SFT only about one village question in
# five is answered truly, so there was little to lose. A regression test is worth as much as the
# skill that it watches. Look at the accuracy before as well as at the change.
#
# ## Presets: how large is a real run?
#
# A preset is a set of sizes, never of cells. `posttrain all` grows with it, and so do lessons 00
# and 05 (`COURSE_PRESET`); most other lessons fix their own sizes, so that they stay short. The
# three are:

# %% id="presets"
for name in ("tiny", "quick", "full"):
    config = preset(name)
    rollouts = config.rl.steps * config.rl.prompts_per_step * config.rl.group_size
    sft = f"SFT batches of {config.sft.batch_size}, {config.sft.epochs} epoch(s)"
    print(f"{name:>5}: {sft}; GRPO {config.rl.steps} steps, {rollouts:,} rollouts")

# %% [markdown] id="cost-question"
# ## What would it cost?
#
# Hosted services charge by the token, and they know three kinds: tokens **prefilled** (prompts that
# are read), **sampled**, and **trained** on. In GRPO a prompt is prefilled once for its whole
# group, and the trainer reads prompt and completion of every rollout. (If no group is dead: the
# loop leaves dead ones out, so the third number is the most that it can be.) Count them for a whole
# run of `steps` steps, each with `prompts` prompts.


# %% id="write-cost" exercise="08.4"
def run_tokens(steps, prompts, group_size, prompt_tokens, completion_tokens):
    """(prefilled, sampled, trained) tokens of the whole run; lengths are means."""
    groups = steps * prompts
    rollouts = groups * group_size
    return (
        groups * prompt_tokens,
        rollouts * completion_tokens,
        rollouts * (prompt_tokens + completion_tokens),
    )


# %% id="check-cost"
run_tokens = check("08.4", run_tokens)

# %% id="cost-run"
rl = preset("quick").rl
prefilled, sampled, taught = run_tokens(rl.steps, rl.prompts_per_step, rl.group_size, 16, 28)
print(f"GRPO at quick: {prefilled:,} prefilled, {sampled:,} sampled, {taught:,} trained on")
print(f"The trainer reads {taught / sampled:.1f} tokens for every token sampled.")

# %% [markdown] id="cost-lesson"
# That is a count of tokens. If no group is dead, the trainer's share is the largest; with these
# lengths it falls behind sampling once more than a third of the groups are dead. Of the *time*
# sampling takes most: it goes token by token. Multiply by the price list of the service you use.
# Before a hosted run `posttrain sft`, `rl` and `all` show such an estimate and ask; in a notebook
# `connect()` refuses until you write `connect(confirm=True)`. Nothing here has to ask: these cells
# cost electricity.
#
# ## The same cells, somewhere else
#
# Where the calls go is decided in one place, in this order: the argument of `connect`, else
# `COURSE_BACKEND`, else `TINKER_BASE_URL` (any Tinker-compatible server or cluster), else
# `TINKER_API_KEY` (hosted Tinker), else the embedded engine.

# %% id="source-choose"
from course_lib.client import choose

show_source(choose)

# %% [markdown] id="second-server-note"
# Let us do it: we start a Tinker server of our own in a *second process* and send the same calls
# there, by its address. A cluster differs in the address only. (Tinker-compatible servers for
# clusters: SkyRL on Ray, Open-RL on Kubernetes, TuFT. This course has run against none of them.)

# %% id="second-server"
import os
import subprocess
import sys
import tempfile

folder = tempfile.mkdtemp()
command = [sys.executable, "-m", "course_lib.cli", "engine", "--store", folder]
server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
address = dict(server.stdout.readline().strip().split("=", 1) for _ in range(2))
os.environ["TINKER_API_KEY"] = address["TINKER_API_KEY"]
remote = connect(address["TINKER_BASE_URL"], quiet=True)
print("The back end is reached by its", remote.backend)

# %% id="second-server-step"
there, _, _ = quick_sft(remote, steps=5)
sampler = there.save_weights_and_get_sampling_client().result()
from course_lib.widgets.chat import ask

question = (Message("user", "Where does Mira live?"),)
quote(ask({"there": sampler}, tokenizer, question)["there"], "five steps, in the other process")
runs_there = remote.rest.list_training_runs().result().training_runs
band("The other process trained a model", len(runs_there) == 1)

# %% id="second-server-stop"
server.terminate()
server.wait(timeout=20)
os.environ.pop("TINKER_API_KEY")
print("The second server has stopped.")

# %% id="progress"
progress()

# %% [markdown] id="take-away"
# ## What to take away
#
# - An accuracy is an estimate. Give its interval and the number of problems.
# - Greedy, sampled and pass@k answer three different questions.
# - Compare models on the same problems, by the gain on each. An interval that holds 0 is no
#   evidence.
# - Measure what you did not train, too.
# - Cost is tokens: prefilled, sampled, trained. The trainer's share of them is the largest while
#   few groups are dead; sampling takes the most time.
# - Another back end is another address, and the same cells.
#
# ## What next
#
# [09 Deploy](09_deploy.ipynb): from a checkpoint to an endpoint that others can call.
