"""Options that several commands share, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from course_lib.config import RunConfig

Config = Annotated[
    str,
    typer.Option("--config", metavar="tiny|quick|full|FILE.toml", help="Preset or TOML file."),
]
Data = Annotated[
    str | None,
    typer.Option("--data", metavar="FILE|NAME", help="A file, folder or hub dataset."),
]
Model = Annotated[
    str | None,
    typer.Option("--model", metavar="FOLDER|NAME", help="Base model: a folder or a hub name."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Any config field; repeatable."),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Everything random follows from it.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="Where to write; default runs/<time>-<preset>."),
]
Resume = Annotated[
    Path | None,
    typer.Option("--resume", metavar="DIR", help="Go on with the stopped run in this folder."),
]
Backend = Annotated[
    str | None,
    typer.Option("--backend", metavar="embedded|hosted|URL", help="Where the calls go."),
]
Yes = Annotated[bool, typer.Option("--yes", help="Agree to the cost estimate of a hosted run.")]
Store = Annotated[
    Path | None,
    typer.Option("--store", metavar="DIR", help="Checkpoints; default runs/store."),
]


def run_config(
    config: str | None,
    overrides: list[str] | None,
    *,
    data: str | None = None,
    model: str | None = None,
    seed: int | None = None,
    backend: str | None = None,
) -> RunConfig:
    """What the options spell: `--set` wins over the file, the named options over both."""
    from course_lib.config import load_config

    named = {"sft.data_path": data, "sft.model_name": model, "seed": seed, "backend": backend}
    if data is not None:
        named["sft.dataset_type"] = "jsonl" if data.endswith(".jsonl") else "huggingface"
    return load_config(
        config,
        [*(overrides or []), *(f"{k}={v}" for k, v in named.items() if v is not None)],
    )
