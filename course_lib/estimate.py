"""What will a run take? Tokens before a hosted run is agreed to; an upper bound, not a bill.

Lengths are estimated from characters, because a hosted model's tokenizer may not be at hand.
Prices change: compare with the price list in the Tinker console. Not counted: a judge's training,
and the NLL of held-out conversations.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from course_lib.batches import plan_batches
from course_lib.config import RunConfig
from course_lib.run_data import RunData
from course_lib.run_judge import needs_judge
from course_lib.stages import EVALUATIONS

CHARACTERS_PER_TOKEN = 3  # English has about 4; digits and other languages fewer
TEMPLATE_TOKENS = 6  # of a chat template, per message


@dataclass(frozen=True)
class TokenEstimate:
    """Tokens of a whole run: trained on, sampled (at most), and read as prompts."""

    sft: int
    rl: int
    sampled: int
    prompts: int

    def __str__(self) -> str:
        return (
            f"about {self.sft + self.rl:,} tokens trained on (SFT {self.sft:,}, RL {self.rl:,}), "
            f"up to {self.sampled:,} sampled, {self.prompts:,} read as prompts"
        )


def estimate_tokens(config: RunConfig, data: RunData) -> TokenEstimate:
    """Tokens that SFT, RL and the three evaluations of `posttrain all` take."""
    lengths = [_tokens([message.content for message in each.messages]) for each in data.train]
    kept = [min(length, config.sft.max_length) for length in lengths]
    batches = plan_batches(len(kept), config.sft, config.seed)
    rl = config.rl
    problems = data.environment.sample(8, config.seed)
    asked = [_tokens([message.content for message in each.messages]) for each in problems]
    prompt = ceil(sum(asked) / len(asked))
    groups = rl.steps * rl.prompts_per_step
    judged = EVALUATIONS * config.eval_problems
    if rl.eval_every:
        judged += ceil(rl.steps / rl.eval_every) * rl.eval_problems  # after the last step, too
    completions = groups * rl.group_size
    whole = completions * (prompt + rl.max_tokens)
    readers = (rl.kl_penalty > 0) + needs_judge(config, data)  # of every completion, once more
    return TokenEstimate(
        sft=sum(kept[index] for batch in batches for index in batch),
        rl=whole * rl.substeps,
        sampled=(completions + judged) * rl.max_tokens,
        prompts=(groups + judged) * prompt + readers * whole,
    )


def _tokens(texts: list[str]) -> int:
    return sum(ceil(len(text) / CHARACTERS_PER_TOKEN) + TEMPLATE_TOKENS for text in texts)
