"""Tokens, one at a time -> text that may be shown already.

Two things hold text back. A character may be spread over several tokens (byte-level BPE cuts an
emoji in four), and the end of the text may be the beginning of a stop text. What has been given out
is never taken back, and all of it together is the text of all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

UNFINISHED = "\ufffd"  # what decoders put in place of bytes that are no character (yet)


@dataclass
class Detokenizer:
    """Text of a growing list of tokens, decoding only a short window at its end each time.

    The window starts where the text last ended on a whole character, one step further back, so that
    a tokenizer which treats the first token specially (a leading space) sees the same start twice.
    """

    tokenizer: Any
    tokens: list[int] = field(default_factory=list)
    start: int = 0  # the window's first token
    given: int = 0  # tokens whose text has been given out

    def add(self, token: int) -> str:
        """The new text that this token completes; empty while a character is unfinished."""
        self.tokens.append(token)
        before, now = self._text(self.given), self._text(len(self.tokens))
        if now.endswith(UNFINISHED):
            return ""
        self.start, self.given = self.given, len(self.tokens)
        return now[len(before) :]

    def rest(self) -> str:
        """What is left when no token follows: unfinished bytes, shown as the decoder shows them."""
        text = self._text(len(self.tokens))[len(self._text(self.given)) :]
        self.start = self.given = len(self.tokens)
        return text

    def _text(self, end: int) -> str:
        return self.tokenizer.decode(
            self.tokens[self.start : end],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )


@dataclass
class StopFinder:
    """Gives text on until one of `stops` appears; that one and what follows is not given."""

    stops: tuple[str, ...]
    held: str = ""
    found: bool = False

    def add(self, text: str) -> str:
        self.held += text
        places = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        if places:
            self.found = True
            return self._give(min(places))
        return self._give(len(self.held) - self._doubtful())

    def rest(self) -> str:
        """What was held back for a stop text that did not come."""
        return "" if self.found else self._give(len(self.held))

    def _give(self, count: int) -> str:
        text, self.held = self.held[:count], self.held[count:]
        return text

    def _doubtful(self) -> int:
        """Length of the longest end of the text that begins a stop text."""
        longest = max((len(stop) - 1 for stop in self.stops), default=0)
        for length in range(min(longest, len(self.held)), 0, -1):
            if any(stop.startswith(self.held[-length:]) for stop in self.stops):
                return length
        return 0
