"""Is this file fit to train on? Every fault at its line, then a summary; not a byte is changed.

    report = validate_file("data/conversations.jsonl")
    print(report)  # report.ok is False if there is an error

The file is read once, row by row, in constant memory whatever its size. Two things are bounded for
that. The report keeps the first 1,000 faults of each kind, and counts all. Repeats are looked for
among the first 500,000 rows, kept as 8-byte hashes (55 MB in all). Where a bound was reached, the
report says so.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.chat_text import control_tokens_in
from course_lib.conversations import (
    Conversation,
    Message,
    as_conversation,
    dataset_type_of,
    prompt_messages,
    read_rows,
)
from course_lib.errors import CourseError, count_of
from course_lib.faults import ERROR, KINDS, WARNING, Fault, fault
from course_lib.rendering import render_conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEPT_PER_KIND = 1_000  # faults in the report
REMEMBERED_ROWS = 500_000  # rows among which repeats are found


@dataclass
class ValidationReport:
    """What was found in one file or dataset; `print` it, or look at its fields."""

    path: str
    length_unit: str = "tokens"  # characters, where no tokenizer was given
    faults: list[Fault] = field(default_factory=list)  # the first 1,000 of each kind
    counts: Counter[str] = field(default_factory=Counter)  # faults by kind: all of them
    rows: int = 0  # lines that are not blank, or rows of a dataset
    conversations: int = 0  # rows that have the right form; what follows is counted over these
    roles: Counter[str] = field(default_factory=Counter)  # messages by role
    turns: Counter[int] = field(default_factory=Counter)  # conversations by number of messages
    lengths: Counter[int] = field(default_factory=Counter)  # by upper edge: 1, 2, 4, 8, 16, ...
    longest: tuple[int, int] = (0, 0)  # length, line
    all_remembered: bool = True  # False: repeats were looked for among the first rows only

    @property
    def errors(self) -> int:
        """How many faults stop training."""
        return sum(n for kind, n in self.counts.items() if KINDS[kind][0] == ERROR)

    @property
    def warnings(self) -> int:
        """How many faults are worth a look."""
        return sum(n for kind, n in self.counts.items() if KINDS[kind][0] == WARNING)

    @property
    def ok(self) -> bool:
        """Can it be trained on?"""
        return self.errors == 0

    def render(self) -> str:
        """The faults as `file:line: finding; remedy`, errors first, then the summary."""
        return "\n".join([*self._listing(ERROR), *self._listing(WARNING), *self._summary()])

    def __str__(self) -> str:
        return self.render()

    def _listing(self, severity: str) -> list[str]:
        listed = [str(one.as_error(self.path)) for one in self.faults if one.severity == severity]
        if not listed:
            return []
        more = [
            f"... and {count - KEPT_PER_KIND} more of the kind {kind}"
            for kind, count in self.counts.items()
            if KINDS[kind][0] == severity and count > KEPT_PER_KIND
        ]
        return [f"{severity}s", *listed, *more, ""]

    def _summary(self) -> list[str]:
        verdict = "fit to train on" if self.ok else "not fit to train on"
        rows, talks = count_of(self.rows, "row"), count_of(self.conversations, "conversation")
        errors, warnings = count_of(self.errors, "error"), count_of(self.warnings, "warning")
        lines = [
            f"{self.path}: {errors}, {warnings}, {verdict}",
            f"{rows}, {talks} among them",
        ]
        if not self.all_remembered:
            lines.append(f"repeats were looked for among the first {REMEMBERED_ROWS} rows only")
        lines += _bars("faults by kind", self.counts.most_common())
        lines += _bars("messages by role", self.roles.most_common())
        lines += _bars("messages per conversation", sorted(self.turns.items()))
        edges = [(f"{edge // 2 + 1}-{edge}", n) for edge, n in sorted(self.lengths.items())]
        lines += _bars(f"{self.length_unit} per conversation", edges)
        if self.conversations:
            lines.append(f"  longest: {self.longest[0]} in line {self.longest[1]}")
        return lines


def _bars(title: str, counts: list[tuple[Any, int]]) -> list[str]:
    """A bar chart in plain ASCII, which every terminal can show."""
    if not counts:
        return []
    width = max(len(str(name)) for name, _ in counts)
    most = max(n for _, n in counts)
    return [
        "",
        title,
        *(f"  {name!s:>{width}} {n:>8} {'#' * round(30 * n / most)}" for name, n in counts),
    ]


def validate_file(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    against: str | Path | None = None,
) -> ValidationReport:
    """Look at every row of a JSONL file or Hugging Face dataset: which of them, its name says.

    With a tokenizer, each conversation is rendered as training does it, and may have `max_length`
    tokens. With `against`, a held-out file, prompts that stand in both are found: leakage.
    """
    if max_length is not None and tokenizer is None:
        raise CourseError("max_length", "tokens need a tokenizer", "give one, or no max_length")
    report = ValidationReport(str(path), "tokens" if tokenizer else "characters")
    seen = _Memory()
    heldout = _Memory() if against is None else _prompts_of(against)
    for line, row, faults in read_rows(path, dataset_type_of(path)):
        faults = list(faults)
        report.rows += all(one.kind not in ("blank_line", "empty_file") for one in faults)
        if row is not None and all(one.severity != ERROR for one in faults):
            conversation = as_conversation(row, f"{path}:{line}")
            faults += _repeats(conversation, line, seen, heldout, str(against))
            found, length = _length(conversation, line, tokenizer, max_length)
            faults += found
            _count(report, conversation, line, length)
        for one in faults:
            report.counts[one.kind] += 1
            if report.counts[one.kind] <= KEPT_PER_KIND:
                report.faults.append(one)
    report.all_remembered = not (seen.full or heldout.full)
    return report


def _count(report: ValidationReport, conversation: Conversation, line: int, length: int) -> None:
    report.conversations += 1
    report.roles.update(message.role for message in conversation.messages)
    report.turns[len(conversation.messages)] += 1
    report.lengths[1 << max(0, length - 1).bit_length()] += 1
    report.longest = max(report.longest, (length, line), key=lambda pair: pair[0])


def _length(
    conversation: Conversation,
    line: int,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int | None,
) -> tuple[list[Fault], int]:
    """What only the tokenizer can tell, and the length in tokens (without one: in characters)."""
    if tokenizer is None:
        return [], sum(len(message.content) for message in conversation.messages)
    faults = []
    for number, message in enumerate(conversation.messages, 1):
        for token in dict.fromkeys(control_tokens_in(message.content, tokenizer)):
            faults.append(fault(line, "control_token", f"message {number} spells out {token}"))
    try:
        n_tokens = len(render_conversation(conversation, tokenizer).tokens)
    except CourseError as error:
        refused = fault(line, "not_renderable", error.finding)
        return [*faults, replace(refused, remedy=error.remedy)], 0
    if max_length is not None and n_tokens > max_length:
        faults.append(fault(line, "too_long", f"{n_tokens} tokens, max_length is {max_length}"))
    return faults, n_tokens


# --------------------------------------------------------------------------------------------------
# Repeats: the same row twice, or a prompt that the evaluation will ask


class _Memory:
    """The line of each of the first 500,000 different texts, each text as an 8-byte hash.

    Two different texts among that many share a hash with a chance of one in a hundred million.
    """

    def __init__(self) -> None:
        self._lines: dict[bytes, int] = {}
        self.full = False

    @property
    def empty(self) -> bool:
        return not self._lines

    def line_of(self, text: str) -> int | None:
        return self._lines.get(_hash(text))

    def remember(self, text: str, line: int) -> None:
        if len(self._lines) < REMEMBERED_ROWS:
            self._lines.setdefault(_hash(text), line)
        else:
            self.full = True


def _hash(text: str) -> bytes:
    return blake2b(text.encode("utf-8"), digest_size=8).digest()


def _repeats(
    conversation: Conversation, line: int, seen: _Memory, heldout: _Memory, against: str
) -> list[Fault]:
    faults = []
    row = json.dumps([(message.role, message.content) for message in conversation.messages])
    twin, leaked = seen.line_of(row), heldout.line_of(_question(conversation.prompt))
    if twin is None:
        seen.remember(row, line)
    else:
        faults.append(fault(line, "duplicate_row", f"the same conversation as in line {twin}"))
    if leaked is not None:
        faults.append(fault(line, "leakage", f"its prompt also stands in {against}:{leaked}"))
    return faults


def _prompts_of(path: str | Path) -> _Memory:
    """The prompts of a held-out file; its own faults are reported when it is validated itself."""
    prompts = _Memory()
    for line, row, faults in read_rows(path, dataset_type_of(path)):
        if asked := _asked(row, faults):
            prompts.remember(_question(asked), line)
    if prompts.empty:
        remedy = 'write {"prompt": ...} or {"messages": [...]} lines'
        raise CourseError(str(path), "holds no prompt to look for", remedy)
    return prompts


def _asked(row: Any, faults: list[Fault]) -> Iterable[Message]:
    """What a held-out row asks, a conversation or a `prompt`; nothing if it cannot be read."""
    if isinstance(row, dict) and "messages" not in row:
        return prompt_messages(row.get("prompt"))
    if row is None or any(one.severity == ERROR for one in faults):
        return ()
    return as_conversation(row).prompt


def _question(asked: Iterable[Message]) -> str:
    """The prompt without what does not make it another question: system message, case, spaces."""
    said = (message.content for message in asked if message.role != "system")
    return json.dumps([" ".join(content.casefold().split()) for content in said])
