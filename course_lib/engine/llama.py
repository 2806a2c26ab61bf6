"""How does a Llama compute? The arithmetic of transformers' LlamaForCausalLM, arranged for speed.

The numbers are the same, to rounding; `BaseModel` compares the two when it loads a model and uses
this one only where they agree. What makes it faster, most of all for small models on a CPU:

* queries, keys and values come from one matrix product, gate and up from another;
* the scale of each norm is multiplied into the matrix that follows it;
* the two dimensions that a rotation mixes stand side by side, so that it is one complex product;
* rows are packed one after the other: no padding is multiplied by anything (see `packing`).

Shapes: T packed tokens, H hidden size, D dimensions of a head. Left out: biases, norms of queries
and keys, sliding windows, weights below float32: such models take the general way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from course_lib.engine.reorder import (
    A_PASS,
    REORDER_AT,
    ROOM,
    product,
    product_added,
    reordered,
    worth_it,
)

STATIC_ROTATIONS = ("default", "linear", "llama3", "yarn")


@dataclass
class Matrix:
    """A weight (out, in), perhaps with adapters on blocks of its rows; the weight includes them."""

    weight: Tensor
    a: Tensor | None = None  # the adapters' A matrices, one below the other
    bs: list[Tensor] = field(default_factory=list)
    blocks: tuple[tuple[int, int], ...] = ()  # the rows that each B writes to
    reordered: Tensor | None = None  # the weight once more, for sampling

    def __call__(self, x: Tensor) -> Tensor:
        if self.reordered is not None and worth_it(x, self.weight):
            return product(x, self.reordered)
        return x @ self.weight.T

    def added(self, to: Tensor, x: Tensor) -> Tensor:
        """to + W x, in one pass."""
        if self.reordered is not None and worth_it(x, self.weight):
            return product_added(to, x, self.reordered)
        return torch.addmm(to, x, self.weight.T)

    @property
    def adapters(self) -> list[Tensor]:
        return [] if self.a is None else [self.a, *self.bs]


@dataclass(frozen=True)
class Part:
    """Base weights that become one matrix; the first `rotated` have their dimensions paired."""

    names: list[str]
    norm: str | None = None  # the norm before them, whose scale is multiplied in
    rotated: int = 0


def layer_parts(index: int) -> list[Part]:
    """The matrices of a layer, in the order of `Layer`."""
    layer = f"model.layers.{index}"
    q, k, v, out = (f"{layer}.self_attn.{letter}_proj.weight" for letter in "qkvo")
    gate, up, down = (f"{layer}.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
    return [
        Part([q, k, v], f"{layer}.input_layernorm.weight", rotated=2),
        Part([out]),
        Part([gate, up], f"{layer}.post_attention_layernorm.weight"),
        Part([down]),
    ]


@dataclass
class Layer:
    qkv: Matrix
    out: Matrix
    gate_up: Matrix
    down: Matrix

    @property
    def matrices(self) -> list[Matrix]:
        return [self.qkv, self.out, self.gate_up, self.down]


@dataclass
class Step:
    """What the way back needs of a layer; T tokens, F the width of the MLP."""

    first: Tensor  # (T, H): the input, normed
    first_scale: Tensor  # (T, 1): what it was multiplied by
    mixed: Tensor  # (T, heads D): what attention gave
    second: Tensor
    second_scale: Tensor
    gate_up: Tensor  # (T, 2 F)
    swished: Tensor  # (T, F): silu(gate)

    def of(self, tokens: Tensor) -> Step:
        """The same of these tokens alone; `index_select` takes a third of an index's time."""
        return Step(*(getattr(self, each.name).index_select(0, tokens) for each in fields(self)))


@dataclass
class Weights:
    """All weights of one model with one adapter folded in."""

    layers: list[Layer]
    head: Matrix
    embedding: Tensor
    use: int = 0  # so far, as `expect` counts it

    def expect(self, tokens: int) -> None:
        """Told of each pass over so many tokens: once they are many, or the passes, the weights are
        arranged for sampling."""
        before, self.use = self.use, self.use + A_PASS + tokens
        if before < REORDER_AT <= self.use:
            self.reorder()

    def reorder(self) -> None:
        """Give each matrix the order in which products of few rows are fast."""
        if self.nbytes <= ROOM:
            for matrix in self.matrices:
                matrix.reordered = reordered(matrix.weight)

    @property
    def matrices(self) -> list[Matrix]:
        return [*chain.from_iterable(layer.matrices for layer in self.layers), self.head]

    @property
    def nbytes(self) -> int:
        """What the matrices take in memory; one that lies there a second time counts twice."""
        return sum(
            (1 + (each.reordered is not None)) * each.weight.nbytes for each in self.matrices
        )

    @property
    def adapters(self) -> list[Tensor]:
        """The adapters' matrices, layer by layer, without the head's."""
        matrices = chain.from_iterable(layer.matrices for layer in self.layers)
        return [tensor for matrix in matrices for tensor in matrix.adapters]


class Llama:
    """The shape of one model, and its forward pass."""

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config
        self.model = model
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.dim = model.model.layers[0].self_attn.head_dim
        self.eps = torch.tensor(config.rms_norm_eps, device=model.device)  # of its own type: faster
        self.layers = [layer_parts(index) for index in range(config.num_hidden_layers)]
        self.head = Part(["lm_head.weight"], "model.norm.weight")
        self.embedding = model.get_parameter("model.embed_tokens.weight").detach()
        self.base = {
            name: model.get_parameter(name).detach()
            for part in [*chain(*self.layers), self.head]
            for name in [*part.names, *filter(None, [part.norm])]
        }
        rotary = model.model.rotary_emb
        positions = torch.arange(config.max_position_embeddings, device=model.device).float()
        angles = positions.unsqueeze(-1) * rotary.inv_freq.float()  # (context, D / 2)
        self.rotations = torch.polar(torch.full_like(angles, rotary.attention_scaling), angles)

    @staticmethod
    def fits(model: PreTrainedModel) -> bool:
        """Is this a plain Llama (or Mistral without a window) in float32?"""
        config = model.config
        if config.model_type not in ("llama", "mistral") or model.dtype != torch.float32:
            return False
        rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        return (
            rotation in STATIC_ROTATIONS
            and getattr(config, "sliding_window", None) is None
            and config.hidden_act == "silu"
            and not any(name.endswith("bias") for name, _ in model.named_parameters())
        )

    def weights(self, folded: dict[str, Tensor]) -> Weights:
        """Arrange the base weights, some of them `folded`, for a forward pass."""
        layers = [Layer(*(self._stacked(part, folded) for part in parts)) for parts in self.layers]
        return Weights(layers, self._stacked(self.head, folded), self.embedding)

    def trained(self, weights: Weights, adapter: dict[str, nn.Parameter]) -> Weights:
        """The same weights beside the adapter that is folded into them, which gets gradients."""
        layers = []
        for layer, parts in zip(weights.layers, self.layers, strict=True):
            made = [
                self._trained(*each, adapter) for each in zip(layer.matrices, parts, strict=True)
            ]
            layers.append(Layer(*made))
        return Weights(layers, self._trained(weights.head, self.head, adapter), weights.embedding)

    def _stacked(self, part: Part, folded: dict[str, Tensor]) -> Matrix:
        weights = [folded[name] if name in folded else self.base[name] for name in part.names]
        weights[: part.rotated] = [self.paired(weight) for weight in weights[: part.rotated]]
        stacked = torch.cat(weights) if len(weights) > 1 else weights[0]
        return Matrix(stacked if part.norm is None else stacked * self.base[part.norm])

    def _trained(self, matrix: Matrix, part: Part, adapter: dict[str, nn.Parameter]) -> Matrix:
        scale = None if part.norm is None else self.base[part.norm]
        downs, ups, blocks, row = [], [], [], 0
        for index, name in enumerate(part.names):
            block = (row, row := row + len(self.base[name]))
            a, b = (adapter.get(lora_key(name, letter)) for letter in "AB")
            if a is not None and b is not None:
                downs.append(a if scale is None else a * scale)
                ups.append(self.paired(b) if index < part.rotated else b)
                blocks.append(block)
        return Matrix(matrix.weight, torch.cat(downs) if downs else None, ups, tuple(blocks))

    def paired(self, rows: Tensor) -> Tensor:
        """Reorder the rows of each head: dimension j and its partner j + D/2 next to each other."""
        split = rows.reshape(-1, 2, self.dim // 2, rows.shape[-1])
        return split.transpose(1, 2).reshape(rows.shape)

    def apart(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The queries, keys and values of qkv (T, n, ...): heads, kv_heads, kv_heads vectors."""
        return qkv.split_with_sizes([self.heads, self.kv_heads, self.kv_heads], dim=1)  # type: ignore

    def rotated(self, qkv: Tensor, rotations: Tensor) -> Tensor:
        """Rotary position embedding (Su et al. 2021): the queries and keys of qkv (T, n, D), in
        place, by rotations (T, 1, D / 2)."""
        pairs = qkv.view(*qkv.shape[:2], -1, 2)[:, : self.heads + self.kv_heads]
        torch.view_as_complex(pairs).mul_(rotations)
        return qkv

    def hidden(
        self,
        weights: Weights,
        tokens: Tensor,
        positions: Tensor,
        attend: Callable[[int, Tensor], Tensor],
        tape: list[Step] | None = None,
        wanted: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """From packed tokens (T,) at their positions (T,) to the last hidden states (T, H), normed,
        and what each was scaled by (T, 1).

        `attend(layer, qkv)`: qkv (T, heads + 2 kv_heads, D) -> (T, heads D). The tape, where there
        is one, gets what the way back needs of each layer. `wanted`: only these tokens leave the
        last layer.
        """
        x = F.embedding(tokens, weights.embedding)
        rotations = self.rotations.index_select(0, positions).unsqueeze(1)  # (T, 1, D / 2)
        for index, layer in enumerate(weights.layers):
            first, first_scale = norm(x, self.eps)
            qkv = self.rotated(layer.qkv(first).view(len(x), -1, self.dim), rotations)
            mixed = attend(index, qkv)
            if wanted is not None and index == len(weights.layers) - 1:
                x, mixed = x.index_select(0, wanted), mixed.index_select(0, wanted)
            x = layer.out.added(x, mixed)
            second, second_scale = norm(x, self.eps)
            gate_up = layer.gate_up(second)
            gate, up = gate_up.chunk(2, dim=-1)
            swished = F.silu(gate)
            x = layer.down.added(x, swished * up)
            if tape is not None:
                tape.append(Step(first, first_scale, mixed, second, second_scale, gate_up, swished))
        return norm(x, self.eps)

    def logits(self, weights: Weights, tokens: Tensor) -> Tensor:
        """The logits (T, V) of one row of tokens (T,): a plain forward pass, to compare with."""

        def attend(layer: int, qkv: Tensor) -> Tensor:
            heads_first = (part.transpose(0, 1).unsqueeze(0) for part in self.apart(qkv))
            mixed = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
            return mixed[0].transpose(0, 1).flatten(1)

        positions = torch.arange(len(tokens), device=tokens.device)
        return weights.head(self.hidden(weights, tokens, positions, attend)[0])


def norm(x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Root mean square norm (Zhang and Sennrich 2019) of (T, H), and what each row was scaled by.

    The norm's learned scale is part of the next matrix.
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = torch.addcmul(eps, length, length, value=1 / x.shape[-1]).rsqrt_()  # (T, 1)
    return x * scale, scale


def lora_key(weight_name: str, part: str) -> str:
    """The name in an adapter file of A or B for a weight."""
    return f"base_model.model.{weight_name.removesuffix('weight')}lora_{part}.weight"
