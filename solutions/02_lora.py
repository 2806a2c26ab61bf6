# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown] id="title"
# # 02 · LoRA: change a model by adding little
#
# A model is a pile of matrices. Fine-tuning could change every number in them. LoRA (low-rank
# adaptation, [Hu et al. 2021](https://arxiv.org/abs/2106.09685)) leaves all of them as they are and
# adds to each matrix the product of two thin ones.
#
# After this notebook you can
#
# - write a LoRA layer, and say why it begins as a change of exactly nothing;
# - count what is trained, and what that saves;
# - show by experiment how much rank a change needs: by cutting the change of a full fine-tune;
# - read a sweep of rank and learning rate, and pick a rate without fooling yourself.
#
# You need lesson 01: conversations, weights, the loss. A matrix product will do for mathematics.

# %% [markdown] id="card"
# The builder writes the measured card here.

# %% id="connect"
from course_lib import connect, check, hint, progress, preset

service = connect()

# %% [markdown] id="layer-question"
# ## What does a LoRA layer compute?
#
# A linear layer takes $x$ to $Wx$. LoRA keeps $W$ frozen and adds a second path:
#
# $$y = Wx + \frac{\alpha}{r}\, B A x$$
#
# with $A$ of shape $(r, d_\text{in})$ and $B$ of shape $(d_\text{out}, r)$. The rank $r$ is small,
# so $A$ squeezes $x$ down to $r$ numbers, and $B$ takes them up again. $\alpha$ is a fixed scale;
# this engine uses $\alpha = 32$. Write the layer with plain lists. `times(M, v)` multiplies a
# matrix with a vector.

# %% id="times"
import math

from course_lib.checks.lesson_02 import times

print(times([[1.0, 2.0], [0.0, 1.0]], [3.0, 4.0]))


# %% id="write-lora-forward" exercise="02.1"
def lora_forward(x, W, A, B, alpha):
    """x (d_in,), W (d_out, d_in), A (r, d_in), B (d_out, r), all plain lists; gives (d_out,)."""
    r = len(A)
    change = times(B, times(A, x))
    return [y + alpha / r * c for y, c in zip(times(W, x), change, strict=True)]


# %% id="check-lora-forward"
lora_forward = check("02.1", lora_forward)

# %% [markdown] id="start-question"
# ## How does it begin?
#
# Before the first step, the layer should do exactly what the base model does. So one of the two
# matrices begins with zeros. **Predict** for each of the three starts: what comes out of the layer,
# and can it learn?
#
# The gradient of $B$ is made of $Ax$, and the gradient of $A$ is made of $B$.

# %% id="starts"
x, W = [1.0, 2.0], [[1.0, 0.0], [0.0, 1.0]]
zeros_A, some_A = [[0.0, 0.0]], [[0.5, 0.25]]
zeros_B, some_B = [[0.0], [0.0]], [[1.0], [1.0]]
print("A random, B zero  ", lora_forward(x, W, some_A, zeros_B, alpha=1.0))
print("A zero, B zero    ", lora_forward(x, W, zeros_A, zeros_B, alpha=1.0))
print("A random, B random", lora_forward(x, W, some_A, some_B, alpha=1.0))

# %% [markdown] id="start-answer"
# The first two give $Wx$, unchanged. But with $A = 0$ *and* $B = 0$ both gradients are zero, for
# ever: such a layer cannot learn (you will see it below). The third begins somewhere else than the
# base model, and all that the base model knew is disturbed before the first step. So: $A$ random,
# $B$ zero. (The other way round would begin as nothing, too, and could learn; Hu et al. chose this
# one, and nearly everybody follows.)
#
# The engine's fresh adapter shows it. Its loss must be that of the base model, whatever its rank:

# %% id="fresh-adapters"
from course_lib.batches import make_datum
from course_lib.evaluation import nll
from course_lib.lessons import band, measured, shipped_conversations
from course_lib.rendering import render_conversation

RANKS = (1, 4, 16)
clients = {
    rank: service.create_lora_training_client(service.base_model, rank=rank, seed=0).result()
    for rank in RANKS
}
tokenizer = clients[1].get_tokenizer()
# single questions only: short rows make quick steps
short = [one for one in shipped_conversations() if len(one.messages) == 2]
short_heldout = [one for one in shipped_conversations("heldout") if len(one.messages) == 2]
rows = [render_conversation(one, tokenizer) for one in short[:480]]
heldout_rows = [render_conversation(one, tokenizer) for one in short_heldout[:32]]
heldout = [make_datum(row) for row in heldout_rows]
fresh = [nll(client, heldout) for client in clients.values()]
measured("held-out loss of a fresh adapter:", fresh[0], "nats per token")
band("The same at every rank", max(fresh) - min(fresh) < 1e-4)

# %% [markdown] id="count-question"
# ## How many numbers are trained?
#
# **Predict** first: a matrix of 4096 by 4096, rank 8. Is the adapter a tenth of the matrix, a
# hundredth, or less? Then write the count.


# %% id="write-lora-parameters" exercise="02.2"
def lora_parameters(d_in, d_out, rank):
    """Trainable numbers of a LoRA adapter on a (d_out, d_in) weight."""
    return rank * (d_in + d_out)


# %% id="check-lora-parameters"
lora_parameters = check("02.2", lora_parameters)

# %% id="count-table"
SHAPES = {
    "ours": [(128, 128)] * 4 + [(128, 384)] * 2 + [(384, 128)],
    "an 8 B model": [(4096, 4096)] * 2 + [(4096, 1024)] * 2 + [(4096, 14336)] * 3,
}
print(f"{'one layer of':>14} {'full':>12}", *(f"{f'rank {rank}':>18}" for rank in RANKS))
for name, shapes in SHAPES.items():
    full = sum(d_in * d_out for d_in, d_out in shapes)
    counts = [sum(lora_parameters(*shape, rank) for shape in shapes) for rank in RANKS]
    cells = [f"{f'{count:,} ({count / full:.2%})':>18}" for count in counts]
    print(f"{name:>14} {full:>12,}", *cells)

# %% [markdown] id="count-note"
# The larger the matrix, the smaller the share: the matrix grows with the square of its side, the
# adapter only with the side. (At 4096 by 4096 and rank 8 it is 65,536 of 16.8 million numbers: one
# in 256.) And every number that is trained needs three more in memory: its gradient, and two that
# Adam remembers. A frozen number needs none of them. On our tiny model rank 16 is no great saving;
# it is there to be looked at.

# %% [markdown] id="full-question"
# ## Is a change of low rank enough?
#
# That is a question about the change itself. So let us make it the expensive way: a **full
# fine-tune**, which may move every number of the matrices that an adapter would sit on (the linear
# layers inside the model; the embedding stays as it is). This is plain torch, with nothing of LoRA
# in it; the model is the one that comes with this course.

# %% id="plain-model"
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from course_lib.config import find_file

logging.disable_progress_bar()


def plain_model():
    """The base model in plain torch, every number frozen; and its matrices by name."""
    model = AutoModelForCausalLM.from_pretrained(find_file("data/base-model"))
    model.requires_grad_(False)
    layers = {
        name: layer
        for name, layer in model.model.layers.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    return model, layers


# %% id="plain-loss"
def loss_of(model, rows):
    """Nats per trained token; rows of different length are filled up with weight 0."""
    longest = max(len(row.tokens) for row in rows)
    tokens = torch.tensor([row.tokens + [0] * (longest - len(row.tokens)) for row in rows])
    weights = torch.tensor([row.weights + [0.0] * (longest - len(row.tokens)) for row in rows])
    logits = model(tokens[:, :-1]).logits  # (B, T - 1, V)
    logprobs = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]  # (B, T - 1)
    return -(logprobs * weights[:, 1:]).sum() / weights[:, 1:].sum()


# %% id="plain-train"
STEPS, BATCH = 30, 8


def train(model, parameters, rate):
    """Adam on the given parameters, the rate falling to 0; gives the held-out loss afterwards."""
    parameters = [parameter.requires_grad_() for parameter in parameters]
    adam = torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.95))
    falling = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / STEPS)
    for step in range(STEPS):
        adam.zero_grad()
        loss_of(model, rows[step * BATCH : (step + 1) * BATCH]).backward()
        adam.step()
        falling.step()
    with torch.no_grad():
        return loss_of(model, heldout_rows).item()


# %% id="full-fine-tune"
base, base_layers = plain_model()
tuned, tuned_layers = plain_model()
with torch.no_grad():
    base_loss = loss_of(base, heldout_rows).item()
full_loss = train(tuned, [layer.weight for layer in tuned_layers.values()], rate=2e-3)
measured("base model:", base_loss, "nats per token")
measured("full fine-tune:", full_loss, "nats per token")
band("Plain torch and the engine agree on the base model", abs(base_loss - fresh[0]) < 1e-3)
band("The full fine-tune has learned", full_loss < 0.6 * base_loss)

# %% [markdown] id="size-note"
# How large is the change, beside the matrix that it changes? Below is the length of one divided by
# the length of the other (all numbers squared, added, and the root of it), for all 28 matrices:
# seven in each of four layers. `q`, `k`, `v` and `o` belong to the attention, the other three to
# the feed-forward part.

# %% id="size-of-change"
from course_lib.plots.heat import heat_map
from course_lib.widgets import show, show_source

with torch.no_grad():
    changes = {name: tuned_layers[name].weight - base_layers[name].weight for name in base_layers}
share = {name: 100 * (c.norm() / base_layers[name].weight.norm()) for name, c in changes.items()}
kinds = [name.split(".")[-1] for name in share][:7]
sizes = [[share[name].item() for name in share if name[0] == layer] for layer in "0123"]
names = {"rows": [f"layer {i}" for i in range(4)], "columns": kinds}
show(heat_map(sizes, "Size of the change", "", "", "% of the matrix", digits=1, **names))

# %% [markdown] id="svd-note"
# A few percent, everywhere: that is all it took to make a model answer that had never seen a chat.
# Now look inside such a change.
#
# The change of a matrix is $\Delta W = W_\text{tuned} - W_\text{base}$. Its singular value
# decomposition $\Delta W = U S V^\top$ sorts it into pieces of rank 1, the largest first. The share
# of the change that the first $r$ pieces keep is counted in squares, and called **energy**:
#
# $$\text{kept}(r) = \frac{s_1^2 + \dots + s_r^2}{s_1^2 + \dots + s_n^2}$$
#
# No other matrix of rank $r$ comes closer to $\Delta W$ (Eckart and Young 1936).

# %% id="spectrum"
from course_lib.plots.lora import spectrum_figure

pieces = {name: torch.linalg.svd(change, full_matrices=False) for name, change in changes.items()}
name = "0.mlp.down_proj"
show(spectrum_figure(pieces[name].S.tolist(), 16, "Singular values of one change"))


# %% id="write-rank-needed" exercise="02.3"
def rank_needed(singular_values, share):
    """The smallest rank whose largest singular values hold `share` of the sum of squares."""
    energies = [value**2 for value in sorted(singular_values, reverse=True)]
    kept, rank = 0.0, 0
    while kept < share * sum(energies) - 1e-12:
        kept += energies[rank]
        rank += 1
    return rank


# %% id="check-rank-needed"
rank_needed = check("02.3", rank_needed)

# %% id="ranks-needed"
from course_lib.plots.bars import counts_figure

needed = [rank_needed(piece.S.tolist(), 0.9) for piece in pieces.values()]
title = "Rank that keeps 90 % of a matrix's change"
show(counts_figure(needed, title, "rank (of at most 128)", bins=range(0, 132, 4)))

# %% [markdown] id="truncate-question"
# ## Does the rest of the change matter?
#
# A small piece of the change may still be an important one. So do not trust the energy: **cut** the
# change down to rank $r$, in all matrices at once, and measure what the model still knows.
#
# **Predict**: at which rank is 90 % of the improvement there?

# %% id="truncate"
CUTS = (0, 1, 2, 4, 8, 16, 32, 64, 128)


def loss_at_rank(rank):
    """Held-out loss of the base model plus the change cut down to `rank`."""
    with torch.no_grad():
        for name, (U, S, Vh) in pieces.items():
            change = (U[:, :rank] * S[:rank]) @ Vh[:rank]
            tuned_layers[name].weight.copy_(base_layers[name].weight + change)
        return loss_of(tuned, heldout_rows).item()


cut = [loss_at_rank(rank) for rank in CUTS]
gained = [(base_loss - loss) / (base_loss - full_loss) for loss in cut]

# %% id="truncate-figure"
from course_lib.plots.lora import kept_figure


def energy_kept(rank):
    """The share of the squares that `rank` pieces of each matrix hold, over all matrices."""
    squares = [piece.S**2 for piece in pieces.values()]
    return (sum(s[:rank].sum() for s in squares) / sum(s.sum() for s in squares)).item()


energy = [energy_kept(rank) for rank in CUTS]
show(kept_figure(CUTS, energy, gained, "A full fine-tune's change, cut"))
band("Rank 16 of 128 keeps 95 % of the improvement", gained[CUTS.index(16)] > 0.95)
band("At rank 4 it keeps more of the improvement than of the energy", gained[3] > energy[3])

# %% [markdown] id="truncate-answer"
# A full fine-tune was free to use all 128 dimensions of every matrix, and what mattered went into a
# few of them: two ranks keep nine tenths of the improvement. The other ranks hold more than half of
# the energy and only a tenth of the improvement. Most of that width comes from the optimizer: Adam
# gives every number a step of about the same size, whether its gradient was large or small. With
# SGD and momentum in its place, and the rows in five orders, sixteen ranks held 97 to 98 % of the
# energy (with Adam, in the same orders, 81 to 83 %), and still all of the improvement that there
# was: SGD ended at 0.48 to 0.58 nats, Adam at 0.39 to 0.45 (`data/results/README.md`, "The width of
# a full fine-tune's change"). This is why LoRA can work: it does not search where there is little
# to find.
#
# One caution. That is a fact about *this* change: a new format and a new habit, learned from a few
# hundred rows. Teaching a model a new language from billions of tokens is another matter.

# %% [markdown] id="torch-layer"
# ## LoRA from scratch
#
# The layer of the first exercise, in torch, around a frozen one:


# %% id="lora-linear"
class LoRALinear(torch.nn.Module):
    """A frozen linear layer plus (alpha / r) B A."""

    def __init__(self, layer, rank, alpha=32.0):
        super().__init__()
        self.layer, self.scale = layer, alpha / rank
        bound = 1 / math.sqrt(layer.in_features)  # as peft and the engine begin
        self.A = torch.nn.Parameter(torch.empty(rank, layer.in_features).uniform_(-bound, bound))
        self.B = torch.nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x):  # (..., d_in) -> (..., d_out)
        return self.layer(x) + self.scale * (x @ self.A.T) @ self.B.T


# %% [markdown] id="gradient-note"
# The start again, now with real gradients. The second half is wrong on purpose: both are zero.


# %% id="first-gradients"
def gradients(layer):
    """The sizes of the gradients of A and B after one backward pass."""
    layer.A.grad = layer.B.grad = None
    layer(torch.ones(1, 8)).square().sum().backward()
    return [parameter.grad.abs().sum().item() for parameter in (layer.A, layer.B)]


probe = LoRALinear(torch.nn.Linear(8, 8), rank=2)
of_A, of_B = gradients(probe)
band("A random, B zero: B can move", of_B > 0)
band("A random, B zero: A can move in the first step", of_A > 0)
torch.nn.init.zeros_(probe.A)
band("A zero, B zero: anything can move", sum(gradients(probe)) > 0)


# %% id="wrap-model"
def lora_model(rank, alpha=32.0):
    """The base model with a LoRALinear in place of each matrix, and what is trained."""
    torch.manual_seed(0)
    model, layers = plain_model()
    wrapped = [(name, LoRALinear(layer, rank, alpha)) for name, layer in layers.items()]
    for name, layer in wrapped:
        parent, _, child = name.rpartition(".")
        setattr(model.model.layers.get_submodule(parent), child, layer)
    return model, [p for _, layer in wrapped for p in (layer.A, layer.B)]


# %% id="train-lora"
trained_numbers, lora_losses = {}, {}
for rank in RANKS:
    model, parameters = lora_model(rank)
    trained_numbers[rank] = sum(parameter.numel() for parameter in parameters)
    lora_losses[rank] = train(model, parameters, rate=4e-3)
    measured(f"rank {rank:>2}, {trained_numbers[rank]:,} numbers:", lora_losses[rank], "nats")
full_numbers = sum(layer.weight.numel() for layer in base_layers.values())
measured(f"full, {full_numbers:,} numbers:", full_loss, "nats per token")

# %% id="lora-against-full"
best = min(lora_losses.values())
reached = (base_loss - best) / (base_loss - full_loss)
measured("share of the full fine-tune's improvement:", reached, "%")
band("LoRA reaches nine tenths of the improvement", reached > 0.9)

# %% [markdown] id="lora-against-full-answer"
# Read that share as "about all of it": it is the best of three runs against one, on 32 held-out
# rows, and nobody looked for the best learning rate of either. They are not the same. Here LoRA
# runs at twice the rate of the full fine-tune; over many models and data sets its best rate was
# about ten times that of full fine-tuning (Schulman and Thinking Machines 2025, "LoRA Without
# Regret"). Who takes the rate along from one to the other may find that "LoRA does not learn".
#
# ## And alpha?
#
# $\alpha$ looks like a third thing to choose. **Predict**: rank 4 with a quarter of the $\alpha$
# learns more slowly. By what would you have to multiply the learning rate to make up for it?

# %% id="alpha-runs"
by_alpha = {(32.0, 4e-3): lora_losses[4]}
for alpha, rate in ((8.0, 4e-3), (8.0, 16e-3)):
    by_alpha[alpha, rate] = train(*lora_model(4, alpha), rate=rate)
for (alpha, rate), loss in by_alpha.items():
    measured(f"rank 4, alpha {alpha:g}, rate {rate:g}:", loss, "nats per token")
quarter, made_up = by_alpha[8.0, 4e-3], by_alpha[8.0, 16e-3]
band("A quarter of alpha learns less", quarter > by_alpha[32.0, 4e-3] + 0.1)
band("Four times the rate makes up for it", abs(made_up - by_alpha[32.0, 4e-3]) < 0.08)

# %% [markdown] id="alpha-answer"
# Adam's steps do not grow with the gradient, so $B$ grows with the rate alone, and the change is
# $\alpha$ times that. As long as $A$ has hardly moved, $\alpha$ and the rate are one handle with
# two names. So fix $\alpha$, as the engine does, and choose the rate.

# %% [markdown] id="sdk-question"
# ## Does the engine do the same?
#
# Whoever uses Tinker writes none of this: `create_lora_training_client(..., rank=16)` is all that
# is said about LoRA. Here is the engine's own formula. For the matrix of a plain layer it is the
# first branch, two lines; the rest is for models with several experts in one layer.

# %% id="source-lora-product"
from course_lib.engine.lora import lora_product

show_source(lora_product)

# %% [markdown] id="sdk-predict"
# It adapts the same matrices, and the output layer besides (unless told `train_unembed=False`), so
# the same rows must lead to about the same place. (Not to the same number: $A$ begins with other
# random values, too. Did you wonder above why rank 16 ended no lower than rank 4? Compare the two
# numbers below, both of rank 16: they differ by as much, or more. One run each does not rank two
# ranks that are close.)


# %% id="sdk-train"
import tinker

datums = [make_datum(row) for row in rows]


def sdk_train(client, rate, steps=STEPS, watch=0):
    """The same training through the SDK; every `watch` steps the held-out loss (0: at the end)."""
    seen = []
    for step in range(steps):
        batch = datums[step * BATCH : (step + 1) * BATCH]
        now = tinker.AdamParams(learning_rate=rate * (1 - step / steps))
        backward, update = client.forward_backward(batch, "cross_entropy"), client.optim_step(now)
        backward.result(), update.result()
        if step + 1 == steps or (watch and (step + 1) % watch == 0):
            seen.append(nll(client, heldout))
    return seen


# %% id="sdk-compare"
sdk_loss = sdk_train(clients[16], rate=4e-3)[-1]
measured("rank 16 through the SDK:", sdk_loss, "nats per token")
measured("rank 16 from scratch:", lora_losses[16], "nats per token")
band("They agree within 0.1 nats", abs(sdk_loss - lora_losses[16]) < 0.1)

# %% [markdown] id="sweep-question"
# ## Which rank, which learning rate?
#
# Two numbers are yours to choose. **Predict** which of them matters more. Then look: fifteen short
# runs through the SDK, with three ranks and five rates.

# %% id="sweep"
RATES = (2.5e-4, 1e-3, 4e-3, 1.6e-2, 6.4e-2)
runs = {}
for rank in RANKS:
    for rate in RATES:
        client = service.create_lora_training_client(service.base_model, rank=rank, seed=0)
        runs[rank, rate] = [fresh[0], *sdk_train(client.result(), rate, steps=12, watch=4)]
last = {setting: curve[-1] for setting, curve in runs.items()}

# %% id="sweep-figure"
from course_lib.plots.lora import sweep_figure

show(sweep_figure(last))
by_rate = [max(last[rank, r] for r in RATES) - min(last[rank, r] for r in RATES) for rank in RANKS]
by_rank = [max(last[r, rate] for r in RANKS) - min(last[r, rate] for r in RANKS) for rate in RATES]
band("The rate matters more than the rank", min(by_rate) > sorted(by_rank)[len(RATES) // 2])

# %% [markdown] id="pick-exercise"
# Now write down how to choose. `sweep` gives for each rate the training loss and the held-out loss
# at the end; a run that blew up has `nan`. (Careful: `<`, `>` and `==` with `nan` are false,
# whatever stands on the other side.)


# %% id="write-pick" exercise="02.4"
def pick_learning_rate(sweep):
    """sweep: rate -> (training loss, held-out loss), some of them nan; gives the best rate."""
    finished = [rate for rate, losses in sweep.items() if math.isfinite(losses[1])]
    return min(finished, key=lambda rate: sweep[rate][1])


# %% id="check-pick"
pick_learning_rate = check("02.4", pick_learning_rate)

# %% id="use-pick"
for rank in RANKS:
    chosen = pick_learning_rate({rate: (last[rank, rate], last[rank, rate]) for rate in RATES})
    measured(f"rank {rank:>2}: the best of the five rates is", chosen)

# %% [markdown] id="explorer-note"
# At the small rates the three ranks nearly coincide. That is what the division by $r$ is for: the
# first change is the mean of $r$ parts, and what they have in common, which lowers the loss, is the
# same for few parts as for many. (So Tinker's documentation can say that the best rate does not
# depend on the rank.) What they do *not* have in common points every which way and shrinks, about
# as $1 / \sqrt{r}$; that may be why rank 16 bears a higher rate than rank 1, where it does.
# (rsLoRA, Kalajdzievski 2023, divides by $\sqrt{r}$ instead, so that high ranks do not learn too
# slowly.) One run each does not settle it: keep the rate when you change the rank, and try its
# neighbours. And what "matters more" depends on how far the grid reaches: this one spans a factor
# of 256 in the rate and of 16 in the rank.
#
# Walk through the runs. Look at two corners: a rate so small that nothing happens, which is a
# frequent reason for "LoRA does not learn"; and one so large that the loss rises.

# %% id="explorer"
from course_lib.widgets import lora_explorer

lora_explorer({(rank, 32.0, rate): curve for (rank, rate), curve in runs.items()}, every=4).show()

# %% id="progress"
progress()

# %% [markdown] id="take-away"
# ## What to take away
#
# - LoRA adds $\frac{\alpha}{r} B A$ to a frozen matrix; $B$ begins at zero, so it begins as
#   nothing.
# - It trains $r (d_\text{in} + d_\text{out})$ numbers: at rank 16 under one percent of a large
#   layer.
# - Small ranks are enough because the *useful part* of the change is of low rank, though the change
#   itself is not; we cut a full fine-tune to see it.
# - Choose the learning rate first, by held-out loss. A rank that is too small costs a little, a
#   rate that is too small costs everything.
#
# ## What next
#
# [03 The SFT loop](03_sft.ipynb): batches, schedule, curves, and a training that survives a crash.
