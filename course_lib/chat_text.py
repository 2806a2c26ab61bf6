"""What does a chat look like to the model? Messages -> the chat template's text -> token ids.

The template is the tokenizer's own, a Jinja program that came with the model, run by transformers.
Two things are added here: a stated default for a tokenizer without one, and safety against a text
that spells out a control token: typed by a person, `<|end|>` stays seven characters, ends no turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from course_lib.conversations import Message
from course_lib.errors import CourseError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For a tokenizer without a chat template: the role on a line of its own, the text, end of text.
DEFAULT_TEMPLATE = (
    "{{ bos_token if bos_token and bos_token != eos_token else '' }}"
    "{% for message in messages %}"
    "{{ message.role + ':\n' + message.content + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)

# Unicode keeps this character for use inside programs; a text that holds it loses it in `encode`.
_SEAM = "\ufdd0"


def chat_text(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, header: bool = False
) -> str:
    """The chat template's text; `header` adds the beginning of the assistant's next message.

    Control tokens that the messages spell out are broken by a seam, which `encode` understands.
    """
    template = None if tokenizer.chat_template else DEFAULT_TEMPLATE
    if template and not tokenizer.eos_token:
        finding = "the tokenizer has neither a chat template nor an end-of-text token"
        raise CourseError("chat template", finding, "set tokenizer.chat_template")
    try:
        text = tokenizer.apply_chat_template(
            as_dicts(messages, tokenizer),
            chat_template=template,
            tokenize=False,
            add_generation_prompt=header,
        )
    except Exception as error:  # a template is a program: it may raise anything
        finding = f"the chat template refuses the messages ({error})"
        remedy = "change the messages, or tokenizer.chat_template"
        raise CourseError("chat template", finding, remedy) from error
    assert isinstance(text, str), "tokenize=False gives text"
    return text


def as_dicts(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, str]]:
    """Messages as templates want them, their control tokens broken up."""
    control_token = _control_tokens(tokenizer)
    return [
        {"role": message.role, "content": _broken_up(message.content, control_token)}
        for message in messages
    ]


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a chat text, cut at its seams: no control token but the template's is whole."""
    tokens: list[int] = []
    for piece in text.split(_SEAM):
        # The template wrote its own special tokens; a length is for `make_datum` to complain about.
        tokens += tokenizer.encode(piece, add_special_tokens=False, verbose=False)
    return tokens


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The first special token that the chat template writes after an assistant's words."""
    template = str(tokenizer.chat_template), str(tokenizer.eos_token)
    return _end_of_turn(tokenizer, len(tokenizer), template)


@lru_cache(maxsize=8)  # asked of every conversation: a third of the time to render it
def _end_of_turn(
    tokenizer: PreTrainedTokenizerBase, n_tokens: int, template: tuple[str, str]
) -> str | None:
    """`n_tokens` and `template` are there for the cache: another template ends otherwise."""
    words = "zqxj"  # in no template
    probe = [Message("user", "?"), Message("assistant", words)]
    tail = chat_text(probe, tokenizer).rpartition(words)[2]
    found = _control_tokens(tokenizer).search(tail)
    return found.group() if found else None


def control_tokens_in(content: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The special tokens that a text spells out, e.g. `<|end|>`."""
    return _control_tokens(tokenizer).findall(content)


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    return _pattern(tokenizer, len(tokenizer))


@lru_cache(maxsize=8)  # Llama 3 has 256 of them, and every message is searched
def _pattern(tokenizer: PreTrainedTokenizerBase, n_tokens: int) -> re.Pattern[str]:
    """`n_tokens` is there for the cache: a token that is added later must be found, too."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    longest_first = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) finds nothing


def _broken_up(content: str, control_token: re.Pattern[str]) -> str:
    return control_token.sub(lambda found: found[0][0] + _SEAM + found[0][1:], content)
