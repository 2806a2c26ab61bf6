"""Where does the training data come from? JSONL or a Hugging Face dataset -> conversations.

    {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]}

is one row: roles system, user and assistant, one turn or many. Rows are read one by one, so that a
file of any size can be looked through.

Left out: tools, images, and other spellings of the format (`prompt`/`completion`, `from`/`value`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from course_lib.errors import CourseError
from course_lib.faults import (
    ERROR,
    MAX_LINE_BYTES,
    STILL_READABLE,
    STOPS_READING,
    Fault,
    decode_line,
    fault,
    is_text,
    row_faults,
)

DATASET_TYPES = ("jsonl", "huggingface")


@dataclass(frozen=True)
class Message:
    """One turn: who speaks (system, user or assistant) and what."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Messages in order, and where they came from (`file:line`), so that errors name the place."""

    messages: tuple[Message, ...]
    source: str = ""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Everything before the last assistant message: what the model is asked."""
        return self.messages[: self._last_answer()]

    @property
    def answer(self) -> str:
        """The last assistant message: what the model should say."""
        return self.messages[self._last_answer()].content

    def _last_answer(self) -> int:
        for index in reversed(range(len(self.messages))):
            if self.messages[index].role == "assistant":
                return index
        place = self.source or "conversation"
        raise CourseError(place, "no assistant message", "add the message that is to be learned")


def load_conversations(
    path_or_hub: str | Path, dataset_type: str = "jsonl", limit: int | None = None
) -> list[Conversation]:
    """All conversations of a file or dataset (the first `limit`).

    Raises CourseError at the first row with an error; `validate_file` reports all of them at once.
    """
    return list(islice(iter_conversations(path_or_hub, dataset_type), limit))


def iter_conversations(
    path_or_hub: str | Path, dataset_type: str = "jsonl"
) -> Iterator[Conversation]:
    """The same, one at a time: the file is never in memory as a whole."""
    for line, row, faults in read_rows(path_or_hub, dataset_type):
        for found in faults:
            if found.severity == ERROR:
                raise found.as_error(str(path_or_hub))
        if row is not None:
            yield as_conversation(row, f"{path_or_hub}:{line}")


def as_conversation(row: dict[str, Any], source: str = "") -> Conversation:
    """A row without errors as a `Conversation`."""
    messages = tuple(Message(turn["role"], turn["content"]) for turn in row["messages"])
    return Conversation(messages, source)


def prompt_messages(prompt: Any) -> tuple[Message, ...]:
    """A row's `prompt`, a text or a list of messages, as messages; none if it is neither."""
    if isinstance(prompt, str):
        return (Message("user", prompt),)
    try:
        messages = tuple(Message(turn["role"], turn["content"]) for turn in prompt)
    except (TypeError, KeyError):
        return ()
    texts = all(isinstance(text, str) for turn in messages for text in (turn.role, turn.content))
    return messages if texts else ()


# --------------------------------------------------------------------------------------------------
# rows, with their faults


def read_rows(
    path_or_hub: str | Path, dataset_type: str = "jsonl"
) -> Iterator[tuple[int, Any, list[Fault]]]:
    """(line, row or None, faults) for every line of a file or row of a dataset, counted from 1."""
    if dataset_type not in DATASET_TYPES:
        choices = " or ".join(DATASET_TYPES)
        raise CourseError("dataset_type", f"{dataset_type!r} is unknown", f"use {choices}")
    read = jsonl_rows if dataset_type == "jsonl" else dataset_rows
    empty = True
    for line, row, faults in read(str(path_or_hub)):
        empty = empty and row is None and all(found.severity != ERROR for found in faults)
        yield line, row, faults
    if empty:
        yield 1, None, [fault(1, "empty_file", "there is no row in it")]


def dataset_type_of(path_or_hub: str | Path) -> str:
    """`jsonl` for a file named so; `huggingface` for a folder, parquet, JSON, or a hub name."""
    return "jsonl" if Path(path_or_hub).suffix == ".jsonl" else "huggingface"


def jsonl_rows(path: str) -> Iterator[tuple[int, Any, list[Fault]]]:
    """Conversations of a JSONL file; a line that cannot be read has row None and says why."""
    remedy = "give a JSONL file, or use dataset_type huggingface for folders and hub names"
    for line, row, faults in json_lines(path, remedy):
        if all(found.kind in STILL_READABLE for found in faults):
            faults = faults + row_faults(row, line)
        yield line, row, faults


def json_lines(path: str, remedy: str) -> Iterator[tuple[int, Any, list[Fault]]]:
    """The JSON values of a file, whatever they mean; `remedy` is for a file that cannot be read."""
    for line, raw in enumerate(_bounded_lines(path, remedy), 1):
        row, faults = decode_line(raw, line)
        yield line, row, faults
        if any(found.kind in STOPS_READING for found in faults):
            return


def sound_lines(path: str, remedy: str) -> Iterator[tuple[str, Any]]:
    """(`file:line`, JSON value) for every line that is not blank; raises at the first fault."""
    for line, row, faults in json_lines(path, remedy):
        if not is_text(json.dumps(row, ensure_ascii=False)):
            faults = [*faults, fault(line, "lone_surrogate", "holds half a character")]
        for found in faults:
            if found.severity == ERROR:
                raise found.as_error(path)
        if all(found.kind != "blank_line" for found in faults):
            yield f"{path}:{line}", row


def _bounded_lines(path: str, remedy: str) -> Iterator[bytes]:
    """Lines as bytes; of a line over the limit only its beginning, so that memory stays bounded."""
    try:
        with open(path, "rb") as file:
            while raw := file.readline(MAX_LINE_BYTES + 1):
                yield raw
                while len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
                    raw = file.readline(MAX_LINE_BYTES + 1) or b"\n"
    except OSError as error:
        raise CourseError(path, error.strerror or "cannot be read", remedy) from error


def dataset_rows(name: str) -> Iterator[tuple[int, Any, list[Fault]]]:
    """Rows of a Hugging Face dataset: its `messages` column, whatever other columns there are."""
    try:
        for number, row in enumerate(_open_dataset(name), 1):
            row = {"messages": row["messages"]} if "messages" in row else row
            yield number, row, row_faults(row, number)
    except Exception as error:  # the library raises some twenty classes, from pyarrow to httpx
        if isinstance(error, CourseError):
            raise
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        remedy = "check the name; without a network give a local folder, parquet or JSON file"
        raise CourseError(name, f"cannot be opened as a dataset ({reason})", remedy) from error


def _open_dataset(name: str) -> Any:
    """An iterable of rows: a file, a folder or a hub name; `owner/name:test` picks a split."""
    import datasets  # here: it takes a second, and JSONL does without it

    path, builder = Path(name), {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
    if path.is_file():
        if path.suffix not in builder:
            remedy = "use .jsonl, .json or .parquet"
            raise CourseError(name, f"a {path.suffix or 'nameless'} file is not known", remedy)
        files = str(path)
        return datasets.load_dataset(
            builder[path.suffix], data_files=files, split="train", streaming=True
        )
    if not path.exists() and ":" in name:
        name, _, split = name.rpartition(":")
    else:
        split = "train"
    if (Path(name) / "dataset_dict.json").exists():  # written by DatasetDict.save_to_disk
        return datasets.load_from_disk(name)[split]
    if (Path(name) / "state.json").exists():  # written by Dataset.save_to_disk
        return datasets.load_from_disk(name)
    # A hub dataset is not streamed but kept in the library's cache: the next run needs no network.
    return datasets.load_dataset(name, split=split, streaming=path.is_dir())
