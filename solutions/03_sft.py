# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown] id="title"
# # 03 · The SFT loop, and how it survives a crash
#
# Supervised fine-tuning is a short loop: take a batch, make its answers likelier, again. All that
# can go wrong with it is in the small print: what is averaged, in which order the rows come, how
# the learning rate moves, and what exactly a checkpoint has kept.
#
# After this notebook you can
#
# - write the weighted mean loss, and say which averages lie;
# - make batches that are shuffled, repeatable and whole;
# - read a training curve beside a held-out curve, and stop in time;
# - resume a run so that nobody can tell that it was interrupted.
#
# You need lessons 01 (weights) and 02 (rank, learning rate).

# %% [markdown] id="card"
# The builder writes the measured card here.

# %% id="connect"
from course_lib import connect, check, hint, progress, preset

service = connect()

# %% [markdown] id="loop-question"
# ## What happens in one step?
#
# Here is the whole loop of the library. Look for five things: where the batches come from, where
# the learning rate is made, where both calls are sent, what is divided by what, and when something
# is saved. The rest of this notebook takes them one by one.

# %% id="source-train-sft"
from course_lib.sft import train_sft
from course_lib.widgets import show, show_source

show_source(train_sft)

# %% id="settings"
from dataclasses import replace

from course_lib.lessons import band, measured, shipped_conversations

config = preset().sft
config = replace(config, batch_size=16, max_steps=30, save_every=0, eval_every=0)
conversations = [one for one in shipped_conversations() if len(one.messages) == 2]
heldout = [one for one in shipped_conversations("heldout") if len(one.messages) == 2][:48]


def fresh_client():
    """A new adapter; the same seed, so the same start each time."""
    rank = config.lora_rank
    return service.create_lora_training_client(service.base_model, rank=rank, seed=0).result()


client = fresh_client()
tokenizer = client.get_tokenizer()

# %% [markdown] id="nll-question"
# ## What is averaged?
#
# The engine gives the **sum** of the loss over all tokens of all conversations in the batch. What
# should it be divided by, so that batches can be compared?
#
# $$\text{NLL} = -\frac{\sum_d \sum_t w_{dt}\, \ln p(x_{dt} \mid x_{d,<t})}{\sum_d \sum_t w_{dt}}$$
#
# NLL is the negative log-likelihood, in nats per trained token. **Predict**: if you divide by *all*
# tokens instead, does the loss look larger or smaller? And if you average each conversation first,
# whose tokens count more: those of long answers, or of short ones?


# %% id="write-weighted-nll" exercise="03.1"
def weighted_nll(logprobs_D_T, weights_D_T):
    """Nats per trained token over the batch; D conversations of T tokens each (T varies)."""
    total = trained = 0.0
    for logprobs_T, weights_T in zip(logprobs_D_T, weights_D_T, strict=True):
        for logprob, weight in zip(logprobs_T, weights_T, strict=True):
            total -= weight * logprob
            trained += weight
    return total / trained


# %% id="check-weighted-nll"
weighted_nll = check("03.1", weighted_nll)

# %% [markdown] id="nll-real"
# On a real batch. `forward` is `forward_backward` without the gradient; it hands back the
# log-probability of every target.

# %% id="nll-of-a-batch"
from course_lib.batches import make_datum
from course_lib.rendering import render_conversation

batch = [make_datum(render_conversation(one, tokenizer)) for one in conversations[:16]]
result = client.forward(batch, "cross_entropy").result()
logprobs_D_T = [output["logprobs"].data for output in result.loss_fn_outputs]
weights_D_T = [datum.loss_fn_inputs["weights"].data for datum in batch]

mine = weighted_nll(logprobs_D_T, weights_D_T)
everything = [[1.0] * len(weights_T) for weights_T in weights_D_T]
per_token = result.metrics["loss:sum"] / sum(map(len, weights_D_T))
measured("weighted mean", mine, "nats per trained token")
measured("wrong on purpose, divided by all tokens", per_token, "nats")
measured("wrong on purpose, questions counted as well", weighted_nll(logprobs_D_T, everything))
same = abs(mine * sum(map(sum, weights_D_T)) - result.metrics["loss:sum"]) < 0.05
band("Times the trained tokens, it is the engine's loss:sum", same)

# %% [markdown] id="nll-answer"
# Divided by all tokens the loss looks smaller, though nothing is better: the questions add nothing
# above the line (their weight is 0) and are counted below it. The more of a batch is question, the
# smaller it looks. Counted in both places they hide the answers: the base model finds questions
# harder to guess than answers. And if each conversation were averaged first, one token of a short
# answer would count as much as several of a long one.
#
# The division is for your eyes only: the gradient is that of the sum. Adam does not mind, since it
# divides its step by the usual size of the gradients, and a constant factor drops out.

# %% [markdown] id="batches-question"
# ## In which order do the rows come?
#
# Here is a function that cuts rows into batches. It runs, the loss falls, and three things are
# wrong with it. Find them before you read on: call it twice, ask which of its four arguments it
# never uses (there are two), and look at the last batch.

# %% id="broken-batches"
import random


def broken_batches(n, batch_size, seed, epoch):
    order = list(range(n))
    random.shuffle(order)
    return [order[i : i + batch_size] for i in range(0, n, batch_size)]


once, again = broken_batches(10, 4, seed=0, epoch=0), broken_batches(10, 4, seed=0, epoch=0)
print("lengths of its batches:", [len(one) for one in once])
band("The same seed gives the same order", once == again)

# %% [markdown] id="batches-exercise"
# A run must be repeatable, or a crash loses it (you will see why). Another order in each epoch, or
# the model meets the same neighbours again. And no partial batch: its gradient comes from fewer
# rows, so it is noisier, and Adam hardly makes the step smaller for it: a few rows get nearly the
# say of a whole batch. Its mean loss is noisier than its neighbours', too.


# %% id="write-epoch-batches" exercise="03.2"
def epoch_batches(n, batch_size, seed, epoch):
    """Rows 0 .. n - 1 in whole batches: another order each epoch, repeatable, none partial."""
    order = list(range(n))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    whole = n // batch_size
    return [order[i * batch_size : (i + 1) * batch_size] for i in range(whole)]


# %% id="check-epoch-batches"
epoch_batches = check("03.2", epoch_batches)

# %% id="show-epoch-batches"
for epoch in (0, 1):
    print(f"epoch {epoch}:", epoch_batches(10, 4, seed=0, epoch=epoch))

# %% [markdown] id="schedule-question"
# ## How should the learning rate move?
#
# Adam's first steps are its most uncertain ones, because its averages have seen nothing yet; so
# many recipes **warm up** (Liu et al. 2020, "RAdam"). The last steps should be small, because what
# they change is not corrected any more; so nearly all recipes let the rate **fall**.
#
# Both ways are straight lines here. Of five steps of warm-up the first has a fifth of the peak and
# the last all of it. The next step has the peak, too; then the rate comes down evenly, and would be
# 0 one step after the last.


# %% id="write-learning-rate" exercise="03.3"
def learning_rate_at(step, total, peak, warmup):
    """step 0 .. total - 1. A straight line up: step warmup - 1 has the peak. Then a straight
    line down from the peak, which step `warmup` has, too; step `total` would have 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (total - step) / (total - warmup)


# %% id="check-learning-rate"
learning_rate_at = check("03.3", learning_rate_at)

# %% [markdown] id="schedule-predict"
# **Predict**: 30 steps with the same high peak (three times the rate of the preset), once constant,
# once falling, once with five steps of warm-up and then falling. Which ends lowest on held-out
# conversations?

# %% id="schedules"
import tinker

from course_lib.evaluation import nll

STEPS, PEAK = 30, 3 * config.learning_rate
datums = [make_datum(render_conversation(one, tokenizer)) for one in conversations]
heldout_datums = [make_datum(render_conversation(one, tokenizer)) for one in heldout]
schedules = {
    "constant": lambda step: PEAK,
    "falling": lambda step: learning_rate_at(step, STEPS, PEAK, 1),
    "warm-up, falling": lambda step: learning_rate_at(step, STEPS, PEAK, 5),
}


# %% id="run-schedules"
def train(rate_at):
    """The loop in its shortest form; gives the NLL of each step and the client."""
    client, losses = fresh_client(), []
    batches = epoch_batches(len(datums), 16, seed=0, epoch=0)[:STEPS]
    for step, rows in enumerate(batches):
        batch = [datums[row] for row in rows]
        backward = client.forward_backward(batch, "cross_entropy")
        update = client.optim_step(tinker.AdamParams(learning_rate=rate_at(step)))
        trained = sum(sum(datum.loss_fn_inputs["weights"].data) for datum in batch)
        losses.append(backward.result().metrics["loss:sum"] / trained)
        update.result()
    return losses, client


runs = {name: train(rate_at) for name, rate_at in schedules.items()}

# %% id="schedules-figure"
from course_lib.plots.curves import curves_figure

title = "Three schedules, the same batches"
show(curves_figure({name: losses for name, (losses, _) in runs.items()}, title, "loss (nats)"))
ends = {name: nll(client, heldout_datums) for name, (_, client) in runs.items()}
for name, end in ends.items():
    measured(f"{name}: held-out loss", end, "nats per token")
band("A rate that falls ends lower than a constant one", ends["falling"] < ends["constant"] - 0.1)

# %% [markdown] id="schedules-answer"
# A high rate goes fast at the beginning and cannot settle at the end; a low one is the other way
# round. A falling rate has the good half of both. That is plain to see: with the rows in five
# orders it ended about half a nat lower than the constant rate every time, or more. Warm-up is
# another matter. In the same five orders it ended 0.07 nats below the plain falling rate once,
# about a tenth of a nat above it twice, and in the same place twice (`data/results/README.md`,
# "Three schedules of the learning rate"). A difference that changes sign needs more runs before one
# believes it; lesson 08 is about telling a difference from luck. For another order, change the
# `epoch` above.
#
# Your numbers will be others: if `epoch_batches` is your own, you have a sixth order; and at so
# high a rate even rounding tells, which differs between machines, and between two runs. With one
# and the same order the constant rate has ended anywhere from 0.69 to 1.55 nats, and the run with
# warm-up from 0.44 to 0.69.

# %% [markdown] id="heat-question"
# ## What is learned first?
#
# A loss is an average, and hides what it averages. So look at one answer, token by token, while the
# model is trained: how surprised is it by each of them? **Predict** which tokens become cheap
# first, and which stay expensive: the words, the numbers, or the end marker.

# %% id="watch-tokens"
from course_lib.conversations import Conversation, Message

question = Message("user", "What is 23 + 45 + 61?")
answer = Message("assistant", "23 + 45 = 68, 68 + 61 = 129. The answer is 129.")
watched = render_conversation(Conversation((question, answer)), tokenizer)
watched_datum = make_datum(watched)
start = watched.weights.index(1.0)
tokens = [tokenizer.decode([token]) for token in watched.tokens[start:]]
WATCH = (1, 2, 4, 8, 15, 30)
client, surprise = fresh_client(), {}


def look(step, total, metrics):
    """Called by the loop after every step."""
    if step in WATCH:
        output = client.forward([watched_datum], "cross_entropy").result().loss_fn_outputs[0]
        surprise[step] = [-logprob for logprob in output["logprobs"].data[start - 1 :]]


# %% id="token-heat-map"
from course_lib.plots.heat import heat_map
from course_lib.plots.tokens import shown

look(WATCH[0], 0, {})
before = surprise.pop(WATCH[0])
train_sft(client, conversations, config, tokenizer=tokenizer, on_step=look)
matrix = [before, *surprise.values()]
names = ["before", *(f"step {step}" for step in surprise)]
columns = [shown(token) for token in tokens]
title = "How surprising is each token of the answer?"
show(heat_map(matrix, title, "token", "", "nats", rows=names, columns=columns, digits=1))
band("The end marker has become cheap", surprise[STEPS][-1] < 0.1 < before[-1])

# %% [markdown] id="heat-answer"
# The results `68` and `129` were cheap from the start: the base model can add two numbers that it
# has just read. So sort the tokens into three kinds, and average each: **form** (signs, commas,
# words, the end; and the very first token, which decides whether the answer begins with a digit or
# with "The"), **asked** (the other digits that stand in the question and must be looked up there),
# **computed** (digits that follow by adding; some of them only repeat a sum that was just written).

# %% id="kinds-of-tokens"
KINDS = "fafaaf ccf ccf aaf ccc fffff cccff".replace(" ", "")  # one letter for each token
names = {"f": "form", "a": "asked", "c": "computed"}


def mean_of(kind, values):
    chosen = [value for value, letter in zip(values, KINDS, strict=True) if letter == kind]
    return sum(chosen) / len(chosen)


by_kind = {name: [mean_of(kind, row) for row in matrix] for kind, name in names.items()}
title = "What is learned first?"
show(curves_figure(by_kind, title, "loss (nats)", "step", steps=[0, *surprise]))
looked_up = [nats for nats, letter in zip(matrix[-1], KINDS, strict=True) if letter == "a"]
measured("the dearest of the digits to be looked up still costs", max(looked_up), "nats")
band("Computing was cheap from the start", by_kind["computed"][0] < 0.2)
band("The form is learned", by_kind["form"][-1] < 0.5 * by_kind["form"][0])

# %% [markdown] id="heat-lesson"
# Thirty steps teach the form. What stays dear of it is the first token: most answers in the data
# begin with "The", and where one does begin with a digit, it must be the right one. To look up what
# was asked is slower: such a digit may still cost $\ln 10 = 2.3$ nats, which is the price of a
# guess among ten. Now ask the model: perfect form, and a wrong number. Nor did it try to work the
# sum out: it answers in one go, as most rows of the data do, and that is what this model cannot do.
# The steps `23 + 45 = 68` are cheap for it; the whole sum at once is not. (Lesson 05 will make use
# of that.) One average would have hidden all this.

# %% id="form-without-content"
from course_lib.lessons import quote
from course_lib.widgets.chat import ask

sampler = {"after 30 steps": client.save_weights_and_get_sampling_client().result()}
for text in ("What is 23 + 45 + 61?", "Add 70, 31 and 12."):
    quote(ask(sampler, tokenizer, (Message("user", text),))["after 30 steps"], text)

# %% [markdown] id="overfit-question"
# ## When should one stop?
#
# Sixteen conversations, seen over and over. The training loss will fall as far as you like.
# **Predict** the held-out curve.
#
# The dashboard moves while it trains. **Stop** holds the run after the step at hand, **Resume**
# goes on, **Finish** saves and ends.

# %% id="overfit"
from course_lib.widgets import LiveTraining

few = replace(config, batch_size=16, epochs=40, max_steps=40, eval_every=4, schedule="constant")
live = LiveTraining()
overfit = await live.run(
    train_sft, fresh_client(), conversations[:16], few, tokenizer=tokenizer, heldout=heldout
)

# %% id="overfit-verdict"
curve = {row["step"]: row["test/nll"] for row in overfit.metrics if "test/nll" in row}
best_step = min(curve, key=lambda step: curve[step])
rise = curve[max(curve)] - curve[best_step]
measured("lowest held-out loss at step", best_step)
measured("held-out loss at the end, above its lowest by", rise, "nats")
band("The training loss goes on falling", overfit.losses[-1] < 0.1)
band("The held-out loss has turned before the end", rise > 0.1)

# %% [markdown] id="overfit-answer"
# The checkpoint to keep is the one at the lowest point of the held-out curve, not the last. That is
# **early stopping** (Prechelt 1998): save often, judge on held-out rows, and take the best.

# %% [markdown] id="kinds-question"
# ## What is in a checkpoint?
#
# Three things can be kept, and they are not the same:
#
# | call | keeps | good for |
# | --- | --- | --- |
# | `save_state` | adapter, and Adam's memory of each number | going on |
# | `save_weights_for_sampler` | adapter | sampling, evaluating, deploying |
# | `save_weights_and_get_sampling_client` | adapter, without a name | a quick look |
#
# Adam (Kingma and Ba 2014) remembers two moving averages for every trained number: which way the
# gradients went, and how large they were. Without them its next steps have another size.

# %% id="save-and-read"
import tempfile
from pathlib import Path

from course_lib.checkpoints import CheckpointLog, StopTraining, training_client_from

out = Path(tempfile.mkdtemp())
plan = replace(config, max_steps=24, save_every=12, schedule="constant")
whole = train_sft(fresh_client(), conversations, plan, tokenizer=tokenizer, out=out)
middle = CheckpointLog(out).read()[0]
print(f"checkpoint of step {middle.step}: for training and for sampling")

# %% [markdown] id="wrong-kind"
# Wrong on purpose: go on training from the sampler's file. It holds no optimizer, so the library
# refuses it. (A tool that goes on without a word makes a mistake that is hard to see, as the next
# experiment shows.)

# %% id="refused"
from course_lib import CourseError

try:
    training_client_from(service, middle.sampler_path)
except CourseError as error:
    print("this path", error.finding, "->", error.remedy)

# %% [markdown] id="resume-question"
# ## Can anybody tell that it was interrupted?
#
# The run above did 24 steps in one go. Now let it crash after step 12, and go on in three ways:
# from the weights and the optimizer, from the weights only, and from nothing at all. Rows and
# learning rates follow from the seed and the step, so all three see the same batches.

# %% id="three-resumes"
with_optimizer = training_client_from(service, middle)
weights_only = training_client_from(service, middle, optimizer=False)
settings = {"tokenizer": tokenizer, "resume": middle}
three = [
    train_sft(start, conversations, plan, **settings).losses
    for start in (with_optimizer, weights_only, fresh_client())
]
letters = random.Random(3).sample("ABC", 3)  # so that only the curves can tell
resumed = dict(sorted(zip(letters, three, strict=True)))
uninterrupted = whole.losses[middle.step :]

# %% id="resume-figure"
steps = range(middle.step + 1, 25)
curves = {"uninterrupted": uninterrupted, **resumed}
show(curves_figure(curves, "Which one is which?", "loss (nats)", steps=steps))

# %% [markdown] id="close-note"
# Two of them lie close to the uninterrupted run. How close? Here is the difference, many times
# enlarged.

# %% id="resume-close-up"
apart = {
    name: [a - b for a, b in zip(losses, uninterrupted, strict=True)]
    for name, losses in resumed.items()
}
close = {name: gaps for name, gaps in apart.items() if max(map(abs, gaps)) < 0.4}
title = "Distance from the uninterrupted run"
looks = {name: number for number, name in enumerate(curves)}  # as in the figure above
show(curves_figure(close, title, "difference of the loss (nats)", steps=steps, looks=looks))

# %% [markdown] id="resume-exercise"
# The letters were drawn by lot. Read the curves, and name each of them. The answer is a dictionary,
# from a letter to a label.

# %% id="which-was-it" exercise="03.4"
# a dictionary: "A", "B" and "C", each with one of these labels:
# "weights and optimizer", "weights only", "fresh start"
which_was_it = {"A": "weights and optimizer", "B": "fresh start", "C": "weights only"}

# %% id="check-which-was-it"
which_was_it = check("03.4", which_was_it, uninterrupted=uninterrupted, resumed=resumed)

# %% id="resume-verdict"
strays = {which_was_it[name]: max(map(abs, gaps)) for name, gaps in apart.items()}
for label, distance in strays.items():
    measured(f"{label}: strays by at most", distance, "nats")
exact, another = strays["weights and optimizer"], strays["weights only"]
band("With the optimizer the curves agree within 0.0001 nats", exact < 1e-4)
band("Weights only: the run goes another way", another > 0.01)

# %% [markdown] id="resume-answer"
# Without the optimizer the run is not broken, and that is the trap: it looks healthy and is another
# run. Nobody can compare it with the one that was not interrupted, and a long training that is
# interrupted ten times forgets ten times how large its steps should be.
#
# In the SDK it hangs on a name: `create_training_client_from_state` loads the weights only, and
# `create_training_client_from_state_with_optimizer` both. The lessons to come use the first, on
# purpose: their experiments do not go on with this training, they begin another one.

# %% [markdown] id="crash-note"
# A crash is nothing else. `posttrain all --resume RUN` reads the last line of `checkpoints.jsonl`
# and does what you have just done; and the **Finish** button raises `StopTraining`, which saves
# first. Three things made it possible: a checkpoint with the optimizer, an order of rows that
# follows from the seed, and a learning rate that follows from the step.

# %% id="progress"
progress()

# %% [markdown] id="take-away"
# ## What to take away
#
# - Divide by the trained tokens of the batch, nothing else. An average over all tokens flatters.
# - Shuffle by (seed, epoch), drop the partial batch, let the rate fall.
# - Judge by held-out loss, and keep the checkpoint at its lowest point.
# - To go on you need weights *and* optimizer; to sample, the weights.
#
# ## What next
#
# SFT has taught the format. [04 Rewards](04_rewards.ipynb) is about what it could not teach: being
# right, and how to pay for it.
