"""The peers' side: TRL's trainers and transformers' generate, set up as well as we know how.

No evaluation, no logging, no checkpoints, no gradient checkpointing, no worker processes; float32,
LoRA of the same rank on the same matrices, sdpa attention. `parts` cuts a step into micro-batches
where one would not fit into the memory of a laptop (14 GiB for 8 rows of 512 tokens).
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

from duel import Gate
from models import RANK, long_questions, model_folder, questions, reward
from ours import LEARNING_RATE, sft_rows

os.environ.setdefault("HF_HUB_OFFLINE", "1")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS = 100_000  # the gate ends it


def loaded(model: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_folder(model)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), tokenizer


def common(batch: int, parts: int) -> dict[str, Any]:
    """What both trainers are told."""
    return {
        "output_dir": tempfile.mkdtemp(prefix="bench-trl-"),
        "per_device_train_batch_size": batch // parts,
        "gradient_accumulation_steps": parts,
        "max_steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=32, target_modules=TARGETS)


def at_the_gate(gate: Gate) -> Any:
    """A callback that stops at every step: a lap is everything from one step's end to the next."""
    from transformers import TrainerCallback

    class AtTheGate(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            gate.lap()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            gate.lap()

    return AtTheGate()


def sft(
    gate: Gate, model: str, shape: str, batch: int, vocabulary: int = 1024, parts: int = 1
) -> None:
    """TRL's SFTTrainer on rows that are tokenised already."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    network, tokenizer = loaded(model)
    rows = sft_rows(shape, batch, vocabulary)
    masks = [[0] * (len(row.tokens) - row.trained) + [1] * row.trained for row in rows]
    data = Dataset.from_dict({"input_ids": [row.tokens for row in rows], "completion_mask": masks})
    config = SFTConfig(**common(batch, parts), max_length=None, completion_only_loss=True)
    SFTTrainer(
        model=network,
        args=config,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=lora(),
        callbacks=[at_the_gate(gate)],
    ).train()


def grpo(
    gate: Gate,
    model: str,
    prompts: int,
    group: int,
    tokens: int,
    length: int = 0,
    parts: int = 1,
) -> None:
    """TRL's GRPOTrainer: one new generation and one optimizer step each."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    network, tokenizer = loaded(model)
    texts = long_questions(2 * prompts, length) if length else questions(512)
    config = GRPOConfig(
        **common(prompts * group, parts),
        num_generations=group,
        max_completion_length=tokens,
        temperature=1.0,
        beta=0.0,
        num_iterations=1,
    )
    GRPOTrainer(
        model=network,
        reward_funcs=lambda completions, **_: [reward(text) for text in completions],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer,
        peft_config=lora(),
        callbacks=[at_the_gate(gate)],
    ).train()


def generate(
    gate: Gate, model: str, calls: int, tokens: int, at_once: bool, stops: bool = False
) -> None:
    """transformers' generate, prompt by prompt or with all prompts in one padded batch."""
    import torch

    network, tokenizer = loaded(model)
    network.eval()
    network.generation_config.eos_token_id = 0 if stops else None
    texts = questions(calls)
    batches = [texts] if at_once else [[text] for text in texts]
    how = {"max_new_tokens": tokens, "do_sample": True, "temperature": 1.0, "top_k": 0}
    while True:
        gate.lap()
        with torch.inference_mode():
            for batch in batches:
                inputs = tokenizer(batch, return_tensors="pt", padding=True)
                inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
                made = network.generate(**inputs, **how, pad_token_id=0)
                assert stops or made.shape[1] == inputs["input_ids"].shape[1] + tokens
