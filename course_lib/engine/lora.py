"""Which weights get an adapter, and what an adapter does to a weight: W + (alpha / rank) B A.

LoRA itself (Hu et al. 2021, https://arxiv.org/abs/2106.09685) is peft's: its layers, initialisation
and file layout. Here is only the choice of target weights from the SDK's three flags, for any
Hugging Face causal LM, and the folding of an adapter into the weights, which sampling uses. Left
out: biases, embeddings and convolutions get no adapter.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from course_lib.engine.requests import LoraSpec, RequestError

ALPHA = (
    32  # Tinker's API does not name it; its authors use 32 (https://thinkingmachines.ai/blog/lora/)
)
PREFIX = "base_model.model."  # what peft writes before a module's name in an adapter file
EXPERTS = "experts"  # the module that holds a mixture's weights, stacked as (expert, out, in)


def kind(model: PreTrainedModel, name: str) -> str | None:
    """What a weight belongs to: `attn`, `mlp`, `unembed`, or None (it gets no adapter)."""
    if model.get_submodule(name) is model.get_output_embeddings():
        return "unembed"
    if name.endswith(("gate", "router")):  # choosing experts is not their work
        return None
    return "attn" if "attn" in name or "attention" in name else "mlp"


def linear_targets(model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """Each matrix that may get an adapter: (module name, kind)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and (part := kind(model, name)):
            yield name, part


def expert_targets(model: PreTrainedModel) -> list[str]:
    """The stacked expert weights of a mixture, by parameter name: they count as mlp."""
    names = [name for name, parameter in model.named_parameters() if parameter.dim() == 3]
    return [name for name in names if name.split(".")[-2] == EXPERTS]


def lora_config(model: PreTrainedModel, spec: LoraSpec) -> LoraConfig:
    """peft's configuration for `spec` on this model, every target by its full name."""
    wanted = {"mlp": spec.train_mlp, "attn": spec.train_attn, "unembed": spec.train_unembed}
    if not any(wanted.values()):
        raise RequestError("an adapter needs at least one of train_mlp, train_attn, train_unembed")
    if not 1 <= spec.rank <= 1024:
        raise RequestError(f"rank is {spec.rank}; give 1 to 1024")
    if spec.seed is not None and not 0 <= spec.seed < 2**63:
        raise RequestError(f"seed is {spec.seed}; give 0 to 2^63 - 1")
    modules = [name for name, part in linear_targets(model) if wanted[part]]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.rank,
        lora_alpha=ALPHA,
        target_modules=modules,
        target_parameters=expert_targets(model) if spec.train_mlp else None,
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in modules),
    )


def expert_names(model: PreTrainedModel) -> dict[str, str]:
    """Which stacked expert weight each of peft's wrappers adapts: key prefix -> weight name.

    peft wraps the weights of one experts module inside each other; the order is its own, so a
    throw-away adapter on a copy that shares all weights is asked for it.
    """
    config = LoraConfig(r=1, target_modules=[], target_parameters=expert_targets(model))
    return {
        f"{PREFIX}{name}": f"{name.replace('.base_layer', '')}.{module.parameter_name}"
        for name, module in inject_adapter_in_model(config, sharing_copy(model)).named_modules()
        if isinstance(module, ParamWrapper)
    }


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same modules again around the very same weight tensors."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def lora_product(weight: Tensor, a: Tensor, b: Tensor, transposed: bool = False) -> Tensor:
    """(alpha / rank) B A in the layout of `weight`; a mixture has one product for each expert."""
    if weight.dim() == 2:
        product = (ALPHA / a.shape[0]) * (b @ a)
        return product.T if transposed else product
    experts = weight.shape[0]
    a = a.reshape(experts, -1, a.shape[-1])  # (experts, rank, in): peft's layout
    b = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)  # (experts, out, rank)
    product = (ALPHA / a.shape[1]) * torch.bmm(b, a)  # (experts, out, in)
    return product if product.shape == weight.shape else product.transpose(1, 2)


class Folding:
    """Adds adapters to the weights of one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.experts = expert_names(model) if expert_targets(model) else {}
        self._targets: dict[str, tuple[str, Tensor, bool]] = {}

    def weight_name(self, key: str) -> str:
        """The base weight that an adapter tensor changes, from the tensor's name in a file."""
        prefix = key.partition(".lora_")[0]
        return self.experts.get(prefix, f"{prefix.removeprefix(PREFIX)}.weight")

    def check(self, state: dict[str, Tensor]) -> None:
        """Refuse what is not pairs of A and B for weights of this model, naming the first."""
        for key, tensor in state.items():
            is_a = ".lora_A." in key
            partner = (
                key.replace(".lora_A.", ".lora_B.") if is_a else key.replace(".lora_B.", ".lora_A.")
            )
            try:
                weight = self.model.get_parameter(self.weight_name(key))
            except AttributeError:
                raise RequestError(
                    f"the adapter has {key}, for which this model has no weight"
                ) from None
            if partner == key or partner not in state:
                raise RequestError(f"the adapter lacks the partner of {key}")
            free, shared = (1, 0) if is_a else (0, 1)
            if tensor.dim() != 2 or tensor.shape[free] not in weight.shape:
                raise RequestError(f"{key} of shape {tuple(tensor.shape)} does not fit this model")
            if tensor.shape[shared] != state[partner].shape[free]:
                raise RequestError(f"the rank of {key} is not that of its partner")

    @torch.no_grad()  # not inference_mode: a backward pass may need the result
    def fold(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The changed weights by name: W + (alpha / rank) B A."""
        folded: dict[str, Tensor] = {}
        for key in (key for key in state if ".lora_A." in key):
            name, weight, transposed = self._target(key)
            a, b = (state[k].to(weight.device) for k in (key, key.replace(".lora_A.", ".lora_B.")))
            if weight.dim() == 2 and not transposed and weight.dtype == a.dtype:
                # The same sum as below in one pass over the weight.
                folded[name] = torch.addmm(weight, b, a, alpha=ALPHA / a.shape[0])
            else:
                folded[name] = (weight + lora_product(weight, a, b, transposed)).to(weight.dtype)
        return folded

    def _target(self, key: str) -> tuple[str, Tensor, bool]:
        """The weight that an adapter tensor changes, by name, and whether it lies transposed."""
        if key not in self._targets:
            name = self.weight_name(key)
            owner = self.model.get_submodule(name.rpartition(".")[0])
            self._targets[key] = name, self.model.get_parameter(name), isinstance(owner, Conv1D)
        return self._targets[key]
