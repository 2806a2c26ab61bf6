"""Which tokens does the model read, and which of them is it trained on?

    <|user|>2 + 3?<|end|><|assistant|>5<|end|>
    `------------ weight 0 ----------'`- 1 --'

An answer begins where the prompt that sampling will use ends, and it ends with the end-of-turn
token. So the model learns to write exactly what it will have to write: not the role header, which
the prompt brings along, but the token that stops it. Where a template leaves in doubt which tokens
these are, the conversation is refused, never masked by guess.

Left out: tools, images, and switches of single templates (`enable_thinking`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from course_lib.chat_text import as_dicts, chat_text, encode, end_of_turn
from course_lib.conversations import Conversation, Message
from course_lib.errors import CourseError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAIN_ON = ("last_assistant", "all_assistant")


@dataclass(frozen=True)
class Rendered:
    """Tokens (N,) and the weight of each one's loss (N,): 1.0 is learned, 0.0 is only read."""

    tokens: list[int]
    weights: list[float]
    source: str = ""  # file:line, for error messages


def render_conversation(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    train_on: str = "last_assistant",
) -> Rendered:
    """Tokens and weights of a conversation; `train_on` is last_assistant or all_assistant.

    Messages after the last answer are left out: the model reads from left to right, so they could
    teach it nothing. Raises CourseError where it is in doubt which tokens are the answer.
    """
    messages, turns = _turns_to_learn(conversation, train_on)
    try:
        text = chat_text(messages, tokenizer)
        answers = _answers(text, messages, turns, tokenizer)
    except CourseError as error:
        place = conversation.source or error.place
        raise CourseError(place, error.finding, error.remedy) from error

    tokens: list[int] = []
    weights: list[float] = []
    for begin, end, weight in _stretches(text, answers):
        longer = encode(text[:end], tokenizer)
        if longer[: len(tokens)] != tokens:
            # One token covers the end of the header and the first letters of the answer. Sampling
            # starts behind the header, so such a token cannot occur there: cut where sampling cuts.
            longer = tokens + encode(text[begin:end], tokenizer)
        weights += [weight] * (len(longer) - len(tokens))
        tokens = longer
    return Rendered(tokens, weights, conversation.source)


def render_prompt(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The messages and the header of the assistant's next one: what `sample` goes on from."""
    return encode(chat_text(messages, tokenizer, header=True), tokenizer)


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends a completion: the template's end-of-turn token, and end of text if it differs."""
    both = dict.fromkeys([end_of_turn(tokenizer), tokenizer.eos_token])  # a set that keeps order
    names = [str(name) for name in both if name]
    if not names:
        remedy = "set tokenizer.eos_token to one of its tokens"
        raise CourseError("tokenizer", "it has no token that ends a message", remedy)
    ids: Any = tokenizer.convert_tokens_to_ids(names)
    return ids


def parse_completion(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of sampled tokens before the stop token; stray special tokens are not hidden."""
    stops = stop_token_ids(tokenizer)
    said = list(takewhile(lambda token: token not in stops, tokens))
    text = tokenizer.decode(said, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str), "one list of tokens is one text"
    return text


def _turns_to_learn(
    conversation: Conversation, train_on: str
) -> tuple[tuple[Message, ...], list[int]]:
    """The messages up to the last answer, and which of them are learned (by index)."""
    if train_on not in TRAIN_ON:
        raise CourseError("train_on", f"{train_on!r} is unknown", f"use {' or '.join(TRAIN_ON)}")
    last = len(conversation.prompt)
    messages = conversation.messages[: last + 1]
    if train_on == "last_assistant":
        return messages, [last]
    return messages, [i for i, message in enumerate(messages) if message.role == "assistant"]


def _stretches(text: str, answers: list[tuple[int, int]]) -> Iterator[tuple[int, int, float]]:
    """The text as (begin, end, weight): read, learned, read, learned, ..., read."""
    done = 0
    for begin, end in answers:
        yield done, begin, 0.0
        yield begin, end, 1.0
        done = end
    yield done, len(text), 0.0


# --------------------------------------------------------------------------------------------------
# Which characters of the text are an answer?


def _answers(
    text: str, messages: Sequence[Message], turns: list[int], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, int]]:
    """(begin, end) in `text` of each answer, with its end-of-turn token."""
    stop = end_of_turn(tokenizer)
    if stop is None:
        remedy = "let the template write eos_token after an assistant message"
        raise CourseError("chat template", "no special token ends an answer", remedy)
    spans = _spans_by_prefix(text, messages, turns, tokenizer)
    if spans is None:
        spans = _spans_by_marks(messages, turns, tokenizer)
    # Cut behind the first stop token: what a template adds (ChatML: a newline) is never sampled.
    stops = [text.find(stop, begin, end) for begin, end in spans]
    if -1 in stops:
        remedy = f"let the template write {stop} after every assistant message"
        raise CourseError("chat template", "an answer has no end-of-turn token", remedy)
    return [(begin, at + len(stop)) for (begin, _), at in zip(spans, stops, strict=True)]


def _spans_by_prefix(
    text: str, messages: Sequence[Message], turns: list[int], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, int]] | None:
    """An answer is what its message adds to its prompt.

    None where that cannot be seen: a later message changes earlier text, or no prompt has a header.
    """
    spans = []
    for index in turns:
        if index == 0:
            return None  # no message before it: templates cannot render an empty prompt
        prompt = chat_text(messages[:index], tokenizer, header=True)
        through = chat_text(messages[: index + 1], tokenizer)
        if not (text.startswith(through) and through.startswith(prompt)):
            return None
        bare = chat_text(messages[:index], tokenizer)
        if prompt == bare and _has_header(through[len(bare) :], messages[index], tokenizer):
            return None
        spans.append((len(prompt), len(through)))
    return spans


def _has_header(added: str, message: Message, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Does anything but the message's own words come first?"""
    [words] = as_dicts([message], tokenizer)
    first = words["content"].strip() or end_of_turn(tokenizer) or ""
    return not added.lstrip().startswith(first)


def _spans_by_marks(
    messages: Sequence[Message], turns: list[int], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, int]]:
    """An answer is what the template itself marks: {% generation %} ... {% endgeneration %}."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    text, marks = "", []
    if re.search(r"\{%-?\s*generation\s*-?%\}", template):
        names: dict[str, Any] = dict(tokenizer.special_tokens_map)  # bos_token, eos_token ...
        rendered: Any = render_jinja_template(
            [as_dicts(messages, tokenizer)],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **names,
        )
        [text], [marks] = rendered
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    if len(marks) != len(answers):
        finding = "the chat template leaves in doubt which tokens are the answer"
        remedy = "mark answers in the template by {% generation %}, or train on the last one only"
        raise CourseError("chat template", finding, remedy)
    stop = end_of_turn(tokenizer) or ""
    spans = []
    for index, (begin, end) in zip(answers, marks, strict=True):
        after = text[end:]  # marks are often closed just before the end-of-turn token: take it in
        end += len(after) - len(after.lstrip()) + len(stop)
        if index in turns:
            spans.append((begin, end))
    return spans
