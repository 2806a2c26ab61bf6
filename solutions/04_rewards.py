# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown] id="title"
# # 04 · Rewards: what you pay for is what you get
#
# Reinforcement learning makes likelier whatever is paid for. So the reward is the real
# specification of the model, with all its holes. This notebook is about writing one down, about
# learning one from comparisons, and about watching a model find the holes.
#
# After this notebook you can
#
# - say what a problem, an environment and a score are, and keep held-out problems held out;
# - write a grader that a clever completion does not fool;
# - turn "this reply is better than that one" into a number, and say how far to trust it;
# - turn a judge into rewards with a tournament, and measure what standing first is worth;
# - make a model game a reward, see it, and repair the reward;
# - use your own problems and your own reward.
#
# You need lesson 00. How rewards become gradients is lesson 05. This is one of the two longest
# lessons; a good place for a break is before "A reward that looks sensible".

# %% [markdown] id="card"
# The builder writes the measured card here.

# %% id="connect"
from course_lib import connect, check, hint, progress, preset

service = connect()

# %% id="settings"
from dataclasses import replace

SFT_STEPS = 30  # to learn how villagers are spoken of
GROUP_SIZE = 6  # replies in the tournament
MAX_TOKENS = 64  # per reply
HELDOUT = 40  # questions for each judgement, never trained on in these words
judge_config = replace(preset().preference, batch_size=8, max_steps=40, learning_rate=2e-3)
rl_config = replace(preset().rl, steps=14, prompts_per_step=8, group_size=8, save_every=0)
rl_config = replace(rl_config, learning_rate=2e-3, schedule="constant", max_tokens=MAX_TOKENS)

# %% [markdown] id="score-question"
# ## What is a reward?
#
# A function from a problem and a completion to a **score**: a number, the parts that it was made
# of, and a reason in words. The number is for the optimiser. The parts and the reason are for you:
# a number alone never tells you why.
#
# Four words of reinforcement learning: the model in training is the **policy**; what it writes is a
# **completion**; a completion with its score is a **rollout**; several rollouts of one problem are
# a **group**.

# %% id="source-score"
from course_lib.rewards import Problem, Score, correct
from course_lib.widgets import show, show_source

show_source(Problem, Score, correct)

# %% id="probe-score"
from course_lib.conversations import Message

asked = Problem((Message("user", "What is 23 + 45 + 61?"),), answer="129")
for text in ("The answer is 129.", "The answer is 130.", "I add 23, 45 and 61."):
    score = correct(asked, text)
    print(f"{score.value}  {text:22} {score.reason}")

# %% [markdown] id="environment-question"
# ## What is an environment?
#
# Where problems come from, and how they are judged. The library's has four parts that matter here:
# a name, `sample(n, seed)` for training problems, `heldout(n, seed)` for problems that are never
# trained on, and `grade(problem, text)`. The same seed gives the same problems.

# %% id="probe-environment"
from course_lib.environments import sums_environment

sums = sums_environment()
for problem in sums.sample(3, seed=0):
    print(problem.messages[-1].content, "->", problem.answer)
print("The same again:", sums.sample(3, seed=0) == sums.sample(3, seed=0))

# %% [markdown] id="heldout-question"
# ### Held out, how?
#
# The usual way is to shuffle the rows and set a tenth aside. Here it is, with sums of two numbers.
# **Predict**: of 200 rows that were set aside, how many ask for a sum that also stands among the
# other 1,800?

# %% id="heldout-leak"
import random

rng = random.Random(0)
rows = [tuple(sorted((rng.randint(10, 99), rng.randint(10, 99)))) for _ in range(2000)]
leaked = sum(row in rows[:1800] for row in rows[1800:])
print(f"set aside at random: {leaked} of 200 were trained on")

pairs_of_two = sums_environment(terms=2)
trained = {problem.id for problem in pairs_of_two.sample(1800, seed=0)}
leaked = sum(problem.id in trained for problem in pairs_of_two.heldout(200, seed=0))
print(f"held out by construction: {leaked} of 200")

# %% [markdown] id="heldout-lesson"
# More than a third leaked, and nothing would have told you: 45 + 23 looks different from 23 + 45.
# For sums the library decides by their *content*, by a hash of the sorted numbers. Then no order,
# wording or seed can carry a sum across. (Questions about the village, below, are held out by their
# wording only: the same fact may be asked in other words in training. They test manners more than
# memory.)
#
# ## How is a grader fooled?
#
# Right is 129. Two graders that people really write: "the right number occurs in the text", and
# "the last number in the text is the right one". **Predict** for each completion below who pays.

# %% id="gallery"
import re

GALLERY = [
    "The answer is 129.",
    "23 + 45 = 68, 68 + 61 = 129. The answer is 129.",
    "The answer is 68. No: the answer is 129.",
    "125 126 127 128 129",
    "The answer is 68. 129 is my house number.",
    "The answer is 68, because 23 + 45 + 61 = 129",
    "The answer is 129,000.",
    "The answer is -129.",
    "The answer is 128, or 129, or 130.",
    "The answer is 129. Or 130, or 128.",
]


def occurs(text):
    return "129" in text


def last_number(text):
    """Wrong on purpose."""
    return (re.findall(r"\d+", text) or [None])[-1] == "129"


# %% [markdown] id="grader-exercise"
# **Write a better one.** A completion states its answer after the last "answer is ". Read the whole
# number there, and nothing else. Be strict: a number that goes on behind a point or a comma (129.5,
# 129,000) is no whole number here. The library, which you saw above, does read 129,000.


# %% id="write-grader" exercise="04.1"
def read_answer(text):
    """The whole number right after the last "answer is " (an int, maybe negative), or None.

    None, too, if its digits go on behind a point or a comma: 129.5, 129,000."""
    _, mark, rest = text.rpartition("answer is ")
    number = re.match(r"-?\d+(?!\d|[.,]\d)", rest) if mark else None
    return int(number[0]) if number else None


# %% id="check-grader"
read_answer = check("04.1", read_answer)

# %% id="gallery-figure"
from course_lib.plots.heat import heat_map

graders = {
    "occurs": occurs,
    "last": last_number,
    "yours": lambda text: read_answer(text) == 129,
    "library": lambda text: correct(asked, text).value,
}
paid = [[float(grade(text)) for grade in graders.values()] for text in GALLERY]
columns = list(graders)
show(heat_map(paid, "Who pays?", "grader", "completion", "reward", rows=GALLERY, columns=columns))

# %% [markdown] id="grader-lesson"
# Only the first three completions answer 129. Both naive graders also pay for a list of numbers: a
# policy would learn to count. One trick gets past yours, too: the last, which hedges. The library
# refuses it ("more numbers follow the answer").
#
# No grader is perfect. What matters is this: **write the gallery before you train**, because the
# policy will look for the holes with thousands of samples, and it never gets bored.
#
# ## From now on: manners
#
# Sums have a right answer. "Is this a good reply?" has none. The village has both sides: facts that
# can be checked, and politeness. A few seconds of SFT give us a policy that answers questions about
# the village in all sorts of ways: curt, plain, polite, rude.

# %% id="village-sft"
from course_lib.environments import stands_aside
from course_lib.lessons import band, measured, quote, shipped_conversations
from course_lib.sft import train_sft
from course_lib.world.village import VILLAGERS


def about_village(conversation):
    """Whether it ends with a question about a villager (and not with a sum about their apples)."""
    question = conversation.prompt[-1].content
    named = any(villager.name in question for villager in VILLAGERS)
    return named and not re.search(r"\d", question)


def asks_heldout(conversation):
    """Whether a question in it is kept for judging."""
    return any(each.role == "user" and stands_aside(each.content) for each in conversation.messages)


policy = service.create_lora_training_client(service.base_model, rank=16, seed=0).result()
tokenizer = policy.get_tokenizer()
everything = [each for each in shipped_conversations() if about_village(each)]
data = [each for each in everything if not asks_heldout(each)]
sft_config = replace(preset().sft, batch_size=16, epochs=2, max_steps=SFT_STEPS)
sft_config = replace(sft_config, save_every=0, eval_every=0)
train_sft(policy, data, sft_config, tokenizer=tokenizer, seed=0)
start = policy.save_state("after-sft").result().path  # both arms of the experiment begin here

# %% [markdown] id="quality-note"
# `village_quality` is our **true quality**: a rule that pays for a true, polite and brief reply. In
# real life there is no such rule, or it is a person whom you cannot ask ten thousand times. We keep
# it apart: nothing in this notebook is trained on it, so that it can judge everything.

# %% id="source-quality"
from course_lib.environments import village_environment, village_quality
from course_lib.rollouts import sample_groups

show_source(village_quality)
village = village_environment()
sampler = policy.save_weights_and_get_sampling_client().result()
settings = {"group_size": GROUP_SIZE, "max_tokens": MAX_TOKENS, "grade": village.grade}
groups = sample_groups(sampler, village.sample(8, seed=3), tokenizer, **settings, seed=1)
group = max(groups, key=lambda each: sum(each.rewards_G))
quote(group.problem.messages[-1].content, "question")
for rollout in group.rollouts:
    quote(rollout.text, f"{rollout.score.value:.2f}, {rollout.score.reason}")

# %% [markdown] id="pairs-question"
# ## How does a comparison become a number?
#
# People find it hard to say "this reply is worth 0.7", and easy to say "this one is better". Such
# pairs look like this; the reason is for us, the model never sees it.

# %% id="pairs"
from course_lib.preferences import load_pairs

all_pairs = load_pairs("data/preferences.jsonl")
train_pairs = [pair for pair in all_pairs if not pair.heldout]
heldout_pairs = [pair for pair in all_pairs if pair.heldout][:120]
for pair in train_pairs[:3]:
    print(f"{pair.prompt[-1].content}\n  + {pair.chosen}\n  - {pair.rejected}\n  ({pair.why})")

# %% [markdown] id="bradley-terry-question"
# Bradley and Terry (1952) give every contestant a strength $\pi > 0$ and say that
#
# $$P(i \text{ beats } j) = \frac{\pi_i}{\pi_i + \pi_j} = \sigma(s_i - s_j), \qquad s = \ln \pi$$
#
# Only the *difference* of the two scores counts, the **margin**. A reward model is a network that
# gives the scores, trained so that the pairs become likely (Ouyang et al. 2022, equation 1):
#
# $$L = -\frac{1}{N} \sum_{n=1}^{N} \ln \sigma(s_n^{\text{chosen}} - s_n^{\text{rejected}})$$
#
# **Write it**, and make it survive a margin of -900.


# %% id="write-bradley-terry" exercise="04.2"
def bradley_terry_loss(margins):
    """Mean of -log(sigmoid(margin)); margin = score of chosen - score of rejected, of any size."""
    from math import exp, log1p

    return sum(max(-m, 0) + log1p(exp(-abs(m))) for m in margins) / len(margins)


# %% id="check-bradley-terry"
bradley_terry_loss = check("04.2", bradley_terry_loss)

# %% [markdown] id="probe-loss-note"
# Four probes. Say first: what is the loss of a judge who cannot tell? And does being wrong by a
# margin of 4 cost four times as much as being wrong by 1, or more, or less?

# %% id="probe-loss"
for name, margins in (
    ("cannot tell", [0.0]),
    ("right, by 4", [4.0]),
    ("wrong, by 1", [-1.0]),
    ("wrong, by 4", [-4.0]),
):
    print(f"{name:12} {bradley_terry_loss(margins):.3f}")

# %% [markdown] id="reward-model-question"
# A little over three times as much: far out the loss is the size of the margin, and at 0 it is
# still $\ln 2$. So one pair that is badly wrong does not drown all the others, as it would if
# the margin were squared.
#
# ## A reward model, trained in seconds
#
# Where does a language model keep a score? Most reward models get a new last layer, which makes one
# number of the last token's hidden state (Ouyang et al. 2022). Ours keeps its layers: it is asked
# "Is this a good reply?" after the dialogue, and $s = \ln p(\text{yes})$. So the reward model is a
# LoRA adapter like any other. Its
# loss is a function of your own, computed here and sent back as gradients:
# `forward_backward_custom`. It works wherever the SDK works. Only differences of $s$ count, so it
# does not matter that "yes" is an unlikely word.

# %% id="source-reward-model"
from course_lib.judges import Duel, judge_by_strength, reward_model
from course_lib.preferences import judgement, train_reward_model

show_source(judgement, train_reward_model)

# %% [markdown] id="first-loss-note"
# **Predict** the first loss. A judge that has learned nothing should be near $\ln 2 = 0.693$. We
# compute it with your function from the strengths of the first batch, before any training.

# %% id="first-loss"
from course_lib.batches import epoch_batches

judge_client = service.create_lora_training_client(service.base_model, rank=16, seed=0).result()
untrained = reward_model(judge_client.save_weights_and_get_sampling_client().result(), tokenizer)
order = epoch_batches(len(train_pairs), judge_config.batch_size, seed=0, epoch=0)[0]
first_batch = [train_pairs[index] for index in order]
replies = [(Problem(p.prompt), t) for p in first_batch for t in (p.chosen, p.rejected)]
strengths = untrained(replies)
margins = [better - worse for better, worse in zip(strengths[0::2], strengths[1::2], strict=True)]
predicted = bradley_terry_loss(margins)
measured("the first loss, by your function:", predicted)

# %% id="train-reward-model"
from course_lib.plots.curves import two_curves_figure

trained = train_reward_model(judge_client, train_pairs, judge_config, tokenizer=tokenizer, seed=0)
losses = [row["train/loss"] for row in trained.metrics]
margin = [row["preference/margin"] for row in trained.metrics]
names = ("loss (nats per pair)", "margin (nats)")
show(two_curves_figure(losses, margin, names, "The reward model learns from 8 pairs a step"))
measured("the first loss, by the engine:", losses[0])
band("Your loss and the engine's agree", abs(losses[0] - predicted) < 0.01)

# %% [markdown] id="judge-question"
# ## How far can it be trusted?
#
# Two questions. How often is it right on pairs that it has not seen? And when it says "90 % sure",
# is it right nine times in ten? The first is accuracy, the second **calibration**.
#
# The pairs were made for seven reasons. **Predict** which of them it finds hardest.

# %% id="judge-heldout"
from course_lib.plots.shares import shares_figure


def chances(strengths):
    """The judge's P(chosen wins) for each held-out pair."""
    duels = [Duel(Problem(p.prompt), p.chosen, p.rejected) for p in heldout_pairs]
    return judge_by_strength(strengths)(duels)


def mean_right(chances):
    return sum(chance > 0.5 for chance in chances) / len(chances)


def accuracy_by_reason(chances):
    rights = {}
    for pair, chance in zip(heldout_pairs, chances, strict=True):
        rights.setdefault(pair.why, []).append(chance > 0.5)
    return {why: sum(right) / len(right) for why, right in sorted(rights.items())}


strengths = reward_model(judge_client.save_weights_and_get_sampling_client().result(), tokenizer)
after = chances(strengths)
before_by, after_by = accuracy_by_reason(chances(untrained)), accuracy_by_reason(after)
bars = {"untrained": list(before_by.values()), "trained": list(after_by.values())}
show(shares_figure(list(after_by), bars, "Held-out pairs: how often is the judge right?"))
measured("held-out pairs judged right:", mean_right(after), "%")
band("The reward model is right on three held-out pairs in four", mean_right(after) >= 0.75)
band("On truth the reward model is worse than a coin", after_by["true instead of false"] < 0.5)

# %% id="calibration-figure"
from course_lib.plots.preferences import calibration_figure
from course_lib.preferences import calibration

bins = calibration(after)
show(calibration_figure(bins, "Is it as right as it is sure?"))
sure, right, _ = max(bins, key=lambda each: each[2])
band("In its largest bin the judge is surer than right", sure > right)

# %% [markdown] id="truth-note"
# On manners it is nearly perfect, and on truth *worse than a coin*. In many of those pairs the
# true reply is plain and the false one polite. The calibration hints at it: most pairs lie in one
# bin, in which the judge is surer than right, and that is where the lies are. Let us ask directly,
# for all eighteen villagers: a plain truth against a polite lie. **Predict** how many lies win.

# %% id="polite-lies"
duels = []
for villager, other in zip(VILLAGERS, VILLAGERS[1:] + VILLAGERS[:1], strict=True):
    asked_food = Problem((Message("user", f"What does {villager.name} like to eat?"),))
    truth = f"{villager.name} likes to eat {villager.food}."
    lie = f"Good day to you. {villager.name} likes to eat {other.food}. I hope this helps."
    duels.append(Duel(asked_food, truth, lie))
trained_judge = judge_by_strength(strengths)
lies_won = sum(chance < 0.5 for chance in trained_judge(duels))
measured("polite lies that beat a plain truth, of 18:", lies_won)
band("Most polite lies win", lies_won > 12)

# %% [markdown] id="truth-lesson"
# It has learned what was easiest to see: six of the seven kinds of pair can be told by how a reply
# sounds, and truth would have needed knowledge. The one accuracy in the headline hid it, and the
# calibration says so only if you look at the right bin. **Split the accuracy of a judge by
# reason.** A policy that is paid by this judge will be taught to lie politely.
#
# But the base model *has* the knowledge: it has read all about the villagers. A score that hangs on
# one "yes" has to find it from scratch. So let the strength of a reply be the logprob that the
# adapter gives to *the reply itself*: a lie is unlikely from the start. Same pairs, same loss, same
# 40 steps. **Predict** what becomes of truth, and of manners. (Careful with truth: most of these
# facts stand in chosen training replies, too, in answer to other wordings. So we ask this judge
# before its training as well: what it knows then, it has from the base model alone.)

# %% id="second-judge"
reply_config = replace(judge_config, strength="reply")
reader = service.create_lora_training_client(service.base_model, rank=16, seed=0).result()
unread = reader.save_weights_and_get_sampling_client().result()
unread_by = accuracy_by_reason(chances(reward_model(unread, tokenizer, "reply")))
train_reward_model(reader, train_pairs, reply_config, tokenizer=tokenizer, seed=0)
reader_weights = reader.save_weights_and_get_sampling_client().result()
reader_after = chances(reward_model(reader_weights, tokenizer, "reply"))
reader_by = accuracy_by_reason(reader_after)
bars = {
    "one yes": list(after_by.values()),
    "reply, before": list(unread_by.values()),
    "reply, after": list(reader_by.values()),
}
show(shares_figure(list(after_by), bars, "Two judges, one set of pairs: how often right?"))
band("The second judge is right on 90 % of the pairs", mean_right(reader_after) >= 0.9)
band("It knew truth before", unread_by["true instead of false"] > 0.8)
band("It knows truth after, too", reader_by["true instead of false"] > 0.8)

# %% [markdown] id="two-judges"
# It knew truth before it was trained, and manners after. What a reward model starts from decides
# what it can learn from a few hundred pairs. This one has its own price: its strengths are logprobs
# of whole replies, so they say nothing across prompts, and only comparisons inside a group make
# sense. That is what the next section is for.
#
# ## From duels to rewards
#
# A strength can be paid as it is. Many judges have none: they read two replies and name the better
# one. Then a **tournament** helps: in each group every reply meets every other, and is paid the
# share of its duels that it won. Rewards are then between 0 and 1, and compare siblings, which is
# what GRPO wants.
#
# Here is the trained judge on the group above: row $i$, column $j$ is the chance that $i$ beats
# $j$.

# %% id="win-matrix"
from textwrap import shorten

from course_lib.judges import win_matrix

texts = [rollout.text for rollout in group.rollouts]
wins = win_matrix(trained_judge, group.problem, texts)
rows = [f"{i} {shorten(text, 36, placeholder=' ...')}" for i, text in enumerate(texts)]
numbers = [str(i) for i in range(GROUP_SIZE)]
title = "The trained judge: who beats whom?"
look = {"rows": rows, "columns": numbers, "limits": (0, 1)}
show(heat_map(wins, title, "shown second", "shown first", "P(row wins)", **look))

# %% [markdown] id="tournament-exercise"
# **Write the tournament.** `first_wins_G_G[i][j]` says whether `i` won when it was shown first and
# `j` second. Each pair has met twice, once in each order; count both. The diagonal, a reply against
# itself, does not count.


# %% id="write-tournament" exercise="04.3"
def tournament_rewards(first_wins_G_G):
    """One reward per answer, 0 to 1; [i][j] is True if i, shown before j, was preferred."""
    G = len(first_wins_G_G)
    rewards = []
    for i in range(G):
        others = [j for j in range(G) if j != i]
        as_first = sum(first_wins_G_G[i][j] for j in others)
        as_second = sum(not first_wins_G_G[j][i] for j in others)
        rewards.append((as_first + as_second) / (2 * len(others)))
    return rewards


# %% id="check-tournament"
tournament_rewards = check("04.3", tournament_rewards)

# %% [markdown] id="position-question"
# ## Does it matter who stands first?
#
# Not to the trained judge: it looks at each reply alone. Now another kind of judge: a language
# model reads "Reply A: ... Reply B: ... Which reply is better, A or B?" and says a letter. We ask
# our base model. **Predict** its win matrix.

# %% id="asked-judge"
from course_lib.judges import judge_by_asking, position_bias

base_sampler = service.create_sampling_client(base_model=service.base_model).result()
asked_judge = judge_by_asking(base_sampler, tokenizer)
asked_wins = win_matrix(asked_judge, group.problem, texts)
title = "The base model, asked: who beats whom?"
show(heat_map(asked_wins, title, "shown second", "shown first", "P(row wins)", **look))

# %% [markdown] id="position-note"
# The diagonal is a reply against itself, where an honest judge says 0.5. The **position bias** is
# the mean of P(first wins) over both orders, less 0.5: what standing first is worth.

# %% id="position-bias"
some = [Duel(Problem(pair.prompt), pair.chosen, pair.rejected) for pair in heldout_pairs[:30]]
bias = {"trained": position_bias(trained_judge, some), "asked": position_bias(asked_judge, some)}
for name, value in bias.items():
    measured(f"position bias of the {name} judge:", round(value, 3) + 0)
band("The trained judge has no position bias", abs(bias["trained"]) < 1e-6)
band("The judge that is asked nearly always says A", bias["asked"] > 0.3)

# %% [markdown] id="one-order-question"
# What does that do to rewards? To save half the calls, somebody asks each pair once, the earlier
# reply first. **Predict** the six rewards. Then with both orders.


# %% id="one-order-figure"
def as_table(wins):
    """P(row wins) -> did the row win?"""
    return [[chance > 0.5 for chance in row] for row in wins]


asked_table = as_table(asked_wins)
once = [
    [asked_table[min(i, j)][max(i, j)] == (i < j) for j in range(GROUP_SIZE)]
    for i in range(GROUP_SIZE)
]
rewards = {
    "asked once": [sum(row[:i] + row[i + 1 :]) / (GROUP_SIZE - 1) for i, row in enumerate(once)],
    "asked both ways": tournament_rewards(asked_table),
    "trained judge": tournament_rewards(as_table(wins)),
}
table = [list(each) for each in zip(*rewards.values(), strict=True)]
look = {"rows": rows, "columns": list(rewards), "limits": (0, 1)}
show(heat_map(table, "What each reply is paid", "judge", "reply", "reward", **look))
band(
    "Asked once, the first is paid more than the last",
    rewards["asked once"][0] > rewards["asked once"][-1] + 0.5,
)
spread = max(rewards["asked both ways"]) - min(rewards["asked both ways"])
band("Asked in both orders, they are paid nearly alike", spread < 0.35)

# %% [markdown] id="position-lesson"
# Asked once, the reward is the seat. GRPO would have trained on it without complaint: in every
# group some replies are paid more than others, and that is all it looks at (lesson 05). Asked in
# both orders, the bias cancels, and what remains is the truth about this judge: it has hardly an
# opinion. (Large models have one, and a smaller bias, and it is there: Zheng et al. 2023, "Judging
# LLM-as-a-Judge".) The library's `tournament_reward` always asks both orders, and reports the bias
# as a part of the score. It also adds up the probabilities instead of counting wins: with a count,
# two replies that the judge finds nearly alike (0.51 against 0.49) are paid as if one were clearly
# better.
#
# ## A reward that looks sensible
#
# "Good replies are polite, and thorough." So: half for length, half for polite words. Here are
# seven replies and what three parts say about each. **Predict** which earns most. Then move the
# sliders: is there a setting in which the best reply wins, and nothing false comes second?

# %% id="reward-designer"
from course_lib.rewards import reward_from_name
from course_lib.widgets import reward_designer

stew = Problem((Message("user", "What does Bram like to eat?"),), "Bram likes to eat stew")
REPLIES = {
    "true and polite": "Thank you for asking. Bram likes to eat stew. Please ask me again.",
    "true and plain": "Bram likes to eat stew.",
    "one word": "stew.",
    "true and rude": "Go away. Bram likes to eat stew.",
    "false and polite": "Thank you for asking. Bram likes to eat plums. Please ask me again.",
    "thanks, 3 times": "Thank you for asking. " * 3,
    "thanks, 10 times": "Thank you for asking. " * 10,
}
parts = {
    name: [reward_from_name(name)(stew, text).value for text in REPLIES.values()]
    for name in ("length", "polite")
}
parts["true"] = [float(f"{stew.answer}." in text) for text in REPLIES.values()]
reward_designer(list(REPLIES), parts, {"length": 0.5, "polite": 0.5}).show()

# %% [markdown] id="hacking-question"
# ## What does a policy make of it?
#
# There is such a setting, with a large weight on *true*. Suppose that we had not thought of it, or
# had no way to check the truth, and trained on length and politeness.
#
# You have seen the hole; the policy has not. It starts from SFT and has never said "Thank you for
# asking" ten times. **Predict**: draw two curves over fourteen steps of GRPO, the reward that is
# paid, and the true quality that nobody pays. Do they rise together? Until when? (A reward that
# stands in for what is meant is a **proxy**. Later a second policy starts from the same place with
# another reward: these are the two **arms** of the experiment.)
#
# `watched` notes the true quality of every completion beside the reward. It does not pay for it.

# %% id="hacking-run"
from course_lib.grpo import train_grpo
from course_lib.widgets import LiveTraining

proxy = reward_from_name("0.5*length+0.5*polite")


def watched(reward):
    """The same reward, with the true quality noted among the parts."""

    def score(problem, text):
        found = reward(problem, text)
        parts = {**found.parts, "quality": village_quality(problem, text).value}
        return Score(found.value, parts, found.reason)

    return score


proxy_arm = service.create_training_client_from_state(start).result()
reward = watched(proxy)
gamed = await LiveTraining().run(
    train_grpo, proxy_arm, village, rl_config, tokenizer=tokenizer, reward=reward, seed=0
)

# %% id="hacking-figure"
from course_lib.plots.preferences import arms_figure


def curves_of(result):
    """What was paid, and what was wanted."""
    return result.rewards, [row["reward/quality"] for row in result.metrics]


paid, quality = curves_of(gamed)
show(arms_figure({"longer and politer": (paid, quality)}, "Paid for length and polite words"))
for rollout in gamed.groups[0].rollouts[:2]:
    quote(
        rollout.text, f"paid {rollout.score.value:.2f}, worth {rollout.score.parts['quality']:.2f}"
    )
band("Gamed: the reward rose by more than 0.4", paid[-1] > paid[0] + 0.4)
band("Gamed: quality rose at first", max(quality) > quality[0] + 0.1)
band("Gamed: then quality fell again, by more than 0.2", quality[-1] < max(quality) - 0.2)

# %% [markdown] id="hacking-lesson"
# For a few steps the two rise together: polite replies *are* better than curt ones. That is why the
# reward looked sensible, and why a short test would have passed it. Then the cheapest way to more
# reward leads away from what was meant. Nothing in the training curve shows the turn: it rises,
# smoothly. (Goodhart's law; measured for reward models by Gao et al. 2022, "Scaling Laws for Reward
# Model Overoptimization".) Look at the dead groups in the dashboard, too: groups in which all
# replies are paid the same. Once every reply earns the full reward, there is nothing to prefer, and
# the model stays where it is.
#
# ## Repair it
#
# What should be true of a better reward? Nothing may be earned without the thing that matters;
# what is pleasant comes on top, and has a ceiling. Here is another broken one, in two lines:
#
# ```python
# def broken_reward(is_correct, polish):
#     return 0.5 * is_correct + polish
# ```
#
# **Repair it**: 0 for a wrong reply; 1 for a right one, and up to 0.2 more for polish.


# %% id="write-repair" exercise="04.4"
def repaired_reward(is_correct, polish):
    """0 if wrong; if correct 1 plus 0.2 times the polish, which counts at least 0 and at most 1."""
    if not is_correct:
        return 0.0
    return 1.0 + 0.2 * min(max(polish, 0.0), 1.0)


# %% id="check-repair"
repaired_reward = check("04.4", repaired_reward)

# %% [markdown] id="control-question"
# Now the control arm: the same start, the same seed, the same questions, the same number of steps.
# Only the reward differs. Polish is one opening and one closing courtesy, each counted once, and
# words beyond sixteen cost. **Predict** both curves again.

# %% id="control-run"
from course_lib.world.village import POLITE_CLOSINGS, POLITE_OPENINGS


def repaired(problem, text):
    """A reply must tell the fact; then an opening and a closing are worth something, once."""
    told = f"{problem.answer}." in text
    courtesies = sum(any(c in text for c in some) for some in (POLITE_OPENINGS, POLITE_CLOSINGS))
    excess = max(0, len(text.split()) - 16)
    value = repaired_reward(told, courtesies / 2 - 0.1 * excess)
    return Score(value, {"told": float(told), "courtesies": courtesies / 2}, f"{excess} words over")


control_arm = service.create_training_client_from_state(start).result()
reward = watched(repaired)
controlled = train_grpo(control_arm, village, rl_config, tokenizer=tokenizer, reward=reward, seed=0)

# %% id="arms-figure"
arms = {"longer and politer": curves_of(gamed), "repaired": curves_of(controlled)}
show(arms_figure(arms, "The same start, the same seed, two rewards"))
paid_control, quality_control = curves_of(controlled)
band("Repaired: the reward rose", paid_control[-1] > paid_control[0] + 0.3)
band("Repaired: quality rose with it", quality_control[-1] > quality_control[0] + 0.2)

# %% [markdown] id="judged-note"
# And on questions that neither arm was trained on, judged by the rule that neither was paid by:

# %% id="arms-judged"
from course_lib.evaluation import evaluate

questions = village.heldout(HELDOUT, seed=0)
worth = {}
for name, client in (("SFT", policy), ("longer and politer", proxy_arm), ("repaired", control_arm)):
    judged = client.save_weights_and_get_sampling_client().result()
    found = evaluate(judged, tokenizer, village, questions, max_tokens=MAX_TOKENS)
    worth[name] = found.mean_reward
    measured(f"{name}: true quality of held-out replies", found.mean_reward)
    quote(found.records[1].completions[0], name)
band(
    "The repaired arm is better by 0.3 or more",
    worth["repaired"] > worth["longer and politer"] + 0.3,
)

# %% [markdown] id="judge-on-arms-note"
# One more question. The reward model was trained on pairs, among them "says it once and stops".
# **Predict**: would it have seen through the gamed replies?

# %% id="judge-on-arms"
ends = {name: run.groups for name, run in (("gamed", gamed), ("repaired", controlled))}
liked = {}
for name, groups_of in ends.items():
    replies = [(each.problem, rollout.text) for each in groups_of for rollout in each.rollouts]
    liked[name] = sum(strengths(replies)) / len(replies)
    measured(f"{name}: mean score by the reward model", liked[name])
band("The reward model prefers the repaired replies", liked["repaired"] > liked["gamed"] + 0.5)

# %% [markdown] id="judge-on-arms-lesson"
# It would: repetition is something that it has seen. A learned reward is blind where its pairs are
# blind (truth), and sharp where they are sharp. A rule is blind where its author was. That is why
# they are combined, and why neither replaces reading.
#
# One alarm costs nothing: `diagnose` reads the metrics of a run (lesson 10 is about it). It sees
# that the replies grow. It cannot know what you meant.

# %% id="diagnose"
from course_lib.diagnosis import diagnose

for finding in diagnose(gamed.metrics):
    quote(f"{finding.finding}: {finding.remedy}", "longer and politer")
band("The loop has something to say about the gamed arm", len(diagnose(gamed.metrics)) > 0)
band("The loop has something to say about the repaired arm", len(diagnose(controlled.metrics)) > 0)

# %% [markdown] id="own-question"
# ## Your own problems, your own reward
#
# Problems are lines of JSON with a `prompt` and an `answer`. The file becomes an environment; a
# hash of the prompt holds out one row in ten on average (in a small file it may be more, or fewer).
# It knows nothing of content: below, each question that is held out is trained on in its other
# wording. Where that matters, give `environment_from_file` a second file, with the held-out
# problems.

# %% id="own-problems"
import json
from pathlib import Path

from course_lib.environments import environment_from_file

folder = Path("runs/lesson-04")
folder.mkdir(parents=True, exist_ok=True)
tasks = [
    {"prompt": question.format(name=each.name), "answer": each.food}
    for each in VILLAGERS
    for question in ("What does {name} like to eat?", "What food does {name} like?")
]
(folder / "food.jsonl").write_text("\n".join(map(json.dumps, tasks)))
food = environment_from_file("runs/lesson-04/food.jsonl")
print(food.sample(1, seed=0)[0].messages[-1].content, "| held out:", len(food.heldout(99, seed=0)))

# %% [markdown] id="own-reward-note"
# A reward is one function in a file: `(problem, completion) -> number`. Say that you pay by the
# word: the answer must be named, and every word costs.

# %% id="own-reward"
(folder / "brief.py").write_text('''
def brief(problem, completion):
    """1 if the answer is named, less 0.05 for each word."""
    return (problem.answer in completion) - 0.05 * len(completion.split())


def careless(problem, completion):
    return len(completion.split()) / completion.count("!")  # wrong on purpose
''')
brief = reward_from_name("runs/lesson-04/brief.py:brief")
for name, text in REPLIES.items():
    score = brief(replace(stew, answer="stew"), text)
    print(f"{score.value:5.2f}  {name}")

# %% [markdown] id="own-bug-note"
# And a bug in it? A reward that quietly gave 0 would look like a policy that cannot learn. So a
# fault is raised, with the file and the line.

# %% id="own-bug"
from course_lib.errors import CourseError

careless = reward_from_name("runs/lesson-04/brief.py:careless")
try:
    careless(stew, REPLIES["one word"])
except CourseError as error:
    print(error)

# %% [markdown] id="own-run-note"
# Together in a run, by name, as the command line would do it (`posttrain all --set rl.reward=...`,
# see lesson 10). **Predict** what replies look like after eight steps. How will this reward be
# gamed?

# %% id="own-run"
own = service.create_training_client_from_state(start).result()
own_config = replace(rl_config, steps=8, reward="runs/lesson-04/brief.py:brief")
result = train_grpo(own, food, own_config, tokenizer=tokenizer, seed=0)
band("Your reward rose by more than 0.2", result.rewards[-1] > result.rewards[0] + 0.2)
for each in result.groups[:4]:
    quote(each.rollouts[0].text, f"{each.rollouts[0].score.value:.2f}")

# %% [markdown] id="own-run-lesson"
# Courtesies cost, so they go. In our run that made it rude: "Stop asking." is two words where "I am
# glad to help." is five, and nothing in this reward forbids it. The cheapest reply of all is one
# word, worth 0.95. The policy knows such replies, its SFT data has them, and still eight steps did
# not end there: a step makes likelier what was paid above its group's mean this time, and a nearer
# cheap reply can win before the cheapest. More in lesson 05. And the hole in this reward: `in`
# looks for letters, not for words. "tea" stands in "teacher".

# %% id="progress"
progress()

# %% [markdown] id="take-away"
# ## What to take away
#
# - A reward is a program that the policy will read more closely than you do. Give it parts and
#   reasons, and write the gallery of tricks first.
# - Hold problems out by their content, not by their row.
# - Bradley-Terry: $P = \sigma(s_i - s_j)$. A reward model learns what is easiest to see in the
#   pairs. Split its accuracy by reason.
# - Tournaments turn comparisons into rewards. Ask both orders, always.
# - A gamed reward rises smoothly. Only something that is *not* paid for can show it: keep a measure
#   apart, and read completions.
# - Pay for the thing itself first; what is pleasant comes behind it, and has a ceiling.
#
# ## What next
#
# [05 GRPO](05_grpo.ipynb): how a reward becomes a gradient.
