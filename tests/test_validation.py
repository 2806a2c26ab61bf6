"""Claims about course_lib.validation and faults: every planted fault at its line, and no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from broken_rows import ELSEWHERE, broken_file, faults_by_line, planted
from chat_templates import COURSE, FAMILIES, byte_tokenizer

import course_lib.validation
from course_lib.errors import CourseError
from course_lib.faults import KINDS, MAX_LINE_BYTES, decode_line, is_text, row_faults
from course_lib.validation import validate_file

DATA = Path(__file__).resolve().parent.parent / "data"
BROKEN, HELDOUT = DATA / "broken.jsonl", DATA / "heldout.jsonl"
TOKENIZER = byte_tokenizer(COURSE)


def row(question: str = "q", answer: str = "a", **more: Any) -> bytes:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages, **more}).encode() + b"\n"


def write(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"".join(lines))
    return path


def found(path: Path, **options: Any) -> list[tuple[int, str]]:
    return sorted((fault.line, fault.kind) for fault in validate_file(path, **options).faults)


# --------------------------------------------------------------------------------------------------
# data/broken.jsonl


def test_the_committed_file_is_the_one_that_the_table_makes() -> None:
    assert BROKEN.read_bytes() == broken_file(), "run: python tests/broken_rows.py"


def test_every_kind_of_fault_is_planted_somewhere() -> None:
    in_the_file = {kind for _, kind in faults_by_line()}
    assert in_the_file | ELSEWHERE == set(KINDS)
    assert not in_the_file & ELSEWHERE


def test_every_planted_fault_is_named_at_its_line_and_nothing_else_is() -> None:
    options = {"tokenizer": TOKENIZER, "max_length": 1024, "against": HELDOUT}
    assert found(BROKEN, **options) == faults_by_line()


def test_without_a_tokenizer_and_a_heldout_file_the_rest_is_still_found() -> None:
    need_more = ("control_token", "too_long", "leakage")
    assert found(BROKEN) == [one for one in faults_by_line() if one[1] not in need_more]


@pytest.mark.parametrize("line", [n for n, (_, kinds) in enumerate(planted(), 1) if kinds])
def test_a_planted_row_shows_its_fault_alone_in_a_file_too(tmp_path: Path, line: int) -> None:
    """What a row before it did must not be why it is found. (A repeat needs its first row.)"""
    raw, kinds = planted()[line - 1]
    needs_others = {"duplicate_row", "leakage", "control_token", "too_long"}
    expected = sorted((2, kind) for kind in kinds if kind not in needs_others)
    raw = raw if raw.endswith(b"\n") else raw + b"\n"
    path = write(tmp_path / "rows.jsonl", row("first", "row"), raw)
    assert found(path) == expected


def test_the_shipped_conversations_are_clean() -> None:
    for name in ("conversations.jsonl", "heldout.jsonl"):
        report = validate_file(DATA / name, TOKENIZER, 1024)
        assert report.ok and report.faults == [], str(report)


# --------------------------------------------------------------------------------------------------
# The file as a whole


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "empty_file"),
        ('{"messages": []}\n'.encode("utf-16"), "utf16"),
        (b'[{"messages": []}]\n', "not_jsonl"),
        (b'[\n  {"messages": []}\n]\n', "not_jsonl"),
        (b'{\n  "messages": [\n  ]\n}\n', "not_jsonl"),
    ],
)
def test_a_file_of_another_kind_gets_one_fault_and_no_noise(
    tmp_path: Path, content: bytes, kind: str
) -> None:
    path = write(tmp_path / "rows.jsonl", content)
    assert found(path) == [(1, kind)]


def test_blank_lines_alone_are_an_empty_file(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", b"\n", b"  \n")
    assert found(path) == [(1, "blank_line"), (1, "empty_file"), (2, "blank_line")]


def test_a_huge_line_is_named_and_the_rows_after_it_keep_their_numbers(tmp_path: Path) -> None:
    huge = b'{"messages": "' + b"x" * (2 * MAX_LINE_BYTES) + b'"}\n'
    exact = b" " * (MAX_LINE_BYTES - len(row())) + row()  # at the limit, still read
    path = write(tmp_path / "rows.jsonl", row("1"), huge, exact, row(""), huge)
    assert found(path) == [(2, "huge_line"), (4, "empty_content"), (5, "huge_line")]


def test_the_field_that_stands_there_twice_is_named() -> None:
    _, (found,) = decode_line(b'{"a": 1, "b": 2, "c": 3, "b": 4}', 1)
    assert (found.kind, found.finding) == ("duplicate_key", "the field 'b' stands there twice")


@pytest.mark.parametrize(
    ("raw", "finding"),
    [
        (b"ab\0c", "NUL at byte 3"),
        (b"a\xff", "byte 2 (0xff) is not UTF-8"),
        (b"\xff\xfea", "byte 1 (0xff) is not UTF-8"),  # UTF-16's mark, but not where one stands
        (b'{"a" 1}', "not JSON: Expecting ':' delimiter at column 6"),
    ],
)
def test_places_within_a_line_are_counted_from_one(raw: bytes, finding: str) -> None:
    value, found = decode_line(raw, 2)
    assert (value, [each.finding for each in found]) == (None, [finding])


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (None, "null"),
        ([], "a list"),
        ("x", "a string"),
        (True, "a boolean"),
        (1, "a number"),
        (0.5, "a number"),
    ],
)
def test_a_row_of_another_kind_is_called_by_its_name_in_json(row: object, kind: str) -> None:
    assert [each.finding for each in row_faults(row, 1)] == [f"the row is {kind}, not an object"]
    found = row_faults({"messages": [{"role": "user", "content": {}}]}, 1)
    assert found[0].finding == "message 1: content is an object, not a string"


def test_half_a_character_is_no_text() -> None:
    assert [is_text(each) for each in ("", "\u00e9\U0001f600", "a\ud800")] == [True, True, False]


def test_a_system_message_stands_between_nobody() -> None:
    roles = ("system", "user", "system", "user", "assistant")
    row = {"messages": [{"role": role, "content": "x"} for role in roles]}
    assert [(each.kind, each.finding) for each in row_faults(row, 1)] == [
        ("system_not_first", "message 3 is a system message"),
        ("same_role_twice", "message 4 is a second user message in a row"),
    ]


def test_numbers_and_nesting_beyond_the_json_reader_are_faults_not_crashes(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.jsonl",
        b'{"messages": ' + b"9" * 5000 + b"}\n",
        b'{"messages": ' + b"[" * 100_000 + b"\n",
        b'{"messages": ' + b"[" * 500 + b"]" * 500 + b"}\n",
    )
    assert found(path) == [(1, "not_json"), (2, "not_json"), (3, "wrong_type")]


def test_a_row_that_the_template_refuses_says_why(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    path = write(tmp_path / "rows.jsonl", json.dumps({"messages": messages}).encode())
    report = validate_file(path, byte_tokenizer(FAMILIES["gemma"]))
    assert [fault.kind for fault in report.faults] == ["assistant_first", "not_renderable"]
    sentence = "the chat template refuses the messages (turns must alternate); change the messages"
    assert f"rows.jsonl:1: {sentence}" in str(report)


def test_validation_changes_neither_the_file_nor_its_date(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", broken_file())
    os.utime(path, ns=(10**18, 10**18))
    path.chmod(0o444)
    before = path.stat()
    validate_file(path, TOKENIZER, 1024)
    after = path.stat()
    assert path.read_bytes() == broken_file()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_file_is_an_error_of_the_call(tmp_path: Path) -> None:
    with pytest.raises(CourseError, match="No such file"):
        validate_file(tmp_path / "rows.jsonl")
    path = write(tmp_path / "rows.jsonl", row())
    with pytest.raises(CourseError, match="No such file"):
        validate_file(path, against=tmp_path / "heldout.jsonl")
    with pytest.raises(CourseError, match="max_length: tokens need a tokenizer"):
        validate_file(path, max_length=100)


# --------------------------------------------------------------------------------------------------
# Repeats


def test_a_duplicate_is_the_same_conversation_however_its_json_is_spelt(tmp_path: Path) -> None:
    plain = row("é", "a")
    other = '{"messages": [{"content": "é", "role": "user"},{"content":"a","role":"assistant"}]}\n'
    path = write(tmp_path / "rows.jsonl", plain, row("x", "a"), other.encode(), row("é", "b"))
    report = validate_file(path)
    assert [(fault.line, fault.kind) for fault in report.faults] == [(3, "duplicate_row")]
    assert report.faults[0].finding == "the same conversation as in line 1"
    assert report.ok  # a warning


def test_leakage_is_the_same_question_whatever_its_answer_case_or_system_message(
    tmp_path: Path,
) -> None:
    heldout = write(
        tmp_path / "heldout.jsonl", row("other"), row("What is  2 + 2?"), row("what is 2 + 2?")
    )
    system = {"role": "system", "content": "Be brief."}
    leaked = json.loads(row("what is 2 + 2?", "Four."))["messages"]
    with_system = json.dumps({"messages": [system, *leaked]}).encode() + b"\n"
    path = write(tmp_path / "rows.jsonl", row("What is 2 + 3?", "5"), with_system)
    report = validate_file(path, against=heldout)
    assert [(fault.line, fault.kind) for fault in report.faults] == [(2, "leakage")]
    assert report.faults[0].finding == f"its prompt also stands in {heldout}:2"
    assert not report.ok


def test_an_earlier_turn_of_a_long_talk_is_part_of_its_question(tmp_path: Path) -> None:
    def talk(first: str) -> bytes:
        contents = [("user", first), ("assistant", "a"), ("user", "why?"), ("assistant", "so")]
        messages = [{"role": role, "content": content} for role, content in contents]
        return json.dumps({"messages": messages}).encode() + b"\n"

    heldout = write(tmp_path / "heldout.jsonl", talk("one"))
    path = write(tmp_path / "rows.jsonl", talk("two"), talk("one"))
    assert found(path, against=heldout) == [(2, "leakage")]


def test_rows_that_are_broken_in_the_heldout_file_do_not_matter_here(tmp_path: Path) -> None:
    heldout = write(tmp_path / "heldout.jsonl", b"nonsense\n", row("q", "a"))
    path = write(tmp_path / "rows.jsonl", row("q", "b"))
    assert found(path, against=heldout) == [(1, "leakage")]


def test_a_prompt_with_its_answer_is_a_heldout_row_too(tmp_path: Path) -> None:
    asked = b'{"prompt": "q", "answer": 1}\n'
    talk = b'{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "r"}]}\n'
    heldout = write(tmp_path / "heldout.jsonl", asked, talk)
    path = write(tmp_path / "rows.jsonl", row("q", "a"), row("r", "a"), row("s", "a"))
    assert found(path, against=heldout) == [(1, "leakage"), (2, "leakage")]


@pytest.mark.parametrize(
    "raw", [b"", b"\n", b"\xff\xfe\x00junk\n", b'{"question": "q"}\n', b'{"prompt": 5}\n', b"[]\n"]
)
def test_a_heldout_file_of_which_nothing_was_read_is_no_proof(tmp_path: Path, raw: bytes) -> None:
    heldout = write(tmp_path / "heldout.jsonl", raw)
    path = write(tmp_path / "rows.jsonl", row("q", "a"))
    with pytest.raises(CourseError, match=r"heldout\.jsonl: holds no prompt"):
        validate_file(path, against=heldout)


# --------------------------------------------------------------------------------------------------
# The report


def test_every_fault_is_a_line_of_file_line_finding_remedy() -> None:
    report = validate_file(BROKEN)
    text = str(report)
    for fault in report.faults:
        assert f"{BROKEN}:{fault.line}: {fault.finding}; {fault.remedy}" in text.splitlines()
    assert f"{BROKEN}:29: role 'bot' is unknown; use system, user or assistant" in text


def test_no_finding_or_remedy_breaks_the_line_or_the_sentence() -> None:
    """One place, one finding, one remedy: the first semicolon stands between the last two."""
    for fault in validate_file(BROKEN, TOKENIZER, 1024, HELDOUT).faults:
        assert "\n" not in fault.finding + fault.remedy
        assert ";" not in fault.finding
        assert ";" not in fault.remedy


def test_a_value_of_any_size_is_quoted_short_and_printable(tmp_path: Path) -> None:
    role = "\x1b[31m\ud83d\n" + "x" * 100_000
    messages = [{"role": role, "content": "q"}]
    path = write(tmp_path / "rows.jsonl", json.dumps({"messages": messages}).encode())
    [fault] = validate_file(path).faults
    assert len(fault.finding) < 80 and fault.finding.isprintable()


def test_one_is_singular(tmp_path: Path) -> None:
    text = str(validate_file(write(tmp_path / "rows.jsonl", row(), b"nonsense\n")))
    assert "rows.jsonl: 1 error, 0 warnings, not fit to train on" in text
    assert "2 rows, 1 conversation among them" in text


def test_the_summary_counts_rows_roles_turns_and_tokens(tmp_path: Path) -> None:
    """`<|user|>` q `<|end|>` `<|assistant|>` a `<|end|>`: 4 special tokens and one per letter."""
    path = write(tmp_path / "rows.jsonl", row("q", "a"), b"\n", row("qq", "aa"), row("q" * 60, "a"))
    report = validate_file(path, TOKENIZER)
    assert (report.rows, report.conversations) == (3, 3)
    assert report.roles == {"user": 3, "assistant": 3}
    assert report.turns == {2: 3}
    assert report.lengths == {8: 2, 128: 1}  # 6, 8 and 65 tokens: buckets 5-8 and 65-128
    assert report.longest == (65, 4)
    text = str(report)
    assert "tokens per conversation\n     5-8        2 " in text
    assert "  65-128        1 ###" in text
    assert "longest: 65 in line 4" in text


def test_without_a_tokenizer_lengths_are_characters(tmp_path: Path) -> None:
    report = validate_file(write(tmp_path / "rows.jsonl", row("12345", "678")))
    assert report.lengths == {8: 1} and report.longest == (8, 1)
    assert "characters per conversation" in str(report)


def test_ok_means_no_error_and_the_verdict_says_so(tmp_path: Path) -> None:
    warned = validate_file(write(tmp_path / "rows.jsonl", row(), row()))
    assert (warned.ok, warned.errors, warned.warnings) == (True, 0, 1)
    assert "0 errors, 1 warning, fit to train on" in str(warned)
    broken = validate_file(write(tmp_path / "rows.jsonl", row(), row(""), row()))
    assert (broken.ok, broken.errors, broken.warnings) == (False, 1, 1)
    assert "1 error, 1 warning, not fit to train on" in str(broken)


def test_the_report_needs_no_more_than_ascii(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", row("é" * 40, "a"), row("q", "a", **{"ключ": 1}))
    str(validate_file(path, TOKENIZER)).replace("ключ", "").encode("ascii")


def test_a_flood_of_faults_is_counted_but_not_kept(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(course_lib.validation, "KEPT_PER_KIND", 3)
    path = write(tmp_path / "rows.jsonl", *[b"nonsense\n"] * 10, b"\n")
    report = validate_file(path)
    assert (report.errors, report.warnings) == (10, 1)
    assert [fault.line for fault in report.faults] == [1, 2, 3, 11]
    assert "... and 7 more of the kind not_json" in str(report)


def test_beyond_the_remembered_rows_the_report_admits_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(course_lib.validation, "REMEMBERED_ROWS", 3)
    rows = [row(str(n)) for n in range(5)]
    few = validate_file(write(tmp_path / "rows.jsonl", *rows[:3], rows[0]))
    assert few.all_remembered and few.counts == {"duplicate_row": 1}
    many = validate_file(write(tmp_path / "rows.jsonl", *rows, rows[4], rows[0]))
    assert many.counts == {"duplicate_row": 1}  # row 0 was remembered, row 4 was not
    assert "repeats were looked for among the first 3 rows only" in str(many)


def test_beyond_the_remembered_heldout_rows_the_report_admits_it_too(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(course_lib.validation, "REMEMBERED_ROWS", 3)
    heldout = write(tmp_path / "heldout.jsonl", *[row(str(n)) for n in range(4)])
    path = write(tmp_path / "rows.jsonl", row("another"))
    assert not validate_file(path, against=heldout).all_remembered


def test_a_dataset_is_validated_by_the_same_rules(tmp_path: Path) -> None:
    import datasets

    rows = [json.loads(line) for line in (row("1"), row(""), row("1"))]
    rows[0]["messages"][0]["name"] = None  # Arrow fills the gaps of other rows with nulls
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list([{**one, "id": 7} for one in rows]).to_parquet(path)
    assert found(path) == [(2, "empty_content"), (3, "duplicate_row")]


# --------------------------------------------------------------------------------------------------
# Memory


def peak_mib(path: Path) -> float:
    """The largest memory of a process that validates `path`, in MiB."""
    code = (
        "import resource, sys; from course_lib.validation import validate_file\n"
        "validate_file(sys.argv[1])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return int(done.stdout) / (2**20 if sys.platform == "darwin" else 2**10)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no resource module")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """200 kB and 20 MB in rows of 20 kB, all of them different and every tenth broken.

    A reader that kept the rows would need 20 MB more; the hashes of 1,000 rows are 0.1 MB.
    """
    long = "x" * 20_000
    lines = [row(f"{n} {long}") if n % 10 else b"nonsense\n" for n in range(1000)]
    small = write(tmp_path / "small.jsonl", *lines[:10])
    large = write(tmp_path / "large.jsonl", *lines)
    assert large.stat().st_size > 17e6
    assert peak_mib(large) - peak_mib(small) < 5
