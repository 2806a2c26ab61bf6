"""The base model and its adapters: what peft makes of them, and that each stays alone."""

from __future__ import annotations

import hashlib
import json
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_double import HubDouble
from huggingface_hub import HfApi, constants
from loopback import free_port, serving
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from tiny_models import ARCHITECTURES, END, VOCAB, random_tokens, tiny_model, tiny_tokenizer

from course_lib.engine import model as model_module
from course_lib.engine import models
from course_lib.engine.lora import lora_config
from course_lib.engine.model import BaseModel
from course_lib.engine.models import fingerprint, knows_again, load_models
from course_lib.engine.requests import LoraSpec, RequestError
from course_lib.errors import CourseError


def tiny_base(architecture: str = "llama", **changes: object) -> BaseModel:
    return BaseModel("tiny", tiny_model(architecture, **changes), tiny_tokenizer())


def randomise(adapter, seed: int = 0) -> dict[str, torch.Tensor]:
    """Give B values, too, so that the adapter changes what the model says."""
    generator = torch.Generator().manual_seed(seed)
    state = {k: 0.1 * torch.randn(v.shape, generator=generator) for k, v in adapter.state().items()}
    adapter.load_state(state)
    return state


@pytest.fixture
def folder(tmp_path):
    """A model saved as anyone would save it."""
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def logits(model, tokens) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.from_numpy(tokens)[None]).logits


def test_a_folder_is_loaded_with_its_tokenizer(folder):
    base = BaseModel.load(str(folder), "course/base", device="cpu")
    assert (base.name, base.context_length, base.vocab_size) == ("course/base", 128, VOCAB)
    assert base.tokenizer.eos_token_id == END
    assert base.tokenizer_path == str(folder)
    assert base.dtype == torch.float32
    tokens = random_tokens(7)
    assert torch.equal(logits(base.plain, tokens), logits(tiny_model(), tokens))


def change(file: Path, place: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(place)
        stream.write(b"another training")


@pytest.mark.parametrize("whole", [256 * 2**20, 0], ids=["read whole", "probed"])
def test_a_fingerprint_tells_trainings_apart_wherever_they_differ(tmp_path, monkeypatch, whole):
    """It saw 64 KiB at either end: a model with every MLP weight changed had the same."""
    monkeypatch.setattr(models, "_WHOLE", whole)
    size, file = 1_000_001, tmp_path / "model.safetensors"
    seen = set()
    for place in (None, 0, 65_536, size // 2, size - 65_600, size - 20):
        file.write_bytes(bytes(size))
        if place is not None:
            change(file, place)
        seen.add(fingerprint(tmp_path))
    assert len(seen) == 6


def test_of_a_large_file_a_fingerprint_reads_places_from_end_to_end():
    places = list(models._places(2**33))
    assert (len(places), places[0], places[-1]) == (256, 0, 2**33 - 65_536)


def test_a_checkpoint_with_a_fingerprint_of_the_old_kind_is_known_again(folder):
    model = load_models(folder)["course/base"]
    weights, config = folder / "model.safetensors", folder / "config.json"
    digest = hashlib.sha256()
    for file in (weights, config):  # as it was made before
        content = file.read_bytes()
        digest.update(f"{file.name}:{len(content)}:".encode())
        digest.update(content[:65_536] + content[-65_536:])
    written = digest.hexdigest()[:16]
    assert knows_again(written, model) and knows_again(model.fingerprint, model)
    change(weights, weights.stat().st_size - 20)
    assert not knows_again(written, model)


def test_a_folder_at_home_may_be_written_with_a_tilde(folder, monkeypatch):
    """The check for the folder knew the tilde, what loads it did not."""
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setenv("USERPROFILE", str(folder.parent))
    assert BaseModel.load(f"~/{folder.name}", "course/base", device="cpu").vocab_size


def test_weights_that_need_unpickling_are_refused(folder):
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(CourseError, match=r"pickle.*can run code"):
        BaseModel.load(str(folder), "course/base")


def test_a_damaged_weight_file_is_told_in_one_line(folder):
    """SafetensorError is no OSError: a traceback came out."""
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CourseError) as caught:
        BaseModel.load(str(folder), "course/base")
    assert str(caught.value).startswith(f"{folder}: the weights cannot be read (Error while")
    assert str(caught.value).endswith("; the file is damaged: make or fetch the model again")
    assert "\n" not in str(caught.value)


def test_a_folder_that_lacks_something_is_told_what(tmp_path):
    """transformers said "expected str, bytes or os.PathLike object, not NoneType"."""
    with pytest.raises(CourseError, match=r"the folder holds no config\.json; give a folder with"):
        BaseModel.load(str(tmp_path), "base")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CourseError, match="the folder holds no tokenizer"):
        BaseModel.load(str(tmp_path), "base")
    with pytest.raises(CourseError, match="there is no such folder"):
        BaseModel.load(str(tmp_path / "elsewhere"), "base")


def test_a_folder_without_a_tokenizer_is_refused_in_one_line(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    with pytest.raises(CourseError) as caught:
        BaseModel.load(str(tmp_path / "model"), "course/base")
    assert "\n" not in str(caught.value)
    assert "tokenizer.json" in str(caught.value)


def test_a_name_that_is_nowhere_is_refused_in_one_line():
    with pytest.raises(CourseError) as caught:
        BaseModel.load("nobody/nothing-like-this", "course/base")
    assert "\n" not in str(caught.value)


def test_a_hub_that_is_out_of_reach_is_said_at_once(monkeypatch):
    """transformers asked six times, for half a minute."""
    nobody = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(model_module, "HfApi", partial(HfApi, endpoint=nobody))
    began = time.monotonic()
    with pytest.raises(CourseError, match=r"^data/base-modle: .* the hub does not answer \("):
        BaseModel.load("data/base-modle", "course/base")
    assert time.monotonic() - began < 5


def test_a_model_that_the_hub_does_not_have_is_said(monkeypatch):
    hub = HubDouble()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with serving(hub.app()) as url:
        monkeypatch.setattr(model_module, "HfApi", partial(HfApi, endpoint=url))
        with pytest.raises(CourseError, match=r"the hub refuses the name \(status 401\)"):
            BaseModel.load("nobody/nothing-like-this", "course/base")
    assert hub.requests == ["GET /api/models/nobody/nothing-like-this"]


def test_the_same_seed_gives_the_same_adapter_as_peft_itself():
    adapter = tiny_base().new_adapter(LoraSpec(rank=4, seed=7))
    model = tiny_model()
    config = lora_config(model, LoraSpec(rank=4))
    torch.manual_seed(7)
    reference = get_peft_model(model, config)
    expected = {
        key.replace(".default.", "."): value
        for key, value in reference.named_parameters()
        if "lora_" in key
    }
    state = adapter.state()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in state)
    assert config.lora_alpha == 32


def test_seeds_differ_and_none_is_random():
    base = tiny_base()
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    tensors = [base.new_adapter(LoraSpec(rank=4, seed=s)).state()[key] for s in (1, 2, None, None)]
    assert len({tuple(tensor.flatten().tolist()) for tensor in tensors}) == 4


def test_making_an_adapter_leaves_torchs_random_numbers_alone():
    base = tiny_base()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    base.new_adapter(LoraSpec(rank=4, seed=5))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        ({"train_mlp": False, "train_unembed": False}, "self_attn"),
        ({"train_attn": False, "train_unembed": False}, "mlp"),
        ({"train_attn": False, "train_mlp": False}, "lm_head"),
    ],
)
def test_the_flags_choose_what_is_trained(flags, kept):
    names = tiny_base().new_adapter(LoraSpec(rank=4, **flags)).state()
    assert names
    assert all(kept in name for name in names)


def test_all_flags_together_train_every_matrix():
    names = tiny_base().new_adapter(LoraSpec(rank=4)).state()
    assert len(names) == 2 * (2 * 7 + 1)  # A and B, two layers of seven matrices, the unembedding


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (LoraSpec(train_mlp=False, train_attn=False, train_unembed=False), "at least one of"),
        (LoraSpec(rank=0), "rank is 0"),
        (LoraSpec(seed=2**70), "seed is 1180591620717411303424; give 0 to"),
    ],
)
def test_an_adapter_that_trains_nothing_is_refused(spec, words):
    with pytest.raises(RequestError, match=words):
        tiny_base().new_adapter(spec)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_folding_gives_the_logits_of_the_adapter(architecture):
    base = tiny_base(architecture)
    adapter = base.new_adapter(LoraSpec(rank=4, seed=0))
    folded = base.folding.fold(randomise(adapter))
    tokens = random_tokens(9)
    expected = logits(base.activate(adapter), tokens)
    with torch.no_grad():
        given = torch.func.functional_call(
            base.plain, folded, torch.from_numpy(tokens)[None], tie_weights=False
        ).logits
    assert (logits(base.plain, tokens) - expected).abs().max() > 0.1  # the adapter does something
    assert torch.allclose(given, expected, atol=2e-5)


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_peft_reads_what_an_adapter_saves(architecture, tmp_path):
    base = tiny_base(architecture)
    adapter = base.new_adapter(LoraSpec(rank=4, seed=0))
    state = randomise(adapter)
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter.peft_config))
    loaded = PeftModel.from_pretrained(tiny_model(architecture), tmp_path)
    tokens = random_tokens(9)
    assert torch.allclose(logits(loaded, tokens), logits(base.activate(adapter), tokens), atol=1e-5)


def test_the_adapter_config_is_the_same_in_every_process():
    first, second = (tiny_base().new_adapter(LoraSpec(rank=4)).peft_config for _ in range(2))
    assert json.dumps(first) == json.dumps(second)
    assert first["target_modules"] == sorted(first["target_modules"])
    assert first["lora_alpha"] == 32


def test_adapters_do_not_touch_each_other_nor_the_base():
    base = tiny_base()
    tokens = random_tokens(9)
    plain = logits(base.plain, tokens)
    mine, yours = (base.new_adapter(LoraSpec(rank=rank, seed=rank)) for rank in (4, 8))
    randomise(mine)
    assert torch.equal(logits(base.activate(yours), tokens), plain)  # B = 0
    before = logits(base.activate(mine), tokens)
    randomise(yours)
    assert torch.equal(logits(base.activate(mine), tokens), before)
    assert torch.equal(logits(base.plain, tokens), plain)


def test_a_deleted_adapter_comes_back_through_its_state():
    base = tiny_base()
    first = base.new_adapter(LoraSpec(rank=4, seed=0))
    state = randomise(first)
    tokens = random_tokens(9)
    expected = logits(base.activate(first), tokens)
    first.delete()
    with pytest.raises(RequestError, match="deleted"):
        base.activate(first)
    again = base.new_adapter(LoraSpec(rank=4, seed=1))
    again.load_state(state)
    assert torch.equal(logits(base.activate(again), tokens), expected)


def test_nbytes_counts_weights_gradients_and_two_moments():
    adapter = tiny_base().new_adapter(LoraSpec(rank=4, train_mlp=False, train_attn=False))
    assert adapter.nbytes == 4 * 4 * (4 * 32 + 4 * VOCAB)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda s: s.pop(next(iter(s))), "lacks base_model.model.model.layers.0.self_attn.q_proj"),
        (lambda s: s.update(extra=torch.zeros(1)), "holds extra"),
        (lambda s: s.update({next(iter(s)): torch.zeros(3, 3)}), r"\(3, 3\); it must be \(4, 32\)"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_as_a_whole(spoil, words):
    adapter = tiny_base().new_adapter(LoraSpec(rank=4, seed=0))
    before, state = adapter.state(), {k: v + 1 for k, v in adapter.state().items()}
    spoil(state)
    with pytest.raises(RequestError, match=words):
        adapter.load_state(state)
    assert all(torch.equal(before[key], value) for key, value in adapter.state().items())


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda s: s.pop(next(iter(s))), "lacks the partner"),
        (lambda s: s.update({"base_model.model.x.lora_A.weight": torch.zeros(4, 4)}), "no weight"),
        (lambda s: s.update({next(iter(s)): torch.zeros(4, 33)}), "does not fit"),
        (lambda s: s.update({next(iter(s)): torch.zeros(5, 32)}), "rank"),
    ],
)
def test_sampler_weights_that_do_not_fit_are_refused(spoil, words):
    base = tiny_base()
    state = dict(base.new_adapter(LoraSpec(rank=4, seed=0)).state())
    spoil(state)
    with pytest.raises(RequestError, match=words):
        base.sampler_weights(state)


def test_state_is_a_copy():
    adapter = tiny_base().new_adapter(LoraSpec(rank=4, seed=0))
    state = adapter.state()
    before = {key: value.clone() for key, value in state.items()}
    randomise(adapter)
    assert all(np.array_equal(before[key], state[key]) for key in state)


def test_a_policy_is_folded_once_for_sampling_and_training_and_again_after_a_change():
    base = tiny_base()
    adapter = base.new_adapter(LoraSpec(rank=4, seed=0))
    randomise(adapter)
    sampled = base.snapshot_weights(before := adapter.state())
    trained = base.arranged(base.llama, adapter)
    assert trained.layers[0].qkv.weight is sampled.layers[0].qkv.weight

    randomise(adapter, seed=1)
    changed = base.arranged(base.llama, adapter)
    assert not torch.equal(changed.layers[0].qkv.weight, sampled.layers[0].qkv.weight)
    again = base.snapshot_weights(before)  # the snapshot is still what it was
    assert torch.equal(again.layers[0].qkv.weight, sampled.layers[0].qkv.weight)
