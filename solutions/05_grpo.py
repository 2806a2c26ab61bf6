# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown] id="title"
# # 05 · GRPO: learn from your own attempts
#
# SFT shows the model good answers. **Reinforcement learning** (RL) lets it try, and tells it
# afterwards how good the attempt was. Nobody has to write the answer down; it is enough to
# recognise a good one.
#
# After this notebook you can
#
# - write down a step of GRPO: sample groups, score them, centre the rewards, push;
# - say why a reward needs a comparison, and why with the *same* question;
# - predict the loss of the first step, and say why it tells you nothing;
# - predict how many groups are dead, and choose the group size;
# - explain why RL comes after SFT, and what it finds that SFT did not teach.
#
# You need lesson 00; rewards and environments are lesson 04.

# %% [markdown] id="card"
# The builder writes the measured card here.

# %% id="connect"
from course_lib import connect, check, hint, progress, preset

service = connect()

# %% [markdown] id="settings-note"
# ## The task, and where we start
#
# The question is always the sum of three two-digit numbers. The reward is 1 for a right answer and
# 0 for a wrong one. We start from a model that a few seconds of SFT have taught to answer at all.

# %% id="settings"
from dataclasses import replace

PROBLEMS = 6  # groups to look at
GROUP_SIZE = 8  # answers to each problem
MAX_TOKENS = 40  # per answer
HELDOUT = 60  # problems for each judgement, never trained on
rl_config = replace(preset().rl, prompts_per_step=8, group_size=GROUP_SIZE, save_every=0)
rl_config = replace(rl_config, steps=max(25, rl_config.steps))
rl_config = replace(rl_config, learning_rate=1e-3, max_tokens=MAX_TOKENS)

# %% id="quick-sft"
from course_lib.environments import sums_environment
from course_lib.lessons import band, measured, quick_sft, quote

client, tokenizer, _ = quick_sft(service)
environment = sums_environment()
start = client.save_state("after-sft").result().path  # to come back to

# %% [markdown] id="group-question"
# ## One question, eight answers
#
# A **group** is several answers to one question, sampled from the same model at temperature 1: each
# token is drawn with the probability that the model gives it. Some are right by luck, or because
# the model happened to go about it in a better way.
#
# **Predict.** The model is right roughly one time in six. In a group of eight, how many are right?

# %% id="sample-groups"
from course_lib.rollouts import sample_groups

sampler = client.save_weights_and_get_sampling_client().result()
problems = environment.sample(PROBLEMS, seed=3)
settings = {"group_size": GROUP_SIZE, "max_tokens": MAX_TOKENS, "grade": environment.grade}
groups = sample_groups(sampler, problems, tokenizer, **settings, seed=1)
group = max(groups, key=lambda each: min(sum(each.rewards_G), GROUP_SIZE - sum(each.rewards_G)))
quote(f"{group.problem.messages[-1].content} (Right is {group.problem.answer}.)", "question")
for rollout in group.rollouts:
    quote(rollout.text, f"reward {rollout.score.value:.0f}")

# %% id="rewards-figure"
from course_lib.plots.heat import heat_map
from course_lib.widgets import show, show_source

rewards_P_G = [group.rewards_G for group in groups]
show(heat_map(rewards_P_G, "Rewards: one row is one group", "answer", "problem", "reward"))

# %% [markdown] id="advantage-question"
# ## Better than what?
#
# A reward of 1 sounds good. Is it? If all eight answers got 1, then none of them was better than
# the others. What a step should follow is the **advantage**: how much better than expected. GRPO
# (group relative policy optimisation, Shao et al. 2024) takes the group itself for the expectation:
#
# $$A_i = r_i - \frac{1}{G}\sum_{j=1}^{G} r_j$$
#
# **Write it.** `rewards_P_G` is a list of P groups, each a list of G rewards.


# %% id="write-advantages" exercise="05.1"
def group_advantages(rewards_P_G):
    """rewards_P_G: P groups (one per problem) of G rewards; gives advantages of the same shape."""
    means_P = [sum(rewards_G) / len(rewards_G) for rewards_G in rewards_P_G]
    return [
        [reward - mean for reward in rewards_G]
        for rewards_G, mean in zip(rewards_P_G, means_P, strict=True)
    ]


# %% id="check-advantages"
group_advantages = check("05.1", group_advantages)

# %% [markdown] id="probe-note"
# Three probes. Say before you run the cell what the advantages will be. The second is the wrong
# way on purpose: the mean of the whole batch. The two rows are an easy question and a hard one.

# %% id="probe-advantages"
easy, hard = [1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]
print("own group:  ", group_advantages([easy, hard]))
batch_mean = sum(easy + hard) / 8
print("whole batch:", [[reward - batch_mean for reward in row] for row in (easy, hard)])
print("all right:  ", group_advantages([[1.0, 1.0, 1.0, 1.0]]))

# %% [markdown] id="probe-answer"
# With its own group as the measure, the one right answer to the hard question gets 0.75, and a
# right answer to the easy one 0.25: what is rare teaches more. With the whole batch as the measure
# all right answers look alike, and the model is told off for every hard question.

# %% [markdown] id="std-question"
# ## Why not divide by the spread?
#
# The original GRPO also divides by the group's standard deviation. The library can do both. Take
# two groups: one in which half of the answers are right, and one in which all but one are. The
# mean of $A^2$ tells how hard a group pulls. **Predict**: with the division, which group pulls
# harder?

# %% id="source-advantages"
from course_lib.advantages import group_advantages as library_advantages

show_source(library_advantages)

# %% id="probe-std"
print("group      kind        right  wrong  mean A^2")
for name, rewards_G in (("half", [1.0] * 4 + [0.0] * 4), ("all but 1", [1.0] * 7 + [0.0])):
    for kind in ("centred", "normalised"):
        advantages_G = library_advantages(rewards_G, kind)
        pull = sum(a * a for a in advantages_G) / 8
        print(f"{name:10} {kind:10} {advantages_G[0]:6.2f} {advantages_G[-1]:6.2f} {pull:9.2f}")

# %% [markdown] id="std-lesson"
# Only centred, the group that nearly agrees pulls less than half as hard as the one that is split:
# there is less to prefer. Divided by the spread, every group pulls alike, and the single wrong
# answer gets -2.65. Questions that are nearly always right, or nearly never, count for more than
# they tell. Liu et al. 2025 ("Dr. GRPO") therefore leave the division out, and so do we.
#
# The third kind, `leave_one_out` (RLOO), compares each answer with the other $G - 1$: the group's
# mean holds the answer itself, which shrinks every advantage to $(G-1)/G$ of it. For one group size
# that is a constant factor, and Adam does not feel it.
#
# Here are the advantages of the groups above. A row of zeros is a **dead group**: nothing to
# prefer, nothing to learn.


# %% id="advantages-figure"
advantages_P_G = group_advantages(rewards_P_G)
title = "Advantages: what the step will follow"
show(heat_map(advantages_P_G, title, "answer", "problem", "advantage", signed=True))
band("Every row adds up to zero", all(abs(sum(row)) < 1e-6 for row in advantages_P_G))

# %% [markdown] id="token-question"
# ## Which token gets the credit?
#
# The reward judges the whole answer, and nobody knows which token made it right. GRPO gives every
# token of an answer the same advantage. That is crude, and it works: over many groups, a token
# that has nothing to do with it is pushed up as hard as down.
#
# The library makes the datum. The question's tokens get advantage 0: they were not sampled.

# %% id="source-rl-datum"
from course_lib.batches import make_rl_datum

show_source(make_rl_datum)

# %% id="token-figure"
from course_lib.plots.tokens import value_strip

row = groups.index(group)
for wanted in sorted(set(group.rewards_G), reverse=True):
    g = group.rewards_G.index(wanted)
    rollout, advantage = group.rollouts[g], advantages_P_G[row][g]
    tokens = rollout.prompt_tokens + rollout.completion_tokens
    values = [0.0] * len(rollout.prompt_tokens) + [advantage] * len(rollout.completion_tokens)
    title = f"Reward {wanted:.0f}: advantage {advantage:+.2f} for every token of the answer"
    show(value_strip([tokenizer.decode([token]) for token in tokens], values, title))

# %% [markdown] id="policy-gradient"
# ## Why push by the advantage?
#
# What we want is a high **expected reward** $J = \sum_y p(y)\, r(y)$, over all answers $y$ that the
# model might give. Since $\nabla p = p\, \nabla \ln p$,
#
# $$\nabla J = \sum_y p(y)\, r(y)\, \nabla \ln p(y)
# = \mathbb{E}\left[r(y)\, \nabla \ln p(y)\right]$$
#
# So sample answers, and push up the log-probability of each as hard as it was rewarded. This is the
# **policy gradient** (REINFORCE, Williams 1992). And any number $b$ may be taken off the reward, if
# it does not depend on the answer: $\mathbb{E}[b\, \nabla \ln p] = b\, \nabla \sum_y p(y) = 0$,
# since probabilities add up to 1 whatever the weights. Such a **baseline** changes no average, only
# the noise. The mean of the *other* answers is one; the group's mean, which holds the answer
# itself, gives the same up to the constant factor above. (PPO as it was made for language models
# trains a second network to foretell the reward, the *critic*; GRPO does without.)

# %% [markdown] id="loss-question"
# ## What is the first loss?
#
# The loss is called `importance_sampling`; lesson 06 is about it. Each token contributes
#
# $$-\frac{p_\text{trainer}(\text{token})}{p_\text{sampler}(\text{token})} \cdot A$$
#
# and the SDK **sums** over tokens and answers. A term's gradient is the one above: where trainer
# and sampler agree, the gradient of the ratio is that of $\ln p$. The minus is there because
# optimizers minimise.
#
# Before the first step, trainer and sampler are the same model. **Predict** the loss of a group
# from its advantages and the lengths of its answers.


# %% id="predict-first-loss" exercise="05.2"
def first_loss(advantages_G, lengths_G):
    """loss:sum of importance_sampling before the first step; lengths_G in completion tokens."""
    return -sum(advantage * n for advantage, n in zip(advantages_G, lengths_G, strict=True))


# %% id="check-first-loss"
first_loss = check("05.2", first_loss)

# %% [markdown] id="first-loss-note"
# And the engine? `forward` computes a loss and takes no step.


# %% id="measure-first-loss"
def rl_datums(groups, advantages_P_G):
    """One datum for each answer whose advantage is not zero."""
    return [
        make_rl_datum(r.prompt_tokens, r.completion_tokens, r.logprobs, [a] * len(r.logprobs))
        for group, advantages_G in zip(groups, advantages_P_G, strict=True)
        for r, a in zip(group.rollouts, advantages_G, strict=True)
        if a
    ]


datums = rl_datums(groups, advantages_P_G)
engine_loss = client.forward(datums, "importance_sampling").result().metrics["loss:sum"]
lengths_P_G = [[len(r.completion_tokens) for r in group.rollouts] for group in groups]
predicted = sum(first_loss(a, n) for a, n in zip(advantages_P_G, lengths_P_G, strict=True))
measured("predicted", predicted)
measured("the engine's loss", engine_loss)
band("They agree", abs(predicted - engine_loss) < 0.01 * max(1, abs(engine_loss)))

# %% [markdown] id="loss-lesson"
# So the loss of an RL step is a number about *lengths*: if all answers were equally long, it would
# be zero, before the first step and after a thousand. It does not fall while the model learns. Its
# *gradient* is what matters; to see whether it learns, look at the reward.
#
# ## A whole step
#
# Everything is there: sample, score, centre, push.

# %% id="grpo-step"
import tinker


def grpo_step(client, seed, advantages_of, learning_rate=1e-3):
    """One step on fresh groups; returns the mean reward of what was sampled."""
    sampler = client.save_weights_and_get_sampling_client().result()
    groups = sample_groups(sampler, environment.sample(8, seed), tokenizer, **settings, seed=seed)
    rewards_P_G = [group.rewards_G for group in groups]
    datums = rl_datums(groups, advantages_of(rewards_P_G))
    backward = client.forward_backward(datums, "importance_sampling")
    update = client.optim_step(tinker.AdamParams(learning_rate=learning_rate))
    backward.result(), update.result()
    return sum(map(sum, rewards_P_G)) / (8 * GROUP_SIZE)


# %% [markdown] id="centring-question"
# ## What happens without centring?
#
# Suppose that somebody pays 10 for any answer, and 1 more if it is right. The order is the same as
# before: right is better. **Predict**: does it matter for a model that follows the rewards
# themselves, 11 and 10? And for one that follows centred rewards?

# %% id="centring-run"
from course_lib.plots.curves import curves_figure


def raw(rewards_P_G):
    """No comparison: the advantage is the reward, here 11 or 10."""
    return [[reward + 10 for reward in rewards_G] for rewards_G in rewards_P_G]


curves, clients = {}, {}
for name, advantages_of in (("not centred", raw), ("centred", group_advantages)):
    clients[name] = service.create_training_client_from_state(start).result()
    curves[name] = [grpo_step(clients[name], seed, advantages_of) for seed in range(10)]
show(curves_figure(curves, "The same ten batches of problems", "share of right answers"))

# %% id="centring-judged"
from course_lib.evaluation import evaluate

heldout = environment.heldout(HELDOUT, seed=0)


def judge(client, name, samples=1):
    """Accuracy of the present weights on held-out problems."""
    sampler = client.save_weights_and_get_sampling_client().result()
    found = evaluate(
        sampler, tokenizer, environment, heldout, max_tokens=MAX_TOKENS, samples=samples
    )
    measured(f"{name}: held-out accuracy", found.accuracy, "%")
    return found


plain, centred = (judge(clients[name], name) for name in curves)
band("Centring made the difference", centred.accuracy > plain.accuracy + 0.15)

# %% [markdown] id="centring-lesson"
# Without a comparison every answer is pushed up with nearly the same force, wrong ones included;
# the small difference between 11 and 10 drowns in it. On average over very many answers both would
# push the same way, since a baseline changes no average; without one the noise is many times
# larger than what is to be learned. Centred, the constant drops out: 11 and 10 are the same as 1
# and 0. (With plain 1 and 0 and no centring, a run as short as this one hardly differs: wrong
# answers then are not pushed at all. Try it: replace the 10 by 0.)
#
# ## What makes a group a group
#
# "Better than its siblings" makes sense if the siblings answered the *same* question. Here is a bug
# that is easily written and hard to see: each group was filled with *different* problems. Nothing
# crashed, and the rewards looked normal.


# %% id="bug-demo"
def buggy_requests(problems, group_size):
    count = len(problems)
    return [[problems[(i + k) % count] for k in range(group_size)] for i in range(count)]


for name, row in zip("AB", buggy_requests(["12+11+10", "87+96+78"], 4), strict=True):
    print(f"group {name}: {row}")

# %% [markdown] id="bug-exercise"
# A model that can do the easy sum and not the hard one would learn here that it did "well" on the
# easy one. **Mend it.**


# %% id="mend-groups" exercise="05.3"
def group_requests(problems, group_size):
    """A list of groups: group p is what to ask to get `group_size` answers to problems[p]."""
    return [[problem] * group_size for problem in problems]


# %% id="check-groups"
group_requests = check("05.3", group_requests)

# %% [markdown] id="dead-question"
# ## How many groups are dead?
#
# A dead group costs as much to sample as any other and teaches nothing. If each answer is right
# with chance $p$, independently: how likely is it that a group of $G$ is dead?


# %% id="write-dead-share" exercise="05.4"
def dead_share(p, group_size):
    """Chance that a group is dead: every answer right, or every answer wrong."""
    return p**group_size + (1 - p) ** group_size


# %% id="check-dead-share"
dead_share = check("05.4", dead_share)

# %% [markdown] id="dead-widget-note"
# Move the sliders. It is often said that with small groups "every problem gives some signal". Set
# p = 0.05 and look at G = 2: nine groups in ten are dead. At G = 8 it is two in three.

# %% id="dead-widget"
from course_lib.widgets import group_explorer

group_explorer(p=0.05, group_size=8).show()

# %% [markdown] id="dead-measure-note"
# Is it true of our model? We take 16 answers to each of 48 problems and cut them into groups of 2,
# 4, 8 and 16. The formula gets the mean of all rewards for $p$. **Predict**: will the true share
# be larger or smaller than the formula's?

# %% id="dead-measure"
many = sample_groups(
    sampler, environment.sample(48, seed=6), tokenizer, **{**settings, "group_size": 16}, seed=2
)
p = sum(sum(group.rewards_G) for group in many) / (48 * 16)
sizes = [2, 4, 8, 16]
counted = []
for size in sizes:
    parts = [g.rewards_G[i : i + size] for g in many for i in range(0, 16, size)]
    counted.append(sum(len(set(part)) == 1 for part in parts) / len(parts))
formula = [dead_share(p, size) for size in sizes]
curves = {"counted": counted, "formula": formula}
show(curves_figure(curves, "Dead groups", "share of groups", "group size G", steps=sizes))
measured("chance of a right answer, all problems together:", p, "%")
band("Larger groups die less often", counted[0] > counted[-1])

# %% [markdown] id="dead-lesson"
# The true share is larger. The formula is right for one $p$. But problems differ: some are nearly
# always right, some nearly never, and both kinds die more often than the average problem. So it
# gives a lower bound. (Counts tremble: from 48 problems one of the four may touch the formula.)
#
# So how large should a group be? What costs is the number of answers, problems times $G$. Small
# groups die, and their mean is a poor guess at what was to be expected; large groups leave room for
# few problems, whose luck then rules the step. Eight to sixteen is common; with hard problems,
# more.
#
# ## Why does RL come after SFT?
#
# **Predict**: the same GRPO, from the base model, which has never answered a question.

# %% id="rl-from-base"
from course_lib.grpo import train_grpo

base = service.create_lora_training_client(service.base_model, rank=16, seed=0).result()
few = replace(rl_config, steps=4)
from_base = train_grpo(base, environment, few, tokenizer=tokenizer)
dead = [row["env/dead_groups"] / row["env/groups"] for row in from_base.metrics]
measured("dead groups", sum(dead) / len(dead), "%")
band("The base model earns any reward", max(from_base.rewards) > 0)

# %% [markdown] id="rl-from-base-lesson"
# Every group is dead, so there is no gradient, so nothing changes, for ever. RL makes likelier
# what happens already; it can reinforce only what is sampled at least now and then. SFT brings the
# right answers within reach. Then RL can find out which of the things that SFT taught pay.
#
# ## GRPO after SFT
#
# Now the library's loop, whose spine is the step that you saw. On the left the reward; in the
# middle the dead groups; on the right the largest deviation of the ratio from 1, which lesson 06
# explains. First, how good is the model before? We sample eight answers to each held-out problem.

# %% id="judge-before"
before = judge(client, "after SFT", samples=8)

# %% id="run-grpo"
from course_lib.widgets import LiveTraining

result = await LiveTraining().run(train_grpo, client, environment, rl_config, tokenizer=tokenizer)

# %% id="judge-after"
after = judge(client, "after GRPO", samples=8)
band("At least 20 points better", after.accuracy > before.accuracy + 0.2)

# %% [markdown] id="discovery-question"
# ## What has it found?
#
# Some conversations of the SFT data add step by step ("worked"), most give the sum at once. Nobody
# told GRPO which is better, and the reward asks for the right number and nothing else. Look at the
# answers from *before* GRPO, counted by kind:


# %% id="discovery-before"
def accuracy_by_kind(found):
    """Share of right answers among the direct and among the worked ones."""
    kinds = {"direct": [], "worked": []}
    for record in found.records:
        for worked, right in zip(record.worked, record.correct, strict=True):
            kinds["worked" if worked else "direct"].append(right)
    return {kind: sum(rights) / max(1, len(rights)) for kind, rights in kinds.items()}


by_kind = accuracy_by_kind(before)
for kind, share in by_kind.items():
    measured(f"before GRPO, right among the {kind} answers:", share, "%")
band("Working it out paid already", by_kind["worked"] > by_kind["direct"])

# %% id="discovery-figure"
from course_lib.plots.curves import two_curves_figure

worked = [row["env/worked_share"] for row in result.metrics]
names = ("reward (mean)", "worked answers (share)")
show(two_curves_figure(result.rewards, worked, names, "The reward asks for one, and gets both"))
band("Most answers are worked now", after.worked_share > 0.6)

# %% [markdown] id="discovery-lesson"
# Within a group, a worked answer was right more often than its direct siblings. So its tokens, the
# first `=` among them, got positive advantages more often than negative ones. That is all. A habit
# of a quarter of the data became the rule, because it pays.
#
# Did you see the dead groups in the dashboard? At first many groups are dead because every answer
# is wrong. In the middle there are fewer. Later some are dead again, because every answer is right,
# which teaches as little. Training slows down by itself. Then take harder problems, or sample until
# enough groups are alive (DAPO's "dynamic sampling", Yu et al. 2025).
#
# ## Did it learn to add, or to say what it knew?
#
# pass@k is the chance that at least one of $k$ answers is right (Chen et al. 2021). **Predict**:
# which of the two models is better at pass@8?

# %% id="pass-at-k"
from course_lib.comparison import pass_at

ks = [1, 2, 4, 8]
curves = {
    name: [pass_at(found, k).value for k in ks]
    for name, found in (("after SFT", before), ("after GRPO", after))
}
show(curves_figure(curves, "One of k answers is right", "pass@k", "k", steps=ks))
gains = [b - a for a, b in zip(*curves.values(), strict=True)]
band("GRPO's lead is smaller with eight tries than with one", gains[-1] < gains[0])

# %% [markdown] id="pass-lesson"
# The model after GRPO is better at pass@8, too, but its lead is much smaller than with one try: the
# model after SFT finds many right answers, it does not find them every time. So much of what GRPO
# does is to make sure of what the model could do now and then. (Whether it can do *more* than that
# is an open question of research; with eight samples and short training one cannot settle it.)

# %% id="progress"
progress()

# %% [markdown] id="take-away"
# ## What to take away
#
# - A step of GRPO: sample groups, score, subtract the group's mean, push every token of an answer
#   by its advantage.
# - Centring makes the constant part of a reward harmless. Groups must share one question.
# - The loss of an RL step is a number about lengths and says nothing. Watch reward, dead groups and
#   ratio.
# - Dead groups: $p^G + (1-p)^G$, and more if problems differ. All dead: no gradient at all. That
#   is why SFT comes first.
# - RL makes frequent what pays. Here that was showing one's working.
#
# ## What next
#
# [06 Importance sampling](06_importance_sampling.ipynb): sampling takes more time than training.
# How often may one batch of answers be used?
