"""What can be wrong with one row of training data? Every kind of fault, and the rules that find it.

Pure functions of bytes and plain JSON values: `conversations` refuses a row by these rules,
`validation` reports a whole file by them. What needs more than one row (duplicates, leakage) or a
tokenizer (too long) is found in `validation`; its kinds stand here, too: the table is complete.

An error stops training; a warning does not, but is worth a look.
"""

from __future__ import annotations

import codecs
import json
import re
from dataclasses import dataclass
from itertools import pairwise
from reprlib import repr as short  # cuts long values, escapes what a terminal cannot show
from typing import Any

from course_lib.errors import CourseError

ROLES = ("system", "user", "assistant")
MAX_LINE_BYTES = 8 * 2**20  # a line is held in memory; no context window needs a longer one
ERROR, WARNING = "error", "warning"

KINDS: dict[str, tuple[str, str]] = {  # kind -> severity, remedy
    # the file
    "empty_file": (ERROR, "give one conversation per line"),
    "utf16": (ERROR, "save the file as UTF-8"),
    "not_jsonl": (ERROR, "write one row per line, or read it with dataset_type huggingface"),
    # the line
    "huge_line": (ERROR, "split the conversation, or delete the line"),
    "bom": (WARNING, "save as UTF-8 without a byte order mark"),
    "crlf": (WARNING, "save with Unix line ends (LF)"),
    "blank_line": (WARNING, "delete the line"),
    "nul": (ERROR, "delete the NUL character"),
    "bad_utf8": (ERROR, "save the file as UTF-8"),
    "trailing_comma": (ERROR, "delete the comma"),
    "duplicate_key": (ERROR, "keep one of the two"),
    "not_json": (ERROR, "write the row with a JSON library, e.g. json.dumps"),
    # the row
    "missing_field": (ERROR, 'write {"messages": [{"role": ..., "content": ...}, ...]}'),
    "wrong_type": (ERROR, 'write {"messages": [{"role": ..., "content": ...}, ...]}'),
    "extra_field": (WARNING, "delete it, or say it in a message: it is ignored"),
    "no_messages": (ERROR, "add the messages, or delete the row"),
    "unknown_role": (ERROR, "use system, user or assistant"),
    "empty_content": (ERROR, "write the text, or delete the message"),
    "lone_surrogate": (ERROR, "write the whole character: it was cut in half"),
    "replacement_character": (WARNING, "look at its source: the text was damaged earlier"),
    # the order of the messages
    "system_not_first": (ERROR, "put the system message first"),
    "same_role_twice": (ERROR, "join the two messages, or add the turn between them"),
    "no_assistant": (ERROR, "add the assistant message that is to be learned"),
    "no_user": (ERROR, "put the question before the answer"),
    "assistant_first": (WARNING, "begin with a user message: some chat templates insist"),
    "last_not_assistant": (WARNING, "add the answer, or delete it: it is not trained on"),
    # more than one row, or a tokenizer
    "duplicate_row": (WARNING, "keep one of the two"),
    "leakage": (ERROR, "delete it here or there: an evaluation must ask what was not trained on"),
    "control_token": (WARNING, "delete it if it is a leftover: it is encoded as text"),
    "not_renderable": (ERROR, "change the row, or the tokenizer's chat template"),
    "too_long": (ERROR, "shorten the conversation, or raise max_length"),
}
STOPS_READING = ("utf16", "not_jsonl")  # every further line would only repeat the complaint
STILL_READABLE = ("bom", "crlf")  # with any other fault of the bytes there is no row to look at


@dataclass(frozen=True)
class Fault:
    """One thing wrong at one line (or row, counted from 1)."""

    line: int
    kind: str
    severity: str
    finding: str
    remedy: str

    def as_error(self, path: str) -> CourseError:
        """The same sentence as an exception: `file:line: finding; remedy`."""
        return CourseError(f"{path}:{self.line}", self.finding, self.remedy)


def fault(line: int, kind: str, finding: str) -> Fault:
    """A `Fault` with the severity and the remedy that its kind has."""
    severity, remedy = KINDS[kind]
    return Fault(line, kind, severity, finding, remedy)


# --------------------------------------------------------------------------------------------------
# bytes -> a JSON value


def decode_line(raw: bytes, line: int) -> tuple[Any, list[Fault]]:
    """The JSON value on one line (None if there is none) and what is wrong with the bytes."""
    if len(raw) > MAX_LINE_BYTES:
        return None, [fault(line, "huge_line", f"longer than {MAX_LINE_BYTES >> 20} MiB")]
    if line == 1 and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return None, [fault(line, "utf16", "the file is UTF-16")]
    faults = []
    if raw.startswith(codecs.BOM_UTF8):
        raw = raw.removeprefix(codecs.BOM_UTF8)
        faults.append(fault(line, "bom", "begins with a byte order mark"))
    if raw.endswith(b"\r\n"):
        faults.append(fault(line, "crlf", "ends in CRLF"))
    if not raw.strip():
        return None, [*faults, fault(line, "blank_line", "the line is blank")]
    if b"\0" in raw:
        where = f"NUL at byte {raw.index(0) + 1}"
        return None, [*faults, fault(line, "nul", where)]
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte {error.start + 1} (0x{raw[error.start]:02x}) is not UTF-8"
        return None, [*faults, fault(line, "bad_utf8", where)]
    row, found = _parse(text.rstrip("\r\n"), line)
    return row, faults + found


class _Refused(ValueError):
    """Python's JSON reader would have let this pass."""

    def __init__(self, kind: str, finding: str) -> None:
        super().__init__(finding)
        self.kind = kind


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Refused("duplicate_key", f"the field {short(twice)} stands there twice")
    return row


def _no_constant(name: str) -> Any:
    raise _Refused("not_json", f"{name} is not JSON")


def _parse(text: str, line: int) -> tuple[Any, list[Fault]]:
    try:
        row = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except _Refused as error:
        return None, [fault(line, error.kind, str(error))]
    except json.JSONDecodeError as error:
        if line == 1 and text.strip() in ("[", "{", "[{"):
            return None, [fault(line, "not_jsonl", "the file is one JSON value over many lines")]
        if _is_trailing_comma(text, error.pos):
            finding = f"a comma with nothing after it, near column {error.pos + 1}"
            return None, [fault(line, "trailing_comma", finding)]
        problem = error.msg.removesuffix(" at")
        return None, [fault(line, "not_json", f"not JSON: {problem} at column {error.pos + 1}")]
    except (ValueError, RecursionError):  # a number of 5,000 digits, a list 5,000 deep
        return None, [fault(line, "not_json", "a number too long, or nested too deep, to be read")]
    if line == 1 and isinstance(row, list) and row and isinstance(row[0], dict):
        return None, [fault(line, "not_jsonl", "the file is one JSON list")]
    return row, []


def _is_trailing_comma(text: str, at: int) -> bool:
    before, after = text[:at].rstrip(), text[at:].lstrip()
    comma_before_bracket = before.endswith(",") and after.startswith(("}", "]"))
    return comma_before_bracket or re.match(r",\s*([}\]]|$)", after) is not None


# --------------------------------------------------------------------------------------------------
# a JSON value -> a conversation?


def row_faults(row: Any, line: int) -> list[Fault]:
    """What keeps `row` from being a conversation, and what is odd about it."""
    if not isinstance(row, dict):
        return [fault(line, "wrong_type", f"the row is {_kind_of(row)}, not an object")]
    if "messages" not in row:
        found = ", ".join(short(name) for name in list(row)[:5]) or "none"
        return [fault(line, "missing_field", f"no field 'messages' (fields: {found})")]
    faults = _extra_fields(row, ("messages",), "", line)
    messages = row["messages"]
    if not isinstance(messages, list):
        return [*faults, fault(line, "wrong_type", f"messages is {_kind_of(messages)}, not a list")]
    if not messages:
        return [*faults, fault(line, "no_messages", "messages is an empty list")]
    for number, message in enumerate(messages, 1):
        faults += _message_faults(message, f"message {number}", line)
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    if all(role in ROLES for role in roles):
        faults += _order_faults(roles, line)
    return faults


def _message_faults(message: Any, place: str, line: int) -> list[Fault]:
    if not isinstance(message, dict):
        return [fault(line, "wrong_type", f"{place} is {_kind_of(message)}, not an object")]
    faults = _extra_fields(message, ("role", "content"), f"{place}: ", line)
    for name in ("role", "content"):
        if name not in message:
            faults.append(fault(line, "missing_field", f"{place} has no {name}"))
        elif not isinstance(message[name], str):
            finding = f"{place}: {name} is {_kind_of(message[name])}, not a string"
            faults.append(fault(line, "wrong_type", finding))
    role, content = message.get("role"), message.get("content")
    if isinstance(role, str) and role not in ROLES:
        # No message number: the role names the place, and the sentence stays short.
        faults.append(fault(line, "unknown_role", f"role {short(role)} is unknown"))
    if isinstance(content, str):
        faults += _content_faults(content, place, line)
    return faults


def is_text(content: str) -> bool:
    """Whether UTF-8 can write it: half a character, e.g. "\\ud800", it cannot."""
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _content_faults(content: str, place: str, line: int) -> list[Fault]:
    faults = []
    if not content.strip():
        faults.append(fault(line, "empty_content", f"{place} is empty"))
    if "\0" in content:
        faults.append(fault(line, "nul", f"{place} holds a NUL character"))
    if "\N{REPLACEMENT CHARACTER}" in content:
        finding = f"{place} holds the replacement character U+FFFD"
        faults.append(fault(line, "replacement_character", finding))
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"U+{ord(content[error.start]):04X}"
        faults.append(fault(line, "lone_surrogate", f"{place} holds half a character ({half})"))
    return faults


def _order_faults(roles: list[Any], line: int) -> list[Fault]:
    faults = []
    talk = [(number, role) for number, role in enumerate(roles, 1) if role != "system"]
    for number, role in enumerate(roles, 1):
        if role == "system" and number > 1:
            finding = f"message {number} is a system message"
            faults.append(fault(line, "system_not_first", finding))
    for (_, role), (number, next_role) in pairwise(talk):
        if role == next_role:
            finding = f"message {number} is a second {role} message in a row"
            faults.append(fault(line, "same_role_twice", finding))
    said = [role for _, role in talk]
    if "assistant" not in said:
        return [*faults, fault(line, "no_assistant", "no assistant message")]
    last_answer = max(index for index, role in enumerate(said) if role == "assistant")
    if "user" not in said[:last_answer]:
        faults.append(fault(line, "no_user", "no user message before the assistant's last"))
    elif said[0] == "assistant":
        faults.append(fault(line, "assistant_first", "the assistant speaks first"))
    if last_answer < len(said) - 1:
        faults.append(fault(line, "last_not_assistant", f"ends with a {roles[-1]} message"))
    return faults


def _extra_fields(
    value: dict[str, Any], known: tuple[str, ...], place: str, line: int
) -> list[Fault]:
    names = [name for name in value if name not in known and value[name] is not None]
    return [fault(line, "extra_field", f"{place}unknown field {short(name)}") for name in names]


def _kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")
