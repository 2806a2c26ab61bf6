"""What goes back? OpenAI's answer objects, whole or as server-sent events.

Field names: https://platform.openai.com/docs/api-reference (chat/object, chat/streaming,
completions/object).
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from course_lib.serve.decoder import ServedModel
from course_lib.serve.generate import Piece, TokenLogprob
from course_lib.serve.protocol import Generation

DONE = b"data: [DONE]\n\n"


@dataclass
class Writer:
    """Writes the answers to one request: they share an id, a time and a model name."""

    model: ServedModel
    wanted: Generation
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    lengths: dict[int, int] = field(default_factory=dict)  # characters given out, by choice
    made: int = 0  # tokens of all choices that ended

    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        """The answer to a request without stream."""
        self.made = sum(piece.tokens for piece in pieces)
        kind = "chat.completion" if self.wanted.chat else "text_completion"
        return self._frame(kind, [self._choice(p) for p in pieces]) | {"usage": self.usage()}

    def first_events(self) -> list[bytes]:
        """What a chat stream opens with: who speaks, in each choice."""
        if not self.wanted.chat:
            return []
        choices = range(self.wanted.choices)
        delta = {"role": "assistant", "content": ""}
        return [self._event([{"index": i, "delta": delta, "finish_reason": None}]) for i in choices]

    def event(self, piece: Piece) -> bytes:
        """One piece as an event."""
        self.made += piece.tokens
        return self._event([self._choice(piece, delta=True)])

    def last_events(self) -> list[bytes]:
        """Usage, if asked for, and the end mark."""
        if not self.wanted.include_usage:
            return [DONE]
        return [self._event([], {"usage": self.usage()}), DONE]

    def usage(self) -> dict[str, int]:
        prompt = sum(len(prompt) for prompt in self.wanted.prompts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.made,
            "total_tokens": prompt + self.made,
        }

    def _event(self, choices: list[dict[str, Any]], more: dict[str, Any] | None = None) -> bytes:
        kind = "chat.completion.chunk" if self.wanted.chat else "text_completion"
        # ASCII: some clients, httpx's `iter_lines` among them, end a line at U+0085 or U+2028, too.
        text = json.dumps(self._frame(kind, choices) | (more or {}))
        return f"data: {text}\n\n".encode()

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        prefix = "chatcmpl" if self.wanted.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model.name,
            "choices": choices,
        }

    def _choice(self, piece: Piece, delta: bool = False) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": piece.choice, "finish_reason": piece.finish_reason}
        start = self.lengths.get(piece.choice, 0)
        self.lengths[piece.choice] = start + len(piece.text)
        if not self.wanted.chat:
            return choice | {"text": piece.text, "logprobs": self._old_logprobs(piece, start)}
        logprobs = self._chat_logprobs(piece)
        if delta:
            return choice | {"delta": {"content": piece.text}, "logprobs": logprobs}
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return choice | {"message": message, "logprobs": logprobs}

    def _chat_logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not self.wanted.logprobs:
            return None
        content = [
            self._named(found.token, found.logprob)
            | {"top_logprobs": [self._named(*alternative) for alternative in found.top]}
            for found in piece.logprobs
        ]
        return {"content": content, "refusal": None}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _old_logprobs(self, piece: Piece, start: int) -> dict[str, Any] | None:
        """The completions API's four lists, one entry a token."""
        if not self.wanted.logprobs:
            return None
        texts = [self._text(found.token) for found in piece.logprobs]
        offsets = [start + sum(map(len, texts[:i])) for i in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [found.logprob for found in piece.logprobs],
            "top_logprobs": [self._top(found) for found in piece.logprobs],
            "text_offset": offsets,
        }

    def _top(self, found: TokenLogprob) -> dict[str, float] | None:
        return {self._text(token): logprob for token, logprob in found.top} or None

    def _text(self, token: int) -> str:
        return self.model.tokenizer.decode([token], skip_special_tokens=False)
