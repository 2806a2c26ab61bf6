"""Chat templates of the common families, written for these tests, and a tokenizer that speaks them.

The tokenizer is byte-level with a few merges, so that every text round-trips and some tokens would
like to straddle the border between a role header and an answer.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

COURSE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

CHATML = """\
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""

# A beginning of text, roles in header tokens, an empty line, trimmed words.
LLAMA3 = """\
{{- bos_token -}}
{%- for m in messages -%}
{{ '<|start_header_id|>' + m.role + '<|end_header_id|>' + '\n\n' }}
{{- m.content | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>' + '\n\n' }}
{%- endif -%}"""

# The assistant is called model; a system message is folded into the first user message.
GEMMA = """\
{{- bos_token -}}
{%- set ns = namespace(fold='', turn='user') -%}
{%- for m in messages -%}
{%- if m.role == 'system' and loop.first -%}{%- set ns.fold = m.content | trim + '\n\n' -%}
{%- else -%}
{%- if m.role != ns.turn -%}{{ raise_exception('turns must alternate') }}{%- endif -%}
{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') + '\n' }}
{{- ns.fold + m.content | trim + '<end_of_turn>\n' }}
{%- set ns.fold = '' -%}
{%- set ns.turn = 'assistant' if ns.turn == 'user' else 'user' -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""

# History is rewritten: only answers after the last question keep a thinking block (an empty one is
# added), older answers lose theirs.
QWEN3 = """\
{%- set ns = namespace(asked=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.asked = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' -%}
{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n')
      if '</think>' in m.content else '' -%}
{%- set words = m.content.split('</think>')[-1].lstrip('\n') -%}
{%- if loop.index0 > ns.asked -%}{{ '<think>\n' + thought + '\n</think>\n\n' }}{%- endif -%}
{{ words }}
{%- else -%}{{ m.content }}{%- endif -%}
{{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""

# No role header at all: the closing bracket is where the answer begins.
MISTRAL = """\
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{ '[INST] ' + m.content + ' [/INST]' }}
{%- elif m.role == 'assistant' -%}{{ ' ' + m.content + eos_token }}{%- endif -%}
{%- endfor -%}"""

# Defects that are met in the wild.
HEADER_NOT_ASKED_FOR = (  # ignores add_generation_prompt
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
)
FORGETFUL = (  # shows no answer but the last
    "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
END_AT_THE_VERY_END = (  # only the whole chat is closed
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}<|end|>{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
THINKING_HEADER = (  # the prompt opens a thought that the history does not show
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)

SPECIALS = {  # template -> special tokens; the first is end of text, the second (if any) begins it
    COURSE: ("<|end|>", None, "<|system|>", "<|user|>", "<|assistant|>"),
    CHATML: ("<|endoftext|>", None, "<|im_start|>", "<|im_end|>"),
    LLAMA3: (
        "<|end_of_text|>",
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ),
    GEMMA: ("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
    QWEN3: ("<|im_end|>", None, "<|im_start|>", "<|endoftext|>"),
    MISTRAL: ("</s>", "<s>"),
}
FAMILIES = {
    "course": COURSE,
    "chatml": CHATML,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "qwen3": QWEN3,
    "mistral": MISTRAL,
}
MERGES = [("Ċ", "Ċ"), ("Ġ", "t"), ("Ġ", "Ġ"), ("Ċ", "Ġ"), ("h", "e"), ("Ġt", "he"), ("s", "Ċ")]


def byte_tokenizer(
    template: str | None, specials: tuple[str | None, ...] | None = None
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer; `<think>` is an added token but not a special one, as in Qwen3."""
    eos, bos, *others = specials or SPECIALS.get(template or "", SPECIALS[COURSE])
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in MERGES:
        vocab.setdefault(left + right, len(vocab))
    inner = Tokenizer(models.BPE(vocab=vocab, merges=MERGES))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([token for token in (eos, bos, *others) if token])
    inner.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=eos, bos_token=bos, chat_template=template
    )
