"""Bodies in and out, against the SDK's own encoder and decoder."""

from __future__ import annotations

import numpy as np
import pytest
import tinker
import zstandard
from tinker import types
from tinker.proto import tinker_public_pb2 as pb
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.proto.response_conv import deserialize_proto_response
from tinker.types.sample_request import SampleRequest as SampleMessage

from course_lib.engine.limits import Limits
from course_lib.engine.protobuf import (
    read_envelope,
    sample_reply,
    tensor_array,
    train_reply,
    train_request,
)
from course_lib.engine.requests import RequestError, SampledSequence, SampleResult, TrainResult
from course_lib.engine.wire import (
    decompressed,
    failure_reply,
    loose_ids,
    read_json,
    sample_request,
)

LIMITS = Limits()
CONTEXT = 500  # tokens


def sent(*data: types.Datum, config: dict | None = None, loss_fn: str = "cross_entropy") -> bytes:
    """The bytes that the SDK sends for these datums."""
    request = types.ForwardBackwardRequest(
        forward_backward_input=types.ForwardBackwardInput(
            data=list(data), loss_fn=loss_fn, loss_fn_config=config
        ),
        model_id="s:train:0",
        seq_id=1,
    )
    return forward_backward_request_to_proto(request).SerializeToString()


def datum(tokens: list[int], **inputs: object) -> types.Datum:
    return types.Datum(model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs=inputs)


def test_a_datum_arrives_as_the_arrays_that_were_sent():
    body = sent(datum([5, 6, 7], target_tokens=[6, 7, 8], weights=[0.0, 1.0, 0.5]))
    request = train_request(read_envelope(body), LIMITS)
    assert request.loss_fn == "cross_entropy" and not request.forward_only
    assert request.data[0].tokens.tolist() == [5, 6, 7]
    assert request.data[0].tokens.dtype == np.int64
    assert request.data[0].loss_fn_inputs["target_tokens"].tolist() == [6, 7, 8]
    assert request.data[0].loss_fn_inputs["weights"].tolist() == [0.0, 1.0, 0.5]


def test_arrays_can_be_written_to():
    """torch.from_numpy warned about the read-only memory of the body, on a notebook's stderr."""
    request = train_request(
        read_envelope(sent(datum([5], target_tokens=[6], weights=[1.0]))), LIMITS
    )
    inputs = request.data[0].loss_fn_inputs
    assert inputs["target_tokens"].flags.writeable and inputs["weights"].flags.writeable


def test_several_text_chunks_are_joined():
    chunks = [types.EncodedTextChunk(tokens=[1, 2]), types.EncodedTextChunk(tokens=[3])]
    body = sent(
        types.Datum(
            model_input=types.ModelInput(chunks=chunks), loss_fn_inputs={"target_tokens": [2, 3, 4]}
        )
    )
    assert train_request(read_envelope(body), LIMITS).data[0].tokens.tolist() == [1, 2, 3]


def test_sparse_targets_are_made_dense_with_zeros():
    sparse = types.TensorData(
        data=[9, 8],
        dtype="int64",
        shape=[3, 4],
        sparse_crow_indices=[0, 1, 1, 2],
        sparse_col_indices=[2, 0],
    )
    body = sent(datum([1, 2, 3], target_tokens=sparse))
    dense = train_request(read_envelope(body), LIMITS).data[0].loss_fn_inputs["target_tokens"]
    assert dense.tolist() == [[0, 0, 9, 0], [0, 0, 0, 0], [8, 0, 0, 0]]


@pytest.mark.parametrize(
    ("crow", "columns"),
    [([0, 1, 3], [0, 1]), ([0, 2, 1], [0, 1]), ([1, 1, 2], [0, 1]), ([0, 1, 2], [0, 4]), ([0], [])],
)
def test_sparse_indices_that_do_not_fit_are_refused(crow: list[int], columns: list[int]):
    tensor = pb.Tensor(dtype=pb.DTYPE_INT64, shape=[2, 4])
    tensor.sparse_csr.values = np.array([1, 2], "<i8").tobytes()
    tensor.sparse_csr.crow_indices = np.array(crow, "<i8").tobytes()
    tensor.sparse_csr.col_indices = np.array(columns, "<i8").tobytes()
    with pytest.raises(RequestError, match="do not fit"):
        tensor_array(tensor, "here", LIMITS)


def test_a_sparse_tensor_cannot_claim_a_terabyte():
    tensor = pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[2**31, 2**31])
    tensor.sparse_csr.values = b""
    with pytest.raises(RequestError, match="at most"):
        tensor_array(tensor, "here", LIMITS)


def test_bfloat16_is_the_upper_half_of_a_float32():
    tensor = pb.Tensor(dtype=pb.DTYPE_BFLOAT16, dense=np.array([0x3FC0], "<u2").tobytes())
    assert tensor_array(tensor, "here", LIMITS).tolist() == [1.5]


@pytest.mark.parametrize(
    ("tensor", "finding"),
    [
        (pb.Tensor(dtype=pb.DTYPE_FLOAT32, dense=b"123"), "whole number of 4-byte"),
        (pb.Tensor(dtype=pb.DTYPE_FLOAT32, dense=bytes(8), shape=[3]), "do not fill"),
        (pb.Tensor(dtype=pb.DTYPE_FLOAT32, dense=bytes(8), shape=[-1, -2]), "do not fill"),
        (pb.Tensor(dtype=0, dense=bytes(8)), "unknown"),
    ],
)
def test_a_broken_tensor_is_told_by_its_place(tensor: pb.Tensor, finding: str):
    with pytest.raises(RequestError, match=f"here: .*{finding}"):
        tensor_array(tensor, "here", LIMITS)


def test_the_error_names_the_datum_and_the_field():
    message = read_envelope(sent(datum([1], target_tokens=[2]), datum([1], target_tokens=[2])))
    message.data[1].loss_fn_inputs["target_tokens"].dense = b"odd"
    with pytest.raises(RequestError, match=r"data\[1\].loss_fn_inputs\['target_tokens'\]"):
        train_request(message, LIMITS)


def test_an_image_is_refused_by_name():
    message = read_envelope(sent(datum([1], target_tokens=[2])))
    message.data[0].model_input.add().image.data = b"png"
    with pytest.raises(RequestError, match=r"data\[0\].model_input holds a chunk of type image"):
        train_request(message, LIMITS)


def test_loss_fn_config_keeps_text_and_numbers():
    body = sent(datum([1], target_tokens=[2]), config={"beta": 0.25, "loss_id": "mine"})
    assert train_request(read_envelope(body), LIMITS).loss_fn_config == {
        "beta": 0.25,
        "loss_id": "mine",
    }


def test_an_older_client_fills_only_the_first_config():
    message = read_envelope(sent(datum([1], target_tokens=[2])))
    message.loss_fn_config["beta"] = 0.5
    assert train_request(message, LIMITS).loss_fn_config == {"beta": 0.5}


def test_too_many_tokens_in_one_request_are_refused():
    message = read_envelope(sent(datum([1, 2, 3], target_tokens=[2, 3, 4])))
    with pytest.raises(RequestError, match="3 tokens; 2 may"):
        train_request(message, Limits(tokens_per_request=2))


def test_zstd_bodies_are_read_and_bombs_are_not():
    body = sent(datum([5], target_tokens=[6]))
    assert decompressed(zstandard.compress(body), "zstd", 1000) == body
    bomb = zstandard.compress(bytes(10_000_000))
    assert len(bomb) < 1000
    with pytest.raises(RequestError, match="larger than 1000"):
        decompressed(bomb, "zstd", 1000)
    with pytest.raises(RequestError, match="not valid zstd"):
        decompressed(b"nonsense", "zstd", 1000)
    with pytest.raises(RequestError, match="unknown"):
        decompressed(b"", "br", 1000)


def test_outputs_come_back_as_the_sdk_reads_them():
    outputs = [
        {"logprobs": np.array([-1.0, -2.0], np.float32)},
        {"logprobs": np.array([-3.0], np.float32)},
    ]
    reply = train_reply(TrainResult(outputs, {"loss:sum": 6.0}))
    result = deserialize_proto_response(reply.body, types.ForwardBackwardOutput)
    assert [output["logprobs"].tolist() for output in result.loss_fn_outputs] == [[-1, -2], [-3]]
    assert result.metrics == {"loss:sum": 6.0}


def test_ragged_columns_come_back_with_their_shapes():
    """K differs between datums: each run of equal K needs a record of its own."""
    shapes = [(2, 3), (2, 3), (4, 1), (5,)]
    outputs = [{"logprobs": np.full(shape, -0.5, np.float32)} for shape in shapes]
    reply = train_reply(TrainResult(outputs, {"loss:sum": 0.0}))
    result = deserialize_proto_response(reply.body, types.ForwardBackwardOutput)
    assert [tuple(output["logprobs"].shape) for output in result.loss_fn_outputs] == shapes


def test_no_outputs_are_an_empty_answer():
    result = deserialize_proto_response(
        train_reply(TrainResult([], {"loss:sum": 0.0})).body, types.ForwardBackwardOutput
    )
    assert result.loss_fn_outputs == []


def message(**fields: object) -> SampleMessage:
    given = {"prompt": types.ModelInput.from_ints([1, 2, 3]), "sampling_params": {}} | fields
    return SampleMessage.model_validate(given)


def test_an_absent_stop_stays_absent_and_an_empty_one_empty():
    assert sample_request(message(), LIMITS, CONTEXT).stop is None
    assert sample_request(message(sampling_params={"stop": []}), LIMITS, CONTEXT).stop == []
    assert sample_request(message(sampling_params={"stop": "."}), LIMITS, CONTEXT).stop == "."
    assert sample_request(message(sampling_params={"stop": [4, 5]}), LIMITS, CONTEXT).stop == [4, 5]


@pytest.mark.parametrize(
    ("fields", "finding"),
    [
        ({"num_samples": 5000}, "num_samples is 5000"),
        ({"sampling_params": {"seed": 2**70}}, "seed"),
        ({"topk_prompt_logprobs": 10**9}, "topk_prompt_logprobs"),
        (
            # Half a billion pairs: the samples were not counted.
            {
                "num_samples": 1024,
                "topk_sample_logprobs": 1000,
                "sampling_params": {"max_tokens": 500},
            },
            "topk_sample_logprobs is 1000; times all tokens",
        ),
        (
            # Without max_tokens the prompt was counted, and not the context that they may fill.
            {"num_samples": 1024, "topk_sample_logprobs": 1000},
            "topk_sample_logprobs is 1000; times all tokens",
        ),
        ({"prompt_logprobs_last_n": 3}, "must be 1 to 2"),
        (  # It said "it must be 1 to 0".
            {"prompt": types.ModelInput.from_ints([1]), "prompt_logprobs_last_n": 1},
            "nothing to score.*leave prompt_logprobs_last_n out",
        ),
        ({"prompt": types.ModelInput.from_ints([-1])}, "negative"),
        ({"prompt": types.ModelInput.from_ints([2**40])}, "too large"),
    ],
)
def test_what_is_too_much_is_refused_before_it_is_queued(fields: dict, finding: str):
    with pytest.raises(RequestError, match=finding):
        sample_request(message(**fields), LIMITS, CONTEXT)


def test_target_prompt_logprobs_keep_their_layout_there_and_back():
    sparse = {
        "data": [7],
        "dtype": "int64",
        "shape": [2, 3],
        "sparse_crow_indices": [0, 0, 1],
        "sparse_col_indices": [2],
    }
    asked = message(target_prompt_logprobs=sparse)
    request = sample_request(asked, LIMITS, CONTEXT)
    assert request.target_prompt_logprobs.tolist() == [[-1, -1, -1], [-1, -1, 7]]
    dense = np.array([[0, 0, 0], [0, 0, -1.5]], np.float32)
    reply = sample_reply(SampleResult([], target_prompt=dense), asked.target_prompt_logprobs)
    back = deserialize_proto_response(reply.body, types.SampleResponse).target_prompt_logprobs
    assert (back.sparse_crow_indices, back.sparse_col_indices) == ([0, 0, 1], [2])
    assert back.to_numpy().tolist() == dense.tolist()


@pytest.mark.parametrize("shape", [[2], [3, 1], [2, 0], [2, 10**9]])
def test_target_prompt_logprobs_of_another_shape_are_refused(shape: list[int]):
    with pytest.raises(RequestError, match="target_prompt_logprobs"):
        target = {"data": [], "dtype": "int64", "shape": shape}
        sample_request(message(target_prompt_logprobs=target), LIMITS, CONTEXT)


def test_a_sample_response_is_what_the_sdk_reads():
    sequence = SampledSequence([4, 5], [-0.1, -0.2], "stop", [[(4, -0.1), (9, -2.0)], [(5, -0.2)]])
    result = SampleResult(
        [sequence],
        prompt_logprobs=np.array([np.nan, -1.0], np.float32),
        topk_prompt=[[], [(3, -0.3)]],
        alt_tokens=(np.array([[8]]), np.array([[-0.8]], np.float32)),
    )
    response = deserialize_proto_response(sample_reply(result).body, tinker.SampleResponse)
    first = response.sequences[0]
    assert (first.tokens, first.stop_reason) == ([4, 5], "stop")
    assert first.logprobs == pytest.approx([-0.1, -0.2])
    assert first.topk_logprobs_np.token_ids.tolist() == [[4, 9], [5, 0]]
    assert first.topk_logprobs_np.logprobs[1, 1] == -99999.0  # an empty cell
    assert response.prompt_logprobs == [None, -1.0]
    assert response.topk_prompt_logprobs[0] is None
    assert response.prompt_alt_tokens.tokens.to_numpy().tolist() == [[8]]


def test_of_a_prompt_of_one_token_the_likeliest_were_asked_for_and_there_are_none():
    """The SDK read the answer as if nobody had asked."""
    result = SampleResult([SampledSequence([4], [-0.1], "length")], topk_prompt=[[]])
    response = deserialize_proto_response(sample_reply(result).body, tinker.SampleResponse)
    assert response.topk_prompt_logprobs == [None]


def test_json_errors_name_the_field():
    with pytest.raises(RequestError, match=r"lora_config\.rank: "):
        read_json(
            b'{"session_id":"a","model_seq_id":0,"base_model":"m","lora_config":{"rank":"x"}}',
            types.CreateModelRequest,
        )
    with pytest.raises(RequestError):
        read_json(b"[" * 100_000, types.CreateModelRequest)


def test_a_failure_is_the_body_that_the_sdk_raises_from():
    assert failure_reply("It broke").failed
    assert failure_reply("It broke").body == b'{"error": "It broke", "category": "user"}'


def test_ids_are_read_from_a_request_that_is_wrong_elsewhere():
    assert loose_ids(b'{"model_id": "m", "seq_id": 3, "more": {}}') == ("m", 3)
    assert loose_ids(b'{"model_id": "m", "seq_id": true}') is None
    assert loose_ids(b"\xff") is None
