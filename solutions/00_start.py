# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown] id="title"
# # 00 · Start here: change a model with one step
#
# A language model answers one question, over and over: *what comes next?* It has learned its
# answers from a large pile of text. **Post-training** changes those answers, so that the model
# does what we ask, and does it well.
#
# After this notebook you can
#
# - make the four calls that all post-training is made of: `forward_backward`, `optim_step`,
#   `save_weights_and_get_sampling_client`, `sample`;
# - say what the loss of a model that knows nothing is, and read a loss curve against it;
# - explain why a sampler still gives the old answers after training;
# - run the whole pipeline, from a base model to a post-trained one, in about a minute.
#
# You need some Python, and the idea of a gradient. Everything runs on this computer.

# %% [markdown] id="card"
# The builder writes the measured card here.

# %% id="connect"
from course_lib import connect, check, hint, progress, preset

service = connect()

# %% [markdown] id="where-calls-go"
# ## Where do my calls go?
#
# `service` is a client of the [Tinker](https://tinker-docs.thinkingmachines.ai) SDK. The line above
# tells where its calls go: without any key or address they go to a small engine that this course
# brings along, in this very process. The same cells train a large model on hosted Tinker if you
# set a key, and on any Tinker-compatible cluster if you set its address. Nothing else changes;
# lesson 08 does it.
#
# A **training client** holds what is trained: here a LoRA adapter (lesson 02) on the base model.
# Calls give a *future* at once, and `.result()` waits for what it promises. Models do not see
# letters, they see **tokens**: pieces of text, of which this model knows the number printed below.
#
# (Clients and models live as long as this notebook's kernel. After a restart, or when you begin in
# the middle, a cell ends in a `NameError`: choose **Run > Run All Above Selected Cell**. What you
# have solved stays solved. The square at the top interrupts a cell that takes too long.)

# %% id="training-client"
import math

import tinker

client = service.create_lora_training_client(service.base_model, rank=16, seed=0).result()
tokenizer = client.get_tokenizer()
vocab_size = len(tokenizer)
print(f"The model chooses among {vocab_size} tokens at every step.")

# %% [markdown] id="base-question"
# ## What does the base model say?
#
# The base model has read exercise books (`Question: ... Answer: ...`), stories from a small village
# and scenes from plays. It knows how to add three numbers. But it has never seen a *chat*, in which
# one speaker asks and the other answers.
#
# Before you run the next cell: what do you expect from a model that can add, but has never seen
# a conversation?
#
# `save_weights_and_get_sampling_client` gives a client that answers, and `sample` asks it. At
# temperature 0 it takes the likeliest token each time (**greedy** decoding), until the model writes
# its end marker. `render_prompt` makes tokens of the question, `parse_completion` makes text of the
# reply.
#
# (Three helpers print results in all lessons. `quote` shows what a model wrote. `measured` shows a
# number, which may differ a little on your machine. `band` shows a claim and whether it holds.)

# %% id="ask-base"
from course_lib.conversations import Message
from course_lib.lessons import band, measured, quote
from course_lib.rendering import parse_completion, render_prompt, stop_token_ids

question = (Message("user", "What is 23 + 45 + 61?"),)
asked = tinker.ModelInput.from_ints(render_prompt(question, tokenizer))
how = tinker.SamplingParams(max_tokens=64, temperature=0.0, stop=stop_token_ids(tokenizer))
sampler = base_sampler = client.save_weights_and_get_sampling_client().result()
said = sampler.sample(prompt=asked, num_samples=1, sampling_params=how).result()
base_answer = parse_completion(said.sequences[0].tokens, tokenizer)
quote(base_answer, "base")
band("The base model answers the question", "129" in base_answer)

# %% [markdown] id="loss-question"
# ## How wrong is a model? The loss
#
# For each token of a text the model gave a probability $p$ to the token that really came next. Its
# loss on that token is
#
# $$\text{loss} = -\ln p \quad\text{(in nats)}$$
#
# Sure and right, $p = 1$: loss 0. The surer it was of something else, the larger the loss. (Shannon
# 1948 is the source of the logarithm; "nats" means that it is the natural one.)
#
# **Predict.** A model that knows nothing gives all `vocab_size` tokens the same probability. What
# is its loss per token? Write down the number, or the formula in Python (`math` is imported).

# %% id="predict-first-loss" exercise="00.1"
predicted_loss = math.log(vocab_size)

# %% id="check-first-loss"
predicted_loss = check("00.1", predicted_loss, vocab_size=vocab_size)

# %% [markdown] id="datum-question"
# ## What does the model learn from?
#
# From examples like this one: a question and the answer that we would like. The text is cut into
# tokens. The model *reads* all of them, but it is *trained* only on the answer: those tokens have
# weight 1. (Why not on the question? Lesson 01 tries it.)

# %% id="one-conversation"
from course_lib.batches import make_datum
from course_lib.conversations import Conversation
from course_lib.plots.tokens import token_strip
from course_lib.rendering import render_conversation
from course_lib.widgets import show, show_source

answer = Message("assistant", "23 + 45 = 68, 68 + 61 = 129. The answer is 129.")
rendered = render_conversation(Conversation((*question, answer)), tokenizer)
words = [tokenizer.decode([token]) for token in rendered.tokens]
show(token_strip(words, rendered.weights, "One example: read all of it, learn the answer"))

# %% [markdown] id="shift-note"
# The SDK takes such an example as a `Datum`. At each position the model reads a token and predicts
# the *next* one, so inputs and targets are shifted by one. This is the library's function that
# makes the shift, for SFT in every lesson. (Below it, `nll`, the negative log-likelihood, measures
# the loss per trained token.)

# %% id="source-make-datum"
show_source(make_datum)

# %% id="measure-loss"
from course_lib.evaluation import nll

datum = make_datum(rendered)
loss_before = nll(client, [datum])
measured("the base model's loss on this answer is", loss_before, "nats per token")
measured("a model that knows nothing has", predicted_loss, "nats per token")
band("The base model knows something about this answer", loss_before < predicted_loss)

# %% [markdown] id="step-question"
# ## One step
#
# `forward_backward` computes the loss and its gradient: in which direction would each trained
# number have to move to make the answer likelier? `optim_step` moves them, with the optimizer Adam
# (Kingma and Ba 2014). The first takes the data and the name of the loss, the second Adam's
# settings: `tinker.AdamParams(learning_rate=...)`.
#
# Both calls come back at once with a future. The engine works through them in the order in which
# they were sent. So a good training step sends both, and waits afterwards: the engine then begins
# the second the moment the first is done.


# %% id="write-train-step" exercise="00.2"
def train_step(client, data, learning_rate):
    """Submit forward_backward (loss "cross_entropy") and optim_step, then wait for both.

    Return what the first one gives.
    """
    backward = client.forward_backward(data, "cross_entropy")
    update = client.optim_step(tinker.AdamParams(learning_rate=learning_rate))
    result = backward.result()
    update.result()
    return result


# %% id="check-train-step"
train_step = check("00.2", train_step)

# %% [markdown] id="probe-note"
# Two probes. The first is wrong on purpose: a learning rate of 0. Before you run the cell, say for
# each of them what the loss will be afterwards: the same, lower, or higher?

# %% id="probe-zero-rate"
train_step(client, [datum], learning_rate=0.0)
band("Rate 0 leaves the loss as it was", abs(nll(client, [datum]) - loss_before) < 1e-4)

# %% id="probe-one-step"
train_step(client, [datum], learning_rate=2e-3)
loss_after = nll(client, [datum])
measured("loss before", loss_before, "nats per token")
measured("loss after one step", loss_after, "nats per token")
band("One step made the answer likelier", loss_after < loss_before)

# %% [markdown] id="stale-question"
# ## Why does the sampler still give the old answer?
#
# The loss has fallen, so the model must have changed. Let us ask the sampler that we made above how
# likely it finds the answer now.


# %% id="stale-sampler"
def answer_logprob(sampling_client):
    """Log-probability of the whole answer: the sum over its tokens."""
    tokens = tinker.ModelInput.from_ints(rendered.tokens)
    logprobs = sampling_client.compute_logprobs(tokens).result()
    trained = zip(logprobs, rendered.weights, strict=True)
    return sum(logprob for logprob, weight in trained if weight)


answer_tokens = sum(rendered.weights)
logprob_before = -loss_before * answer_tokens
band("The sampler has noticed the step", abs(answer_logprob(sampler) - logprob_before) > 0.05)

# %% [markdown] id="stale-exercise"
# It has not. **Find the bug, and mend it**: measure `answer_logprob` so that it tells what the
# model does *after* the step.

# %% id="mend-stale-sampler" exercise="00.3"
fresh = client.save_weights_and_get_sampling_client().result()
logprob_after = answer_logprob(fresh)

# %% id="check-stale-sampler"
trained = -nll(client, [datum]) * answer_tokens  # what the trainer itself says now
logprob_after = check("00.3", logprob_after, before=logprob_before, trained=trained)

# %% [markdown] id="photograph"
# A sampling client is a photograph of the weights. That is on purpose: while one part of a
# program trains, another can sample from a model that stands still. Lesson 06 is about what
# happens when such a photograph grows old.

# %% [markdown] id="memorise-question"
# ## What do twenty steps on one example do?
#
# **Predict** before you run the cell: to what value does the loss fall? And will the model then be
# able to add? (`loss:sum` is the loss added up over the trained tokens.)

# %% id="twenty-steps"
from course_lib.plots.curves import curves_figure

losses = [loss_before]
for _ in range(19):  # one step is done already; each step reports the loss from before it
    result = train_step(client, [datum], learning_rate=4e-3)
    losses.append(result.metrics["loss:sum"] / answer_tokens)
losses.append(nll(client, [datum]))
level = (predicted_loss, "knows nothing: ln(vocabulary)")
curves = {"this answer": losses}
show(curves_figure(curves, "One example, twenty steps", "loss (nats)", level=level, first=0))
band("The loss is now below 0.3 nats", losses[-1] < 0.3)

# %% [markdown] id="next-token-note"
# What have these steps done to the very first token of the answer?

# %% id="next-token-figure"
from course_lib.lessons import next_tokens
from course_lib.plots.bars import next_token_figure

trained = client.save_weights_and_get_sampling_client().result()
prompt = rendered.tokens[: rendered.weights.index(1.0)]
first = [tokenizer.encode(word)[0] for word in ("2", "The", "Please", "Listen")]
names = [tokenizer.decode([token]) for token in first]
before, after = (
    [math.exp(logprob) for logprob in next_tokens(each, prompt, first)]
    for each in (base_sampler, trained)
)
show(next_token_figure(names, before, after, "How does the answer begin?"))

# %% [markdown] id="memorised-question"
# And can it add now? Here is the question that it was trained on, and another one. (`ask` makes
# the call of `sample` that you saw above, for several models at once.)

# %% id="memorised"
from course_lib.widgets.chat import ask

other = (Message("user", "What is 31 + 14 + 52?"),)
for asked, right in ((question, "129"), (other, "97")):
    said = ask({"trained": trained}, tokenizer, asked)["trained"]
    quote(said, asked[0].content)
    band(f"{asked[0].content} answered rightly", right in said)

# %% [markdown] id="memorise-lesson"
# It has learned one answer by heart. A loss near zero on the training data says nothing about other
# questions; that is why every lesson measures on questions that were **held out**.

# %% [markdown] id="pipeline"
# ## The whole pipeline in a minute
#
# Now the real thing, with the functions that the coming lessons take apart:
#
# 1. **SFT** (supervised fine-tuning, lessons 01 to 03): imitate good conversations. It teaches
#    the *format*: you are asked, you answer, you stop.
# 2. **GRPO** (group relative policy optimisation, a kind of reinforcement learning, lessons 04 to
#    07): try several answers to each question, and make those likelier that were right. It teaches
#    what *pays*.
#
# First a fresh client, and how it does before anything has happened to it. While the training runs,
# the dashboard moves; **Stop** holds it after the step at hand, **Resume** goes on, **Finish** ends
# there (`await` keeps the buttons alive while the cell waits for the training). A training cell
# that is run again goes on from the weights as they are; to start anew, begin at the cell that
# makes the client. Of the three curves of GRPO look at the left one: the mean reward, here the
# share of right answers. (The other two are explained in lessons 05 and 06.)

# %% id="settings"
from dataclasses import replace

config = preset()
sft_config = replace(config.sft, batch_size=16, max_steps=80, save_every=0, eval_every=0)
rl_config = replace(config.rl, steps=max(25, config.rl.steps), prompts_per_step=8)
rl_config = replace(rl_config, learning_rate=8e-4, max_tokens=40, save_every=0)
PROBLEMS = 60  # held-out problems for each judgement

# %% id="judge-base"
from course_lib.environments import sums_environment
from course_lib.evaluation import evaluate

environment = sums_environment()
heldout = environment.heldout(PROBLEMS, seed=0)
client = service.create_lora_training_client(service.base_model, rank=16, seed=0).result()


def judge(name):
    """Accuracy of the present weights on problems never trained on: one sampled answer to each."""
    sampler = client.save_weights_and_get_sampling_client().result()
    found = evaluate(sampler, tokenizer, environment, heldout, max_tokens=40)
    measured(f"{name}: held-out accuracy", found.accuracy, "%")
    measured(f"{name}: answers that show their working", found.worked_share, "%")
    return sampler, found


samplers, report = {}, {}
samplers["base"], report["base"] = judge("base")

# %% id="run-sft"
from course_lib.lessons import shipped_conversations
from course_lib.sft import train_sft
from course_lib.widgets import LiveTraining

data = shipped_conversations()
await LiveTraining().run(train_sft, client, data, sft_config, tokenizer=tokenizer, seed=0)
samplers["SFT"], report["sft"] = judge("SFT")

# %% id="run-grpo"
from course_lib.grpo import train_grpo

await LiveTraining().run(train_grpo, client, environment, rl_config, tokenizer=tokenizer, seed=0)
samplers["GRPO"], report["rl"] = judge("GRPO")

# %% id="before-and-after"
from course_lib.plots.run import accuracy_figure, describe_accuracy

summaries = {stage: found.summary() for stage, found in report.items()}
show(accuracy_figure(summaries), describe_accuracy(summaries))
forms = {
    stage: sum("The answer is" in record.completions[0] for record in found.records)
    for stage, found in report.items()
}
band("SFT taught the format", forms["base"] < 0.1 * PROBLEMS < 0.9 * PROBLEMS < forms["sft"])
band("GRPO made it right more often", report["rl"].accuracy > report["sft"].accuracy + 0.2)
band(
    "GRPO found out that working it out pays",
    report["rl"].worked_share > report["sft"].worked_share + 0.2,
)

# %% [markdown] id="discovery"
# Look at the right half of the figure. SFT has shown the model both kinds of answer, with the
# working and without. Nobody told it which is better, and the reward did not ask: it paid for right
# answers only. But answers that were worked out were right more often, so they became more
# frequent. That is the discovery that this course takes apart.
#
# This was a short version: seconds of training. `posttrain all --config quick` in a terminal trains
# longer, and reaches what the table in the README shows.
#
# Ask the three models something yourself. After so short a training some answers still go wrong,
# even where they begin well. (Take the tick away, and each answer is sampled anew.)

# %% id="chat"
from course_lib.widgets import Chat

Chat(samplers, tokenizer, "What is 31 + 14 + 52?").show()

# %% [markdown] id="presets"
# ## How long, how large?
#
# `preset()` gives the sizes of everything, and `COURSE_PRESET` chooses: **tiny** (seconds: does it
# run?), **quick** (about a minute: does it work?), **full** (how far does it go?). The lessons say
# what they change.

# %% id="show-preset"
print(f"preset {config.preset}: SFT batches of {config.sft.batch_size}, {config.rl.steps} RL steps")

# %% id="progress"
progress()

# %% [markdown] id="take-away"
# ## What to take away
#
# - Training is two calls, `forward_backward` and `optim_step`; using it is two more,
#   `save_weights_and_get_sampling_client` and `sample`. Send first, wait later.
# - A model that knows nothing has a loss of $\ln V$ nats per token. Read every curve against it.
# - A sampling client is a photograph. After training, take a new one.
# - A loss near zero may mean that the model has learned by heart. Measure on what it has not seen.
#
# ## What next
#
# [01 Data](01_data.ipynb): what exactly goes into a training example, and what a wrong
# mask costs.
# Stuck? `hint("00.2")` gives one hint at a time, and `check` names the mistake.
