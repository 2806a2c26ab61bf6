"""Commands that bring a checkpoint to other people: deploy, serve, compare, rollback."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from course_lib.cli.options import Backend, Config, Model, Overrides, Store, Yes
from course_lib.errors import CourseError
from course_lib.files import write_whole

if TYPE_CHECKING:
    from course_lib.deploy import DeployResult
    from course_lib.export.hub import UploadPlan

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="What posttrain deploy made.")]


def deploy(
    checkpoint: Annotated[str, typer.Option(metavar="tinker://...", help="What to deploy.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Its last part names the model.")] = Path(
        "deploys/posttrain"
    ),
    upload: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Also to the Hugging Face Hub, private."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Make the folder; list what --upload would send."),
    ] = False,
    config: Config = None,
    overrides: Overrides = None,
    backend: Backend = None,
    model: Model = None,
    store: Store = None,
    yes: Yes = False,
) -> None:
    """Download, merge, prove, wrap up: a folder that can be served.

    Here with posttrain serve, elsewhere with the Modal app that is written beside the model.

    \b
    posttrain deploy --checkpoint tinker://RUN/weights/NAME
    posttrain deploy --checkpoint tinker://RUN/weights/NAME --upload ada/sums --dry-run
    """
    from course_lib.cli.bars import Bars
    from course_lib.client import choose, connect
    from course_lib.config import load_config
    from course_lib.deploy import deploy as make
    from course_lib.export.hub import upload as send

    settings = load_config(config, overrides or []).deploy
    repository = upload or settings.hf_repo_name
    if dry_run and not repository:
        finding = "it lists what would be uploaded, and no repository is named"
        raise CourseError("--dry-run", finding, "add --upload OWNER/NAME, or leave it out")
    sends = bool(upload or settings.upload_to_hf) and not dry_run
    settings = replace(settings, upload_to_hf=sends, hf_repo_name=repository)
    loaded = model if choose(backend).backend == "embedded" else None  # elsewhere: only merged into
    service = connect(backend, model=loaded, store=store, confirm=yes)
    with Bars() as bars:
        result = make(service, checkpoint, out, settings, base=model, on_progress=bars.on_progress)
    _print_result(result, out)
    plan = result.upload
    if dry_run and repository:
        plan = send(result.model, repository, private=settings.private, dry_run=True)
    if plan:
        _print_upload(plan)


def serve(
    folder: Folder,
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
) -> None:
    """Serve a deployed model to OpenAI-compatible clients.

    The key that they need is POSTTRAIN_API_KEY, or a new one that is printed.

    \b
    posttrain serve deploys/posttrain --port 8000
    """
    from course_lib.serve import serve as run

    run(folder, host=host, port=port)


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="Folder, tinker:// path, base or URL.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The same; how often does it win?")],
    prompts: Annotated[str, typer.Option(metavar="FILE", help="JSONL of prompts or messages.")],
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="All answers, as JSON.")] = None,
    backend: Backend = None,
    model: Model = None,
    store: Store = None,
    yes: Yes = False,
) -> None:
    """Ask two models the same prompts, side by side.

    \b
    posttrain compare base deploys/posttrain --prompts data/heldout.jsonl
    """
    from course_lib.cli.bars import Bars
    from course_lib.cli.tables import print_comparison
    from course_lib.client import connect
    from course_lib.compare import compare as run
    from course_lib.compare import read_prompts

    if out:
        _check_place(out)
    problems = read_prompts(prompts)
    asked = [name for name in (a, b) if name == "base" or name.startswith("tinker://")]
    service = connect(backend, model=model, store=store, confirm=yes) if asked else None
    with Bars() as bars:
        found = run(
            a, b, problems, service=service, max_tokens=max_tokens, on_progress=bars.on_progress
        )
    print_comparison(found)
    if out:
        write_whole(out, json.dumps(found.as_dict(), indent=2) + "\n")


def rollback(folder: Folder) -> None:
    """Make the version before the current one current again.

    Nothing is deleted. A running server serves what it has loaded: start it again.

    \b
    posttrain rollback deploys/posttrain
    """
    from course_lib.export.versions import rollback as go_back

    print(f"current version: {go_back(folder)}")


def _check_place(out: Path) -> None:
    """Raises CourseError if no file can come to be at `out`; nothing is made or changed there."""
    there = next((folder for folder in out.absolute().parents if folder.exists()), out)
    if out.is_dir():
        finding = "is a folder"
    elif not there.is_dir():
        finding = f"cannot be written, because {there} is a file"
    elif not os.access(there, os.W_OK | os.X_OK):
        finding = f"cannot be written, because nothing may be written in {there}"
    else:
        return
    raise CourseError(f"--out {out}", finding, "give the name of a file to write")


def _print_result(result: DeployResult, out: Path) -> None:
    from course_lib.cli.tables import print_commands, print_paths

    known = "was finished already" if result.reused else f"made in {result.seconds:.0f} s"
    print(f"{result.version.name} {known}; it is the adapter, merged, and passed the smoke test")
    proof, rules = result.record["verification"], result.record["serving_rules"]
    print(
        f"logits differ from the adapter's by at most {proof['error']:.1e} (allowed "
        f"{proof['tolerance']:.0e}), from the base's by up to {proof['effect']:.1e}"
    )
    kept = sum(rule["kept"] for rule in rules)
    print(f"{kept} of {len(rules)} documented rules of vLLM and SGLang kept (read off, not run)")
    app = result.version / "modal_app.py"
    print_paths({"model": result.model, "adapter": result.adapter, "Modal app": app})
    print_commands(["posttrain", "serve", str(out)], ["modal", "run", str(app)])


def _print_upload(plan: UploadPlan) -> None:
    who = "private" if plan.private else "public"
    print(f"{'Uploaded to' if plan.url else 'Would upload to'} {plan.url or plan.repo} ({who}):")
    for name, size in plan.files:
        print(f"  {size:>12,} bytes  {name}")


COMMANDS = {"deploy": deploy, "serve": serve, "compare": compare, "rollback": rollback}
