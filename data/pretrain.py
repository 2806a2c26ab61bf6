"""Train the shipped base model: a one-million-parameter Llama on the village corpus, from a seed.

    python data/pretrain.py --out data/base-model  # a quarter of an hour on two cores
    python data/pretrain.py --out /tmp/small --tokens 500000  # a quick look

What it leaves out: everything that large runs need (sharding, restarts, data loading). Muon (Jordan
et al. 2024, https://kellerjordan.github.io/posts/muon/) trains the matrices, AdamW the rest; the
learning rate warms up and then falls linearly. Rows are 256 tokens, and 1,024 in the last part, so
that the whole context is trained.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from course_lib.world.corpus import documents

SPECIAL_TOKENS = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CONTEXT = 1024
VOCABULARY = 1024
# One token per digit, words without their spaces split off, an operator with the spaces around it.
PIECES = r"\d| ?[A-Za-z]+| ?[^A-Za-z\d\s]+ ?|\s+"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text round-trips, no token is added in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(documents(seed), 20_000), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|end|>",
        additional_special_tokens=SPECIAL_TOKENS[1:],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def corpus_tokens(tokenizer: PreTrainedTokenizerFast, seed: int, count: int) -> np.ndarray:
    """The first `count` tokens of the corpus, as one stream."""
    parts, total, stream = [], 0, documents(seed)
    while total < count:
        batch = tokenizer(list(islice(stream, 5_000)))["input_ids"]
        ids = np.fromiter((token for row in batch for token in row), dtype=np.uint16)
        parts.append(ids)
        total += len(ids)
    return np.concatenate(parts)[:count]


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    muon = torch.optim.Muon(matrices, lr=0.04, momentum=0.95, weight_decay=0.01)
    adam = torch.optim.AdamW(others, lr=6e-3, betas=(0.9, 0.95), weight_decay=0.0)
    return [muon, adam]


def learning_rate_factor(done: float) -> float:
    """Warm up over the first 2 %, then fall linearly to zero."""
    return min(1.0, done / 0.02, (1.0 - done) / 0.98)


def pretrain(out: Path, *, tokens: int, seed: int, rows: int, save_every: int) -> dict:
    started = time.monotonic()
    tokenizer = train_tokenizer(seed)
    model = make_model(tokenizer, seed)
    stream = torch.from_numpy(corpus_tokens(tokenizer, seed + 1, tokens).astype(np.int64))
    optimizers = make_optimizers(model)
    initial = [[group["lr"] for group in opt.param_groups] for opt in optimizers]
    per_step = rows * 256
    steps = tokens // per_step
    long_from = int(steps * 0.9)
    running = None
    for step in range(steps):
        length = 256 if step < long_from else CONTEXT
        batch = stream[step * per_step : (step + 1) * per_step].view(-1, length)
        factor = learning_rate_factor((step + 1) / steps)
        for opt, rates in zip(optimizers, initial, strict=True):
            for group, rate in zip(opt.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        with torch.autocast("cpu", torch.bfloat16):  # matrices in bfloat16, weights stay float32
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0:
            seconds = time.monotonic() - started
            print(f"step {step}/{steps} loss {running:.4f} nats, {seconds:.0f} s", flush=True)
        if save_every and step and step % save_every == 0:
            save(model, tokenizer, out)
    save(model, tokenizer, out)
    summary = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": int(steps * per_step),
        "final_loss_nats": round(running or float("nan"), 4),
        "seconds": round(time.monotonic() - started),
        "seed": seed,
    }
    (out / "pretraining.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=20_000_000)
    parser.add_argument("--rows", type=int, default=48, help="rows of 256 tokens a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=0, help="steps; 0 = only at the end")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print(
        pretrain(
            args.out, tokens=args.tokens, seed=args.seed, rows=args.rows, save_every=args.save_every
        )
    )


if __name__ == "__main__":
    main()
