"""Tiny random causal LMs with a small tokenizer, as folders: what the deployment tests deploy."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SPECIALS = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = "What is 23 + 45 + 61? The answer is 129. The mill stands by the river. Grüße, 日本 🙂."


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over a line of text, with the course's chat template."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([TEXT] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|end|>", pad_token="<|end|>", model_max_length=256
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_config(tokenizer: PreTrainedTokenizerFast, tied: bool = False) -> LlamaConfig:
    """Two layers of 32: large enough for every kind of matrix to differ in shape."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )


def save_base(
    folder: Path,
    *,
    config: PreTrainedConfig | None = None,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shard: str = "1GB",
) -> Path:
    """A random model with its tokenizer; weights large enough that two seeds disagree by nats."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config or tiny_config(tokenizer, tied))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(
    folder: Path,
    base: Path,
    *,
    modules: list[str] | str = "all-linear",
    head: bool = True,
    rank: int = 8,
    alpha: int = 32,
    strength: float = 0.05,
    parameters: list[str] | None = None,
    seed: int = 1,
) -> Path:
    """A LoRA adapter on `base` as peft itself saves it, with B drawn at random instead of zero."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = linear_names(model, head) if modules == "all-linear" else list(modules)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        target_modules=targets,
        target_parameters=parameters,
        fan_in_fan_out="gpt2" in str(model.config.model_type),
    )
    torch.manual_seed(seed)
    peft_model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=strength)
    peft_model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def linear_names(model: PreTrainedModel, head: bool) -> list[str]:
    """Every linear layer's full name, as the embedded engine names its targets."""
    kinds = ("Linear", "Conv1D")
    names = [name for name, module in model.named_modules() if type(module).__name__ in kinds]
    return [name for name in names if head or name != "lm_head"]
