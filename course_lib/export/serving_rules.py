"""Would vLLM and SGLang load this adapter? Their documented rules, read off the files; nothing is
run.

Sources: vLLM docs "LoRA Adapters" and `vllm/lora/peft_helper.py`, `vllm/config/lora.py`,
`vllm/lora/layers/logits_processor.py` (read 2026-11); SGLang docs "LoRA Serving" and
`python/sglang/srt/lora/lora_config.py`. Whether the server implements LoRA for the architecture at
all is not checked: that list changes with every release.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from course_lib.export.adapter import CONFIG, PREFIX, WEIGHTS
from course_lib.export.base import BaseFolder
from course_lib.export.files import read_json

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values --max-lora-rank takes
VLLM_MAX_VOCAB = 258_048  # with an adapted lm_head
MLP_GROUP = {"gate_proj", "up_proj"}  # stored as one matrix by both servers


@dataclass(frozen=True)
class Rule:
    """One documented rule and whether the files keep it."""

    server: str
    rule: str
    kept: bool
    note: str


def check_serving_rules(adapter: str | Path, base: BaseFolder) -> list[Rule]:
    """Every rule of both servers for the PEFT-layout folder `adapter`. Checked on the files, not
    run.
    """
    adapter = Path(adapter)
    config = read_json(adapter / CONFIG)
    with safe_open(adapter / WEIGHTS, framework="pt") as file:
        names = list(file.keys())
    rank, targets = config["r"], {each.rsplit(".", 1)[-1] for each in config["target_modules"]}
    plain = all(
        n.startswith(PREFIX) and n.endswith((".lora_A.weight", ".lora_B.weight")) for n in names
    )
    vocab = base.tensors[base.head_source].shape[0]
    slot = next((size for size in VLLM_RANKS if size >= rank), None)
    experts = any(".experts" in name for name in names)
    groups = targets & MLP_GROUP in (set(), MLP_GROUP)
    return [
        Rule(
            "vLLM",
            "rank fits a value of --max-lora-rank",
            slot is not None,
            f"start with --max-lora-rank {slot}",
        ),
        Rule("vLLM", "no DoRA, no modules_to_save, no bias", _plain_config(config), ""),
        Rule("vLLM", "tensors are named base_model.model.*.lora_A/B.weight", plain, ""),
        Rule(
            "vLLM",
            f"vocabulary <= {VLLM_MAX_VOCAB} when lm_head is adapted",
            vocab <= VLLM_MAX_VOCAB,
            f"{vocab}",
        ),
        Rule(
            "vLLM",
            "expert adapters are experimental",
            not experts,
            "serve the merged model" if experts else "",
        ),
        Rule(
            "SGLang",
            "plain LoRA: r, lora_alpha, target_modules, no DoRA",
            _plain_config(config),
            "",
        ),
        Rule("SGLang", "gate_proj and up_proj adapted together", groups, ""),
        Rule(
            "SGLang",
            "no tokens added to the vocabulary",
            not (adapter / "added_tokens.json").exists(),
            "",
        ),
        Rule(
            "SGLang", "--max-lora-rank covers the rank", True, f"start with --max-lora-rank {rank}"
        ),
        Rule(
            "SGLang", "no expert adapters", not experts, "serve the merged model" if experts else ""
        ),
    ]


def _plain_config(config: dict) -> bool:
    unset = (None, False, "none", [])
    return all(config.get(key) in unset for key in ("use_dora", "modules_to_save", "bias"))
