# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown] id="title"
# # 10 · Clinic and capstone
#
# Most of the work in post-training is to find out why a run does not do what it should. The first
# half of this notebook is a clinic with eight patients, and the list of troubles that everybody
# meets. The second half is your own project from the first row of data to a model that is judged.
#
# After this notebook you can
#
# - tell eight kinds of broken RL run apart by their curves, and say what to try;
# - tell a rise from noise;
# - find what is wrong with a data file, a request that is too large, a reward without spread, and a
#   merge that is not the model;
# - train on data of your own, with a reward of your own, and report the result honestly.
#
# You need lessons 05, 07 and 08.

# %% [markdown] id="card"
# The builder writes the measured card here.

# %% id="connect"
from course_lib import connect, check, hint, progress, preset

service = connect()

# %% [markdown] id="clinic-note"
# # Part 1: the clinic
#
# Eight runs were broken on purpose, each in one way. What you see are **recordings**: the metrics
# of real runs of 30 steps, kept in `data/recordings`. The command that makes each of them again is
# shown when you have given your diagnosis. They all start from the same SFT checkpoint (but one:
# find out which) as the healthy run, which is drawn in grey.
#
# These are the kinds:
#
# | kind | what was done |
# | --- | --- |
# | `ratio_off` | sampler and trainer disagree about the probabilities |
# | `dead_groups` | no group has two different rewards, from the start |
# | `length_explosion` | answers earn by being long |
# | `entropy_collapse` | one and the same reply earns more than any right one |
# | `hacked_reward` | the reward pays for something else than right answers |
# | `kl_runaway` | the steps are far too large |
# | `tiny_rate` | the steps are far too small |
# | `flat_reward` | the reward has nothing to do with the answer |
#
# First the healthy run by itself, in eight curves: the reward; the share of right answers; the
# share of dead groups; the largest |ratio - 1|; the KL from the start; the entropy (how unsure the
# model is of its next token: 0 is no doubt); the length of the answers; the share of them that end.
# **Before you look**: which should rise in a run that does well, which should fall, and which
# should stay where it is?

# %% id="healthy-figure"
from course_lib.plots.clinic import clinic_figure
from course_lib.recordings import KINDS, recording, ward
from course_lib.widgets import show, show_source

healthy = recording("healthy").rows
show(clinic_figure(healthy, healthy, "Recording of a healthy run"))

# %% [markdown] id="healthy-lesson"
# The reward is the share of right answers, so the first two panels agree. Groups die in the end
# because nearly every answer is right: *late* dead groups are a sign of success or of ruin, and
# only the reward tells which. The ratio stays at 1 up to rounding. The KL rises by one or two nats
# and stops. Entropy is $-\sum p \ln p$ over the next token, 0 when the model has no doubt. It
# falls: the model grows sure of itself. Answers become longer as it learns to
# show its working, and all of them end.
#
# ## The patients
#
# Write down a kind for each run before you go on. Eight runs, eight kinds, each once.

# %% id="patients-abcd"
runs = ward("clinic")
for letter in "ABCD":
    show(clinic_figure(runs[letter].rows, healthy, f"Run {letter} (recording)"))

# %% id="patients-efgh"
for letter in "EFGH":
    show(clinic_figure(runs[letter].rows, healthy, f"Run {letter} (recording)"))

# %% [markdown] id="diagnose-note"
# **Your diagnosis.** Six of eight are enough to pass.

# %% id="diagnose-runs" exercise="10.1"
diagnosis = {
    "A": "length_explosion",
    "B": "dead_groups",
    "C": "flat_reward",
    "D": "hacked_reward",
    "E": "kl_runaway",
    "F": "tiny_rate",
    "G": "ratio_off",
    "H": "entropy_collapse",
}

# %% id="check-diagnosis"
diagnosis = check("10.1", diagnosis, runs=runs)

# %% [markdown] id="reveal-note"
# ## What the rules say
#
# `posttrain diagnose runs/...` reads the same metrics and names the likeliest cause in a sentence;
# every report of `posttrain all` ends with it. Compare it with yours. Below each sentence stands
# what was really done, and the command that does it again.

# %% id="reveal-runs" reveals="10.1"
from course_lib.diagnosis import diagnose

named = {letter: diagnose(run.rows) for letter, run in runs.items()}
for letter, run in runs.items():
    print(f"{letter}  {named[letter][0]}")
    print(f"   Done to it: {run.how}.")
    print(f"   {run.command}")
agreed = sum(named[letter][0].kind == run.kind for letter, run in runs.items())
print(f"The rules name {agreed} of 8; the healthy run: {diagnose(healthy) or 'nothing found'}")

# %% [markdown] id="coin-surprise"
# One surprise in run C: a coin decides what is paid, and still the share of right answers rises for
# a while. So a rising accuracy does not prove that the *reward* is sound. We do not know why it
# rose. A coin has no direction on average, yet worked answers went from one in four to nine in ten:
# a random reward makes a policy drift, and one run is one drift. (It is tossed once per text, so
# the same answer is always paid the same.) The flat reward gives the coin away.
#
# And one in run G: by its reward it is as healthy as the healthy run. The ratio panel tells, and at
# the first step. (Who looks closely sees it in the KL, too: 0.19 nats before anything was trained,
# where it must be 0.) Part of that reward is the temperature: at 0.5 a model that has learned the
# sums slips less often.

# %% [markdown] id="rise-question"
# ## Did it rise, or was that noise?
#
# Most rules ask whether a curve has risen. Its last value minus its first answers with luck: each
# is the mean of 64 rewards. So the rules compare means of a fifth of the steps, and ask how far
# noise alone would carry those: `rise` is the late mean minus the early one, and `noise` its
# standard error, $\hat\sigma\sqrt{2/w}$ with $w$ steps in a mean. (`fall` begins at the first step
# alone, since a policy can be spoilt before a window is full; its error is larger for it. `best` is
# the best mean anywhere.) The noise of one step can be read off *neighbouring* steps, whether or
# not there is a trend (von Neumann 1941):
#
# $$\hat\sigma^2 = \frac{1}{2(n-1)}\sum_{t=1}^{n-1} (x_{t+1} - x_t)^2$$
#
# Here are two of the rules.

# %% id="source-rules"
from course_lib.diagnosis import hacked_reward, kl_runaway

show_source(hacked_reward, kl_runaway)

# %% [markdown] id="rise-probe-note"
# A probe on two curves that we make: one that only trembles, and one with a trend below the same
# trembling. The last column is wrong on purpose: the standard deviation of the whole curve taken
# for noise. **Predict**: for which curve does it go wrong?

# %% id="rise-probe"
import random
from itertools import pairwise

rng = random.Random(0)
tremble = [rng.gauss(0, 0.05) for _ in range(30)]
trend = [value + step / 40 for step, value in enumerate(tremble)]
print("curve     last - first   rise of means   noise by neighbours   standard deviation")
for name, xs in (("tremble", tremble), ("trend", trend)):
    jumps = [(b - a) ** 2 / 2 for a, b in pairwise(xs)]
    sigma, mean = (sum(jumps) / 29) ** 0.5, sum(xs) / 30
    spread = (sum((x - mean) ** 2 for x in xs) / 30) ** 0.5
    rise = sum(xs[-6:]) / 6 - sum(xs[:6]) / 6
    print(f"{name:8} {xs[-1] - xs[0]:13.3f} {rise:15.3f} {sigma:21.3f} {spread:20.3f}")

# %% [markdown] id="rise-lesson"
# Both curves carry the same noise, and the neighbours say so. The standard deviation counts the
# trend itself as noise: the steeper a curve rises, the noisier it is said to be. So no rise,
# however steep, could ever look like many times the noise.
#
# ## How far can the rules be trusted?
#
# The thresholds were set on the recordings that you saw. Whether they hold for other seeds is a
# question that only other seeds can answer. This table is a recording, too; its command stands
# below it.

# %% id="rules-scored"
import json

from course_lib.config import find_file
from course_lib.lessons import band, measured, quick_sft, quote

result = json.loads(find_file("data/results/diagnosis.json").read_text(encoding="utf-8"))
unseen = result["unseen"]
for kind, right in unseen["by_kind"].items():
    quote(f"{right} runs named right", kind)
print(f"A recording, made by: {result['command']}")
measured("broken runs named right", unseen["named_right"] / unseen["broken_runs"], "%")
band("A healthy run was accused", unseen["accused"] > 0)

# %% [markdown] id="rules-lesson"
# The mistakes teach more than the score. `entropy_collapse` is often called `hacked_reward`: until
# the entropy has really fallen, all there is to see is a reward that rises while right answers
# fall, and that is true as well. And after a weak start (one of the seeds has hardly a right answer
# at step 1) there is nothing left that could fall, so the rules say nothing. A rule that is silent
# has not said that all is well.
#
# ## One run, broken here and mended here
#
# Recordings are for looking. Now take a run in hand: the ordinary GRPO of lesson 05, with a
# learning rate that somebody took from an SFT sweep such as lesson 02's, where it lies between the
# best two: `1e-2`. **Predict**: what does the reward do, and which rule speaks?

# %% id="quick-sft"
from dataclasses import replace

from course_lib.environments import environment_from_file, sums_environment
from course_lib.grpo import train_grpo

client, tokenizer, _ = quick_sft(service)
start = client.save_state("after-sft").result().path
reference = client.save_weights_and_get_sampling_client().result()
sound = replace(preset().rl, steps=9, prompts_per_step=8, group_size=8, max_tokens=40)
sound = replace(sound, learning_rate=1e-3, schedule="constant", save_every=0)


# %% id="break-live"
def run_grpo(config):
    """GRPO from the checkpoint after SFT; the reference is there only to measure the KL."""
    learner = service.create_training_client_from_state(start).result()
    sums = sums_environment()
    return train_grpo(learner, sums, config, tokenizer=tokenizer, reference=reference)


broken = run_grpo(replace(sound, learning_rate=1e-2))
found = diagnose(broken.metrics)
quote("; ".join(str(each) for each in found[:1]) or "nothing found", "diagnose")
band("The rules name kl_runaway", bool(found) and found[0].kind == "kl_runaway")

# %% [markdown] id="mend-note"
# The sentence ends with what to try. The cheapest is the rate. Note *where* the mended run starts:
# at the checkpoint before the ruin. A model that has run away does not come back; in all its groups
# no answer is right, so there is nothing left to learn from. (Four of the eight rules,
# `hacked_reward` and `flat_reward` among them, keep silent below 20 steps. Over nine, "nothing
# found" says only that it did not run away, start dead, grow endless answers or get its ratios
# wrong.)

# %% id="mend-live"
from course_lib.plots.curves import curves_figure

mended = run_grpo(sound)
rewards = {"rate 1e-2": broken.rewards, "rate 1e-3": mended.rewards}
show(curves_figure(rewards, "The same problems, one number changed", "reward (mean)"))
band("Mended: it learns", sum(mended.rewards[-3:]) / 3 > mended.rewards[0] + 0.1)
band("Nothing is found any more", not diagnose(mended.metrics))

# %% [markdown] id="list-note"
# # Part 2: four troubles that everybody meets
#
# Each with its symptom, really made, and its remedy.
#
# ## "My data file is refused"
#
# `data/broken.jsonl` holds two dozen kinds of fault, as people and programs make them, with a few
# sound rows between. `posttrain validate FILE` names every line; here is the same function.
# **Before you run it**: a trailing comma, a role called `bot`, a row that stands there twice,
# Windows line ends: which of these would stop training, and which would let it run and spoil it?

# %% id="jsonl-faults"
from course_lib.validation import validate_file

report = validate_file(find_file("data/broken.jsonl"), tokenizer, max_length=1024)
shown = {}
for fault in report.faults:
    shown.setdefault(fault.kind, fault)
for fault in list(shown.values())[:12]:
    print(f"line {fault.line:2}, {fault.severity}: {fault.finding}; {fault.remedy}")
print(f"{report.errors} errors, {report.warnings} warnings, {len(shown)} kinds; fit: {report.ok}")

# %% [markdown] id="jsonl-lesson"
# The errors are the friendly ones: they stop you. A warning (an unknown field; further down in the
# file, a row that stands there twice) trains without complaint. And a prompt that also stands in
# the held-out file is found only by who asks: `posttrain validate FILE --against
# data/heldout.jsonl`. The remedy is the habit: validate before every run.
#
# ## "Out of memory"
#
# This is what it looks like on a processor. We ask for the attention scores of a batch of 32
# conversations of a million tokens, 8 heads each: an array that no machine has room for, so that
# the refusal comes at once and does no harm.

# %% id="memory-symptom"
import torch

try:
    torch.empty(32, 8, 1_000_000, 1_000_000)
except RuntimeError as error:
    quote(str(error).split(". ")[-1].splitlines()[0], type(error).__name__)
for tokens in (1_000, 4_000, 16_000):
    print(f"32 x 8 heads x {tokens:6} tokens squared: {32 * 8 * tokens**2 * 4 / 1e9:6.0f} GB")

# %% [markdown] id="memory-remedy-note"
# Four times the length is sixteen times the memory, if the scores are written down (kernels such
# as FlashAttention, Dao et al. 2022, avoid just that); twice the batch is only twice as much. So
# look at the *longest* conversation first. A guard is `max_length`: a longer one is refused by
# name, never cut in silence. And the service refuses what is longer than the model's context.

# %% id="too-long"
from course_lib import CourseError
from course_lib.batches import make_datum
from course_lib.lessons import shipped_conversations
from course_lib.rendering import Rendered, render_conversation

long = Rendered([5] * 1500, [0.0] + [1.0] * 1499, "row 17")
try:
    make_datum(long, max_length=1024)
except CourseError as error:
    print(f"make_datum refuses: {error}")
try:
    client.forward([make_datum(long)], "cross_entropy").result()
except Exception as error:
    quote(str(error).split(" for self")[0], "the service refuses")

# %% [markdown] id="halves-question"
# If the batch itself is too large, send it in parts. The losses are *sums*, and gradients add up
# until `optim_step`. **Predict**: are two halves the same as the whole, or nearly?

# %% id="halves"
import tinker

data = shipped_conversations(limit=16)
datums = [make_datum(render_conversation(each, tokenizer)) for each in data]


def gradient_norm(parts):
    """The gradient's length after these parts, each a forward_backward; and the summed loss."""
    learner = service.create_training_client_from_state(start).result()
    calls = [learner.forward_backward(part, "cross_entropy") for part in parts]
    loss = sum(call.result().metrics["loss:sum"] for call in calls)
    update = learner.optim_step(tinker.AdamParams(learning_rate=1e-4)).result()
    return loss, next(value for name, value in update.metrics.items() if "grad_norm" in name)


whole, halves = gradient_norm([datums]), gradient_norm([datums[:8], datums[8:]])
measured("gradient of the whole batch", whole[1])
measured("gradient of two halves", halves[1])
same = all(abs(a - b) < 1e-3 * abs(a) for a, b in zip(whole, halves, strict=True))
band("Two halves are the whole, to rounding", same)

# %% [markdown] id="low-reward-question"
# ## "The reward stays low"
#
# A reward of 0 for everything is nearly always the *grader*. Here is one that people write:
# compare the text with the answer. We let it judge the answers of our model, whose share of right
# ones we know. **Predict** its mean reward, and the advantages.

# %% id="low-reward"
from course_lib.advantages import group_advantages
from course_lib.rewards import Score, correct
from course_lib.rollouts import sample_groups


def strict(problem, completion):
    """Compares the whole text with the number: a grader with a bug."""
    return Score(float(completion == problem.answer), {}, "compared")


problems = sums_environment().sample(6, seed=3)
options = {"group_size": 8, "max_tokens": 40, "seed": 1}
groups = sample_groups(reference, problems, tokenizer, **options, grade=strict)
quote(groups[0].rollouts[0].text, f"answer {groups[0].problem.answer}, the model")
print("rewards of the first group:   ", groups[0].rewards_G)
print("its advantages:               ", group_advantages(groups[0].rewards_G))
again = [[correct(g.problem, r.text).value for r in g.rollouts] for g in groups]
band("The library's grader finds right answers among the same texts", sum(map(sum, again)) > 0)
band("Some groups now differ within", any(len(set(row)) > 1 for row in again))

# %% [markdown] id="low-reward-lesson"
# A reward without spread has no gradient, however long you train. So, in this order: **read ten
# completions**; grade a right and a wrong one by hand; then look at dead groups; and only then at
# the learning rate. If the grader is right and every answer wrong, SFT comes first (lesson 05), or
# easier problems, or a reward with steps in between.
#
# ## "Deployment fails"
#
# The usual reason is a merge that is not the model: an adapter added to the wrong base. Here it is
# added *twice*: the merged model is taken for the base and merged into again. Every file is there,
# every shape fits, and the model even talks.

# %% id="merge-right"
import shutil
from pathlib import Path

from course_lib.export.base import BaseFolder, find_base
from course_lib.export.download import download_adapter
from course_lib.export.merge import merge_adapter
from course_lib.export.peft_layout import to_peft
from course_lib.export.verify import verify_merge

folder = Path("runs/clinic")
shutil.rmtree(folder, ignore_errors=True)
got = download_adapter(service, start, folder / "download")
base = find_base(got.base_model, got.model_folder)
adapter = to_peft(got.folder, base, folder / "adapter", got.base_model)
once = merge_adapter(base, adapter, folder / "once")
proof = verify_merge(base, adapter.path, once, got.probe)
measured("largest difference of a logit", proof.error)
band("The right merge passes", proof.error < proof.tolerance)

# %% id="merge-wrong"
wrong_base = BaseFolder(once)
twice = merge_adapter(wrong_base, adapter, folder / "twice")
try:
    verify_merge(wrong_base, adapter.path, twice, got.probe)
    refused = False
except CourseError as error:
    refused = True
    quote(f"{error.finding}; {error.remedy}", "refused")
band("The merge into the wrong base is refused", refused)

# %% [markdown] id="merge-lesson"
# Comparing the merged model with "base plus adapter" does not find this: both sides use the same
# wrong base. What finds it is a few logprobs that the *service* gave while the adapter was still in
# it. `posttrain deploy` asks for them by itself, and leaves no finished version when they differ.
#
# | symptom | look here first | remedy |
# | --- | --- | --- |
# | a JSONL file is refused | `posttrain validate FILE` | mend the line that it names |
# | out of memory | the longest conversation | `sft.max_length`, `rl.max_tokens`, part batches |
# | the reward stays low | ten completions, graded by hand | the grader, then SFT, then the rate |
# | deployment fails | what `posttrain deploy` says | the right base, a trained checkpoint |
#
# # Part 3: your own project
#
# The task below is small, so that it trains in seconds: a **till**. Somebody names three prices,
# the till says the sum, and if it has manners, it says thank you. The model has added numbers, but
# never pence, and it does not end with a thank-you. Everything that you would change for a task of
# your own stands in the next few cells.
#
# ## Three rows by heart
#
# Whatever the project, begin with the smallest run that can fail: can the model learn three rows by
# heart? If not, the mistake is in the data, the mask or the loop, and no larger run will mend it.
# **Write three conversations of your own**, as JSONL. (Words that the model has never read, "heron"
# or your own name, cost it more steps: then give it more epochs before you blame the loop.)

# %% id="write-own-rows" exercise="10.2"
my_rows = "\n".join(
    json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]})
    for q, a in (
        ("What is 12 + 30 + 11 pence?", "The answer is 53."),
        ("Is the till open?", "It is open. Thank you."),
        ("Who are you?", "I am the till of the mill."),
    )
)

# %% id="check-own-rows"
my_rows = check("10.2", my_rows)

# %% id="learn-by-heart"
from course_lib.conversations import load_conversations
from course_lib.sft import train_sft

project = Path("runs/capstone")
shutil.rmtree(project, ignore_errors=True)
project.mkdir(parents=True)
(project / "rows.jsonl").write_text(my_rows, encoding="utf-8")
mine = load_conversations(str(project / "rows.jsonl"))
band("Fit to train on", validate_file(project / "rows.jsonl", tokenizer).ok)
learner = service.create_training_client_from_state(start).result()
by_heart = replace(preset().sft, batch_size=3, epochs=80, eval_every=0, save_every=0)
by_heart = replace(by_heart, schedule="constant")
losses = train_sft(learner, mine, by_heart, tokenizer=tokenizer).losses
show(curves_figure({"loss": losses}, "Three rows, learned by heart", "loss (nats per token)"))
band("The loss is near zero", losses[-1] < 0.1)

# %% [markdown] id="own-data-note"
# ## Your own task, in ten lines
#
# Problems for RL are rows with a `prompt` and an `answer`. One row in ten is held out by itself.
# For SFT the same questions get a reply: half of them show the working, a third say thank you. The
# held-out questions get none.

# %% id="own-data"
rng = random.Random(0)
prices = {tuple(rng.randrange(11, 100) for _ in range(3)) for _ in range(600)}
rows = [
    {"prompt": f"What is {a} + {b} + {c} pence?", "answer": str(a + b + c)}
    for a, b, c in sorted(prices)
]
(project / "till.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
environment = environment_from_file(str(project / "till.jsonl"))
heldout = environment.heldout(60, seed=0)
print(f"{len(rows)} questions, {len(heldout)} of them held out to judge with.")
print(rows[0])


# %% [markdown] id="own-reward-note"
# ## Your own reward, in five lines
#
# A reward is a function of the problem and the completion. It gives a `Score`: what is paid, what
# it is made of, and why. Ours pays 0.7 for the right sum and 0.3 for manners. **Before you go on**:
# how would a model cheat it? What does it earn if it only says thank you?


# %% id="own-reward"
def till_reward(problem, completion):
    """0.7 for the right sum, 0.3 for one thank you."""
    right = correct(problem, completion).value
    thanks = float(completion.count("Thank you.") == 1)
    return Score(0.7 * right + 0.3 * thanks, {"right": right, "thanks": thanks}, "sum and manners")


for text in ("The answer is 42.", "The answer is 42. Thank you.", "Thank you.", "42 42 42"):
    problem = replace(heldout[0], answer="42")
    print(f"{till_reward(problem, text).value:.1f}  {text}")

# %% [markdown] id="own-before-note"
# ## Train it
#
# **Predict**: what does the model after the village's SFT say to "What is 24 + 18 + 31 pence?" Is
# there anything for RL to reinforce?

# %% id="own-before"
from course_lib.evaluation import evaluate


def judge(client, name, seed):
    """Accuracy on the held-out questions, four answers each, with its 95 % interval."""
    sampler = client.save_weights_and_get_sampling_client().result()
    asked = {"max_tokens": 44, "samples": 4, "seed": seed}  # a seed of its own: no shared luck
    found = evaluate(sampler, tokenizer, environment, heldout, **asked)
    measured(f"{name}: right answers", found.accuracy, "%")
    measured(f"{name}: 95 % interval, from", found.interval[0], "%")
    measured(f"{name}: 95 % interval, to", found.interval[1], "%")
    return found


untrained = judge(client, "before", seed=0)
quote(untrained.records[0].completions[0], untrained.records[0].prompt)
band("Fewer than one answer in seven is right", untrained.accuracy < 0.14)

# %% [markdown] id="own-before-answer"
# It answers in the right form, and nearly always with a wrong sum. So most groups would be dead,
# and RL would learn slowly from the few that are not. SFT on the till's own replies comes first.

# %% id="own-sft"
held = {problem.messages[-1].content for problem in environment.heldout(len(rows), seed=0)}
replies = []
for number, ((a, b, c), row) in enumerate(zip(sorted(prices), rows, strict=True)):
    words = f"{a} + {b} = {a + b}, {a + b} + {c} = {a + b + c}. " if number % 2 else ""
    words += f"The answer is {row['answer']}." + (" Thank you." if number % 3 == 0 else "")
    turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": words}]
    replies += [{"messages": turns}] if row["prompt"] not in held else []
(project / "replies.jsonl").write_text("".join(json.dumps(reply) + "\n" for reply in replies))
till = service.create_training_client_from_state(start).result()
short = replace(preset().sft, batch_size=16, epochs=2, max_steps=25, eval_every=0, save_every=0)
train_sft(till, load_conversations(str(project / "replies.jsonl")), short, tokenizer=tokenizer)
after_sft = judge(till, "after SFT", seed=1)

# %% id="own-rl"
config = replace(sound, steps=20, max_tokens=44)  # enough for all rules of diagnose
grown = train_grpo(till, environment, config, tokenizer=tokenizer, reward=till_reward)
curves = {name: [row[f"reward/{name}"] for row in grown.metrics] for name in ("right", "thanks")}
show(curves_figure(curves, "What the reward is made of", "share of answers"))
found = diagnose(grown.metrics)
print("diagnose:", found[0].kind if found else "nothing found")
thanks = curves["thanks"]
band("It has found its manners", sum(thanks[-3:]) / 3 > thanks[0] + 0.15)

# %% [markdown] id="own-judge-note"
# ## Is it better, and is that luck?
#
# The reward that it was trained on is no judge. We count right sums on the questions that neither
# SFT nor GRPO has seen, on the same ones for both, with an interval.

# %% id="own-judge"
from course_lib.comparison import compare
from course_lib.plots.groups import intervals_figure

after_rl = judge(till, "after GRPO", seed=2)
gain = compare(untrained, after_rl)
stages = {"before": untrained, "after SFT": after_sft, "after GRPO": after_rl}
values = [each.accuracy for each in stages.values()]
limits = [each.interval for each in stages.values()]
show(intervals_figure(list(stages), values, limits, "Held-out questions", "right answers (share)"))
quote(str(gain), "SFT and GRPO against the start")
quote(str(compare(after_sft, after_rl)), "of this GRPO's part, against SFT")
band("The interval of the gain lies above zero", gain.interval[0] > 0)
quote(after_rl.records[0].completions[0], after_rl.records[0].prompt)

# %% [markdown] id="certificate-note"
# The last line is one sampled answer, as it came. Where the working is right and the end is not, it
# is one of the wrong ones that the accuracy counts.
#
# ## Your certificate
#
# A result that others can believe names both accuracies, the gain in *points*, and how many
# problems stand behind it. **Write the function** that makes it from the scores of two models on
# the same problems.


# %% id="write-certificate" exercise="10.3"
def before_and_after(base, tuned):
    """Scores (0 to 1) of two models on the same problems, problem by problem, as a dict:

    "base" and "tuned" in per cent, "gain_points" in points, "problems" counted."""
    before, after = (100 * sum(scores) / len(scores) for scores in (base, tuned))
    return {"base": before, "tuned": after, "gain_points": after - before, "problems": len(base)}


# %% id="check-certificate"
before_and_after = check("10.3", before_and_after)

# %% [markdown] id="save-certificate-note"
# The score of a question is the share of its four answers that were right. So the gain is the one
# above, and so is its interval, in points as well. (It is the questions that are counted, not the
# answers: four answers to one question are not four questions.) Beside the numbers the certificate
# keeps what somebody needs to do it again: the checkpoint, the data and the seed.

# %% id="save-certificate"
checkpoint = till.save_state("till").result().path
scores = [
    [sum(record.correct) / len(record.correct) for record in found.records]
    for found in (untrained, after_rl)
]
certificate = {
    **before_and_after(*scores),
    "gain_interval_points": [100 * end for end in gain.interval],
    "checkpoint": checkpoint,
    "data": "till.jsonl",
    "seed": 0,
}
text = json.dumps(certificate, indent=1, default=float)  # float: also of an array's or a tensor's
(project / "certificate.json").write_text(text, encoding="utf-8")
measured("gain in points", certificate["gain_points"])
for name, end in zip(("from", "to"), certificate["gain_interval_points"], strict=True):
    measured(f"95 % interval in points, {name}", end)
print(f"judged on {certificate['problems']} held-out questions; written to certificate.json")
band("At least 30 points better", certificate["gain_points"] > 30)

# %% [markdown] id="deploy-note"
# ## Hand it on
#
# From here it is one command, in a terminal that stands in this notebook's folder: its checkpoints
# lie there, in `runs/store` (from elsewhere, add `--store`). It downloads the adapter, merges it,
# proves the merge as above, and writes a folder that `posttrain serve` and Modal can take
# (lesson 09).

# %% id="deploy-command"
quote(f"posttrain deploy --checkpoint {checkpoint} --out deploys/till", "$")
quote("posttrain serve deploys/till", "$")

# %% [markdown] id="capstone-cli-note"
# And the whole project without a notebook, on a larger model or on hosted Tinker, is one command
# too. The data are the files that this notebook wrote; the reward is a function in a file: copy the
# function `till_reward` (without the loop below it) into `my_reward.py`, and put `from
# course_lib.rewards import Score, correct` above it.
#
# ```
# posttrain all --set sft.data_path=runs/capstone/replies.jsonl \
#     --set rl.environment=runs/capstone/till.jsonl --set rl.reward=my_reward.py:till_reward
# ```

# %% id="progress"
progress()

# %% [markdown] id="take-away"
# ## What to take away
#
# - Look at several curves together. The reward alone cannot tell learning from cheating, nor a dead
#   start from a ruin.
# - Ask which curve moved *first*: it is nearer to the cause.
# - Compare a rise with the noise of its neighbours before you believe it.
# - Errors that stop you are friends. What spoils a result runs without complaint: a wrong grader, a
#   warning, the wrong base. Each has a check that costs seconds.
# - Three rows by heart; SFT until RL has something to reinforce; RL; then a judge that was not the
#   reward.
#
# ## What next
#
# This is the last lesson. Change three cells into something that you need, and run the notebook
# again: the questions (the one that writes `till.jsonl`), the reward, and the replies for SFT;
# where the curves are called `right` and `thanks`, name the parts of *your* score. The yes and no
# lines were written for the till: read the numbers instead. Then the same with a larger model ([08
# Evaluate and scale](08_evaluate.ipynb)).
