"""An adapter in a folder -> LoRA pairs, named as the base names its tensors.

Two namings are understood. The embedded engine stores PEFT's own. Hosted Tinker names some modules
its own way; the mapping follows what tinker-cookbook documents
(`tinker_cookbook/weights/README.md`, "Key Remapping"), and was never run here against the hosted
service:

    model.unembed_tokens  ->  lm_head
    .attn.                ->  .self_attn.            where the base has self_attn
    model.                ->  model.language_model.  where the base is a vision-language model

Refused with a sentence: pickles, age-encrypted exports, embedding adapters, DoRA, biases, ranks
that differ by module, Tinker's own stacked experts (w1, w2, w3), and modules the base stores fused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from course_lib.errors import CourseError
from course_lib.export.base import BaseFolder
from course_lib.export.files import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # what peft writes before a module's name
EXPERTS = ".experts"
REFUSED = {
    "use_dora": "DoRA rescales the base and is not a sum",
    "modules_to_save": "whole modules are no LoRA pairs",
    "bias": "vLLM and SGLang serve no adapter biases",
    "rank_pattern": "ranks that differ by module are not supported",
    "alpha_pattern": "alphas that differ by module are not supported",
}


@dataclass(frozen=True)
class LoraPair:
    """One adapted matrix: the delta is `scaling * B @ A`, transposed where the base stores (in,
    out).
    """

    module: str  # the tensor's name in the base without ".weight"
    A: torch.Tensor  # (rank, in)
    B: torch.Tensor  # (out, rank)
    transposed: bool = False  # GPT-2's Conv1D


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter in memory: its configuration, its file's tensors, and the pairs they make."""

    path: Path
    config: dict[str, Any]
    pairs: dict[str, LoraPair]  # by module, stacked experts taken apart
    stacked: dict[str, torch.Tensor]  # peft's stacked expert tensors, as the file names them

    @property
    def scaling(self) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023)."""
        rank = self.config["r"]
        return self.config["lora_alpha"] / (
            math.sqrt(rank) if self.config.get("use_rslora") else rank
        )


def read_adapter(folder: str | Path, base: BaseFolder) -> AdapterFolder:
    """Read an adapter in Tinker's or PEFT's naming and name its modules as `base` does.

    Raises CourseError for a file that is missing, pickled or broken, for a feature that has no
    merge here, and for a matrix that does not fit the base.
    """
    folder = Path(folder)
    place = str(folder / WEIGHTS)
    config = _read_config(folder)
    halves = _pair_up(place, _read_tensors(folder))
    pairs: dict[str, LoraPair] = {}
    stacked: dict[str, torch.Tensor] = {}
    for name, (A, B) in sorted(halves.items()):
        if name.removesuffix(".base_layer").endswith(EXPERTS):
            found = list(_expert_pairs(name, A, B, base, config["r"], place))
            stacked |= {f"{PREFIX}{name}.lora_A.weight": A, f"{PREFIX}{name}.lora_B.weight": B}
        else:
            module = _module_in_base(name, A, base, place)
            found = [LoraPair(module, A, B, base.stores_in_out and module != "lm_head")]
        for pair in found:
            _check_pair(pair, config["r"], base, place)
            pairs[pair.module] = pair
    return AdapterFolder(folder, config, pairs, stacked)


def _read_config(folder: Path) -> dict[str, Any]:
    place = str(folder / CONFIG)
    config = read_json(folder / CONFIG)
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            finding = f"{key} is {value!r}, not a positive number"
            raise CourseError(place, finding, "download the adapter again")
    for key, why in REFUSED.items():
        if config.get(key) not in (None, False, {}, [], "none"):
            raise CourseError(place, f"{key} is set: {why}", "train a plain LoRA adapter")
    return config


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS
    if not path.exists():
        finding = "there is no such file"
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
            finding = "the adapter is pickled (.bin, .pt), and pickles are never opened"
        if any(folder.glob("*.age")):
            finding = "the adapter is age-encrypted"
        raise CourseError(str(path), finding, "export the adapter as plain safetensors")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        finding = f"cannot be read ({error})"
        raise CourseError(str(path), finding, "download the adapter again") from None


def _pair_up(
    place: str, tensors: dict[str, torch.Tensor]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module name -> (A, B), every tensor used."""
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        stem, found, half = name.removesuffix(".weight").rpartition(".lora_")
        if not found or half not in ("A", "B"):
            finding = f"{name} is neither a lora_A nor a lora_B"
            raise CourseError(place, finding, "train a plain LoRA adapter")
        halves.setdefault(stem.removeprefix(PREFIX), {})[half] = tensor
    for stem, both in halves.items():
        if set(both) != {"A", "B"}:
            finding = f"{stem} has only one of lora_A and lora_B"
            raise CourseError(place, finding, "download the adapter again")
    if not halves:
        raise CourseError(place, "no LoRA matrices in it", "download the adapter again")
    return {stem: (both["A"], both["B"]) for stem, both in halves.items()}


def _module_in_base(name: str, A: torch.Tensor, base: BaseFolder, place: str) -> str:
    """The base's own name of a downloaded module."""
    if A.dim() != 2:
        remedy = "merge this one with tinker_cookbook.weights.build_hf_model"
        raise CourseError(place, f"{name} stacks its experts in Tinker's own way", remedy)
    plain = name.replace("model.unembed_tokens", "lm_head").replace("unembed_tokens", "lm_head")
    names = [plain, plain.replace(".attn.", ".self_attn.")]
    inner = [each.removeprefix("model.") for each in names]
    names += [
        p + each for p in ("model.language_model.", "language_model.model.") for each in inner
    ]
    for candidate in names:
        if f"{candidate}.weight" in base.tensors or candidate == "lm_head":
            return candidate
    remedy = "merge into the base that the adapter was trained on"
    raise CourseError(place, f"the base has no module {name}", remedy)


def _expert_pairs(
    name: str, A: torch.Tensor, B: torch.Tensor, base: BaseFolder, rank: int, place: str
) -> Iterator[LoraPair]:
    """Peft's stacked experts taken apart: one pair for each expert's own matrix in the base's
    files.

    A is (E * rank, in) with the expert first, B is (out, rank * E) with the expert last. Which
    stack it is, the shapes tell: peft's nesting of the two (`.base_layer`) has no order one can
    rely on.
    """
    module = name.removesuffix(".base_layer")
    experts = A.shape[0] // rank
    down = base.tensors.get(f"{module}.0.down_proj.weight")
    if down is None or A.shape[0] % rank:
        remedy = "merge this one with peft's merge_and_unload"
        raise CourseError(place, f"the base does not store {module} expert by expert", remedy)
    is_down = (B.shape[0], A.shape[1]) == down.shape
    A = A.reshape(experts, rank, -1)  # (E, r, in)
    B = B.reshape(B.shape[0], rank, experts).permute(2, 0, 1)  # (E, out, r)
    for e in range(experts):
        if is_down:
            yield LoraPair(f"{module}.{e}.down_proj", A[e], B[e])
        else:
            gate, up = B[e].chunk(2)  # the two halves of gate_up_proj's rows
            yield LoraPair(f"{module}.{e}.gate_proj", A[e], gate)
            yield LoraPair(f"{module}.{e}.up_proj", A[e], up)


def _check_pair(pair: LoraPair, rank: int, base: BaseFolder, place: str) -> None:
    source = base.head_source if pair.module == "lm_head" else f"{pair.module}.weight"
    if source not in base.tensors:
        raise CourseError(place, f"the base has no {source}", "give the base it was trained on")
    shape = base.tensors[source].shape
    out_size, in_size = reversed(shape) if pair.transposed else shape
    found, wanted = (tuple(pair.A.shape), tuple(pair.B.shape)), ((rank, in_size), (out_size, rank))
    if found != wanted:
        finding = f"{pair.module}: A {found[0]} and B {found[1]}, not {wanted[0]} and {wanted[1]}"
        raise CourseError(place, finding, "merge into the base that the adapter was trained on")
    if not (torch.isfinite(pair.A).all() and torch.isfinite(pair.B).all()):
        finding = f"{pair.module} holds NaN or infinity"
        raise CourseError(place, finding, "take an earlier checkpoint")
