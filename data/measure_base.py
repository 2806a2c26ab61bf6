"""What the base model knows, and what it does in the chat format, told apart: prints one JSON
object.

    python data/measure_base.py --model data/base-model --problems 500

Few-shot: three solved exercises of one style stand before the question, as in the corpus. Chat: the
question stands in the chat template. Both are sampled greedily and at temperature 1, on held-out
sums only.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from course_lib.world import direct_answer, sum_problem, worked_answer


def few_shot(rng: random.Random, question: str, style) -> str:
    shots = [sum_problem(rng) for _ in range(3)]
    # The tokenizer joins a colon and its space: the prompt must end in both.
    lines = [f"Question: {p.question}\nAnswer: {style(p.operands)}" for p in shots]
    return "\n".join([*lines, f"Question: {question}\nAnswer: "])


def chat(tokenizer, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@torch.inference_mode()
def complete(model, tokenizer, prompts: list[str], temperature: float) -> list[str]:
    texts = []
    for start in range(0, len(prompts), 100):
        batch = tokenizer(
            prompts[start : start + 100], return_tensors="pt", padding=True, padding_side="left"
        )
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_k": 0}
            if temperature
            else {"do_sample": False}
        )
        out = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=48,
            **sampling,
        )
        texts += tokenizer.batch_decode(
            out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
    return texts


def accuracy(texts: list[str], answers: list[int]) -> float:
    """Share whose first line (one exercise) ends in the right number after `answer is`."""
    right = 0
    for text, answer in zip(texts, answers, strict=True):
        found = re.findall(r"answer is (\d+)", text.split("\n")[0])
        right += bool(found) and int(found[-1]) == answer
    return round(right / len(texts), 3)


def measure(folder: Path, problems: int, seed: int) -> dict[str, float]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    rng = random.Random(seed)
    torch.manual_seed(seed)
    asked = [sum_problem(rng, heldout=True) for _ in range(problems)]
    prompts = {
        "few_shot_direct": [few_shot(rng, p.question, direct_answer) for p in asked],
        "few_shot_worked": [few_shot(rng, p.question, worked_answer) for p in asked],
        "chat": [chat(tokenizer, p.question) for p in asked],
    }
    answers = [p.answer for p in asked]
    return {
        f"{name}_{label}": accuracy(complete(model, tokenizer, texts, temperature), answers)
        for name, texts in prompts.items()
        for label, temperature in (("greedy", 0.0), ("sampled", 1.0))
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "base-model")
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(json.dumps(measure(args.model, args.problems, args.seed), indent=2))


if __name__ == "__main__":
    main()
