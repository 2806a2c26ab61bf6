"""Unmodified tinker-cookbook programs against the engine, in an environment of their own.

    pytest -m "slow and network" tests/test_cookbook.py

The package is installed without its dependencies (it asks for one that is not needed here) beside
the project's own; COOKBOOK_PYTHON names an interpreter that has it already. The base model stands
in for meta-llama/Llama-3.2-1B under an alias, and small local data for the hub's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import textwrap
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
import tinker

from course_lib.engine.models import load_models, shipped_model, tokenizer_home
from course_lib.engine.server import Engine

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(1800)]

NAME = "meta-llama/Llama-3.2-1B"
RANK = "lora_rank=8"
COOKBOOK = "tinker-cookbook==0.6.1"
BESIDES = [
    "chz",
    "blobfile",
    "termcolor",
    "tiktoken",
    "cloudpickle",
    "pylatexenc",
    "math-verify",
    "latex2sympy2-extended",
    "antlr4-python3-runtime==4.13.2",
    "pycryptodomex",
    "lxml",
]
LOCAL_DATA = '''
    """Read when Python starts in the cookbook's environment: hub data sets become local."""
    import os
    import sys

    if any("recipes" in word for word in sys.orig_argv):
        import datasets

        load = datasets.load_dataset

        def load_dataset(path, *args, **kwargs):
            file = os.path.join(os.environ["LOCAL_DATA"], path.split("/")[-1] + ".jsonl")
            data_files = {"train": file, "test": file}
            return load("json", data_files=data_files, split=kwargs.get("split"))

        datasets.load_dataset = load_dataset
'''


@pytest.fixture(scope="module")
def cookbook_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    if given := os.environ.get("COOKBOOK_PYTHON"):
        return given
    place = tmp_path_factory.mktemp("cookbook")
    venv.create(place, with_pip=True)
    python = place / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    theirs = subprocess.check_output([python, "-c", purelib], text=True).strip()
    Path(theirs, "project.pth").write_text(sysconfig.get_path("purelib"))
    install = [python, "-m", "pip", "install", "-q", "--no-deps", COOKBOOK, *BESIDES]
    subprocess.run(install, check=True, timeout=600)
    return str(python)


class Kitchen:
    """An engine with the base model under its alias, and the environment to run programs in."""

    def __init__(self, python: str, place: Path) -> None:
        models = load_models(aliases={NAME: str(shipped_model())})
        self.engine = Engine(models, place / "store").launch()
        self.python, self.place = python, place
        (place / "site").mkdir()
        (place / "site" / "sitecustomize.py").write_text(textwrap.dedent(LOCAL_DATA))
        self.write_data(place / "data")
        self.environment = os.environ | {
            "TINKER_BASE_URL": self.engine.url,
            "TINKER_API_KEY": self.engine.api_key,
            "HF_HOME": str(tokenizer_home(place / "hf", models)),
            "HF_HUB_OFFLINE": "1",
            "LOCAL_DATA": str(place / "data"),
            "PYTHONPATH": str(place / "site"),
        }

    def write_data(self, folder: Path) -> None:
        folder.mkdir()
        chats, sums, pairs, choices = [], [], [], []
        for number in range(64):
            question, answer = f"What is {number} + 1?", f"The answer is {number + 1}."
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            chats.append({"messages": messages})
            sums.append({"question": question, "answer": f"#### {number + 1}"})
            asked = f"\n\nHuman: {question}\n\nAssistant: "
            pairs.append({"chosen": f"{asked}{number + 1}.", "rejected": f"{asked}{number + 2}."})
            choices.append(
                {
                    "domain": "Chemistry",
                    "details": {"level": "L3"},
                    "type": "mcq-4-choices",
                    "question": question,
                    "choices": {"label": ["A", "B"], "text": [str(number + 1), "0"]},
                    "answerKey": "A",
                }
            )
        for name, rows in (
            ("no_robots", chats),
            ("gsm8k", sums),
            ("DeepMath-103K", sums),
            ("hh-rlhf", pairs),
            ("SciKnowEval", choices),
        ):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(text)

    def run(self, module: str, *settings: str) -> dict[str, float]:
        """Run a recipe; gives its last line of metrics."""
        log = self.place / module
        command = [self.python, "-m", f"tinker_cookbook.recipes.{module}", f"log_path={log}"]
        command += [f"model_name={NAME}", *settings]
        done = subprocess.run(
            command,
            env=self.environment,
            cwd=self.place,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        lines = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
        return {key: value for line in lines for key, value in line.items()}


@pytest.fixture(scope="module")
def kitchen(cookbook_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kitchen]:
    if not shipped_model().is_dir():
        pytest.skip("the base model is not there")
    kitchen = Kitchen(cookbook_python, tmp_path_factory.mktemp("kitchen"))
    yield kitchen
    kitchen.engine.stop()


def test_sl_loop(kitchen: Kitchen):
    settings = ["batch_size=8", "max_steps=4", "max_length=256", "save_every=2"]
    metrics = kitchen.run("sl_loop", RANK, *settings)
    assert metrics["train_mean_nll"] > 0
    checkpoints = (kitchen.place / "sl_loop" / "checkpoints.jsonl").read_text().splitlines()
    assert len(checkpoints) == 2


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "cispo", "gspo"])
def test_rl_loop(kitchen: Kitchen, loss_fn: str):
    settings = ["batch_size=4", "group_size=4", "max_tokens=24", "max_steps=2"]
    metrics = kitchen.run("rl_loop", RANK, *settings, f"loss_fn={loss_fn}", "learning_rate=1e-3")
    assert "reward/total" in metrics


def test_math_rl_on_arithmetic(kitchen: Kitchen):
    settings = ["env=arithmetic", "groups_per_batch=4", "group_size=4", "max_tokens=5"]
    metrics = kitchen.run(
        "math_rl.train",
        RANK,
        *settings,
        "max_steps=2",
        "loss_fn=importance_sampling",
        "eval_every=0",
    )
    assert "env/all/reward/total" in metrics


def test_chat_sl_on_a_file(kitchen: Kitchen):
    file = kitchen.place / "data" / "no_robots.jsonl"
    settings = [f"dataset={file}", "batch_size=8", "max_steps=4", "max_length=256", "eval_every=0"]
    assert "train_mean_nll" in kitchen.run("chat_sl.train", RANK, *settings)


def test_dpo_by_a_custom_loss(kitchen: Kitchen):
    settings = ["batch_size=8", "max_length=200", "max_steps=2", "learning_rate=1e-3"]
    metrics = kitchen.run("preference.dpo.train", *settings)
    assert metrics["dpo_loss"] > 0 and metrics["surrogate_loss:sum"] != metrics["loss:sum"]


def test_distillation_from_a_teachers_logprobs(kitchen: Kitchen):
    settings = ["groups_per_batch=4", "group_size=2", "max_tokens=24", "eval_every=0", RANK]
    metrics = kitchen.run(
        "distillation.on_policy_distillation", f"teacher_model={NAME}", "max_steps=2", *settings
    )
    assert abs(metrics["teacher_kl"]) < 0.1  # the student's own base model


def test_distillation_of_a_teachers_likeliest_tokens(kitchen: Kitchen):
    settings = ["groups_per_batch=4", "max_tokens=16", "topk=5", "max_context_length=900", RANK]
    metrics = kitchen.run("sdft.train", *settings, "max_steps=2", "eval_every=0")
    assert metrics["sdft/topk"] == 5 and metrics["grad_norm:mean"] > 0


def test_weights_are_downloaded_and_converted(kitchen: Kitchen):
    service = tinker.ServiceClient(base_url=kitchen.engine.url, api_key=kitchen.engine.api_key)
    client = service.create_lora_training_client(base_model=NAME, rank=8).result(60)
    path = client.save_state("for-download").result(60).path
    program = f"""
        from tinker_cookbook import weights
        weights.download(tinker_path={path!r}, output_dir="adapter")
        weights.build_lora_adapter(
            base_model={str(shipped_model())!r}, adapter_path="adapter", output_path="peft"
        )
    """
    command = [kitchen.python, "-c", textwrap.dedent(program)]
    done = subprocess.run(
        command,
        env=kitchen.environment,
        cwd=kitchen.place,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for folder in ("adapter", "peft"):
        files = {file.name for file in (kitchen.place / folder).iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json"} <= files
