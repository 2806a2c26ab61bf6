"""What is trained: one base model, frozen, and the LoRA adapters that learners put on it.

Any Hugging Face causal LM is loaded, by folder or hub name, from safetensors only. Two views of it
share the same weights in memory: one that peft has put adapters into, for training, and a plain
one, for sampling, whose weights are exchanged for folded ones (W + scale B A). So sampling never
meets a half-made training step. A plain Llama is computed by `llama` in both: peft then gives its
adapters their names and first numbers only.

Left out: quantised weights, several devices, models that keep a recurrent state instead of keys and
values.
"""

from __future__ import annotations

import enum
import itertools
import os
import secrets
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import HfApi, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import cached_file

from course_lib.engine.adapter import Adapter, Moment, Snapshot
from course_lib.engine.forwards import Forward, GeneralForward, LlamaForward
from course_lib.engine.llama import Llama, Weights
from course_lib.engine.lora import Folding, lora_config, sharing_copy
from course_lib.engine.requests import LoraSpec, RequestError
from course_lib.errors import CourseError

CONFIG = "config.json"
WHAT_TO_GIVE = "give a folder with config.json, tokenizer.json and *.safetensors, or a hub name"
HUB_S = 8.0  # for one answer


@dataclass(frozen=True, eq=False)
class SamplerWeights:
    """An immutable snapshot to sample from: an adapter's tensors; None is the bare base model."""

    state: dict[str, Tensor] | None

    @cached_property
    def sound(self) -> bool:
        """Are its numbers numbers? A learning rate that is far too high leaves others."""
        tensors = list(self.state.values()) if self.state else []
        return not tensors or bool(torch.stack(torch._foreach_norm(tensors)).isfinite().all())


class BaseModel:
    """A frozen base model with its tokenizer, and the adapters on it."""

    def __init__(
        self, name: str, model: PreTrainedModel, tokenizer, tokenizer_path: str = ""
    ) -> None:
        model.eval().requires_grad_(False)
        self.name = name
        self.tokenizer = tokenizer
        self.tokenizer_path = tokenizer_path  # a local folder, whatever the model was loaded by
        self.config = model.config.get_text_config()
        self.context_length = int(self.config.max_position_embeddings)
        self.vocab_size = model.get_input_embeddings().weight.shape[0]
        self.device, self.dtype = model.device, model.dtype
        self.parameter_count = model.num_parameters()
        self.plain = sharing_copy(model)  # for sampling
        self.folding = Folding(self.plain)
        self.trained = model  # peft changes this one in place
        self._peft: PeftModel | None = None
        self.llama = agreeing_llama(self.plain)  # the fast way, where it gives the same numbers
        self._folded: tuple[Moment, Weights] | None = None
        self._arranged: tuple[Moment, Weights] | None = None
        self._numbers = itertools.count()
        self._active: Adapter | None = None

    @classmethod
    def load(
        cls,
        folder_or_hub: str,
        name: str,
        device: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> BaseModel:
        """Load a folder or hub name: float32 on CPU and MPS, bfloat16 on CUDA, or as told."""
        folder = find_model(folder_or_hub)
        folder_or_hub = os.path.expanduser(folder_or_hub)
        device = device or default_device()
        dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CourseError(folder_or_hub, first_line(error), WHAT_TO_GIVE) from error
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder_or_hub, dtype=dtype, use_safetensors=True, attn_implementation="sdpa"
            )
        except (OSError, ValueError) as error:
            remedy = "give a causal language model with weights in safetensors"
            raise CourseError(folder_or_hub, first_line(error), remedy) from error
        except SafetensorError as error:
            finding = f"the weights cannot be read ({first_line(error)})"
            remedy = "the file is damaged: make or fetch the model again"
            raise CourseError(folder_or_hub, finding, remedy) from error
        return cls(name, model.to(device), tokenizer, str(folder.resolve()))

    def new_adapter(self, spec: LoraSpec) -> Adapter:
        """A fresh adapter (B = 0, so it changes nothing yet); the same seed gives the same tensors.

        The seed is torch's: `torch.manual_seed(seed)` before `peft.get_peft_model` gives these very
        tensors.
        """
        config = lora_config(self.plain, spec)
        name = f"adapter{next(self._numbers)}"
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
            torch.manual_seed(secrets.randbits(63) if spec.seed is None else spec.seed)
            if self._peft is None:
                self._peft = get_peft_model(self.trained, config, name)
            else:
                self._peft.add_adapter(name, config)
        parameters = lora_parameters(self._peft, name)
        description = peft_config_json(config, self.name)
        return Adapter(name, spec, parameters, description, lambda: self._remove(name))

    def activate(self, adapter: Adapter) -> PeftModel:
        """The training view with this adapter switched on and every other one off."""
        if adapter.name not in self._peft.peft_config:
            raise RequestError("this adapter was deleted")
        if self._active is not adapter:
            self._peft.set_adapter(adapter.name)
            self._active = adapter
        return self._peft

    def sampling_forward(self, reorders: bool = True) -> Forward:
        """A forward pass for sampling: the caller's own, around the shared base weights.

        `reorders`: weights that are much used are arranged anew, which rounds otherwise.
        """
        if self.llama is not None:
            return LlamaForward(self.llama, self.snapshot_weights, reorders)
        return GeneralForward(self.plain, self.folding)

    def arranged(self, llama: Llama, adapter: Adapter) -> Weights:
        """The weights of the fast forward pass with the adapter folded in, ready for gradients."""
        if self._arranged is None or self._arranged[0] != adapter.moment:
            self._arranged = None  # free the old ones first
            weights = self.folded(llama, adapter.parameters, adapter.moment)
            for parameter in adapter.parameters.values():
                parameter.requires_grad_(True)  # peft turns it off when it is not the active one
            with torch.enable_grad():
                weights = llama.trained(weights, adapter.parameters)
            self._arranged = adapter.moment, weights
        return self._arranged[1]

    def folded(self, llama: Llama, state: Mapping[str, Tensor], moment: Moment) -> Weights:
        """The weights of the fast forward pass with an adapter's tensors of a moment folded in.

        The last ones are kept: those that a policy samples with are those it is trained with next.
        """
        if self._folded is None or self._folded[0] != moment:
            self._folded = None  # free the old ones first
            self._folded = moment, llama.weights(self.folding.fold(state))
        return self._folded[1]

    def snapshot_weights(self, state: Mapping[str, Tensor] | None) -> Weights:
        """The same for a sampler's tensors, wherever they come from; None is the base model."""
        assert self.llama is not None
        if isinstance(state, Snapshot):
            return self.folded(self.llama, state, state.moment)
        return self.llama.weights(self.folding.fold(state or {}))

    def sampler_weights(self, state: dict[str, Tensor] | None) -> SamplerWeights:
        """A snapshot to sample from: the tensors of an adapter's `state()`; None is the base model.

        Nothing is computed or copied here; the sampler folds the tensors into the weights when it
        first meets them.
        """
        if state is not None and not isinstance(state, Snapshot):
            self.folding.check(state)
        return SamplerWeights(state)

    def _remove(self, name: str) -> None:
        self._active = self._arranged = self._folded = None
        if self._peft is not None and name in self._peft.peft_config:
            with warnings.catch_warnings(action="ignore"):  # that the active one goes is meant
                self._peft.delete_adapter(name)


def agreeing_llama(model: PreTrainedModel) -> Llama | None:
    """The fast forward pass, if the model is one that it fits and it gives the same logits."""
    if not Llama.fits(model):
        return None
    llama = Llama(model)
    tokens = torch.arange(min(16, model.config.vocab_size), device=model.device)
    with torch.inference_mode():
        expected = model(tokens.unsqueeze(0)).logits[0]
        given = llama.logits(llama.weights({}), tokens)
    return llama if torch.allclose(given, expected, rtol=1e-4, atol=1e-4) else None


def lora_parameters(model: PeftModel, name: str) -> dict[str, nn.Parameter]:
    """The tensors of one adapter by their names in a file, where peft leaves out its own name."""
    mark = f".{name}."
    return {key.replace(mark, "."): p for key, p in model.named_parameters() if mark in key}


def peft_config_json(config: LoraConfig, base_model: str) -> dict:
    """The content of adapter_config.json, in an order that does not change from run to run."""
    fields = config.to_dict() | {"inference_mode": True, "base_model_name_or_path": base_model}
    for key, value in fields.items():
        if isinstance(value, set):
            fields[key] = sorted(value)
        elif isinstance(value, enum.Enum):
            fields[key] = value.value
    return fields


def default_device() -> str:
    """CUDA, Apple's MPS or the CPU, whichever is there first."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def find_model(folder_or_hub: str) -> Path:
    """The folder that holds the model's configuration, fetched from the hub for a hub name.

    Raises:
        CourseError: there is none, or the folder lacks something that a model needs.
    """
    check_folder(folder_or_hub)
    place = os.path.expanduser(folder_or_hub)
    check_hub(place)
    refuse_pickles(place)
    try:
        return Path(cached_file(place, CONFIG)).parent
    except (OSError, ValueError) as error:
        raise CourseError(folder_or_hub, first_line(error), WHAT_TO_GIVE) from error


def check_folder(folder_or_hub: str) -> None:
    """Say what a folder lacks before the libraries say it in their words; hub names pass."""
    path = Path(folder_or_hub).expanduser()
    if path.is_dir():
        needed = {CONFIG: [CONFIG], "tokenizer": ["tokenizer*", "vocab*"]}
        for name, patterns in needed.items():
            if not any(file for pattern in patterns for file in path.glob(pattern)):
                raise CourseError(folder_or_hub, f"the folder holds no {name}", WHAT_TO_GIVE)
    elif path.is_absolute() or folder_or_hub.startswith((".", "~")):
        raise CourseError(folder_or_hub, "there is no such folder", WHAT_TO_GIVE)


def check_hub(name: str) -> None:
    """Ask the hub once for a model that is neither a folder nor in the cache: transformers alone
    would ask six times, for half a minute."""
    if Path(name).is_dir():
        return
    try:
        if not is_offline_mode() and not isinstance(try_to_load_from_cache(name, CONFIG), str):
            HfApi().model_info(name, timeout=HUB_S)
    except HFValidationError:
        return  # transformers says what a name looks like
    except HfHubHTTPError as error:
        status = error.response.status_code
        finding = f"there is no such folder here, and the hub refuses the name (status {status})"
        remedy = f"{WHAT_TO_GIVE}; a gated model needs `hf auth login`"
        raise CourseError(name, finding, remedy) from error
    except Exception as error:  # of whatever speaks HTTP for the library
        finding = f"there is no such folder here, and the hub does not answer ({first_line(error)})"
        raise CourseError(name, finding, WHAT_TO_GIVE) from error


def refuse_pickles(folder: str) -> None:
    """Weights that exist only as pickles are not loaded: unpickling runs what is in the file."""
    path = Path(folder)
    pickles = (
        [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")] if path.is_dir() else []
    )
    if pickles and not any(path.glob("*.safetensors")):
        finding = f"its weights are only there as a pickle ({pickles[0].name}), which can run code"
        raise CourseError(folder, finding, "save the model again with safe_serialization=True")


def first_line(error: Exception) -> str:
    """What went wrong, without the page of advice that transformers adds."""
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else repr(error)
