"""What does a sampling request do? Make a sampler, and sample from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tinker import types
from tinker.types.sample_request import SampleRequest as SampleMessage

from course_lib.engine.batch import SampleJob
from course_lib.engine.names import TinkerPath, shown
from course_lib.engine.protobuf import sample_reply
from course_lib.engine.records import CheckpointRecord
from course_lib.engine.requests import RequestError
from course_lib.engine.rooms import Rooms
from course_lib.engine.samplers import GoneError, SamplingSession, State
from course_lib.engine.saving import check_same_model
from course_lib.engine.tensors import ADAPTER, read_tensors
from course_lib.engine.wire import sample_request

CLONE_BLOCK = 1_000_000_000  # a cloned client numbers its calls in a block of its own


def create_sampling_session(
    rooms: Rooms, owner: str, message: types.CreateSamplingSessionRequest
) -> str:
    """A sampler on the base model, or on a checkpoint's weights."""
    session = rooms.sessions.live(message.session_id, owner)
    key = path = None
    if message.model_path is not None:
        parsed, record = rooms.checkpoint(owner, message.model_path)
        if parsed.kind == "external_weights":
            raise RequestError(f"{parsed} is for download; sample from weights or sampler_weights")
        model = rooms.model(message.base_model or record.base_model)
        check_same_model(record, model)
        key = path = str(parsed)
        if not rooms.store.read(parsed, lambda folder: (folder / ADAPTER).is_file()):
            raise RequestError(f"{parsed}: {ADAPTER} is missing")
        key = f"{path}@{record.created_at}"
        rooms.shelf.put_reader(key, model, lambda: _read(rooms, parsed, record))
    elif message.base_model is not None:
        model = rooms.model(message.base_model)
    else:
        raise RequestError("create_sampling_session needs base_model or model_path")
    if message.sampling_session_seq_id < 0:
        raise RequestError("sampling_session_seq_id must not be negative")
    sampler_id = f"{session.session_id}:sample:{message.sampling_session_seq_id}"
    rooms.samplers.add(SamplingSession(sampler_id, owner, session.session_id, model, path, key))
    rooms.sessions.add_sampler(session.session_id, sampler_id)
    return sampler_id


def _read(rooms: Rooms, path: TinkerPath, record: CheckpointRecord) -> State:
    """The weights that the sampler was made for, not those that took their place."""
    state = rooms.store.read(path, lambda folder: read_tensors(folder / ADAPTER, str(path)))
    # Looked at only now: a checkpoint may be replaced even while it is read.
    if rooms.store.checkpoint(path).created_at != record.created_at:
        raise GoneError(f"{path} was replaced after this sampler was made; make the sampler again")
    return state


def asample(rooms: Rooms, owner: str, message: SampleMessage) -> tuple[str, int] | None:
    """Queue a `sample` call: its request id and number of samples, or None when too many wait."""
    if message.sampling_session_id is None:
        raise RequestError("asample needs sampling_session_id")
    session = rooms.samplers.get(message.sampling_session_id, owner)
    seq_id = message.seq_id or 0
    if not 0 <= seq_id < 2**63:
        raise RequestError(f"seq_id is {shown(seq_id)}; it must be 0 or more, in 64 bits")
    known = rooms.samplers.known(session.sampler_id, seq_id)
    if known is not None and message.seq_id is not None:
        return known
    base = session.model.base
    request = sample_request(message, rooms.limits, base.context_length)
    rooms.compute.check_sample(request, base.vocab_size, base.context_length)

    pending = rooms.futures.open(owner, (session.sampler_id, seq_id // CLONE_BLOCK))
    request = replace(request, cancelled=lambda: pending.cancelled)
    target = message.target_prompt_logprobs
    job = SampleJob(
        pending=pending,
        request=request,
        sampler=rooms.samplers.decoder(session.model),
        weights=lambda: weights_of(rooms, session),
        encode=lambda result: sample_reply(result, target),
        learner=session.session_id,
    )
    if not rooms.worker.submit_sample(job):
        rooms.futures.discard(pending)
        return None
    accepted = (pending.request_id, message.num_samples)
    rooms.samplers.remember(session.sampler_id, seq_id, accepted)
    return accepted


def weights_of(rooms: Rooms, session: SamplingSession) -> Any:
    """The sampler's weights; asked for on the compute thread, when the call joins the batch."""
    if session.weights_key is None:
        return rooms.shelf.bare(session.model)
    return rooms.shelf.weights(session.weights_key)
