"""Who decodes? One thread that runs the engine's sampler for every caller at once.

The sampler is the one that training samples from; here it always has the same weights, the merged
model's own. A request joins the running batch at the next token.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from course_lib.chat_text import encode
from course_lib.conversations import Message
from course_lib.engine.model import BaseModel
from course_lib.engine.requests import SampleRequest
from course_lib.engine.sampler import Sampler
from course_lib.export.versions import model_folder
from course_lib.rendering import parse_completion, render_prompt, stop_token_ids

log = logging.getLogger("posttrain.serve")


class Stopping(Exception):
    """The server is going down and takes nothing new."""


class ServedModel:
    """A model, its tokenizer, and the thread that decodes for everyone."""

    def __init__(self, base: BaseModel, name: str) -> None:
        self.base, self.name = base, name
        self.tokenizer = base.tokenizer
        self.stop_ids = stop_token_ids(base.tokenizer)
        self._sampler = Sampler(base)
        self._weights = base.sampler_weights(None)
        self._wake = threading.Condition()
        self._stopping = False
        self._came = False  # a request, since the thread last looked
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        self._thread.start()

    @classmethod
    def load(cls, folder: str | Path, name: str | None = None) -> ServedModel:
        """Load a deploy folder's current model, or a model folder; its name is the folder's own."""
        place = model_folder(folder)
        return cls(
            BaseModel.load(str(place), name or model_name(folder)), name or model_name(folder)
        )

    def render(self, messages: list[Message]) -> list[int]:
        """A chat as the model was trained to see it, up to the answer's header."""
        return render_prompt(messages, self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """A plain text's tokens, nothing added."""
        return encode(text, self.tokenizer)

    def answer(self, messages: list[Message], max_tokens: int) -> str:
        """The likeliest answer to a chat, waited for."""
        prompt = self.render(messages)
        room = self.base.context_length - len(prompt)
        tokens = np.array(prompt, dtype=np.int64)
        wanted = SampleRequest(tokens, 1, min(max_tokens, room), 0.0, stop=self.stop_ids)
        sequence = self.submit(wanted).result().sequences[0]
        return parse_completion(sequence.tokens, self.tokenizer)

    def submit(self, request: SampleRequest) -> Future:
        """Queue a request; raises Stopping once `stop` was called."""
        with self._wake:
            if self._stopping:
                raise Stopping
            future = self._sampler.submit(request, self._weights)
            self._came = True
            self._wake.notify()
        return future

    def stop(self, timeout_s: float = 60) -> None:
        """Take nothing new, finish what is running, end the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            try:
                while self._sampler.step():
                    pass
            except Exception:  # the callers get 500; the server goes on
                log.exception("decoding failed; what was running is dropped")
                self._sampler.reset()
            with self._wake:
                if self._came:  # something, in between
                    self._came = False
                    continue
                if self._stopping:
                    return
                self._wake.wait()


def model_name(folder: str | Path) -> str:
    """The name under which a folder is served: its own, not `model` or `v3`."""
    path = Path(folder).resolve()
    while path.name in ("model", "") or (path.name[:1] == "v" and path.name[1:].isdigit()):
        path = path.parent
    return path.name
