"""The faults planted in data/broken.jsonl: one table makes the file, and the tests judge by it.

    python tests/broken_rows.py     writes the file again

Good rows stand between the broken ones, so that a validator which loses its place is found out. Not
in the file, because they spoil a whole file or need another tokenizer: `empty_file`, `utf16`,
`not_jsonl`, `huge_line` (8 MiB) and `not_renderable`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent.parent / "data"
ELSEWHERE = {"empty_file", "utf16", "not_jsonl", "huge_line", "not_renderable"}


def row(*contents: str, **more: Any) -> bytes:
    """A row in which user and assistant take turns."""
    roles = ("user", "assistant")
    return chat(*[(roles[i % 2], content) for i, content in enumerate(contents)], **more)


def chat(*turns: tuple[str, str], **more: Any) -> bytes:
    """A row of (role, content) pairs."""
    return dump({"messages": [{"role": r, "content": c} for r, c in turns], **more})


def dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def leaked_prompt() -> str:
    """A question of the shipped held-out file."""
    with (DATA / "heldout.jsonl").open(encoding="utf-8") as file:
        rows = (json.loads(line)["messages"] for line in file)
        return next(
            row[0]["content"] for row in rows if [m["role"] for m in row][1:] == ["assistant"]
        )


def planted() -> list[tuple[bytes, tuple[str, ...]]]:
    """(line, kinds of its faults), in the order of the file; () is a good row."""
    good = (row("What is 2 + 3 + 4?", f"The answer is {n}.") for n in range(9, 99))
    ok = {"role": "user", "content": "Where is the mill?"}
    answer = {"role": "assistant", "content": "By the river."}
    return [
        # bytes
        (b"\xef\xbb\xbf" + next(good) + b"\n", ("bom",)),
        (next(good) + b"\r\n", ("crlf",)),
        (b"\n", ("blank_line",)),
        (row("Where is the mill?", "By the \0 river.").replace(b"\\u0000", b"\0"), ("nul",)),
        (row("Who reads this?", "Nobody\0."), ("nul",)),
        (row("Wo ist die Mühle?", "Am Fluß.").decode().encode("latin-1"), ("bad_utf8",)),
        (next(good), ()),
        # JSON
        (row("Is this a comma?", "Yes.")[:-2] + b",]}", ("trailing_comma",)),
        (row("Is this one, too?", "Yes.") + b",", ("trailing_comma",)),
        (b'{"messages": [], "messages": []}', ("duplicate_key",)),
        (str({"messages": [ok, answer]}).encode(), ("not_json",)),  # Python, with single quotes
        (row("Is a torn line JSON?", "No, it is")[:-12], ("not_json",)),
        (row("Two rows in a line?", "No.") + b" " + row("Why?", "No."), ("not_json",)),
        (b'{"messages": NaN}', ("not_json",)),
        (next(good), ()),
        # fields and types
        (dump({"prompt": "Where is the mill?", "completion": "By the river."}), ("missing_field",)),
        (dump({"messages": [ok, {"role": "assistant"}]}), ("missing_field",)),
        (dump({"messages": [{"content": "Who?"}, answer]}), ("missing_field",)),
        (dump([ok, answer]), ("wrong_type",)),
        (dump({"messages": {"role": "user"}}), ("wrong_type",)),
        (dump({"messages": [ok, {"role": "assistant", "content": None}]}), ("wrong_type",)),
        (dump({"messages": [ok, {"role": "assistant", "content": ["a"]}]}), ("wrong_type",)),
        (dump({"messages": [ok, "By the river."]}), ("wrong_type",)),
        (b"null", ("wrong_type",)),
        (row("Who wrote this?", "Ada.", author="Ada"), ("extra_field",)),
        (dump({"messages": [ok, {**answer, "content": "It is.", "weight": 1}]}), ("extra_field",)),
        (dump({"messages": []}), ("no_messages",)),
        (next(good), ()),
        # roles and content
        (chat(("user", "Who are you?"), ("bot", "A bot.")), ("unknown_role",)),
        (chat(("User", "Who are you?"), ("assistant", "A model.")), ("unknown_role",)),
        (row("Is there anything here?", " \n"), ("empty_content",)),
        (b'{"messages": [{"role": "user", "content": "half a smile \\ud83d"}, '
         b'{"role": "assistant", "content": "Yes."}]}', ("lone_surrogate",)),
        (row("Is this caf\ufffd?", "It was."), ("replacement_character",)),
        (next(good), ()),
        # order
        (chat(("user", "Hello."), ("system", "Be brief."), ("assistant", "Hi.")),
         ("system_not_first",)),
        (chat(("user", "One."), ("user", "Two."), ("assistant", "Three.")), ("same_role_twice",)),
        (chat(("user", "One."), ("assistant", "Two."), ("user", "Three."), ("user", "Four.")),
         ("same_role_twice", "last_not_assistant")),
        (chat(("user", "Is anybody there?")), ("no_assistant",)),
        (chat(("system", "Be brief."), ("assistant", "Hi.")), ("no_user",)),
        (chat(("assistant", "Hi."), ("user", "Hello.")), ("last_not_assistant", "no_user")),
        (chat(("assistant", "Hello."), ("user", "Hi."), ("assistant", "How are you?")),
         ("assistant_first",)),
        (row("Hello.", "Hi.", "Bye."), ("last_not_assistant",)),
        (next(good), ()),
        # more than the row
        (row("Which row stands here twice?", "This one."), ()),
        (row("Which row stands here twice?", "This one."), ("duplicate_row",)),
        (row(leaked_prompt(), "I have seen this before."), ("leakage",)),
        (row("Does it end here?", "No.<|end|><|user|>Now?"), ("control_token", "control_token")),
        (row("How long is too long?", "and so on " * 500), ("too_long",)),
        (next(good), ()),
    ]  # fmt: skip


def broken_file() -> bytes:
    """The bytes of data/broken.jsonl."""
    lines = [line for line, _ in planted()]
    return b"".join(line if line.endswith(b"\n") else line + b"\n" for line in lines)


def faults_by_line() -> list[tuple[int, str]]:
    """(line, kind) of every planted fault, sorted."""
    numbered = enumerate(planted(), 1)
    return sorted((line, kind) for line, (_, kinds) in numbered for kind in kinds)


if __name__ == "__main__":
    (DATA / "broken.jsonl").write_bytes(broken_file())
