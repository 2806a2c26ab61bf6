"""Options that several commands share, each written once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from course_lib.errors import CourseError

if TYPE_CHECKING:
    from course_lib.config import RunConfig

Backend = Annotated[
    str | None,
    typer.Option("--backend", metavar="embedded|hosted|URL", help="Where the calls go."),
]
Model = Annotated[
    str | None,
    typer.Option("--model", metavar="FOLDER|NAME", help="Base model: a folder or a hub name."),
]
Store = Annotated[
    Path | None,
    typer.Option("--store", metavar="DIR", help="Checkpoints; default runs/store."),
]
Config = Annotated[
    str | None,
    typer.Option(metavar="tiny|quick|full|FILE.toml", help="Preset or TOML; default tiny."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Any config field; repeatable."),
]
Yes = Annotated[bool, typer.Option("--yes", help="Agree to the cost of a hosted run.")]


@dataclass(frozen=True)
class RunOptions:
    """What `sft`, `rl` and `all` take; None: not given."""

    config: Config = None
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE|NAME", help="Conversations: a file, folder or hub dataset."),
    ] = None
    model: Model = None
    overrides: Overrides = None
    seed: Annotated[int | None, typer.Option(help="Everything random follows from it.")] = None
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="New folder; default runs/<time>-<preset>."),
    ] = None
    resume: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Go on with the stopped run in this folder."),
    ] = None
    backend: Backend = None
    store: Store = None
    yes: Yes = False

    def run_config(self) -> RunConfig:
        """What the options spell: `--set` wins over the file, a named option over both."""
        from course_lib.config import load_config
        from course_lib.conversations import dataset_type_of
        from course_lib.pipeline import saved_config

        named: dict[str, object] = {
            "data_path": self.data,
            "dataset_type": None if self.data is None else dataset_type_of(self.data),
            "model_name": self.model,
            "seed": self.seed,
            "out": self.out,
            "backend": self.backend,
            "store": self.store,
        }
        given = {name: value for name, value in named.items() if value is not None}
        if self.resume is None:
            spelled = [f"{name}={value}" for name, value in given.items()]
            return load_config(self.config, [*(self.overrides or []), *spelled])
        if given.keys() - {"store"} or self.config or self.overrides:
            finding = "a stopped run goes on with its own settings, and others were given"
            remedy = f"write only --resume {self.resume}, and --store if that has moved"
            raise CourseError("--resume", finding, remedy)
        saved = saved_config(self.resume)
        return saved if self.store is None else replace(saved, store=str(self.store))


def with_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Turn `command(options, ...)` into one that typer can read: a parameter per option."""
    hints = get_type_hints(RunOptions, include_extras=True)
    shared = [
        inspect.Parameter(
            item.name, inspect.Parameter.KEYWORD_ONLY, default=item.default,
            annotation=hints[item.name],
        )
        for item in fields(RunOptions)
    ]  # fmt: skip
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]

    def run(**given: Any) -> None:
        options = RunOptions(**{item.name: given.pop(item.name) for item in fields(RunOptions)})
        command(options, **given)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in (*own, *shared)}
    return run
