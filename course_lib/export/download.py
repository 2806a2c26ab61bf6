"""Fetch a checkpoint's adapter through the SDK, from hosted Tinker and the embedded engine alike.

SDK 0.38 has no archive to download. A training (or sampler) checkpoint is loaded into a new
training client, written out by `save_weights_external`, and its files are fetched by the plain
URLs of `get_external_weights_urls`. The SDK's own command line does the same, and says that hosted
*sampler* checkpoints cannot be downloaded; we try, and if the service refuses, the error names the
training checkpoint as the way out.

A stopped download goes on: the export's path is kept in `download.json`, each partial file beside
its place (see `fetch.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from course_lib.checkpoints import one_line
from course_lib.errors import CourseError
from course_lib.export.fetch import BrokenOff, fetch
from course_lib.export.files import list_files, read_json, safe_path, sha256_file, write_json

if TYPE_CHECKING:
    import tinker

    from course_lib.client import CourseService

STATE, FILES = "download.json", "files"
EXPORT_TTL_S = 3600  # the shortest that hosted Tinker takes
ATTEMPTS = 5  # for one file; each goes on where the last one broke off
ANSWER_S = 300  # the longest wait for one answer of the service; the SDK would wait for ever
PROBE_TEXT = "What is 23 + 45 + 61? 23 + 45 = 68, 68 + 61 = 129. The answer is 129."
WORTH_ANOTHER_TRY = (403, 408, 410, 429)  # besides 5xx: an expired URL is signed anew

Progress = Callable[[str, int, int], None]  # (stage, bytes done, bytes in all)


@dataclass(frozen=True)
class Download:
    """An adapter on this disk, and what the service says about it."""

    folder: Path
    checkpoint: str
    base_model: str  # the SDK's name of it
    model_folder: str | None  # where an engine on this machine reads that model from
    files: dict[str, str]  # name -> sha256
    probe: dict[str, Any] | None  # {"tokens", "logprobs"}: the service's answer, for verify_merge


def download_adapter(
    service: CourseService,
    checkpoint: str,
    folder: str | Path,
    *,
    on_progress: Progress | None = None,
) -> Download:
    """Fetch every file of `checkpoint` into `folder`; called again after a stop, it goes on.

    On the way the service is asked for a text's logprobs, against which a merge can be proved.
    """
    folder = Path(folder)
    (folder / FILES).mkdir(parents=True, exist_ok=True)
    state = _read_state(folder, checkpoint)
    if "files" not in state:
        rest = service.rest
        _find_or_make_export(service, rest, checkpoint, folder, state)
        _fetch_all(rest, state["export"], folder / FILES, on_progress)
        names = list_files(folder / FILES)
        state["files"] = {name: sha256_file(folder / FILES / name) for name in names}
        write_json(folder / STATE, state)
        if state["export"] != checkpoint:
            _forget(rest, state["export"])
    return Download(
        folder / FILES,
        checkpoint,
        state["base_model"],
        state.get("model_folder"),
        state["files"],
        state.get("probe"),
    )


def base_model_of(rest: tinker.RestClient, checkpoint: str) -> str:
    """The SDK's name of the model that `checkpoint` adapts."""
    checkpoint_kind(checkpoint)
    return ask(rest.get_weights_info_by_tinker_path, checkpoint, place=checkpoint).base_model


def checkpoint_kind(checkpoint: str) -> str:
    """`training`, `sampler` or `external`; CourseError for what is no tinker:// path."""
    import tinker

    try:
        return tinker.ParsedCheckpointTinkerPath.from_tinker_path(checkpoint).checkpoint_type
    except ValueError:
        remedy = "write tinker://RUN/weights/NAME, as a run's report.json lists them"
        raise CourseError(checkpoint, "is not a checkpoint path", remedy) from None


def ask(call: Callable[..., Any], *args: Any, place: str, **kwargs: Any) -> Any:
    """One SDK call, waited for; every way in which the service says no becomes one sentence."""
    import tinker

    try:
        return call(*args, **kwargs).result(timeout=ANSWER_S)
    except (tinker.TinkerError, ValueError) as error:
        remedy = "check the path, whose key you use, and the --store that it was saved in"
        raise CourseError(place, f"the service answers: {one_line(error)}", remedy) from None
    except TimeoutError:
        raise CourseError(place, f"no answer in {ANSWER_S} s", "run it again, it goes on") from None


def _read_state(folder: Path, checkpoint: str) -> dict[str, Any]:
    """What an earlier call noted; a file that changed since it was checked is fetched again."""
    if not (folder / STATE).exists():
        return {"checkpoint": checkpoint}
    state = read_json(folder / STATE)
    if state["checkpoint"] != checkpoint:
        finding = f"holds a download of {state['checkpoint']}"
        raise CourseError(str(folder), finding, "choose another folder")
    for name, digest in list(state.get("files", {}).items()):
        path = folder / FILES / name
        if not path.exists() or sha256_file(path) != digest:
            path.unlink(missing_ok=True)
            state.pop("files", None)
    return state


def _find_or_make_export(
    service: Any, rest: Any, checkpoint: str, folder: Path, state: dict[str, Any]
) -> None:
    """Note the external checkpoint whose files are fetched before any of them is."""
    state.setdefault("base_model", base_model_of(rest, checkpoint))
    kind = checkpoint_kind(checkpoint)
    if kind == "external":
        state["export"] = checkpoint
    elif not _has_urls(rest, state.get("export")):
        client = _load(service, checkpoint, kind)
        state["model_folder"] = _model_folder(client)
        state["probe"] = _probe(client)
        digest = hashlib.sha256(checkpoint.encode()).hexdigest()[:8]
        name = f"deploy-{digest}-{time.time_ns()}"
        saved = ask(client.save_weights_external, name, ttl_seconds=EXPORT_TTL_S, place=checkpoint)
        state["export"] = saved.path
    write_json(folder / STATE, state)


def _load(service: Any, checkpoint: str, kind: str) -> Any:
    try:
        return ask(service.create_training_client_from_state, checkpoint, place=checkpoint)
    except CourseError as error:
        if kind != "sampler":
            raise
        finding = f"a sampler checkpoint that cannot be loaded ({error.finding})"
        remedy = "deploy the training checkpoint of the same step (tinker://RUN/weights/NAME)"
        raise CourseError(checkpoint, finding, remedy) from None


def _model_folder(client: Any) -> str | None:
    """The folder that an engine on this machine reads the base from; hosted Tinker names none."""
    folder = client.get_info().model_data.tokenizer_id
    return folder if folder and (Path(folder) / "config.json").exists() else None


def _probe(client: Any) -> dict[str, Any]:
    """The service's logprobs of tokens 1 ... T-1 under this checkpoint: one forward, no update."""
    import tinker

    tokens = [int(token) for token in client.get_tokenizer().encode(PROBE_TEXT)]
    inputs: Any = {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)}
    read = tinker.ModelInput.from_ints(tokens[:-1])
    datum = tinker.Datum(model_input=read, loss_fn_inputs=inputs)
    output = ask(client.forward, [datum], "cross_entropy", place="the service's forward pass")
    logprobs = output.loss_fn_outputs[0]["logprobs"].data
    return {"tokens": tokens, "logprobs": [float(value) for value in logprobs]}


def _has_urls(rest: Any, export: str | None) -> bool:
    """False for an export that was never made, has expired or was deleted."""
    if export is None:
        return False
    try:
        return bool(ask(rest.get_external_weights_urls, export, place=export).urls)
    except CourseError:
        return False


def _forget(rest: Any, export: str) -> None:
    """Delete our temporary export; should that fail, it expires by itself within the hour."""
    with contextlib.suppress(CourseError):
        ask(rest.delete_checkpoint_from_tinker_path, export, place=export)


def _fetch_all(rest: Any, export: str, folder: Path, on_progress: Progress | None) -> None:
    urls = ask(rest.get_external_weights_urls, export, place=export).urls
    if not urls:
        raise CourseError(export, "the export has no files", "run the command again")
    paths = {name: safe_path(folder, name, export) for name in urls}
    done = sum(path.stat().st_size for path in paths.values() if path.exists())
    for name, path in sorted(paths.items()):
        if path.exists():
            continue

        def told(have: int, total: int, done: int = done) -> None:
            if on_progress:
                on_progress("download", done + have, done + max(total, have))

        _fetch_one(rest, export, name, path, urls[name], told)
        done += path.stat().st_size


def _fetch_one(
    rest: Any, export: str, name: str, path: Path, url: str, told: Callable[[int, int], None]
) -> None:
    """Several attempts at one file, each with a newly signed URL."""
    for attempt in range(ATTEMPTS):
        try:
            return fetch(url, path, told)
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            if status < 500 and status not in WORTH_ANOTHER_TRY:
                raise CourseError(
                    name, f"the download is refused ({status})", "run it again"
                ) from None
            broken: Exception = error
        except (httpx.TransportError, BrokenOff) as error:
            broken = error
        time.sleep(0.2 * 2**attempt)
        url = ask(rest.get_external_weights_urls, export, place=export).urls[name]
    finding = f"the download broke off {ATTEMPTS} times ({broken})"
    raise CourseError(name, finding, "run it again, it goes on")
