"""Write modal_app.py and modal_client.py: the merged model as an endpoint on Modal, and a caller.

Two variants, chosen by `DeployConfig.gpu`. A GPU's name: vLLM serves the model. `cpu`: the ASGI app
of `posttrain serve` does, which is enough for a tiny model. Both scale to zero, read the weights
from a Modal volume, and let nobody in without the key in a Modal secret.

Neither was run on Modal: the tests build the real `modal.App`, read it back, run the ASGI app in
process, and run the client against a local server.
"""

from __future__ import annotations

import importlib.util
import re
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from course_lib.config import DeployConfig
from course_lib.errors import CourseError
from course_lib.files import write_whole

KEY_VARIABLE = "POSTTRAIN_API_KEY"
VLLM = "0.32.0"  # the newest that installs with transformers 5, which wrote the model's config
SERVING = ("numpy", "transformers", "peft", "safetensors", "starlette", "uvicorn", "httpx")

HEAD = '''\
"""Serve {name} on Modal {where}: OpenAI's API, scaled to zero when idle.

    pip install modal && modal setup                      # once
    modal secret create {app}-key {variable}=...  # once: the key that callers need
    modal run modal_app.py                                # upload the weights
    modal deploy modal_app.py                             # prints the URL

Written by `posttrain deploy`. What it costs: the time between a first request and {scaledown_s} s
after the last one, in at most {max_containers} container(s).
"""

import os
{imports}from pathlib import Path

import modal

MODEL = "{name}"  # the name that callers use
WEIGHTS = "/weights/{version}"  # in the container
FOLDER = Path(__file__).parent / "model"  # on the machine that uploads

app = modal.App("{app}")
volume = modal.Volume.from_name("{app}-weights", create_if_missing=True)
secret = modal.Secret.from_name("{app}-key", required_keys=["{variable}"])
'''

GPU_APP = """\
image = modal.Image.debian_slim(python_version="3.12").uv_pip_install("vllm=={vllm}")


@app.function(
    image=image,
    gpu="{gpu}",
    volumes={{"/weights": volume}},
    secrets=[secret],
    scaledown_window={scaledown_s},  # seconds without a request until it stops
    max_containers={max_containers},
{region}    timeout=3600,  # seconds for one request
)
@modal.concurrent(max_inputs=64)  # requests that one container batches
@modal.web_server(8000, startup_timeout=900)
def serve() -> None:
    command = ["vllm", "serve", WEIGHTS, "--served-model-name", MODEL, "--port", "8000"]
    # By the environment and not by --api-key: a command line can be read by every process.
    key = {{"VLLM_API_KEY": os.environ["{variable}"], "HF_HUB_OFFLINE": "1"}}
    subprocess.Popen(command, env=os.environ | key)
"""

CPU_APP = """\
image = (
    modal.Image.debian_slim(python_version="3.11")
    .uv_pip_install("torch=={torch}", index_url="https://download.pytorch.org/whl/cpu")
    .uv_pip_install(
{packages}
    )
    .env({{"HF_HUB_OFFLINE": "1"}})
    .add_local_python_source("course_lib")
)


@app.function(
    image=image,
    cpu=2,
    memory=4096,  # MiB
    volumes={{"/weights": volume}},
    secrets=[secret],
    scaledown_window={scaledown_s},  # seconds without a request until it stops
    max_containers={max_containers},
{region}    timeout=3600,  # seconds for one request
)
@modal.concurrent(max_inputs=64)  # requests that one container batches
@modal.asgi_app()
def serve():
    from course_lib.serve import ServedModel, create_app

    return create_app(ServedModel.load(WEIGHTS, MODEL), os.environ["{variable}"])
"""

TAIL = """

@app.local_entrypoint()
def upload() -> None:
    with volume.batch_upload(force=True) as batch:
        batch.put_directory(str(FOLDER), WEIGHTS.removeprefix("/weights"))
    print("uploaded; now: modal deploy modal_app.py")
"""

CLIENT = '''\
"""Ask {name}, wherever it is served.

    pip install openai
    export POSTTRAIN_URL=https://...modal.run/v1     # what `modal deploy` printed, and /v1
    export {variable}=...                   # the key in the Modal secret
    python modal_client.py "What is 23 + 45 + 61?"
"""

import os
import sys

import openai

MODEL = "{name}"


def ask(question: str) -> str:
    # The first request after an idle time waits for a container: minutes with vLLM.
    client = openai.OpenAI(
        base_url=os.environ["POSTTRAIN_URL"],
        api_key=os.environ.get("{variable}") or "none",
        timeout=900,
    )
    messages = [{{"role": "user", "content": question}}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, temperature=0)
    return answer.choices[0].message.content or ""


if __name__ == "__main__":
    try:
        print(ask(" ".join(sys.argv[1:]) or "What is 23 + 45 + 61?"))
    except openai.AuthenticationError:
        sys.exit("401: set {variable} to the endpoint's key")
'''


def check_modal_names(config: DeployConfig, name: str) -> None:
    """Raise CourseError for a name that could not stand in the generated source, or on Modal."""
    given = {
        "app_name": (config.app_name, r"[A-Za-z0-9._-]{1,58}"),  # Modal allows 64; "-key" follows
        "gpu": (config.gpu, r"[A-Za-z0-9!:+-]{1,32}"),
        "region": (config.region or "any", r"[A-Za-z0-9-]{1,32}"),
        "the deploy folder's name": (name, r"[A-Za-z0-9._-]{1,96}"),
    }
    for field, (value, allowed) in given.items():
        if not re.fullmatch(allowed, value):
            finding = f"{value!r} cannot name it on Modal"
            raise CourseError(field, finding, "use letters, digits, '.', '_' and '-'")


def write_modal_files(folder: str | Path, config: DeployConfig, name: str, version: str) -> None:
    """Write both files beside `folder`/model; the endpoint calls the model `name`.

    `version` keeps the weights of earlier deploys on the volume apart.
    """
    check_modal_names(config, name)
    cpu = config.gpu.lower() == "cpu"
    facts = {
        "name": name,
        "version": version,
        "app": config.app_name,
        "gpu": config.gpu,
        "scaledown_s": config.scaledown_s,
        "max_containers": config.max_containers,
        "region": f'    region="{config.region}",\n' if config.region else "",
        "variable": KEY_VARIABLE,
        "where": "on CPUs" if cpu else f"by vLLM on a GPU ({config.gpu})",
        "imports": "" if cpu else "import subprocess\n",
        "vllm": VLLM,
        "torch": installed("torch").partition("+")[0],
        "packages": "\n".join(f'        "{each}=={installed(each)}",' for each in SERVING),
    }
    app = HEAD + (CPU_APP if cpu else GPU_APP) + TAIL
    write_whole(Path(folder, "modal_app.py"), app.format(**facts))
    write_whole(Path(folder, "modal_client.py"), CLIENT.format(**facts))


def read_modal_app(file: str | Path) -> dict[str, Any]:
    """What the `modal.App` in a generated file asks of Modal; the file is run, Modal is not called.

    Modal has no public reader for a function that was not deployed: `_spec_` is what its own client
    sends.
    """
    found = importlib.util.spec_from_file_location("generated_modal_app", file)
    assert found is not None and found.loader is not None, file
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    spec = module.serve._spec_
    return {
        "app": module.app.name,
        "gpu": spec.gpus,
        "cpu": spec.cpu,
        "volumes": list(spec.volumes),
        "secrets": len(spec.secrets),
    }
