"""What do the two binary messages hold? ForwardBackward in and out, and SampleResponse out.

The classes are the SDK's own generated ones. Arrays cross as bytes: there is Python per datum and
per field, never per token.

Legend: N tokens of one datum, K target columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from google.protobuf.message import DecodeError
from tinker.proto import tinker_public_pb2 as pb

from course_lib.engine.limits import Limits
from course_lib.engine.names import shown
from course_lib.engine.requests import (
    RequestError,
    SampleResult,
    TrainDatum,
    TrainRequest,
    TrainResult,
)
from course_lib.engine.wire import PROTO_TYPE, Reply, csr_cells

_NUMPY_TYPES = {
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_INT64: np.dtype("<i8"),
    pb.DTYPE_INT32: np.dtype("<i4"),
    pb.DTYPE_BFLOAT16: np.dtype("<u2"),
}
_STOP_REASONS = {"stop": pb.STOP_REASON_STOP, "length": pb.STOP_REASON_LENGTH}
EMPTY_LOGPROB = -99999.0  # what the SDK takes for "no entry" in a top-k row


def read_envelope(body: bytes) -> pb.ForwardBackwardRequest:
    """Parse the message only; `train_request` looks inside later, when the request has its turn."""
    message = pb.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise RequestError("The body is not a ForwardBackwardRequest in protobuf") from error
    return message


def train_request(message: pb.ForwardBackwardRequest, limits: Limits) -> TrainRequest:
    """The arrays of a `forward` or `forward_backward`; errors name datum and field."""
    _check_size(message, limits)
    return TrainRequest(
        data=[_datum(datum, f"data[{index}]", limits) for index, datum in enumerate(message.data)],
        loss_fn=message.loss_fn,
        loss_fn_config=_loss_fn_config(message),
        forward_only=message.forward_only,
    )


def _check_size(message: pb.ForwardBackwardRequest, limits: Limits) -> None:
    if len(message.data) > limits.data_per_request:
        raise RequestError(f"data holds {len(message.data)} datums; {limits.data_per_request} may")
    chunks = (chunk for datum in message.data for chunk in datum.model_input)
    tokens = sum(len(chunk.encoded_text.tokens) // 4 for chunk in chunks)
    if tokens > limits.tokens_per_request:
        raise RequestError(f"data holds {tokens} tokens; {limits.tokens_per_request} may be sent")


def _loss_fn_config(message: pb.ForwardBackwardRequest) -> dict[str, float | str]:
    """The second, typed map when it is there; older clients fill only the first."""
    typed = {
        key: value.text if value.WhichOneof("value") == "text" else value.number
        for key, value in message.loss_fn_config_v2.items()
    }
    return typed or dict(message.loss_fn_config)


def _datum(datum: pb.Datum, place: str, limits: Limits) -> TrainDatum:
    parts = []
    for chunk in datum.model_input:
        if chunk.WhichOneof("chunk") != "encoded_text":
            raise RequestError(
                f"{place}.model_input holds a chunk of type {chunk.WhichOneof('chunk')}; "
                "these models read encoded_text only"
            )
        parts.append(_numbers(chunk.encoded_text.tokens, "<i4", f"{place}.model_input"))
    tokens = np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)
    inputs = {
        name: tensor_array(tensor, f"{place}.loss_fn_inputs[{shown(name)}]", limits)
        for name, tensor in datum.loss_fn_inputs.items()
    }
    return TrainDatum(tokens, inputs)


def _numbers(raw: bytes, dtype: str | np.dtype, place: str) -> np.ndarray:
    size = np.dtype(dtype).itemsize
    if len(raw) % size:
        raise RequestError(
            f"{place}: {len(raw)} bytes are not a whole number of {size}-byte values"
        )
    return np.frombuffer(raw, dtype=dtype)


def tensor_array(tensor: pb.Tensor, place: str, limits: Limits) -> np.ndarray:
    """A tensor as a dense array, int64 or float32; cells that a CSR tensor leaves out are 0."""
    if tensor.dtype not in _NUMPY_TYPES:
        raise RequestError(f"{place}: the dtype number {tensor.dtype} is unknown")
    dtype, shape = _NUMPY_TYPES[tensor.dtype], list(tensor.shape)
    if tensor.WhichOneof("encoding") == "sparse_csr":
        return _from_csr(tensor.sparse_csr, dtype, shape, place, limits)
    values = _widened(_numbers(tensor.dense, dtype, place), dtype)
    if not shape:
        return values
    if min(shape) < 0 or math.prod(shape) != values.size:
        raise RequestError(f"{place}: {values.size} values do not fill the shape {shape[:8]}")
    return values.reshape(shape)


def _widened(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Only int64 and float32 go further; bfloat16 is the upper half of a float32."""
    if dtype == _NUMPY_TYPES[pb.DTYPE_BFLOAT16]:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.int64 if dtype.kind == "i" else np.float32)  # a copy: torch writes


def _from_csr(
    csr: pb.SparseCsr, dtype: np.dtype, shape: list[int], place: str, limits: Limits
) -> np.ndarray:
    # A few bytes may claim a shape of terabytes: the bound comes before the allocation.
    if len(shape) != 2 or min(shape) < 0 or shape[0] * shape[1] > limits.dense_cells:
        raise RequestError(
            f"{place}: a sparse tensor needs a shape [rows, columns] of at most "
            f"{limits.dense_cells} cells, not {shape[:8]}"
        )
    values = _widened(_numbers(csr.values, dtype, place), dtype)
    crow = _numbers(csr.crow_indices, "<i8", place)
    columns = _numbers(csr.col_indices, "<i8", place)
    cells = csr_cells(crow, columns, shape, values.size, place)
    dense = np.zeros(shape, dtype=values.dtype)
    dense[cells] = values
    return dense


def train_reply(result: TrainResult) -> Reply:
    """Encode outputs and metrics; data of one trailing shape in a row share an ArrayRecord."""
    message = pb.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord", metrics=result.metrics)
    for outputs in _alike(result.loss_fn_outputs):
        record = message.loss_fn_outputs.add(num_datums=len(outputs))
        for name, first in outputs[0].items():
            arrays = [np.asarray(output[name], _wire_dtype(first)) for output in outputs]
            ends = np.cumsum([0] + [array.nbytes for array in arrays], dtype=np.int64)
            field = record.fields[name]
            field.data = b"".join(array.tobytes() for array in arrays)
            field.offsets = ends.tobytes()
            field.dtype = pb.DTYPE_INT64 if first.dtype.kind == "i" else pb.DTYPE_FLOAT32
            field.trailing_shape.extend(first.shape[1:])
    return Reply(message.SerializeToString(), PROTO_TYPE)


def _wire_dtype(array: np.ndarray) -> np.dtype:
    return np.dtype("<i8") if array.dtype.kind == "i" else np.dtype("<f4")


def _alike(outputs: list[dict[str, np.ndarray]]) -> Iterable[list[dict[str, np.ndarray]]]:
    """Split into runs with the same fields, kinds and trailing shapes (K may be ragged)."""
    run: list[dict[str, np.ndarray]] = []
    layout: object = None
    for output in outputs:
        this = {name: (array.dtype.kind, array.shape[1:]) for name, array in output.items()}
        if run and this != layout:
            yield run
            run = []
        layout = this
        run.append(output)
    if run:
        yield run


def sample_reply(result: SampleResult, target: object = None) -> Reply:
    """Encode sequences and prompt logprobs; `target` is the request's own tensor, whose layout
    (dense, or CSR with its indices) the answer repeats."""
    message = pb.SampleResponse()
    for sequence in result.sequences:
        added = message.sequences.add(
            stop_reason=_STOP_REASONS[sequence.stop_reason],
            tokens=np.asarray(sequence.tokens, "<i4").tobytes(),
            logprobs=np.asarray(sequence.logprobs, "<f4").tobytes(),
        )
        if sequence.topk is not None:
            _write_topk(added.topk_sampled_logprobs, sequence.topk)
    if result.prompt_logprobs is not None:
        message.prompt_logprobs = np.asarray(result.prompt_logprobs, "<f4").tobytes()
    if result.topk_prompt is not None:
        _write_topk(message.topk_prompt_logprobs, result.topk_prompt)
    if result.target_prompt is not None:
        _write_target(message.target_prompt_logprobs, result.target_prompt, target)
    if result.alt_tokens is not None:
        ids, logprobs = result.alt_tokens
        _write_dense(message.prompt_alt_tokens.tokens, np.asarray(ids, "<i4"), pb.DTYPE_INT32)
        _write_dense(
            message.prompt_alt_tokens.logprobs, np.asarray(logprobs, "<f4"), pb.DTYPE_FLOAT32
        )
    return Reply(message.SerializeToString(), PROTO_TYPE)


def _write_topk(message: pb.TopkLogprobs, rows: list[list[tuple[int, float]]]) -> None:
    width = max((len(row) for row in rows), default=0) or 1  # 0 would read as "not asked for"
    ids = np.zeros((len(rows), width), "<i4")
    logprobs = np.full((len(rows), width), EMPTY_LOGPROB, "<f4")
    for index, row in enumerate(rows):
        if row:
            ids[index, : len(row)], logprobs[index, : len(row)] = zip(*row, strict=True)
    message.token_ids, message.logprobs = ids.tobytes(), logprobs.tobytes()
    message.k, message.length = width, len(rows)


def _write_dense(message: pb.Tensor, array: np.ndarray, dtype: pb.DType.ValueType) -> None:
    message.dense, message.dtype = array.tobytes(), dtype
    message.shape.extend(array.shape)


def _write_target(message: pb.Tensor, logprobs: np.ndarray, target: object) -> None:
    dense = np.asarray(logprobs, "<f4")
    crow = getattr(target, "sparse_crow_indices", None)
    if crow is None:
        _write_dense(message, dense, pb.DTYPE_FLOAT32)
        return
    columns = np.asarray(target.sparse_col_indices or [], "<i8")  # type: ignore[attr-defined]
    rows = np.repeat(np.arange(dense.shape[0]), np.diff(np.asarray(crow, "<i8")))
    message.dtype = pb.DTYPE_FLOAT32
    message.shape.extend(dense.shape)
    message.sparse_csr.values = dense[rows, columns].tobytes()
    message.sparse_csr.crow_indices = np.asarray(crow, "<i8").tobytes()
    message.sparse_csr.col_indices = columns.tobytes()
