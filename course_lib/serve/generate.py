"""One request through the decoder: tokens as they are made, turned into pieces of text.

The decoding thread hands every token to the event loop; here each choice's tokens become text, stop
texts are found, and a choice that is finished is told. When the caller is gone the request is
cancelled, and the decoder drops it before its next token.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from course_lib.engine.requests import RequestError, SampledSequence, SampleRequest
from course_lib.serve.decoder import ServedModel, Stopping
from course_lib.serve.protocol import ApiError, Generation
from course_lib.serve.text import Detokenizer, StopFinder


@dataclass(frozen=True)
class TokenLogprob:
    """A token of the answer, its logprob, and its best alternatives with theirs."""

    token: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Piece:
    """Something new in one choice: text, the tokens behind it, and at the end why it ended."""

    choice: int
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None  # "stop" | "length"
    tokens: int = 0  # at the end: how many tokens were made, the stop token included


class Choice:
    """One answer in the making."""

    def __init__(self, index: int, model: ServedModel, wanted: Generation) -> None:
        self.index = index
        self.text = Detokenizer(model.tokenizer)
        self.stops = StopFinder(wanted.stop)
        self.stop_ids = frozenset(model.stop_ids)
        self.made = 0
        self.pending: list[TokenLogprob] = []
        self.done = False

    def add(self, token: int, logprob: float) -> Piece | None:
        """The piece that a new token completes, if it completes one."""
        self.made += 1
        if token in self.stop_ids:
            return self.finish("stop")
        self.pending.append(TokenLogprob(token, logprob))
        text = self.stops.add(self.text.add(token))
        if self.stops.found:
            self.done = True
            return self._piece(text, "stop")
        return self._piece(text) if text else None

    def finish(self, reason: str) -> Piece:
        """The last piece: what was held back, and why it ended."""
        self.done = True
        text = self.stops.add(self.text.rest())
        text += self.stops.rest()
        return self._piece(text, "stop" if self.stops.found else reason)

    def _piece(self, text: str, reason: str | None = None) -> Piece:
        logprobs, self.pending = self.pending, []
        return Piece(self.index, text, logprobs, reason, self.made if reason else 0)


async def generate(
    model: ServedModel, wanted: Generation, results: dict[int, SampledSequence] | None = None
) -> AsyncIterator[Piece]:
    """The pieces of every choice as they come; each choice's last one has a finish_reason.

    `results` receives what the decoder made of each choice, by its index.
    """
    loop = asyncio.get_running_loop()
    events: asyncio.Queue = asyncio.Queue()
    gone = False
    choices = [Choice(i, model, wanted) for i in range(wanted.choices)]

    def tell(*event: object) -> None:
        loop.call_soon_threadsafe(events.put_nowait, event)

    def submit(prompt_index: int) -> Future:
        first = prompt_index * wanted.n
        mine = choices[first : first + wanted.n]
        request = SampleRequest(
            prompt=np.array(wanted.prompts[prompt_index], dtype=np.int64),
            num_samples=wanted.n,
            max_tokens=wanted.max_tokens,
            temperature=wanted.temperature,
            top_p=wanted.top_p,
            seed=None if wanted.seed is None else wanted.seed % 2**62 + first,
            stop=model.stop_ids,
            topk_sample_logprobs=wanted.top_logprobs,
            cancelled=lambda: gone or (not wanted.top_logprobs and all(c.done for c in mine)),
            on_token=lambda sample, token, logprob: tell("token", first + sample, token, logprob),
        )
        future = model.submit(request)
        future.add_done_callback(lambda done: tell("end", first, done))
        return future

    try:
        for index in range(len(wanted.prompts)):
            submit(index)
        running = len(wanted.prompts)
        while running:
            kind, index, *values = await events.get()
            if kind == "token":
                piece = None if choices[index].done else choices[index].add(*values)
                if piece:
                    yield piece
                continue
            running -= 1
            mine, future = choices[index : index + wanted.n], values[0]
            for piece in _ended(mine, future):
                yield piece
            if results is not None and not future.cancelled():
                results.update(enumerate(future.result().sequences, index))
    except Stopping:
        raise ApiError(503, "the server is stopping", code="stopping") from None
    except RequestError as error:
        raise ApiError(400, str(error)) from error
    finally:
        gone = True


def _ended(choices: list[Choice], future: Future) -> list[Piece]:
    """Last pieces of the choices that no stop ended: their tokens ran out."""
    if all(choice.done for choice in choices):
        return []
    if future.cancelled():  # the decoder dropped it after a failure of its own
        raise ApiError(500, "decoding failed; see the server's log", code="decoding_failed")
    if future.exception():
        raise ApiError(500, str(future.exception()), code="decoding_failed")
    return [choice.finish("length") for choice in choices if not choice.done]


async def collect(model: ServedModel, wanted: Generation) -> list[Piece]:
    """Every choice whole, as one piece each."""
    results: dict[int, SampledSequence] = {}
    texts = [""] * wanted.choices
    logprobs: list[list[TokenLogprob]] = [[] for _ in texts]
    last: dict[int, Piece] = {}
    async for piece in generate(model, wanted, results):
        texts[piece.choice] += piece.text
        logprobs[piece.choice] += piece.logprobs
        if piece.finish_reason:
            last[piece.choice] = piece
    for index, sequence in results.items():
        for found, top in zip(logprobs[index], sequence.topk or [], strict=False):
            found.top.extend(top)
    return [
        Piece(i, texts[i], logprobs[i], last[i].finish_reason, last[i].tokens)
        for i in range(wanted.choices)
    ]
