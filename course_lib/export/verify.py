"""Is the merged folder the adapter? Three answers, each of which finds what the others cannot.

1. Tensors: every matrix in the merged folder equals the base's plus the delta that *peft*
   computes, within one rounding; every other tensor equals the base's bit for bit. This finds one
   missing module among hundreds.
2. Logits: logits(merged) = logits(base + adapter in peft) within tolerance, and differ from
   logits(base).
3. Service: the merged model gives the logprobs that the service gave for the same tokens. Only
   this finds a base that is not the one the adapter was trained on, because 1 and 2 use the same
   wrong base on both sides.

At most one model is in memory at a time.
"""

from __future__ import annotations

import gc
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open

from course_lib.errors import CourseError
from course_lib.export.adapter import read_adapter
from course_lib.export.base import BaseFolder
from course_lib.export.merge import plan_merge

PROBE_ROWS, PROBE_TOKENS = 4, 32
FLOAT32_LIMIT = 2_000_000_000  # parameters; larger models are compared in their own dtype
TOLERANCE_FLOAT32 = 1e-3  # logits; observed differences are below 1e-4
TOLERANCE_ROUNDED = 0.03  # share of the largest |logit|, for weights that were rounded to 16 bits
SERVICE_TOLERANCE_NATS = (
    0.05  # mean |difference| per token; bfloat16 on other hardware stays below 0.03
)


@dataclass(frozen=True)
class Verification:
    """What was compared and what came out; kept in deploy.json."""

    error: float  # max |logits(merged) - logits(adapter)|
    effect: float  # max |logits(merged) - logits(base)|
    tolerance: float
    tensors: int  # compared one by one
    service_error_nats: float | None  # mean |logprob difference| to the service; None: it gave none


def verify_merge(
    base: BaseFolder, adapter: Path, merged: Path, probe: dict[str, Any] | None = None
) -> Verification:
    """Compare `merged` with `adapter` on `base`; raise CourseError unless it is the same model and
    not the base.

    `probe` is {"tokens": [...], "logprobs": [...]} as the service computed them for this
    checkpoint.
    """
    ids = _probe_ids(base)
    base_logits, adapter_logits, compared = _adapter_side(base, adapter, merged, ids)
    model = load_model(merged)
    merged_logits = _logits(model, ids)
    found = Verification(
        error=(merged_logits - adapter_logits).abs().max().item(),
        effect=(merged_logits - base_logits).abs().max().item(),
        tolerance=_tolerance(base, adapter_logits),
        tensors=compared,
        service_error_nats=service_error(model, probe),
    )
    _judge(found, str(merged))
    return found


def _judge(found: Verification, place: str) -> None:
    """Raise CourseError unless the numbers say: the adapter, and not the base."""
    if not found.error <= found.tolerance:  # so written, NaN is refused, too
        finding = f"logits differ from the adapter's by {found.error:.2g}"
        raise CourseError(place, f"{finding} (allowed {found.tolerance:.2g})", "deploy it again")
    if found.effect <= found.error:
        finding = f"the model is not told apart from the base (logits move by {found.effect:.2g})"
        raise CourseError(place, finding, "deploy a checkpoint that was trained")
    apart = found.service_error_nats
    if apart is not None and not apart <= SERVICE_TOLERANCE_NATS:
        finding = f"its logprobs differ from the service's by {apart:.2g} nats a token"
        raise CourseError(place, finding, "merge into the base that the adapter was trained on")


def _tolerance(base: BaseFolder, adapter_logits: torch.Tensor) -> float:
    rounded = base.tensors[base.head_source].dtype in ("BF16", "F16")
    largest = adapter_logits.abs().max().item()
    return TOLERANCE_ROUNDED * largest if rounded else TOLERANCE_FLOAT32


def load_model(folder: str | Path) -> torch.nn.Module:
    """The causal LM in `folder` on the CPU, for reading only; safetensors or nothing."""
    from transformers import AutoModelForCausalLM

    count = sum(place.nbytes // 2 for place in BaseFolder(Path(folder)).tensors.values())
    dtype = torch.float32 if count < FLOAT32_LIMIT else "auto"
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, local_files_only=True
    )
    return model.eval()


def _adapter_side(
    base: BaseFolder, adapter: Path, merged: Path, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """logits(base), logits(base + adapter) and the number of tensors compared, with one model in
    memory.
    """
    from peft import PeftModel

    with warnings.catch_warnings():  # peft warns of merging a tied head in place; we untie it
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        warnings.filterwarnings("ignore", category=FutureWarning)  # between peft and transformers
        model = PeftModel.from_pretrained(load_model(base.path), str(adapter)).eval()
    adapter_logits = _logits(model, ids)
    with model.disable_adapter():
        base_logits = _logits(model, ids)
    compared = _compare_tensors(model, base, adapter, merged)
    del model
    gc.collect()
    return base_logits, adapter_logits, compared


def _compare_tensors(model: torch.nn.Module, base: BaseFolder, adapter: Path, merged: Path) -> int:
    """Every tensor of `merged` against the base and the delta that peft computes."""
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    places = BaseFolder(merged).tensors
    plan = plan_merge(base, read_adapter(adapter, base))
    odd = set(places) ^ {tensor.name for tensor in plan}
    if odd:
        finding = f"tensors missing or too many: {', '.join(sorted(odd)[:3])}"
        raise CourseError(str(merged), finding, "deploy it again")
    for tensor in plan:
        with safe_open(base.path / tensor.place.file, framework="pt") as file:
            expected = file.get_tensor(tensor.source)
        with safe_open(merged / places[tensor.name].file, framework="pt") as file:
            found = file.get_tensor(tensor.name)
        delta = _peft_delta(layers, tensor.name.removesuffix(".weight"))
        if delta is not None:
            expected = (expected.float() + delta.float()).to(expected.dtype)
        if not _same(found, expected, exact=delta is None):
            finding = f"{tensor.name} is not base + adapter"
            raise CourseError(str(merged), finding, "deploy it again")
    return len(plan)


def _peft_delta(layers: dict[str, Any], module: str) -> torch.Tensor | None:
    """What peft adds to a stored matrix; None where it adds nothing.

    An expert's own matrix, `...experts.3.up_proj`, is a slice of a stacked one, (E, rows, columns).
    """
    if module in layers:
        return layers[module].get_delta_weight("default")
    stack, dot, rest = module.partition(".experts.")
    if not dot or f"{stack}.experts" not in layers:
        return None
    index, matrix = rest.split(".")
    wrapped: Any = layers[f"{stack}.experts"]
    wanted = "down_proj" if matrix == "down_proj" else "gate_up_proj"
    while getattr(wrapped, "parameter_name", wanted) != wanted:
        wrapped = wrapped.base_layer
    if not hasattr(wrapped, "get_delta_weight"):
        return None
    delta = wrapped.get_delta_weight("default")[int(index)]
    return delta if wanted == "down_proj" else delta.chunk(2)[matrix == "up_proj"]


def _same(found: torch.Tensor, expected: torch.Tensor, exact: bool) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if exact:
        return torch.equal(found, expected)
    if found.dtype == torch.float32:
        return torch.allclose(found, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())
    # 16 bits hide a small delta inside a tolerance, so ask for equality: float32 sums made in
    # another order cross a rounding border in far fewer than one element of a hundred.
    return (found != expected).float().mean().item() <= 0.01


@torch.no_grad()
def _logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits.float()  # (B, T, V)


def _probe_ids(base: BaseFolder) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    vocabulary = base.tensors[base.head_source].shape[0]
    return torch.randint(vocabulary, (PROBE_ROWS, PROBE_TOKENS), generator=generator)  # (B, T)


def service_error(model: torch.nn.Module, probe: dict[str, Any] | None) -> float | None:
    """Mean |difference| between the model's and the service's logprobs of tokens 1 ... T-1."""
    if not probe:
        return None
    tokens = torch.tensor([probe["tokens"]])  # (1, T)
    logprobs = _logits(model, tokens)[0, :-1].log_softmax(-1)  # (T - 1, V)
    ours = logprobs.gather(-1, tokens[0, 1:, None])[:, 0]  # (T - 1,)
    return (ours - torch.tensor(probe["logprobs"])).abs().mean().item()
