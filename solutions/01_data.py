# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown] id="title"
# # 01 · Data: what exactly does the model learn from?
#
# Supervised fine-tuning (SFT) shows a model good conversations and asks it to imitate the answers.
# Many failures of SFT are not failures of training. They are a row that should not be there, or a
# mask that sits in the wrong place, and the training runs on without a word.
#
# After this notebook you can
#
# - read a conversations file, and find what is wrong with a row;
# - say which tokens of a conversation a model reads, and which of them it is trained on;
# - shift inputs against targets, with the weights on the right side;
# - show by experiment what a wrong mask costs, why earlier answers are left out, and how a leak
#   between training and evaluation flatters.
#
# You need lesson 00: what a training step is.

# %% [markdown] id="card"
# The builder writes the measured card here.

# %% id="connect"
from course_lib import connect, check, hint, progress, preset

service = connect()

# %% [markdown] id="row-question"
# ## What is one row?
#
# One conversation per line, in a text file: the format is called JSONL. A conversation is a list of
# messages, and each message says who speaks (`system`, `user` or `assistant`) and what. Some have
# one question and one answer, some go on for several turns.

# %% id="first-rows"
from course_lib.config import find_file
from course_lib.conversations import load_conversations
from course_lib.lessons import band, measured, quote

DATA = find_file("data/conversations.jsonl")
conversations = load_conversations(DATA)
for conversation in (conversations[0], conversations[6]):
    for message in conversation.messages:
        print(f"{message.role:>9}: {message.content}")
    print()
print(f"{len(conversations)} conversations")

# %% [markdown] id="hub-note"
# Data often comes as a Hugging Face dataset instead: a name on the hub, a folder, a Parquet or JSON
# file. `dataset_type="huggingface"` reads all of these, if there is a column `messages`. Nothing
# else changes, and here we read our own file through that door.

# %% id="hub-door"
through_datasets = load_conversations(DATA, dataset_type="huggingface", limit=100)
same = [one.messages for one in through_datasets] == [one.messages for one in conversations[:100]]
band("Both doors give the same conversations", same)

# %% [markdown] id="faults-question"
# ## What can be wrong with a row?
#
# A file of conversations is written by programs and by people, so everything happens. Here are six
# common faults. Look for them in this order, and stop at the first:
#
# | fault | example | what training would do |
# | --- | --- | --- |
# | not JSON | a torn last line | stop in the middle of the night |
# | no messages | `{"text": "..."}` | stop, or learn nothing |
# | unknown role | `"role": "bot"` | the template writes a marker that no model knows |
# | empty content | `"content": " "` | teach the model to say nothing |
# | same role twice | user, user | teach it that questions follow questions |
# | no assistant turn | only a question | there is nothing to learn |
#
# Only the first is sure to make a noise. Most training code says nothing about the others: it
# trains, and the loss falls. (The second one has many faces: no `messages`, an empty list of them,
# or a line that is JSON and no object at all.)

# %% id="planted-rows"
import json
from itertools import pairwise

from course_lib.checks.lesson_01 import planted_lines

lines = planted_lines(seed=0)
for number, line in enumerate(lines, start=1):
    print(f"{number:>2}  {line}")

# %% [markdown] id="faults-predict"
# Some of these lines are sound. **Before you go on**, find the faulty ones by eye. Then write the
# function that does it for a million lines.


# %% id="write-line-fault" exercise="01.1"
def line_fault(line):
    """The first of: "not JSON", "no messages", "unknown role", "empty content", "same role twice",
    "no assistant turn"; None for a sound line."""
    try:
        row = json.loads(line)
    except ValueError:
        return "not JSON"
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        return "no messages"
    roles = [message["role"] for message in messages]
    if set(roles) - {"system", "user", "assistant"}:
        return "unknown role"
    if not all(message["content"].strip() for message in messages):
        return "empty content"
    if any(one == following for one, following in pairwise(roles)):
        return "same role twice"
    return None if "assistant" in roles else "no assistant turn"


# %% id="check-line-fault"
line_fault = check("01.1", line_fault)

# %% id="use-line-fault"
for number, line in enumerate(lines, start=1):
    print(f"{number:>2}  {line_fault(line) or 'sound'}")

# %% [markdown] id="validator-note"
# The library's validator knows some thirty faults, and says for each where it is and what to do.
# From a terminal: `posttrain validate data/broken.jsonl`. That file holds most of them; here are a
# few of what it finds, and then the verdict on the data that we shall train on.

# %% id="validate-broken"
from course_lib.validation import validate_file

broken = validate_file(find_file("data/broken.jsonl"))
for fault in broken.faults[5:40:6]:
    print(f"line {fault.line}: {fault.finding}; {fault.remedy}")
print(f"{broken.errors} errors, {broken.warnings} warnings in {broken.rows} rows")

# %% id="validate-shipped"
client = service.create_lora_training_client(service.base_model, rank=16, seed=0).result()
tokenizer = client.get_tokenizer()
report = validate_file(DATA, tokenizer, max_length=1024)
print(f"{report.errors} errors, {report.warnings} warnings in {report.rows} rows")
band("Fit to train on", report.ok)

# %% [markdown] id="template-question"
# ## What does the model see of a conversation?
#
# A model reads tokens, not roles. The **chat template**, a small program that comes with every chat
# model, writes the conversation as one text with markers: who begins to speak, who has finished.
# Another model has other markers, so never write them by hand.

# %% id="chat-text"
from course_lib.chat_text import chat_text
from course_lib.conversations import Conversation, Message
from course_lib.rendering import render_conversation, render_prompt

example = Conversation(
    (
        Message("user", "What is 2 + 3 + 4?"),
        Message("assistant", "The answer is 9."),
        Message("user", "Add 20, 30 and 40."),
        Message("assistant", "The answer is 90."),
    )
)
print(chat_text(example.messages, tokenizer))

# %% [markdown] id="mask-question"
# ## Which of these tokens is it trained on?
#
# It reads all of them. But each token has a **weight**, and the loss counts only what has weight 1:
#
# $$\text{loss} = -\frac{\sum_t w_t \ln p(x_t \mid x_{<t})}{\sum_t w_t}$$
#
# Look at the strip. Three decisions are visible in it: the questions have weight 0, the marker
# `<|end|>` after the answer has weight 1, and of two answers only the last one counts. Each of the
# three is tried out below.

# %% id="mask-strip"
from course_lib.plots.tokens import token_strip
from course_lib.widgets import mask_viewer, show, show_source

rendered = render_conversation(example, tokenizer)
words = [tokenizer.decode([token]) for token in rendered.tokens]
show(token_strip(words, rendered.weights, "Read everything, learn the last answer"))

# %% [markdown] id="viewer-note"
# Look at other conversations, and at masks that are wrong. Which mistake would you have noticed?

# %% id="mask-viewer"
mask_viewer([example, *conversations[:8]], tokenizer).show()

# %% [markdown] id="mask-exercise"
# Now write the mask. To keep markers and sub-words out of the way, a token is here a pair: whose
# message it belongs to, and which part of that message it is: the **header** (the marker that opens
# it, `<|user|>` or `<|assistant|>`), the **text**, or the **end** (`<|end|>`). (`_T` in a name: a
# list with one entry for each of T tokens.) The text and the end of the last assistant message are
# trained on, even when the user speaks after it.

# %% id="mask-tokens"
tokens_T = [
    *[("user", "header"), ("user", "text"), ("user", "text"), ("user", "end")],
    *[("assistant", "header"), ("assistant", "text"), ("assistant", "end")],
    *[("user", "header"), ("user", "text"), ("user", "end")],
    *[("assistant", "header"), ("assistant", "text"), ("assistant", "text"), ("assistant", "end")],
]


# %% id="write-mask" exercise="01.2"
def last_assistant_weights(tokens_T):
    """One weight (0.0 or 1.0) per token; a token is (role, part).

    A part is "header", "text" or "end"."""
    border = max(t for t, token in enumerate(tokens_T) if token == ("assistant", "header"))
    return [
        float(t > border and role == "assistant" and part != "header")
        for t, (role, part) in enumerate(tokens_T)
    ]


# %% id="check-mask"
last_assistant_weights = check("01.2", last_assistant_weights)

# %% id="show-mask"
names = [f"{role} {part}" for role, part in tokens_T]
show(token_strip(names, last_assistant_weights(tokens_T), "The mask"))

# %% [markdown] id="shift-question"
# ## What goes in, and what should come out?
#
# At every position the model has read some tokens and predicts the next one. So a text of $T$
# tokens makes $T - 1$ predictions: inputs lose their last token, targets their first. A weight says
# how much a *predicted* token counts. With which side does it go?


# %% id="write-shift" exercise="01.3"
def shift(tokens_T, weights_T):
    """(inputs, targets, weights), each of length T - 1; a token is a number or a piece of text."""
    return tokens_T[:-1], tokens_T[1:], weights_T[1:]


# %% id="check-shift"
shift = check("01.3", shift)

# %% id="shift-table"
short = render_conversation(Conversation(example.messages[:2]), tokenizer)
pieces = [tokenizer.decode([token]) for token in short.tokens]
print(f"{'input':>15}  {'target':>15}  weight")
for read, predicted, weight in zip(*shift(pieces, short.weights), strict=True):
    print(f"{read!r:>15}  {predicted!r:>15}  {weight:.0f}")

# %% [markdown] id="shift-source"
# The first line with weight 1 reads the header `<|assistant|>` and predicts the first word of the
# answer; the last one predicts `<|end|>`. In the library this function makes the shift:

# %% id="source-make-datum"
from course_lib.batches import make_datum

show_source(make_datum)

# %% [markdown] id="lengths-question"
# ## How long are the rows?
#
# A row longer than the model's context cannot be used. Cutting it would take away the end of the
# answer, and with it `<|end|>`, so `make_datum` refuses it instead.

# %% id="lengths-figure"
from course_lib.plots.bars import counts_figure

rows = [render_conversation(one, tokenizer) for one in conversations[:640]]
lengths = [len(row.tokens) for row in rows]
trained = sum(sum(row.weights) for row in rows) / sum(lengths)
marks = {"longest": max(lengths)}
show(counts_figure(lengths, "Length of a conversation", "tokens", marks=marks))
measured("share of the tokens that is trained on:", trained, "%")

# %% [markdown] id="cost-question"
# ## What does a wrong mask cost?
#
# Four masks, the same rows, the same 30 steps. **Predict**: which of them will be harmless, and
# what will the others do when they are asked to add three numbers?
#
# | mask | the mistake |
# | --- | --- |
# | last answer | none |
# | questions, too | weight 1 everywhere |
# | end missing | the end marker of the answer has weight 0 |
# | one early | all weights one token early: on the header, not on the end marker |

# %% id="settings"
import tinker

STEPS, BATCH, RATE = 30, 16, 4e-3  # steps, conversations per step, first learning rate
PROBLEMS, MAX_TOKENS = 40, 40


def train(datums, steps=STEPS):
    """A fresh adapter, `steps` steps like lesson 00's, the rate falling to 0."""
    client = service.create_lora_training_client(service.base_model, rank=16, seed=0).result()
    for step in range(steps):
        first = step * BATCH
        batch = [datums[(first + i) % len(datums)] for i in range(BATCH)]
        rate = RATE * (1 - step / steps)
        backward = client.forward_backward(batch, "cross_entropy")
        update = client.optim_step(tinker.AdamParams(learning_rate=rate))
        backward.result(), update.result()
    return client


# %% id="judge"
from course_lib.environments import sums_environment
from course_lib.evaluation import evaluate

environment = sums_environment()
heldout = environment.heldout(PROBLEMS, seed=0)


def judge(client, problems=heldout):
    """Greedy answers to problems: evaluation, and the share that ended by itself."""
    sampler = client.save_weights_and_get_sampling_client().result()
    limits = {"temperature": 0.0, "max_tokens": MAX_TOKENS}
    found = evaluate(sampler, tokenizer, environment, problems, **limits)
    ended = [record.tokens[0] < MAX_TOKENS for record in found.records]
    return found, sum(ended) / len(ended)


# %% id="masks"
from course_lib.rendering import Rendered


def everything(row):
    return [1.0] * len(row.tokens)


def end_missing(row):
    last = max(t for t, weight in enumerate(row.weights) if weight)
    return [weight if t != last else 0.0 for t, weight in enumerate(row.weights)]


def one_early(row):
    return [*row.weights[1:], 0.0]


masks = {
    "last answer": lambda row: row.weights,
    "questions, too": everything,
    "end missing": end_missing,
    "one early": one_early,
}

# %% id="run-masks"
clients, results, ended = {}, {}, {}
for name, mask in masks.items():
    datums = [make_datum(Rendered(row.tokens, mask(row))) for row in rows[: STEPS * BATCH]]
    clients[name] = train(datums)
    results[name], ended[name] = judge(clients[name])
    quote(results[name].records[0].completions[0], name)
    band(f"{name}: nearly every answer ends by itself", ended[name] > 0.9)

# %% id="masks-figure"
from course_lib.evaluation import nll
from course_lib.plots.shares import shares_figure


def share(found, holds):
    """The share of an evaluation's answers for which `holds(text)`."""
    texts = [record.completions[0] for record in found.records]
    return sum(holds(text) for text in texts) / len(texts)


asks = [share(found, lambda text: "Question:" in text) for found in results.values()]
measures = {"ends by itself": list(ended.values()), "asks a question": asks}
show(shares_figure(list(results), measures, "Four masks, the same rows, the same steps"))

# %% [markdown] id="cost-answer"
# Two of the masks give a model that answers and then cannot stop: it goes on with what usually
# follows such a sentence in the base model's reading. `<|end|>` is a token like any other; if it is
# never a target, it is never learned. (*One early* makes the same mistake by accident.)
#
# *Questions, too* still stops. What it costs is more hidden: most of the loss now comes from the
# questions, so the answers get a small part of every step. Look at the held-out loss, counted on
# the answers alone. (A cost on our rows, and no law: with few rows, or short answers to long
# questions, learning the questions as well has been found to help; Shi et al. 2024, "Instruction
# Tuning With Loss Over Instructions".)

# %% id="questions-cost"
heldout_rows = load_conversations(find_file("data/heldout.jsonl"), limit=60)
heldout_datums = [make_datum(render_conversation(one, tokenizer)) for one in heldout_rows]
losses = {}
for name in ("last answer", "questions, too"):
    losses[name] = nll(clients[name], heldout_datums)
    measured(f"{name}: held-out loss of the answers", losses[name], "nats per token")
costs = losses["questions, too"] - losses["last answer"]
band("Learning the questions, too, costs the answers", costs > 0)

# %% [markdown] id="why-last-question"
# ## Why the *last* answer only?
#
# A conversation that went on often went on because the first answer was not good. Somebody kept the
# log for the sake of its good end. Here are such logs: the assistant was polite and did nothing,
# the user insisted, and then the answer came.
#
# **Predict**: what does a model say to its first question if it was trained on every assistant
# message of these logs? And on the last one only?

# %% id="grumpy-logs"
polite = Message("assistant", "I am glad to help.")
insists = Message("user", "Please work it out.")
single = [one for one in conversations if len(one.messages) == 2]
logs = [
    Conversation((one.messages[0], polite, insists, one.messages[1]))
    for one in single[: STEPS * BATCH]
]
for message in logs[0].messages:
    print(f"{message.role:>9}: {message.content}")

# %% id="last-or-all"
spoken = {}
for train_on in ("all_assistant", "last_assistant"):
    datums = [make_datum(render_conversation(one, tokenizer, train_on)) for one in logs]
    spoken[train_on], _ = judge(train(datums))
    quote(spoken[train_on].records[0].completions[0], train_on)

# %% id="last-or-all-figure"
evasive = [share(found, lambda text: "glad" in text) for found in spoken.values()]
answers = [share(found, lambda text: "answer is" in text) for found in spoken.values()]
measures = {"polite, no answer": evasive, "gives an answer": answers}
show(shares_figure(list(spoken), measures, "Trained on logs whose first answers were bad"))
band("Trained on all answers, it is polite and does nothing", evasive[0] > 0.9)
band("Trained on the last, it answers", answers[1] > 0.9)

# %% [markdown] id="why-last-answer"
# The mask decides whom the model imitates. If you know that *every* answer in your data is good,
# `train_on="all_assistant"` is no mistake: it learns more from each row. If you do not know, train
# on the one that was chosen.

# %% [markdown] id="leak-question"
# ## How much does a leak flatter?
#
# We judge a model on questions that it has not seen. If some of them slip into the training data,
# the judgement rises and the model is no better. First write the detector: case and spacing must
# not hide a leak, and a question is only leaked as a whole.


# %% id="write-leaked" exercise="01.4"
def leaked(train, heldout):
    """A list of the positions in heldout (0 is the first) of questions that also occur in train;
    case and spacing do not count."""

    def plain(question):
        return " ".join(question.lower().split())

    seen = {plain(question) for question in train}
    return [i for i, question in enumerate(heldout) if plain(question) in seen]


# %% id="check-leaked"
leaked = check("01.4", leaked)

# %% id="shipped-leak"
train_questions = [one.messages[0].content for one in single]
heldout_questions = [one.messages[0].content for one in heldout_rows if len(one.messages) == 2]
found = leaked(train_questions, [*heldout_questions, train_questions[7].upper()])
band("Only the one that we planted is found", found == [len(heldout_questions)])

# %% [markdown] id="leak-experiment"
# It finds copies. The same sum in another order, or the same question in other words, is a leak,
# too, and looks different: lesson 04 holds out by content. Now leak on purpose. Sixteen held-out
# problems stand in the training data, each with its right answer, and nothing else does.
# **Predict** the accuracy on these sixteen, and on problems that did not leak.

# %% id="run-leak"
leaks = environment.heldout(16, seed=5)
told = [Message("assistant", f"The answer is {problem.answer}.") for problem in leaks]
pairs = [Conversation((*p.messages, answer)) for p, answer in zip(leaks, told, strict=True)]
datums = [make_datum(render_conversation(one, tokenizer)) for one in pairs]
leaky = train(datums, steps=60)
seen, _ = judge(leaky, leaks)
unseen, _ = judge(leaky, [one for one in heldout if one.id not in {p.id for p in leaks}])

# %% id="leak-figure"
measures = {"right": [seen.accuracy, unseen.accuracy]}
show(shares_figure(["leaked problems", "other problems"], measures, "The same model, judged twice"))
band("On what leaked it looks excellent", seen.accuracy >= 0.8)
band("It cannot add", unseen.accuracy < 0.2)

# %% id="progress"
progress()

# %% [markdown] id="take-away"
# ## What to take away
#
# - Validate before you train. Bad rows do not raise an error; they teach.
# - Weight 1 means: imitate this token. The answer *and* its end marker have weight 1; headers and
#   questions have 0.
# - The shift moves tokens against tokens, and the weights go with the targets.
# - Train on the last answer unless you vouch for all of them.
# - An evaluation is worth as much as the wall between it and the training data.
#
# ## What next
#
# [02 LoRA](02_lora.ipynb): which numbers of the model are changed, and why so few are enough. Try
# it on your own data: `posttrain validate yours.jsonl` tells what is wrong, line by line.
