"""Upload a finished model folder to the Hugging Face Hub, after a list of what would go and a
search for secrets.

Only a merged folder's own kinds of files go; a file of any other kind, or a secret in any of them,
stops the upload before the Hub hears of it.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from course_lib.errors import CourseError
from course_lib.export.files import list_files

KINDS = (".safetensors", ".json", ".jinja", ".txt", ".md", ".model")
LICENCES = ("LICENSE", "NOTICE")
SECRET = re.compile(
    r"tml-[A-Za-z0-9_-]{16,}|hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|a[ks]-[A-Za-z0-9]{20,}"
    r"|eyJ[A-Za-z0-9_-]{20,}\.[A-Za-z0-9_-]{10,}|AKIA[A-Z0-9]{16}|-----BEGIN [A-Z ]*PRIVATE KEY"
)
SECRET_NAMES = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)$")


@dataclass(frozen=True)
class UploadPlan:
    """What an upload sends, or has sent."""

    repo: str
    private: bool
    files: list[tuple[str, int]]  # name, bytes
    url: str | None = None  # of the commit; None = a dry run


def upload(
    folder: str | Path,
    repo: str,
    *,
    private: bool = True,
    dry_run: bool = False,
    endpoint: str | None = None,
    token: str | None = None,
) -> UploadPlan:
    """Send the model folder to `repo` ("owner/name"); a dry run only lists files and sizes.

    `token` None takes HF_TOKEN or the token of `hf auth login`. Uploading again replaces what
    changed and deletes nothing.
    """
    folder = Path(folder)
    plan = UploadPlan(repo, private, _files(folder))
    find_secrets(folder)
    if dry_run:
        return plan
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(endpoint=endpoint, token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(repo).private:
            finding = "this repository exists and is public"
            raise CourseError(repo, finding, "choose another name, or --set deploy.private=false")
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=[name for name, _ in plan.files],
            commit_message="Upload the merged model",
        )
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        finding = "the Hub refuses it: " + " ".join(str(error).split())[:300]
        remedy = "check the name, your token (hf auth login) and its write permission"
        raise CourseError(repo, finding, remedy) from None
    return UploadPlan(repo, private, plan.files, commit.commit_url)


def find_secrets(folder: str | Path) -> None:
    """Raise CourseError when a file holds something that looks like a key, or one of your own."""
    own = {
        value: f"the value of {name}"
        for name, value in os.environ.items()
        if SECRET_NAMES.search(name) and len(value) >= 8
    }
    for name in list_files(Path(folder)):
        if name.endswith(".safetensors"):
            continue  # numbers; our own writer puts no text into it
        text = (Path(folder) / name).read_text(encoding="utf-8", errors="replace")
        for secret, what in [*own.items(), *((f, "a key") for f in SECRET.findall(text))]:
            if secret in text:
                line = text[: text.index(secret)].count("\n") + 1
                place = f"{Path(folder) / name}:{line}"
                finding = f"holds a secret ({what}, {secret[:4]}...)"
                raise CourseError(place, finding, "take it out, then revoke it")


def _files(folder: Path) -> list[tuple[str, int]]:
    if not (folder / "config.json").exists():
        raise CourseError(str(folder), "is no model folder", "give the folder that deploy made")
    files = []
    for name in list_files(folder):
        if not (name.endswith(KINDS) or Path(name).stem in LICENCES):
            raise CourseError(str(folder / name), "is no part of a model", "move it elsewhere")
        files.append((name, (folder / name).stat().st_size))
    return files
