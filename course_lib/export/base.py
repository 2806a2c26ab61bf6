"""A base model as it lies in a folder: tensor names, shapes and files, read from safetensors
headers alone.

Nothing here loads weights, and nothing unpickles: a base that exists only as `pytorch_model.bin`
is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from course_lib.dotenv import PROJECT
from course_lib.errors import CourseError
from course_lib.export.files import read_json, safe_path

COPIED = (
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "LICENSE*",
    "NOTICE*",
)  # besides weights and README
SHIPPED = "course/base"  # the SDK's name of the model in data/base-model
WEIGHT_INDEX = "model.safetensors.index.json"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


@dataclass(frozen=True)
class TensorPlace:
    """One tensor of the base: the file that holds it, its shape and its size in bytes."""

    file: str
    shape: tuple[int, ...]
    dtype: str  # the safetensors name: "BF16", "F32" ...
    nbytes: int


@dataclass(frozen=True)
class BaseFolder:
    """A Hugging Face model folder whose weights are safetensors, in one file or many."""

    path: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json; a quantised base is refused, because adding to packed integers is not a
        merge.
        """
        config = read_json(self.path / "config.json")
        if config.get("quantization_config"):
            raise CourseError(
                str(self.path / "config.json"),
                "the base is quantised, and a delta cannot be added to packed integers",
                "use the base in bfloat16 or float32",
            )
        return config

    @cached_property
    def tensors(self) -> dict[str, TensorPlace]:
        """Every tensor of the base in file order."""
        places: dict[str, TensorPlace] = {}
        for name in self._weight_files():
            for key, place in _header(self.path, name).items():
                if key in places:
                    raise CourseError(
                        str(self.path / name),
                        f"tensor {key} is in two files",
                        "fetch the base again",
                    )
                places[key] = place
        return places

    @property
    def files(self) -> list[str]:
        """The names of the files that hold the weights."""
        return sorted({place.file for place in self.tensors.values()})

    @property
    def head_source(self) -> str:
        """The stored tensor that the unembedding reads: its own, or the embedding when the two are
        tied.
        """
        if "lm_head.weight" in self.tensors:
            return "lm_head.weight"
        found = [name for name in self.tensors if name.endswith(EMBEDDINGS)]
        if len(found) != 1:
            raise CourseError(
                str(self.path), f"no lm_head.weight, and {len(found)} embeddings", "merge by hand"
            )
        return found[0]

    @property
    def stores_in_out(self) -> bool:
        """True for GPT-2's Conv1D, stored (in, out). Peft goes by the layer, not by its flag."""
        return self.config.get("model_type") in ("gpt2", "openai-gpt")

    def side_files(self) -> list[Path]:
        """Tokenizer, chat template, configurations and licences: what a merged folder needs besides
        weights.
        """
        found = {path for pattern in COPIED for path in self.path.glob(pattern)}
        return sorted(path for path in found if path.name != WEIGHT_INDEX and path.is_file())

    def _weight_files(self) -> list[str]:
        index = self.path / WEIGHT_INDEX
        if index.exists():
            names = sorted(set(read_json(index)["weight_map"].values()))
            for name in names:
                if not safe_path(self.path, name, str(index)).exists():
                    raise CourseError(
                        str(index), f"the shard {name} is missing", "fetch the base model again"
                    )
            return names
        if (self.path / "model.safetensors").exists():
            return ["model.safetensors"]
        finding = "no model.safetensors here"
        if any(self.path.glob("*.bin")):
            finding = "the weights are pickled (.bin), and pickles are never opened"
        raise CourseError(str(self.path), finding, "give a model folder with safetensors weights")


def find_base(name: str, *places: str | None) -> BaseFolder:
    """The folder of the base model that the SDK calls `name`.

    The first of `places` that is a model folder, `name` itself as a folder, the shipped model for
    `course/base`, else a hub name, whose safetensors are fetched (or found in the cache).
    """
    for place in [*places, name]:
        if place and (Path(place) / "config.json").exists():
            return BaseFolder(Path(place))
    if name == SHIPPED:
        return BaseFolder(PROJECT / "data" / "base-model")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(name, allow_patterns=[*COPIED, "*.safetensors"])
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().split("\n")[0]
        finding = f"the base model is no folder here, and the hub does not give it ({first})"
        raise CourseError(name, finding, "give its folder with --model") from None
    return BaseFolder(Path(folder))


def _header(folder: Path, name: str) -> dict[str, TensorPlace]:
    try:
        with safe_open(folder / name, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            return {key: _place(name, part) for key, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CourseError(
            str(folder / name), f"cannot be read ({error})", "fetch the file again"
        ) from None


def _place(name: str, part: Any) -> TensorPlace:
    shape, dtype = tuple(part.get_shape()), part.get_dtype()
    count = 1
    for size in shape:
        count *= size
    return TensorPlace(name, shape, dtype, count * DTYPE_BYTES.get(dtype, 8))


DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "BF16": 2,
    "F16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
