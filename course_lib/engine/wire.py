"""What arrives and what goes back? HTTP bodies: their size, their compression, and JSON.

JSON bodies are read by the SDK's own request types, so that the two sides can never disagree about
a field. `protobuf` reads and writes the two messages that are not JSON.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pydantic
from tinker import types
from tinker.types.encoded_text_chunk import EncodedTextChunk
from tinker.types.sample_request import SampleRequest as SampleMessage

from course_lib.engine.limits import Limits
from course_lib.engine.names import shown
from course_lib.engine.requests import AdamParams, LoraSpec, RequestError, SampleRequest

Message = TypeVar("Message", bound=pydantic.BaseModel)

JSON_TYPE = "application/json"
PROTO_TYPE = "application/x-protobuf"
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Reply:
    """A finished answer: bytes that go out as they are. `failed` marks an {"error": ...} body."""

    body: bytes
    content_type: str = JSON_TYPE
    failed: bool = False


def json_reply(value: object) -> Reply:
    """Encode plain data. Metrics may be NaN, which the SDK reads; strict JSON has none."""
    return Reply(json.dumps(value).encode())


def failure_reply(sentence: str, category: str = "user") -> Reply:
    """The body that the SDK turns into a RequestFailedError carrying the sentence."""
    return Reply(json.dumps({"error": sentence, "category": category}).encode(), failed=True)


def decompressed(body: bytes, encoding: str, limit: int) -> bytes:
    """Undo `Content-Encoding`; a small body that unfolds beyond the limit is refused."""
    if encoding in ("", "identity"):
        return body
    if encoding != "zstd":
        raise RequestError(f"Content-Encoding {shown(encoding)} is unknown; use zstd or none")
    import zstandard

    try:
        with zstandard.ZstdDecompressor().stream_reader(body) as reader:
            plain = reader.read(limit + 1)
    except zstandard.ZstdError as error:
        raise RequestError(f"The body is not valid zstd: {error}") from error
    if len(plain) > limit:
        raise RequestError(f"The body is larger than {limit} bytes when decompressed")
    return plain


def read_json(body: bytes, message_type: type[Message]) -> Message:
    """Read one of the SDK's request types, or say which field is wrong."""
    try:
        return message_type.model_validate_json(body or b"{}")
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"][:6]) or "the body"
        raise RequestError(f"{place}: {first['msg']}") from error


def loose_ids(body: bytes) -> tuple[str, int] | None:
    """The run and sequence id of a training request that is wrong elsewhere, if any."""
    try:
        values = json.loads(body)
        run_id, seq_id = values["model_id"], values["seq_id"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (run_id, seq_id) if isinstance(run_id, str) and type(seq_id) is int else None


def lora_spec(config: types.LoraConfig | None) -> LoraSpec:
    """The adapter that `create_model` asks for."""
    return LoraSpec() if config is None else LoraSpec(**config.model_dump())


def adam_params(message: types.OptimStepRequest) -> AdamParams:
    """Adam's numbers; the trainer checks their ranges."""
    params = message.optim_params
    if not isinstance(params, types.AdamParams):
        raise RequestError(
            f"optim_step: the optimizer {shown(params.type)} is unknown here; use AdamParams"
        )
    return AdamParams(**params.model_dump())


def token_array(tokens: object, place: str) -> np.ndarray:
    """Token ids (P,) int64; ids beyond int32 cannot come back over the wire."""
    try:
        array = np.asarray(tokens, dtype=np.int64).reshape(-1)
    except (OverflowError, ValueError) as error:
        raise RequestError(f"{place}: a token id is too large") from error
    if array.size and (array.min() < 0 or array.max() > _INT32_MAX):
        raise RequestError(f"{place}: a token id is negative or too large")
    return array


def prompt_tokens(prompt: types.ModelInput) -> np.ndarray:
    """A prompt's chunks joined: (P,) int64. Only text can be read by these models."""
    parts = []
    for chunk in prompt.chunks:
        if not isinstance(chunk, EncodedTextChunk):
            raise RequestError(f"prompt: a chunk of type {shown(chunk.type)} is not text")
        parts.append(token_array(chunk.tokens, "prompt"))
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def sample_request(message: SampleMessage, limits: Limits, context_length: int) -> SampleRequest:
    """One `sample` call as the sampler takes it."""
    params, prompt = message.sampling_params, prompt_tokens(message.prompt)
    _check_bounds(message, prompt.size, limits, context_length)
    target = message.target_prompt_logprobs
    if target is not None:
        target = target_matrix(target, prompt.size, limits)
    return SampleRequest(
        prompt=prompt,
        num_samples=message.num_samples,
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        seed=params.seed,
        stop=params.stop if params.stop is None or isinstance(params.stop, str) else [*params.stop],
        prompt_logprobs=bool(message.prompt_logprobs),
        topk_prompt_logprobs=message.topk_prompt_logprobs,
        topk_sample_logprobs=message.topk_sample_logprobs,
        target_prompt_logprobs=target,
        prompt_alt_tokens_k=message.prompt_alt_tokens_k,
        prompt_logprobs_last_n=message.prompt_logprobs_last_n,
    )


def _check_bounds(message: SampleMessage, length: int, limits: Limits, context_length: int) -> None:
    """What would be legal but too much; `validation` checks what makes sense."""
    seed = message.sampling_params.seed
    if seed is not None and not -(2**63) <= seed < 2**63 - limits.samples_per_request:
        raise RequestError(f"seed is {seed}; give a 64-bit number")
    if message.num_samples > limits.samples_per_request:
        raise RequestError(
            f"num_samples is {message.num_samples}; at most {limits.samples_per_request} are made"
        )
    sampled = message.num_samples * (message.sampling_params.max_tokens or context_length)
    for name, tokens in (
        ("topk_prompt_logprobs", length),
        ("topk_sample_logprobs", sampled),
        ("prompt_alt_tokens_k", length),
    ):
        k = getattr(message, name)
        if k * tokens > limits.logprob_cells:
            raise RequestError(f"{name} is {k}; times all tokens it may be {limits.logprob_cells}")
    last = message.prompt_logprobs_last_n
    if last is not None and length < 2:
        raise RequestError(
            f"prompt_logprobs_last_n is {last}; a prompt of one token has nothing to score, since "
            "the first has no log-probability: leave prompt_logprobs_last_n out"
        )
    if last is not None and not 1 <= last <= length - 1:
        raise RequestError(f"prompt_logprobs_last_n is {last}; it must be 1 to {length - 1}")


def target_matrix(tensor: types.TensorData, length: int, limits: Limits) -> np.ndarray:
    """Token ids to score, (P - 1, K) with -1 in empty cells, from a dense or CSR tensor."""
    place, shape = "target_prompt_logprobs", tensor.shape or []
    if len(shape) != 2 or shape[0] != length - 1 or shape[1] < 1:
        raise RequestError(f"{place}: its shape is {shape}; it must be [{length - 1}, K]")
    if shape[0] * shape[1] > limits.logprob_cells:
        raise RequestError(f"{place}: {shape[0]} x {shape[1]} cells are too many")
    try:
        values = np.asarray(tensor.data, dtype=np.int64).reshape(-1)
    except (OverflowError, ValueError) as error:
        raise RequestError(f"{place}: a token id is not a whole number in range") from error
    if tensor.sparse_crow_indices is None and tensor.sparse_col_indices is None:
        if values.size != shape[0] * shape[1]:
            raise RequestError(f"{place}: {values.size} values do not fill the shape {shape}")
        return values.reshape(shape)
    rows, columns = csr_cells(
        tensor.sparse_crow_indices or [], tensor.sparse_col_indices or [], shape, values.size, place
    )
    dense = np.full(shape, -1, dtype=np.int64)
    dense[rows, columns] = values
    return dense


def csr_cells(
    crow: object, columns: object, shape: list[int], count: int, place: str
) -> tuple[np.ndarray, np.ndarray]:
    """The row and column of each stored value of a CSR matrix, (count,) each, checked."""
    try:
        starts, columns_N = np.asarray(crow, np.int64), np.asarray(columns, np.int64)
    except (OverflowError, ValueError) as error:
        raise RequestError(f"{place}: the sparse indices are not whole numbers") from error
    sound = (
        starts.size == shape[0] + 1
        and columns_N.size == count
        and starts[0] == 0
        and starts[-1] == count
        and bool(np.all(np.diff(starts) >= 0))
        and (count == 0 or (columns_N.min() >= 0 and columns_N.max() < shape[1]))
    )
    if not sound:
        raise RequestError(f"{place}: the sparse row and column indices do not fit {shape}")
    return np.repeat(np.arange(shape[0]), np.diff(starts)), columns_N
