"""Which weights does a sampler use? Sampling sessions, and the shelf that holds their weights.

A sampler names one set of weights: the base model, a checkpoint in the store, or a snapshot taken
from a run in training. The shelf keeps the sets used last in memory. A snapshot that must go is
parked on disk; a checkpoint is simply read again.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from course_lib.engine.limits import Limits
from course_lib.engine.names import shown
from course_lib.engine.requests import NotFoundError, RequestError
from course_lib.engine.runs import Model
from course_lib.engine.tensors import Scratch

if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, "Tensor"]
_REMEMBERED = 16_384  # sample calls whose re-sending is recognised


@dataclass
class SamplingSession:
    """One sampler: the weights it uses, and the clients that have joined it."""

    sampler_id: str
    owner: str
    session_id: str
    model: Model
    model_path: str | None
    weights_key: str | None  # on the shelf; None = the base model
    clients: int = 0  # the last clone id given out; the first client is 0


@dataclass
class Shelved:
    """Weights on the shelf. `read` brings back the tensors once they have left memory."""

    model: Model
    read: Callable[[], State] | None  # None: a snapshot, which is parked on disk when it must go
    weights: Any = None  # model.SamplerWeights, while in memory
    state: State | None = None
    nbytes: int = 0  # in memory
    parked_bytes: int = 0  # on disk


class GoneError(RequestError):
    """The weights exist no longer: a snapshot made room, or a checkpoint was replaced."""


class Shelf:
    """Sampler weights by key, the last used in memory. Its tensors belong to the compute thread."""

    def __init__(self, limits: Limits, scratch: Scratch) -> None:
        self._limits, self._scratch = limits, scratch
        self._lock = threading.Lock()
        self._shelf: OrderedDict[str, Shelved] = OrderedDict()
        self._bare: dict[int, Any] = {}

    def bare(self, model: Model) -> Any:
        """The base model's own weights: one object, so that all its calls decode together."""
        return self._bare.setdefault(id(model.base), model.base.sampler_weights(None))

    def put_snapshot(self, key: str, model: Model, state: State) -> None:
        """Shelve tensors that exist nowhere else; an older set under the key is replaced."""
        with self._lock:
            older = self._shelf.get(key)
            self._shelf[key] = shelved = Shelved(model, None)
        try:
            self._hold(key, shelved, state)
        except Exception:
            with self._lock:  # its client is told that there is none
                self._shelf.pop(key, None)
                if older is not None:
                    self._shelf[key] = older
            raise

    def put_reader(self, key: str, model: Model, read: Callable[[], State]) -> None:
        """Shelve weights that can be read again at any time."""
        with self._lock:
            self._shelf.setdefault(key, Shelved(model, read))

    def weights(self, key: str) -> Any:
        """The weights as the sampler takes them."""
        with self._lock:
            shelved = self._shelf.get(key)
            if shelved is None:
                raise GoneError(
                    "The sampler's weights are gone: its session ended, or newer snapshots needed "
                    "the room. save_weights_for_sampler(name) keeps weights for as long as you like"
                )
            self._shelf.move_to_end(key)
        if shelved.weights is None:
            state = shelved.read() if shelved.read else self._scratch.read(_file_name(key))
            self._hold(key, shelved, state)
        return shelved.weights

    def drop(self, key: str) -> None:
        with self._lock:
            self._shelf.pop(key, None)
        self._scratch.remove(_file_name(key))

    def clear(self) -> None:
        """Let go of everything, at the engine's end."""
        with self._lock:
            self._shelf.clear()
            self._bare.clear()

    def memory_bytes(self) -> int:
        with self._lock:
            return sum(shelved.nbytes for shelved in self._shelf.values())

    def _hold(self, key: str, shelved: Shelved, state: State) -> None:
        shelved.weights = shelved.model.base.sampler_weights(state)
        shelved.nbytes = sum(tensor.nbytes for tensor in state.values())
        shelved.state = state if shelved.read is None else None
        try:
            self._make_room(key)
        except Exception:  # a full disk: else each failing try would leave more in memory
            shelved.weights, shelved.state, shelved.nbytes = None, None, 0
            raise

    def _make_room(self, key: str) -> None:
        """Park other weights until those in memory are no more than allowed."""
        with self._lock:
            others = [(k, other) for k, other in self._shelf.items() if k != key and other.nbytes]
        for other_key, other in others:  # the one used longest ago comes first
            if self.memory_bytes() <= self._limits.shelf_bytes:
                return
            self._park(other_key, other)

    def _park(self, key: str, shelved: Shelved) -> None:
        if shelved.state is not None and not shelved.parked_bytes:
            self._scratch.write(_file_name(key), shelved.state)
            shelved.parked_bytes = shelved.nbytes
        shelved.weights, shelved.state, shelved.nbytes = None, None, 0
        while self._parked_bytes() > self._limits.scratch_bytes:
            self.drop(next(key for key, other in self._shelf.items() if other.parked_bytes))

    def _parked_bytes(self) -> int:
        with self._lock:
            return sum(shelved.parked_bytes for shelved in self._shelf.values())


def _file_name(key: str) -> str:
    return "sampler-" + hashlib.sha256(key.encode()).hexdigest()[:32]


class SamplerTable:
    """The sampling sessions, the requests they have accepted, and one decoder per base model."""

    def __init__(self, make_sampler: Callable[[Any], Any]) -> None:
        self._make_sampler = make_sampler
        self._lock = threading.Lock()
        self._sessions: dict[str, SamplingSession] = {}
        self._decoders: dict[int, Any] = {}
        self._known: OrderedDict[tuple[str, int], tuple[str, int]] = OrderedDict()

    def add(self, session: SamplingSession) -> SamplingSession:
        """Register a sampler; the one that was there first stays (a re-sent request)."""
        with self._lock:
            return self._sessions.setdefault(session.sampler_id, session)

    def get(self, sampler_id: str, owner: str) -> SamplingSession:
        with self._lock:
            session = self._sessions.get(sampler_id)
        if session is None or session.owner != owner:
            raise NotFoundError(f"There is no sampler {shown(sampler_id)}; make it again")
        return session

    def join(self, session: SamplingSession) -> int:
        """A new client's number, unique in the sampling session."""
        with self._lock:
            session.clients += 1
            return session.clients

    def of_session(self, session_id: str) -> list[SamplingSession]:
        with self._lock:
            return [s for s in self._sessions.values() if s.session_id == session_id]

    def drop(self, session: SamplingSession) -> None:
        with self._lock:
            self._sessions.pop(session.sampler_id, None)

    def clear(self) -> None:
        """Let go of everything, at the engine's end."""
        with self._lock:
            self._sessions.clear()
            self._decoders.clear()

    def decoder(self, model: Model) -> Any:
        """The base model's Sampler; aliases of one model share it."""
        with self._lock:
            key = id(model.base)
            if key not in self._decoders:
                self._decoders[key] = self._make_sampler(model.base)
            return self._decoders[key]

    def known(self, sampler_id: str, seq_id: int) -> tuple[str, int] | None:
        """The request id and number of samples under which this call was accepted before."""
        with self._lock:
            return self._known.get((sampler_id, seq_id))

    def remember(self, sampler_id: str, seq_id: int, accepted: tuple[str, int]) -> None:
        with self._lock:
            self._known[sampler_id, seq_id] = accepted
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
