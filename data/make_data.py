"""Write conversations.jsonl, heldout.jsonl and preferences.jsonl again, byte for byte.

python data/make_data.py            # into this folder
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from course_lib.world.dialogues import conversations, preference_pairs

CONVERSATIONS, HELDOUT, PREFERENCES = 2400, 300, 800


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    out = parser.parse_args().out
    train = list(conversations(0, CONVERSATIONS))
    # The village is so small that the same thing is asked on both sides: drop what training asks.
    asked = [row[:-1] for row in train]
    drawn = conversations(1, 6 * HELDOUT, heldout=True)
    heldout = [row for row in drawn if row[:-1] not in asked][:HELDOUT]
    write_jsonl(out / "conversations.jsonl", ({"messages": row} for row in train))
    write_jsonl(out / "heldout.jsonl", ({"messages": row} for row in heldout))
    write_jsonl(out / "preferences.jsonl", preference_pairs(0, PREFERENCES))


if __name__ == "__main__":
    main()
