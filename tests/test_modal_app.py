"""The generated Modal files: what Modal is told, what its container would run, who may call it."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import openai
import pytest
from deploy_models import save_base
from loopback import serving
from modal_double import ModalDouble, modal_serving
from modal_proto import api_pb2

from course_lib.config import DeployConfig
from course_lib.errors import CourseError
from course_lib.modal_app import KEY_VARIABLE, read_modal_app, write_modal_files
from course_lib.serve import ServedModel, create_app

KEY = "a-key-for-tests"
CONFIG = DeployConfig(app_name="sums", gpu="L4", scaledown_s=120, max_containers=3, region="eu")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished version's folder with the files of each variant."""
    folders = {}
    for gpu in ("L4", "cpu"):
        folders[gpu] = tmp_path_factory.mktemp("modal") / gpu
        save_base(folders[gpu] / "model")
        write_modal_files(folders[gpu], replace(CONFIG, gpu=gpu), "sums", "v2")
    return folders


def modal(folder: Path, *arguments: str) -> ModalDouble:
    """Run the real modal command line against the double."""
    double = ModalDouble()
    with modal_serving(double) as url:
        environment = os.environ | {
            "MODAL_SERVER_URL": url,
            "MODAL_TOKEN_ID": "ak-x",
            "MODAL_TOKEN_SECRET": "as-x",
            "MODAL_CONFIG_PATH": str(folder / "no-such-file"),
            "PYTHONPATH": str(Path(__file__).parents[1]),
        }
        done = subprocess.run(
            [sys.executable, "-m", "modal", *arguments, "modal_app.py"],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=90,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    return double


def test_modal_is_told_a_gpu_server_that_scales_to_zero_behind_a_secret(built):
    told = modal(built["L4"], "deploy")
    [function] = [message.function for message in told.of("FunctionCreate")]
    assert function.resources.gpu_config.gpu_type == "L4"
    assert function.autoscaler_settings.min_containers == 0
    assert function.autoscaler_settings.max_containers == 3
    assert function.autoscaler_settings.scaledown_window == 120
    assert function.max_concurrent_inputs == 64
    assert list(function.scheduler_placement.regions) == ["eu"]
    assert function.webhook_config.type == api_pb2.WEBHOOK_TYPE_WEB_SERVER
    assert function.webhook_config.web_server_port == 8000
    assert [mount.mount_path for mount in function.volume_mounts] == ["/weights"]
    [secret] = told.of("SecretGetOrCreate")
    assert (secret.deployment_name, list(secret.required_keys)) == ("sums-key", [KEY_VARIABLE])
    [volume] = told.of("VolumeGetOrCreate")
    assert volume.deployment_name == "sums-weights"
    image = "\n".join(c for m in told.of("ImageGetOrCreate") for c in m.image.dockerfile_commands)
    assert "vllm==" in image
    assert told.of("AppPublish")[0].name == "sums"


def test_modal_is_told_a_cpu_server_with_this_very_app(built):
    told = modal(built["cpu"], "deploy")
    [function] = [message.function for message in told.of("FunctionCreate")]
    assert function.resources.gpu_config.gpu_type == "" and function.resources.milli_cpu == 2000
    assert function.webhook_config.type == api_pb2.WEBHOOK_TYPE_ASGI_APP
    assert function.autoscaler_settings.scaledown_window == 120
    image = "\n".join(c for m in told.of("ImageGetOrCreate") for c in m.image.dockerfile_commands)
    assert "whl/cpu" in image and "transformers==" in image and "vllm" not in image
    names = [file.filename for m in told.of("MountGetOrCreate") for file in m.files]
    assert any(name.endswith("/course_lib/serve/app.py") for name in names)


def test_modal_run_uploads_the_model_to_its_versions_place_on_the_volume(built):
    told = modal(built["L4"], "run")
    uploaded = {file.filename: file.size for m in told.of("VolumePutFiles") for file in m.files}
    model = built["L4"] / "model"
    assert {name.lstrip("/") for name in uploaded} == {
        f"v2/{path.name}" for path in model.iterdir()
    }


def test_the_app_is_read_back_without_modal(built):
    said = read_modal_app(built["L4"] / "modal_app.py")
    assert said == {"app": "sums", "gpu": "L4", "cpu": None, "volumes": ["/weights"], "secrets": 1}
    said = read_modal_app(built["cpu"] / "modal_app.py")
    assert (said["gpu"], said["cpu"]) == (None, 2)


def load(folder: Path):
    """The generated modal_app as a module, as Modal's container would import it."""
    spec = importlib.util.spec_from_file_location("generated_app", folder / "modal_app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_gpu_container_starts_vllm_and_keeps_the_key_off_the_command_line(built, monkeypatch):
    app = load(built["L4"])
    started = []
    monkeypatch.setattr(
        app.subprocess, "Popen", lambda command, env: started.append((command, env))
    )
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    app.serve.local()
    [(command, environment)] = started
    assert command[:3] == ["vllm", "serve", "/weights/v2"]
    assert command[command.index("--served-model-name") + 1] == "sums"
    assert environment["VLLM_API_KEY"] == KEY and not any(KEY in part for part in command)


def test_the_cpu_containers_app_answers_with_the_key_and_only_with_it(built, monkeypatch):
    app = load(built["cpu"])
    monkeypatch.setattr(app, "WEIGHTS", str(built["cpu"] / "model"))
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    asgi = app.serve.local()
    with serving(asgi) as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
            assert [model.id for model in client.models.list()] == ["sums"]
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="another-key") as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()


def ask(folder: Path, url: str, key: str | None) -> subprocess.CompletedProcess:
    environment = {**os.environ, "POSTTRAIN_URL": f"{url}/v1", KEY_VARIABLE: key or ""}
    return subprocess.run(
        [sys.executable, str(folder / "modal_client.py"), "What is 1 + 2 + 3?"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_generated_client_gets_the_servers_answer_with_the_key_and_401_without(built):
    folder = built["L4"]
    model = ServedModel.load(folder / "model", "sums")
    try:
        with serving(create_app(model, KEY)) as url:
            with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
                messages = [{"role": "user", "content": "What is 1 + 2 + 3?"}]
                wanted = client.chat.completions.create(
                    model="sums", messages=messages, temperature=0
                )
            right, wrong, none = (ask(folder, url, key) for key in (KEY, "wrong-key", None))
    finally:
        model.stop()
    assert right.stdout.rstrip("\n") == wanted.choices[0].message.content.rstrip("\n")
    for refused in (wrong, none):
        assert refused.returncode == 1 and refused.stderr.startswith("401: set POSTTRAIN_API_KEY")


def test_the_cpu_image_has_all_that_the_server_imports(built):
    """`course_lib.serve` must not need the tinker SDK, the plots or the command line."""
    code = (
        "import sys, course_lib.serve; "
        "print(sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=90, check=True
    )
    loaded = ast.literal_eval(done.stdout.strip().splitlines()[-1])
    assert not {"tinker", "matplotlib", "typer", "modal", "datasets"} & set(loaded)


@pytest.mark.parametrize("gpu", ["L4", "cpu"])
def test_the_generated_files_are_small_and_clean(built, gpu):
    for name in ("modal_app.py", "modal_client.py"):
        path = built[gpu] / name
        assert len(path.read_text().splitlines()) < 80
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "ruff",
            "check",
            "--isolated",
            "--line-length=100",
            "--select=E,F,I,UP,B",
            built[gpu],
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "change",
    [{"app_name": 'x"; import os'}, {"gpu": "L4', x='"}, {"region": "eu\n"}, {"app_name": ""}],
)
def test_a_setting_cannot_become_code(tmp_path, change):
    with pytest.raises(CourseError, match="cannot name it on Modal"):
        write_modal_files(tmp_path, replace(CONFIG, **change), "sums", "v1")
    with pytest.raises(CourseError, match="the deploy folder's name"):
        write_modal_files(tmp_path, CONFIG, 'a"b', "v1")
    assert not list(tmp_path.iterdir())
