"""Merging: the merged folder is the adapter, and every wrong merge is caught."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from deploy_models import save_adapter, save_base, tiny_config, tiny_tokenizer
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPT2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from course_lib.errors import CourseError
from course_lib.export import merge
from course_lib.export.adapter import read_adapter
from course_lib.export.base import BaseFolder
from course_lib.export.merge import merge_adapter
from course_lib.export.peft_layout import to_peft
from course_lib.export.serving_rules import check_serving_rules
from course_lib.export.verify import verify_merge

IDS = torch.arange(1, 25).reshape(2, 12)


def merged(tmp_path: Path, base: Path, adapter: Path, **options) -> Path:
    folder = BaseFolder(base)
    to_peft(adapter, folder, tmp_path / "peft", "course/base")
    return merge_adapter(
        folder, read_adapter(tmp_path / "peft", folder), tmp_path / "merged", **options
    )


def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapter") / "adapter", base)


def test_merged_logits_are_the_adapters_and_not_the_bases(tmp_path, base, adapter):
    out = merged(tmp_path, base, adapter)
    wanted = logits(base, adapter)
    assert torch.allclose(logits(out), wanted, atol=1e-4)
    assert (logits(base) - wanted).abs().max() > 0.1
    found = verify_merge(BaseFolder(base), tmp_path / "peft", out)
    assert found.error < 1e-4 < 0.1 < found.effect and found.tensors == 21


def test_a_merged_matrix_is_w_plus_alpha_over_r_b_a(tmp_path, base, adapter):
    out = merged(tmp_path, base, adapter)
    name = "model.layers.1.self_attn.q_proj"
    lora = load_file(adapter / "adapter_model.safetensors")
    A = lora[f"base_model.model.{name}.lora_A.weight"]
    B = lora[f"base_model.model.{name}.lora_B.weight"]
    W = load_file(base / "model.safetensors")[f"{name}.weight"]
    found = load_file(out / "model.safetensors")[f"{name}.weight"]
    assert torch.allclose(found, W + 32 / 8 * B @ A, atol=1e-6)


def test_an_adapter_of_rank_stabilised_lora_is_merged_as_peft_merges_it(tmp_path, base):
    adapter = save_adapter(tmp_path / "adapter", base)
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_rslora": True}))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wanted = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()
    found = load_file(merged(tmp_path, base, adapter) / "model.safetensors")
    assert all(torch.allclose(tensor, wanted[name], atol=1e-5) for name, tensor in found.items())


def test_the_merged_folder_keeps_tokenizer_template_and_generation_settings(
    tmp_path, base, adapter
):
    out = merged(tmp_path, base, adapter)
    chat = [{"role": "user", "content": "What is 23 + 45 + 61?"}]
    tokens = [
        AutoTokenizer.from_pretrained(folder).apply_chat_template(
            chat, add_generation_prompt=True, tokenize=False
        )
        for folder in (base, out)
    ]
    assert tokens[0] == tokens[1] == "<|user|>What is 23 + 45 + 61?<|end|><|assistant|>"
    assert (out / "generation_config.json").read_bytes() == (
        base / "generation_config.json"
    ).read_bytes()


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapted_unembedding_leaves_the_embedding_alone(tmp_path, tied):
    base = save_base(tmp_path / "base", tied=tied)
    adapter = save_adapter(tmp_path / "adapter", base, modules=["lm_head"])
    out = merged(tmp_path, base, adapter)
    tensors = load_file(out / "model.safetensors")
    before = load_file(base / "model.safetensors")
    assert torch.equal(tensors["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    verify_merge(BaseFolder(base), tmp_path / "peft", out)


def test_a_tied_base_stays_tied_when_its_unembedding_is_not_adapted(tmp_path):
    base = save_base(tmp_path / "base", tied=True)
    adapter = save_adapter(tmp_path / "adapter", base, head=False)
    out = merged(tmp_path, base, adapter)
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
    verify_merge(BaseFolder(base), tmp_path / "peft", out)


def test_bfloat16_is_kept_and_every_sum_is_rounded_once(tmp_path):
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base)
    out = merged(tmp_path, base, adapter)
    name = "model.layers.0.mlp.down_proj"
    lora = load_file(adapter / "adapter_model.safetensors")
    A = lora[f"base_model.model.{name}.lora_A.weight"]
    B = lora[f"base_model.model.{name}.lora_B.weight"]
    W = load_file(base / "model.safetensors")[f"{name}.weight"]
    found = load_file(out / "model.safetensors")[f"{name}.weight"]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, (W.float() + 4.0 * (B @ A)).bfloat16())
    verify_merge(BaseFolder(base), tmp_path / "peft", out)


def test_a_sharded_base_gives_the_same_tensors_in_shards_of_any_size(tmp_path, base, adapter):
    sharded = save_base(tmp_path / "sharded", shard="40KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    whole = merged(tmp_path / "a", base, adapter)
    parts = merged(tmp_path / "b", sharded, adapter, shard_bytes=30_000)
    files = sorted(parts.glob("model-*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 60_000 for file in files)
    together = {k: v for file in files for k, v in load_file(file).items()}
    expected = load_file(whole / "model.safetensors")
    assert together.keys() == expected.keys()
    assert all(torch.equal(together[name], expected[name]) for name in expected)
    assert torch.equal(logits(parts), logits(whole))


FAMILIES = {
    "qwen3": Qwen3Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=True,
        vocab_size=320,
    ),
    "gemma3": Gemma3TextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, vocab_size=320,
    ),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=320),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_merge_too(tmp_path, family):
    base = save_base(tmp_path / "base", config=FAMILIES[family])
    adapter = save_adapter(tmp_path / "adapter", base, strength=0.02)
    out = merged(tmp_path, base, adapter)
    verify_merge(BaseFolder(base), tmp_path / "peft", out)


def test_a_mixture_of_experts_merges_expert_by_expert(tmp_path):
    config = Qwen3MoeConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_experts=4, num_experts_per_tok=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    base = save_base(tmp_path / "base", config=config)
    stacks = [
        f"model.layers.{layer}.mlp.experts.{matrix}"
        for layer in (0, 1)
        for matrix in ("gate_up_proj", "down_proj")
    ]
    adapter = save_adapter(
        tmp_path / "adapter",
        base,
        modules=[f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)] + ["lm_head"],
        parameters=stacks,
        rank=4,
    )
    out = merged(tmp_path, base, adapter)
    found = verify_merge(BaseFolder(base), tmp_path / "peft", out)
    assert found.effect > 0.1


# --- wrong merges are caught --------------------------------------------------------------------


def spoil(out: Path, name: str, change) -> None:
    tensors = load_file(out / "model.safetensors")
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def refused(base: Path, tmp_path: Path, out: Path, match: str, probe=None) -> None:
    with pytest.raises(CourseError, match=match):
        verify_merge(BaseFolder(base), tmp_path / "peft", out, probe)


def test_a_merge_with_a_wrong_scale_is_caught(tmp_path, base, adapter, monkeypatch):
    right = merge.lora_delta
    monkeypatch.setattr(merge, "lora_delta", lambda pair, adapter: right(pair, adapter) / 2)
    out = merged(tmp_path, base, adapter)
    refused(base, tmp_path, out, "is not base [+] adapter")


def test_a_merge_with_b_transposed_is_caught(tmp_path, base, adapter, monkeypatch):
    def transposed(pair, adapter):
        if pair.module.endswith("q_proj"):  # square, so that the shapes do not tell
            return adapter.scaling * (pair.A.T @ pair.B.T)
        return adapter.scaling * (pair.B @ pair.A)

    monkeypatch.setattr(merge, "lora_delta", transposed)
    refused(base, tmp_path, merged(tmp_path, base, adapter), "q_proj.weight is not base")


def test_a_merge_that_skips_one_matrix_is_caught(tmp_path, base, adapter):
    out = merged(tmp_path, base, adapter)
    name = "model.layers.1.mlp.up_proj.weight"
    spoil(out, name, lambda _: load_file(base / "model.safetensors")[name])
    refused(base, tmp_path, out, "up_proj.weight is not base")


def test_a_merge_that_loses_a_tensor_is_caught(tmp_path, base, adapter):
    out = merged(tmp_path, base, adapter)
    tensors = load_file(out / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    refused(base, tmp_path, out, "missing or too many: model.layers.1.mlp.up_proj.weight")


def test_a_base_tensor_changed_on_the_way_is_caught(tmp_path, base, adapter):
    out = merged(tmp_path, base, adapter)
    spoil(out, "model.norm.weight", lambda norm: norm * 1.001)
    refused(base, tmp_path, out, "model.norm.weight is not base")


def test_in_bfloat16_half_the_scale_in_one_matrix_is_caught(tmp_path, monkeypatch):
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base, strength=0.005)
    right = merge.lora_delta

    def halved(pair, adapter):
        half = pair.module == "model.layers.0.self_attn.o_proj"
        return right(pair, adapter) * (0.5 if half else 1)

    monkeypatch.setattr(merge, "lora_delta", halved)
    refused(base, tmp_path, merged(tmp_path, base, adapter), "o_proj.weight is not base")


def test_logits_catch_what_the_tensors_cannot_a_config_that_runs_them_otherwise(
    tmp_path, base, adapter
):
    out = merged(tmp_path, base, adapter)
    config = json.loads((out / "config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (out / "config.json").write_text(json.dumps(config))
    refused(base, tmp_path, out, "logits differ from the adapter's")


def test_an_untrained_adapter_is_not_called_a_merge(tmp_path, base):
    adapter = save_adapter(tmp_path / "adapter", base, strength=0.0)
    refused(base, tmp_path, merged(tmp_path, base, adapter), "not told apart from the base")


def test_a_stale_base_is_caught_by_the_services_own_logprobs(tmp_path, base, adapter):
    tokens = tiny_tokenizer()("What is 23 + 45 + 61? The answer is 129.").input_ids
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(adapter)).eval()
    with torch.no_grad():
        table = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)  # (T, V)
    answers = [table[i, token].item() for i, token in enumerate(tokens[1:])]
    probe = {"tokens": tokens, "logprobs": answers}

    right = merged(tmp_path / "right", base, adapter)
    found = verify_merge(BaseFolder(base), tmp_path / "right" / "peft", right, probe)
    assert found.service_error_nats < 1e-4
    stale = save_base(tmp_path / "stale", seed=7)
    wrong = merged(tmp_path, stale, adapter)
    verify_merge(BaseFolder(stale), tmp_path / "peft", wrong)  # nothing to see without the service
    refused(stale, tmp_path, wrong, "differ from the service's by .* nats", probe)


# --- the adapter's two namings, and adapters that are refused -----------------------------------


def rename(adapter: Path, out: Path, change, config_change=None) -> Path:
    """A copy of `adapter` with other tensor names (or tensors) and configuration."""
    out.mkdir(parents=True)
    tensors = {}
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        tensors |= change(name, tensor)
    save_file({k: v.contiguous() for k, v in tensors.items()}, out / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text()) | (config_change or {})
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


def test_tinkers_name_of_the_unembedding_is_understood(tmp_path, base, adapter):
    def hosted(name, tensor):
        return {name.replace("model.lm_head", "model.model.unembed_tokens"): tensor}

    renamed = rename(adapter, tmp_path / "hosted", hosted)
    assert any("unembed_tokens" in k for k in load_file(renamed / "adapter_model.safetensors"))
    out = merged(tmp_path, base, renamed)
    assert torch.allclose(logits(out), logits(base, adapter), atol=1e-4)


def test_the_written_adapter_loads_in_peft_and_gives_the_same_logits(tmp_path, base, adapter):
    to_peft(adapter, BaseFolder(base), tmp_path / "peft", "course/base")
    assert torch.allclose(logits(base, tmp_path / "peft"), logits(base, adapter), atol=1e-6)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["target_modules"] == [
        "down_proj", "gate_proj", "k_proj", "lm_head", "o_proj", "q_proj", "up_proj", "v_proj",
    ]  # fmt: skip
    assert config["base_model_name_or_path"] == "course/base"


def test_an_adapter_on_some_layers_names_them_in_full(tmp_path, base):
    name = "model.layers.1.self_attn.q_proj"
    adapter = save_adapter(tmp_path / "adapter", base, modules=[name])
    to_peft(adapter, BaseFolder(base), tmp_path / "peft", "course/base")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["target_modules"] == [name]


REFUSALS = {
    "transposed B": (lambda n, t: {n: t.T if "lora_B" in n else t}, {}, "not .* and"),
    "one half": (lambda n, t: {} if "q_proj.lora_B" in n else {n: t}, {}, "only one of lora_A"),
    "another base": (lambda n, t: {n.replace("q_proj", "qq"): t}, {}, "the base has no module"),
    "embedding adapter": (
        lambda n, t: {n: t, "x.lora_embedding_A": t.clone()},
        {},
        "neither a lora_A",
    ),
    "NaN": (lambda n, t: {n: t * float("nan")}, {}, "holds NaN"),
    "another rank": (lambda n, t: {n: t}, {"r": 16}, r"A \(8, 32\)"),
    "rank zero": (lambda n, t: {n: t}, {"r": 0}, "r is 0, not a positive number"),
    "DoRA": (lambda n, t: {n: t}, {"use_dora": True}, "use_dora is set"),
    "stacked experts": (lambda n, t: {n: t[None]}, {}, "stacks its experts in Tinker's own way"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_an_adapter_that_does_not_fit_is_refused_by_name(tmp_path, base, adapter, case):
    change, config, match = REFUSALS[case]
    bad = rename(adapter, tmp_path / "bad", change, config)
    with pytest.raises(CourseError, match=match):
        read_adapter(bad, BaseFolder(base))


class Touch:
    """Unpickling this makes a file: the proof that somebody unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickles_are_refused_and_never_opened(tmp_path, base, adapter):
    opened = tmp_path / "opened"
    pickled = rename(adapter, tmp_path / "pickled", lambda n, t: {n: t})
    (pickled / "adapter_model.safetensors").unlink()
    torch.save({"x": Touch(opened)}, pickled / "adapter_model.bin")
    with pytest.raises(CourseError, match="pickles are never opened"):
        read_adapter(pickled, BaseFolder(base))
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text((base / "config.json").read_text())
    torch.save({"x": Touch(opened)}, old / "pytorch_model.bin")
    with pytest.raises(CourseError, match="pickles are never opened"):
        read_adapter(adapter, BaseFolder(old))
    assert not opened.exists()


def test_a_truncated_file_is_named(tmp_path, base, adapter):
    cut = rename(adapter, tmp_path / "cut", lambda n, t: {n: t})
    data = (cut / "adapter_model.safetensors").read_bytes()
    (cut / "adapter_model.safetensors").write_bytes(data[:-100])
    with pytest.raises(CourseError, match=r"adapter_model\.safetensors: cannot be read"):
        read_adapter(cut, BaseFolder(base))


def test_a_quantised_base_is_refused(tmp_path, base):
    config = tiny_config(tiny_tokenizer()).to_dict() | {"quantization_config": {"bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    with pytest.raises(CourseError, match="the base is quantised"):
        _ = BaseFolder(tmp_path).config


# --- going on after a stop -----------------------------------------------------------------------


def test_a_stopped_merge_keeps_its_finished_shards(tmp_path, base, adapter, monkeypatch):
    written: list[str] = []
    right = merge._write_shard

    def counting(path, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        right(path, *rest)

    monkeypatch.setattr(merge, "_write_shard", counting)
    with pytest.raises(KeyboardInterrupt):
        merged(tmp_path, base, adapter, shard_bytes=30_000)
    monkeypatch.setattr(merge, "_write_shard", lambda p, *r: (written.append(p.name), right(p, *r)))
    out = merged(tmp_path, base, adapter, shard_bytes=30_000)
    assert len(written) == len(set(written)) > 3, "a finished shard was written twice"
    verify_merge(BaseFolder(base), tmp_path / "peft", out)


def test_shards_of_another_adapter_are_not_kept(tmp_path, base, adapter):
    other = save_adapter(tmp_path / "other", base, seed=9)
    merged(tmp_path, base, other, shard_bytes=30_000)
    out = merged(tmp_path, base, adapter, shard_bytes=30_000)
    verify_merge(BaseFolder(base), tmp_path / "peft", out)


# --- vLLM's and SGLang's rules -------------------------------------------------------------------


def test_the_servers_rules_are_kept_by_what_we_write(tmp_path, base, adapter):
    to_peft(adapter, BaseFolder(base), tmp_path / "peft", "course/base")
    rules = check_serving_rules(tmp_path / "peft", BaseFolder(base))
    assert {rule.server for rule in rules} == {"vLLM", "SGLang"}
    assert all(rule.kept for rule in rules), [rule for rule in rules if not rule.kept]


def test_a_broken_rule_is_named(tmp_path, base):
    adapter = save_adapter(tmp_path / "adapter", base, modules=["model.layers.0.mlp.up_proj"])
    (adapter / "added_tokens.json").write_text("{}")
    broken = [r.rule for r in check_serving_rules(adapter, BaseFolder(base)) if not r.kept]
    assert broken == ["gate_proj and up_proj adapted together", "no tokens added to the vocabulary"]
