"""Claims about course_lib.conversations: JSONL and Hugging Face datasets through one door."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from course_lib.conversations import (
    Conversation,
    Message,
    dataset_type_of,
    iter_conversations,
    load_conversations,
)
from course_lib.errors import CourseError
from course_lib.faults import MAX_LINE_BYTES

DATA = Path(__file__).resolve().parent.parent / "data"
GOOD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def write(path: Path, *lines: Any) -> Path:
    """Values are written as JSON, bytes as they are."""
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines]
    path.write_bytes(b"".join(raw))
    return path


# --------------------------------------------------------------------------------------------------
# A conversation


def test_prompt_and_answer_split_at_the_last_assistant_message() -> None:
    turns = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    chat = Conversation((*turns, Message("assistant", "d"), Message("user", "e")))
    assert chat.prompt == tuple(turns)
    assert chat.answer == "d"


def test_without_an_assistant_there_is_neither_and_the_place_is_named() -> None:
    chat = Conversation((Message("user", "a"),), "rows.jsonl:7")
    for part in ("prompt", "answer"):
        with pytest.raises(CourseError, match=r"rows\.jsonl:7: no assistant message"):
            getattr(chat, part)


# --------------------------------------------------------------------------------------------------
# JSONL


@pytest.mark.parametrize("name", ["conversations.jsonl", "heldout.jsonl"])
def test_the_shipped_files_load(name: str) -> None:
    conversations = load_conversations(DATA / name)
    assert len(conversations) >= (800 if name == "conversations.jsonl" else 200)
    assert all(chat.answer for chat in conversations)


def test_the_source_names_file_and_line_and_blank_lines_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD, b"\n", GOOD)
    sources = [chat.source for chat in load_conversations(path)]
    assert sources == [f"{path}:1", f"{path}:3"]


def test_what_only_deserves_a_warning_is_loaded(tmp_path: Path) -> None:
    """A byte order mark, Windows line ends, an unknown field: the conversation itself is whole."""
    crlf = json.dumps({**GOOD, "id": 3}).encode() + b"\r\n"
    path = write(tmp_path / "rows.jsonl", b"\xef\xbb\xbf" + crlf, crlf)
    assert [chat.answer for chat in load_conversations(path)] == ["a", "a"]


def test_the_first_broken_row_stops_with_its_line(tmp_path: Path) -> None:
    bot = {"messages": [{"role": "user", "content": "q"}, {"role": "bot", "content": "a"}]}
    path = write(tmp_path / "rows.jsonl", GOOD, bot, {})
    with pytest.raises(CourseError) as error:
        load_conversations(path)
    sentence = "rows.jsonl:2: role 'bot' is unknown; use system, user or assistant"
    assert str(error.value) == f"{tmp_path}/{sentence}"


def test_a_json_null_row_is_refused_even_with_a_warning_beside_it(tmp_path: Path) -> None:
    """It once passed for a blank line, because the line end was the only fault of its bytes."""
    path = write(tmp_path / "rows.jsonl", GOOD, b"null\r\n")
    with pytest.raises(CourseError, match=r":2: the row is null, not an object"):
        load_conversations(path)


def test_a_limit_reads_no_further(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD, GOOD, b"this is not JSON\n")
    assert len(load_conversations(path, limit=2)) == 2
    assert load_conversations(path, limit=0) == []


def test_rows_are_read_one_at_a_time(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD, GOOD, b"this is not JSON\n")
    assert len(list(itertools.islice(iter_conversations(path), 2))) == 2


def test_a_line_without_end_does_not_fill_the_memory(tmp_path: Path) -> None:
    """Three times the limit in one line: the row is refused, the next one has its right number."""
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.write(b'{"messages": "')
        for _ in range(3):
            file.write(b"x" * MAX_LINE_BYTES)
        file.write(b'"}\n')
    with pytest.raises(CourseError, match=r":1: longer than 8 MiB; split the conversation"):
        load_conversations(path)


@pytest.mark.parametrize("content", [b"", b"\n \n\r\n"])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path / "rows.jsonl", content)
    with pytest.raises(CourseError, match=r":1: there is no row in it; give one conversation"):
        load_conversations(path)


def test_a_missing_file_and_a_folder_get_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CourseError, match="No such file or directory; give a JSONL"):
        load_conversations(tmp_path / "rows.jsonl")
    with pytest.raises(CourseError, match=r"Is a directory; .* use dataset_type huggingface"):
        load_conversations(tmp_path)


def test_an_unknown_dataset_type_names_the_choices() -> None:
    with pytest.raises(CourseError, match="'csv' is unknown; use jsonl or huggingface"):
        load_conversations("rows.csv", "csv")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("data/rows.jsonl", "jsonl"),
        ("rows.json", "huggingface"),
        ("rows.parquet", "huggingface"),
        ("folder", "huggingface"),
        ("owner/name", "huggingface"),
    ],
)
def test_the_kind_of_a_source_is_seen_from_its_name(name: str, expected: str) -> None:
    assert dataset_type_of(name) == expected


content = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")).filter(
    str.strip
)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(content, min_size=1, max_size=3), min_size=1, max_size=4), st.booleans())
def test_what_json_dumps_writes_is_loaded_unchanged(tmp_path_factory, rows, ascii_only) -> None:
    """Line separators of Unicode (U+2028, NEL) inside a text end no row."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    chats = [
        [turn for text in texts for turn in (Message("user", text), Message("assistant", text))]
        for texts in rows
    ]
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for chat in chats:
            row = {"messages": [{"role": m.role, "content": m.content} for m in chat]}
            file.write(json.dumps(row, ensure_ascii=ascii_only) + "\n")
    assert [list(chat.messages) for chat in load_conversations(path)] == chats


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=60))
def test_no_bytes_do_anything_but_load_or_be_refused_in_a_sentence(tmp_path_factory, raw) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_bytes(raw)
    with pytest.raises(CourseError) as error:
        load_conversations(path)  # 60 random bytes hold no conversation
    assert "\n" not in str(error.value)
    str(error.value).encode("utf-8")  # it can be printed


# --------------------------------------------------------------------------------------------------
# Hugging Face datasets


@pytest.fixture
def dataset():
    import datasets

    datasets.disable_progress_bars()
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"q{i}"},
                {"role": "assistant", "content": f"a{i}"},
            ],
            "prompt_id": i,
        }
        for i in range(3)
    ]
    yield datasets.Dataset.from_list(rows)
    datasets.enable_progress_bars()


@pytest.mark.parametrize("kind", ["parquet", "json lines", "json list", "folder", "disk", "splits"])
def test_every_kind_of_local_dataset_comes_through_the_same_door(
    tmp_path: Path, dataset, kind: str
) -> None:
    import datasets

    path = {
        "parquet": tmp_path / "rows.parquet",
        "json lines": tmp_path / "rows.jsonl",
        "json list": tmp_path / "rows.json",
    }.get(kind, tmp_path / "rows")
    if kind == "parquet":
        dataset.to_parquet(path)
    elif kind == "json lines":
        dataset.to_json(path)
    elif kind == "json list":
        path.write_text(json.dumps(dataset.to_list()))
    elif kind == "folder":
        path.mkdir()
        dataset.to_parquet(path / "train.parquet")
    elif kind == "disk":
        dataset.save_to_disk(path)
    else:
        datasets.DatasetDict(train=dataset, test=dataset.select([2])).save_to_disk(path)
    conversations = load_conversations(path, "huggingface")
    assert [chat.answer for chat in conversations] == ["a0", "a1", "a2"]
    assert conversations[1].source == f"{path}:2"
    assert len(load_conversations(path, "huggingface", limit=2)) == 2
    if kind == "splits":
        [heldout] = load_conversations(f"{path}:test", "huggingface")
        assert heldout.answer == "a2"


def test_columns_that_some_rows_leave_empty_are_no_fault(tmp_path: Path) -> None:
    """Arrow gives every message the same fields; in most rows `name` is null."""
    import datasets

    named = [{"role": "user", "content": "q", "name": "Ada"}, {"role": "assistant", "content": "a"}]
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list([{"messages": named}, GOOD]).to_parquet(path)
    assert [chat.answer for chat in load_conversations(path, "huggingface")] == ["a", "a"]


def test_a_dataset_without_messages_says_what_it_has(tmp_path: Path) -> None:
    import datasets

    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(path)
    with pytest.raises(CourseError, match=r":1: no field 'messages' \(fields: 'text'\); write "):
        load_conversations(path, "huggingface")


def test_a_dataset_with_a_broken_row_names_the_row(tmp_path: Path) -> None:
    import datasets

    bad = {"messages": [{"role": "user", "content": "q"}]}
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list([GOOD, bad]).to_parquet(path)
    with pytest.raises(CourseError, match=r"rows\.parquet:2: no assistant message"):
        load_conversations(path, "huggingface")


@pytest.mark.parametrize("name", ["owner/name", "owner/name:test", "name"])
def test_a_hub_name_without_a_network_gets_one_sentence(name: str) -> None:
    """conftest sets HF_HUB_OFFLINE."""
    sentence = "cannot be opened as a dataset .*; check the name; without a network give a local"
    with pytest.raises(CourseError, match=sentence):
        load_conversations(name, "huggingface")


def test_files_that_are_no_dataset_get_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.txt").write_text("hello")
    (tmp_path / "rows.parquet").write_bytes(b"nonsense")
    for name, sentence in {
        "empty": "doesn't contain any data files",
        "rows.txt": "a .txt file is not known; use .jsonl, .json or .parquet",
        "rows.parquet": "cannot be opened as a dataset",
    }.items():
        with pytest.raises(CourseError, match=sentence):
            load_conversations(tmp_path / name, "huggingface")


def test_a_file_of_another_kind_is_told_once_and_a_folder_may_have_a_colon(tmp_path, dataset):
    (tmp_path / "rows.txt").write_text("hello")
    with pytest.raises(CourseError) as caught:
        load_conversations(tmp_path / "rows.txt", "huggingface")
    assert str(caught.value).startswith(f"{tmp_path}/rows.txt: a .txt file is not known; use ")
    folder = tmp_path / "monday:1"
    folder.mkdir()
    dataset.to_parquet(folder / "train.parquet")
    assert len(load_conversations(folder, "huggingface")) == 3
