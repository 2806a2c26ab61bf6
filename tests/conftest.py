"""Every test starts from the same place: no key, no server address, no network, an own store."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports huggingface_hub or torch: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TINKER_TELEMETRY"] = "0"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
LEARNERS_CHOICES = (
    "TINKER_BASE_URL",
    "TINKER_API_KEY",
    "TINKER_CREDENTIAL_CMD",
    "TINKER_PROJECT_ID",
)


def forget_choices() -> None:
    """Drop whatever the person running the tests has chosen for their own runs."""
    for name in [*LEARNERS_CHOICES, *(n for n in os.environ if n.startswith("COURSE_"))]:
        os.environ.pop(name, None)
    os.environ["COURSE_ENV_FILE"] = ""  # a key in the developer's .env is not the tests' key


forget_choices()  # for what is made before the first test: session fixtures, subprocesses


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What a test exports reaches neither the next test nor the learner's own runs."""
    for name in LEARNERS_CHOICES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COURSE_STORE", str(tmp_path / "store"))
    yield
    if watch := sys.modules.get("course_lib.client.watch"):  # not imported for those that do not
        watch.leave_all()  # a server that the test has ended is nobody's concern


@pytest.fixture(scope="session")
def course_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer model that speaks the course's chat template."""
    import torch
    from chat_templates import COURSE, byte_tokenizer
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = tmp_path_factory.mktemp("course-model")
    tokenizer = byte_tokenizer(COURSE)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
