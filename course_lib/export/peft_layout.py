"""Write an adapter so that `peft.PeftModel.from_pretrained` loads it, and so do vLLM and SGLang."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from course_lib.export.adapter import CONFIG, PREFIX, WEIGHTS, AdapterFolder, read_adapter
from course_lib.export.base import BaseFolder
from course_lib.export.files import write_json, write_tensors


def to_peft(source: str | Path, base: BaseFolder, out: str | Path, base_name: str) -> AdapterFolder:
    """Write the adapter in `source` to `out` in PEFT's layout, naming `base_name` as its base."""
    adapter, out = read_adapter(source, base), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_tensors(out / WEIGHTS, _tensors(adapter))
    write_json(out / CONFIG, _config(adapter, base, base_name))
    return read_adapter(out, base)


def _tensors(adapter: AdapterFolder) -> dict[str, torch.Tensor]:
    tensors = dict(adapter.stacked)
    for pair in adapter.pairs.values():
        if not (adapter.stacked and ".experts." in pair.module):
            tensors[f"{PREFIX}{pair.module}.lora_A.weight"] = pair.A
            tensors[f"{PREFIX}{pair.module}.lora_B.weight"] = pair.B
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _config(adapter: AdapterFolder, base: BaseFolder, base_name: str) -> dict[str, Any]:
    stacked = bool(adapter.stacked)
    given = adapter.config
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": given["r"],
        "lora_alpha": given["lora_alpha"],
        "use_rslora": bool(given.get("use_rslora")),
        "target_modules": given["target_modules"] if stacked else _target_modules(adapter, base),
        "target_parameters": given["target_parameters"] if stacked else None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": base.stores_in_out,
        "modules_to_save": None,
        "inference_mode": True,
    }


def _target_modules(adapter: AdapterFolder, base: BaseFolder) -> list[str]:
    """Short names ("q_proj") where every module of that name is adapted, else full names.

    A short name that also fits an unadapted module (a vision tower's q_proj) would make PEFT adapt
    that one, too.
    """
    short = {module.rsplit(".", 1)[-1] for module in adapter.pairs}
    stored = {name.removesuffix(".weight") for name in base.tensors if name.endswith(".weight")}
    fitting = {module for module in stored | {"lm_head"} if module.rsplit(".", 1)[-1] in short}
    return sorted(short if fitting == set(adapter.pairs) else adapter.pairs)
