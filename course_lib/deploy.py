"""deploy(): a tinker:// checkpoint -> a folder that `posttrain serve`, Modal and the Hub can take.

    download -> PEFT layout -> merge -> proof -> card -> Modal files -> smoke test -> finished

Each step goes on from what a stopped one left below DIR/.work; the finished version appears by one
rename (see `export/versions.py`). Nothing is written outside DIR, nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from course_lib.config import DeployConfig
from course_lib.errors import CourseError
from course_lib.export.adapter import AdapterFolder
from course_lib.export.base import BaseFolder, find_base
from course_lib.export.card import CardFacts, run_of_checkpoint, write_model_card
from course_lib.export.download import Download, checkpoint_kind, download_adapter
from course_lib.export.hub import UploadPlan, find_secrets, upload
from course_lib.export.merge import check_disk, fingerprint, merge_adapter
from course_lib.export.peft_layout import to_peft
from course_lib.export.serving_rules import check_serving_rules
from course_lib.export.verify import verify_merge
from course_lib.export.versions import (
    LOCK,
    WORK,
    check_version,
    find_version,
    finish_version,
    leaving_no_empty_work,
    next_version,
    read_record,
    use_version,
)
from course_lib.modal_app import check_modal_names, write_modal_files
from course_lib.serve.smoke import smoke_test

if TYPE_CHECKING:
    from course_lib.client import CourseService

Progress = Callable[[str, int, int], None]  # (stage, done, total)


@dataclass(frozen=True)
class DeployResult:
    """Where the finished version is, and what is known about it."""

    version: Path
    record: dict[str, Any]  # deploy.json: verification, smoke, serving_rules, files ...
    reused: bool  # True: it was finished already
    seconds: float
    upload: UploadPlan | None = None

    @property
    def model(self) -> Path:
        return self.version / "model"

    @property
    def adapter(self) -> Path:
        return self.version / "adapter"


def deploy(
    service: CourseService,
    checkpoint: str,
    out: str | Path,
    config: DeployConfig | None = None,
    *,
    base: str | None = None,
    runs: str | Path = "runs",
    on_progress: Progress | None = None,
) -> DeployResult:
    """Make the next version of the deploy folder `out` from `checkpoint`; go on if one was begun.

    `base` is the base model's folder where the service does not say it. The model card tells the
    results of the run below `runs` that saved the checkpoint. With `config.upload_to_hf` the
    finished model is uploaded. Raises CourseError, and leaves no version, when the merged model is
    not the adapter or fails the smoke test.
    """
    start, out, config = time.monotonic(), Path(out).resolve(), config or DeployConfig()
    checkpoint_kind(checkpoint)  # what is wrong with the words is said before a folder is made
    check_modal_names(config, out.name)
    key = _key(checkpoint, config)
    work = out / WORK / key
    try:
        with leaving_no_empty_work(out):
            work.mkdir(parents=True, exist_ok=True)
            with FileLock(out / WORK / LOCK, timeout=0):
                version = _finished(out, key)
                reused = version is not None
                if version is None:
                    version = _make(service, checkpoint, out, work, config, base, runs, on_progress)
                use_version(out, version)
                shutil.rmtree(work, ignore_errors=True)
    except Timeout:
        finding = "another deploy is at work in this folder"
        raise CourseError(str(out), finding, "wait for it, or choose another --out") from None
    plan = None
    if config.upload_to_hf and config.hf_repo_name:
        plan = upload(version / "model", config.hf_repo_name, private=config.private)
    return DeployResult(version, read_record(version), reused, time.monotonic() - start, plan)


def _key(checkpoint: str, config: DeployConfig) -> str:
    """Names the work: the same checkpoint and Modal settings find the same version again."""
    modal = (config.app_name, config.gpu, config.scaledown_s, config.max_containers, config.region)
    return hashlib.sha256(json.dumps([checkpoint, modal]).encode()).hexdigest()[:12]


def _finished(out: Path, key: str) -> Path | None:
    """The version that this very deploy made before, if its base and files are unchanged."""
    version = find_version(out, key)
    if version is None:
        return None
    record = read_record(version)
    base = BaseFolder(Path(record["base_folder"]))
    try:
        check_version(version)
        same = fingerprint(base) == record["base_files"]
    except (CourseError, OSError):
        return None  # make it anew
    return version if same else None


def _make(
    service: CourseService,
    checkpoint: str,
    out: Path,
    work: Path,
    config: DeployConfig,
    base_folder: str | None,
    runs: str | Path,
    on_progress: Progress | None,
) -> Path:
    tell = on_progress or (lambda stage, done, total: None)
    build = work / "build"
    got = download_adapter(service, checkpoint, work / "download", on_progress=on_progress)
    base = find_base(got.base_model, base_folder, got.model_folder)
    check_disk(out, base)
    adapter = to_peft(got.folder, base, build / "adapter", got.base_model)
    progress = work / "merge.json"
    model = merge_adapter(base, adapter, build / "model", progress, on_progress=on_progress)
    tell("verify", 0, 1)
    proof = verify_merge(base, adapter.path, model, got.probe)
    tell("verify", 1, 1)
    version, name = next_version(out), out.name
    report, run_config = run_of_checkpoint(checkpoint, Path(runs))
    facts = _facts(name, got, adapter, proof, report, run_config)
    write_model_card(model / "README.md", base, facts)
    write_modal_files(build, config, name, version.name)
    find_secrets(build)
    tell("smoke test", 0, 1)
    smoke = smoke_test(model)
    tell("smoke test", 1, 1)
    record = {
        "key": _key(checkpoint, config),
        "checkpoint": checkpoint,
        "base_model": got.base_model,
        "base_folder": str(base.path.resolve()),
        "base_files": fingerprint(base),
        "adapter_files": got.files,
        "verification": asdict(proof),
        "smoke": asdict(smoke),
        "serving_rules": [asdict(rule) for rule in check_serving_rules(adapter.path, base)],
        "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    return finish_version(build, version, record)


def _facts(
    name: str,
    got: Download,
    adapter: AdapterFolder,
    proof: Any,
    report: dict[str, Any] | None,
    run_config: dict[str, Any] | None,
) -> CardFacts:
    return CardFacts(
        name=name,
        checkpoint=got.checkpoint,
        base_model=got.base_model,
        rank=adapter.config["r"],
        alpha=adapter.config["lora_alpha"],
        modules=sorted({module.rsplit(".", 1)[-1] for module in adapter.pairs}),
        verification=proof,
        report=report,
        config=run_config,
    )
