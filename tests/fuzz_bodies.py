"""Bodies that no client would send: good ones, changed in a few places, and plain rubbish."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tinker.proto import tinker_public_pb2 as pb

STRANGE: list[Any] = [
    None, True, 0, -1, 1, 2**31, 2**63, -(2**70), 10**400, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "x", "..", "../../etc/passwd", "\0", "a" * 10_000, "tinker://", "é🙂",
    "tinker://../weights/x", [], {}, [[]], [None], [1, "a"], {"a": {"a": {}}}, [0] * 1000,
    "adamw", "encoded_text", "inflight",
]  # fmt: skip
DELETE = object()


@dataclass
class Ids:
    """What a body must name to get past the first check."""

    session: str
    run: str
    sampler: str
    path: str


def good_bodies(ids: Ids, number: int) -> dict[str, dict[str, Any]]:
    """One good body for each JSON endpoint; `number` makes the ids in it new."""
    here = {"model_id": ids.run, "seq_id": number}
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}
    sample = {
        "sampling_session_id": ids.sampler,
        "seq_id": number,
        "num_samples": 2,
        "prompt": prompt,
        "sampling_params": {"max_tokens": 3, "temperature": 1.0, "stop": [5], "seed": 1},
        "prompt_logprobs": True,
        "topk_prompt_logprobs": 2,
        "topk_sample_logprobs": 2,
        "prompt_alt_tokens_k": 2,
        "prompt_logprobs_last_n": 1,
        "target_prompt_logprobs": {
            "data": [4],
            "dtype": "int64",
            "shape": [2, 3],
            "sparse_crow_indices": [0, 0, 1],
            "sparse_col_indices": [1],
        },
    }
    lora = {"rank": 2, "seed": 1, "train_mlp": True, "train_attn": True, "train_unembed": False}
    slot = {"session_id": ids.session, "model_seq_id": number}
    return {
        "client/config": {"sdk_version": "0.38.0"},
        "create_session": {"tags": ["t"], "user_metadata": {"a": "b"}, "sdk_version": "0.38.0"},
        "session_heartbeat": {"session_id": ids.session},
        "telemetry": {"events": [], "platform": "x", "session_id": ids.session},
        "create_model": slot | {"base_model": "course/base", "lora_config": lora},
        "load_weights": slot | {"path": ids.path, "optimizer": True},
        "get_info": {"model_id": ids.run},
        "optim_step": here | {"adam_params": {"learning_rate": 1e-4, "grad_clip_norm": 1.0}},
        "save_weights": here | {"path": f"n{number}", "ttl_seconds": 3600, "overwrite": True},
        "save_weights_for_sampler": here | {"sampling_session_seq_id": number, "kind": "snapshot"},
        "save_weights_external": here | {"path": f"n{number}", "age_encryption_recipients": None},
        "create_sampling_session": {
            "session_id": ids.session,
            "sampling_session_seq_id": number,
            "base_model": "course/base",
            "model_path": ids.path,
        },
        "join_sampling_session": {"sampling_session_id": ids.sampler},
        "asample": sample,
        "retrieve_futures": {
            "target": {"sampling_session_id": ids.sampler, "cloned_sampler_id": 0},
            "prev_cursor": 0,
            "timeout": 0,
            "retrieved_request_ids": ["x"],
        },
        "cancel_future": {"request_id": "x"},
        "weights_info": {"tinker_path": ids.path},
        "copy_weights": {"source_path": ids.path, "destination_project_id": "p"},
        "sessions/search": {"limit": 5, "display_name": "x", "user_metadata": {"a": "b"}},
    }


def good_chunk(ids: Ids, number: int) -> bytes:
    """A good `forward_backward` message."""
    message = pb.ForwardBackwardRequest(model_id=ids.run, seq_id=number, loss_fn="cross_entropy")
    datum = message.data.add()
    datum.model_input.add().encoded_text.tokens = bytes([1, 0, 0, 0, 2, 0, 0, 0])
    targets = datum.loss_fn_inputs["target_tokens"]
    targets.dtype, targets.dense = pb.DTYPE_INT64, bytes([2] + [0] * 7 + [3] + [0] * 7)
    weights = datum.loss_fn_inputs["weights"]
    weights.dtype = pb.DTYPE_FLOAT32
    weights.shape.extend([2])
    weights.dense = bytes([0, 0, 128, 63] * 2)
    message.loss_fn_config_v2["beta"].number = 0.1
    return message.SerializeToString()


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every value inside a JSON value."""
    found = [path]
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(item, (*path, key))
    return found


def changed(body: dict[str, Any], rng: random.Random) -> bytes:
    """The body with one to three values replaced, deleted or added; sometimes cut off."""
    body = json.loads(json.dumps(body))
    for _ in range(rng.randint(1, 3)):
        path = rng.choice(places(body))
        if not path:
            body["extra"] = copy.deepcopy(rng.choice(STRANGE))
            continue
        holder: Any = body
        for key in path[:-1]:
            holder = holder[key]
        if isinstance(holder, dict) and rng.random() < 0.15:
            del holder[path[-1]]
        else:
            holder[path[-1]] = copy.deepcopy(rng.choice(STRANGE))
    text = json.dumps(body).encode()
    return text if rng.random() < 0.9 else text[: rng.randint(0, len(text))]


def damaged(raw: bytes, rng: random.Random) -> bytes:
    """The bytes with a few flipped, inserted, removed or repeated."""
    data = bytearray(raw)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data) + 1)
        act: Callable[[], None] = rng.choice(
            [
                lambda at=at: data.__setitem__(slice(at, at + 1), bytes([rng.randrange(256)])),
                lambda at=at: data.__setitem__(slice(at, at), rng.randbytes(rng.randint(1, 9))),
                lambda at=at: data.__delitem__(slice(at, at + rng.randint(1, 9))),
                lambda at=at: data.extend(data[at : at + 40]),
            ]
        )
        act()
    return bytes(data)
