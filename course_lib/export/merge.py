"""Base + adapter -> one model folder: W' = W + (alpha / r) B A for every adapted matrix (Hu et al.
2021, section 4.1).

The base is read tensor by tensor and written shard by shard, so memory holds one shard (1 GiB) and
one delta however large the base is. Each sum is made in float32 and rounded once to the base's own
dtype. When a tied unembedding is adapted the two matrices part: `lm_head.weight` is written and
`tie_word_embeddings` becomes false.

The function continues what a stopped run left: a shard whose hash stands in `merge.json` and still
fits is kept. Whether the result is right is `verify.py`'s question.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from course_lib.errors import CourseError
from course_lib.export.adapter import CONFIG, WEIGHTS, AdapterFolder, LoraPair
from course_lib.export.base import WEIGHT_INDEX, BaseFolder, TensorPlace
from course_lib.export.files import (
    read_json,
    sha256_file,
    write_json,
    write_tensors,
)
from course_lib.files import write_whole

SHARD_BYTES = 1 << 30
HEAD = "lm_head.weight"

Progress = Callable[[str, int, int], None]  # (stage, done, total) in bytes


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the merged model: its name, where its base values lie, and the pair to add, if
    any.
    """

    name: str
    source: str  # the tensor's name in the base; differs only for an unembedding that was tied
    place: TensorPlace
    pair: LoraPair | None


def merge_adapter(
    base: BaseFolder,
    adapter: AdapterFolder,
    out: str | Path,
    log: str | Path | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
    on_progress: Progress | None = None,
) -> Path:
    """Write the merged model to the folder `out`: weights, configuration, tokenizer, template.

    `log` is the file that remembers finished shards; None: `merge.json` beside `out`.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    shards = plan_shards(plan_merge(base, adapter), shard_bytes)
    inputs = {
        "base": fingerprint(base),
        "adapter": [sha256_file(adapter.path / name) for name in (CONFIG, WEIGHTS)],
        "shard_bytes": shard_bytes,
    }
    finished = ShardLog(Path(log or out.with_name("merge.json")), inputs)
    total, written = sum(t.place.nbytes for shard in shards.values() for t in shard), 0
    for name, planned in shards.items():
        if not finished.holds(out / name):
            _write_shard(out / name, base, adapter, planned)
            finished.add(out / name)
        written += sum(t.place.nbytes for t in planned)
        if on_progress:
            on_progress("merge", written, total)
    _write_index(out, shards, total)
    _write_side_files(out, base, adapter)
    return out


def plan_merge(base: BaseFolder, adapter: AdapterFolder) -> list[PlannedTensor]:
    """Every tensor of the merged model, each with its pair. A pair that finds no tensor is an
    error.
    """
    left = dict(adapter.pairs)
    plan = [
        PlannedTensor(n, n, place, left.pop(n.removesuffix(".weight"), None))
        for n, place in base.tensors.items()
    ]
    if "lm_head" in left:  # tied: the head gets values of its own
        plan.append(
            PlannedTensor(
                HEAD, base.head_source, base.tensors[base.head_source], left.pop("lm_head")
            )
        )
    assert not left, ("read_adapter let a pair through that fits no tensor", sorted(left))
    return plan


def plan_shards(plan: list[PlannedTensor], shard_bytes: int) -> dict[str, list[PlannedTensor]]:
    """Tensors in file order, cut into shards of at most `shard_bytes` (a larger tensor stands
    alone).
    """
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in plan:
        if shards[-1] and size + tensor.place.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.place.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {
        f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard
        for i, shard in enumerate(shards, 1)
    }


def lora_delta(pair: LoraPair, adapter: AdapterFolder) -> torch.Tensor:
    """(alpha / r) B A in float32, laid out as the base stores the matrix."""
    delta = adapter.scaling * (pair.B.float() @ pair.A.float())  # (out, in)
    return delta.T if pair.transposed else delta


def _write_shard(
    path: Path, base: BaseFolder, adapter: AdapterFolder, planned: list[PlannedTensor]
) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for tensor in planned:
        with safe_open(base.path / tensor.place.file, framework="pt") as file:
            value = file.get_tensor(tensor.source)
        if tensor.pair is not None:
            value = (value.float() + lora_delta(tensor.pair, adapter)).to(value.dtype)
        tensors[tensor.name] = value.contiguous()
    write_tensors(path, tensors)


def fingerprint(base: BaseFolder) -> dict[str, list[int]]:
    """The base's weight files by size and time: hashing 100 GB would cost more than merging."""
    stats = {name: (base.path / name).stat() for name in base.files}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


class ShardLog:
    """Which shards are finished, by their hashes, so that a stopped merge goes on.

    A log of other inputs (another adapter, a changed base) counts for nothing.
    """

    def __init__(self, path: Path, inputs: dict[str, Any]) -> None:
        self.path, self.inputs = path, inputs
        record = read_json(path) if path.exists() else {}
        self.shards = record["shards"] if record.get("inputs") == inputs else {}

    def holds(self, shard: Path) -> bool:
        """Is this shard finished, and still as it was?"""
        digest = self.shards.get(shard.name)
        return digest is not None and shard.exists() and sha256_file(shard) == digest

    def add(self, shard: Path) -> None:
        self.shards[shard.name] = sha256_file(shard)
        write_json(self.path, {"inputs": self.inputs, "shards": self.shards})


def _write_index(out: Path, shards: dict[str, list[PlannedTensor]], total: int) -> None:
    for stale in set(out.glob("model*.safetensors")) - {out / name for name in shards}:
        stale.unlink()  # from a stopped run that cut its shards otherwise
    (out / WEIGHT_INDEX).unlink(missing_ok=True)
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in shards.items() for tensor in shard}
        write_json(
            out / WEIGHT_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def _write_side_files(out: Path, base: BaseFolder, adapter: AdapterFolder) -> None:
    for path in base.side_files():
        if path.name != "config.json":
            write_whole(out / path.name, path.read_bytes())
    config = json.loads(json.dumps(base.config))
    if "lm_head" in adapter.pairs:
        config["tie_word_embeddings"] = False
        if "text_config" in config:
            config["text_config"]["tie_word_embeddings"] = False
    write_json(out / "config.json", config)


def check_disk(out: Path, base: BaseFolder) -> None:
    """Raise before the work starts when the merged model cannot fit on the disk."""
    need = sum(place.nbytes for place in base.tensors.values())
    free = shutil.disk_usage(out).free
    if free < need:
        raise CourseError(
            str(out),
            f"the merged model needs {need / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free",
            "free some space",
        )
