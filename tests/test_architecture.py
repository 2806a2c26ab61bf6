"""Claims about the package as a whole: data flows one way, and `import course_lib` is instant."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
PACKAGE = PROJECT / "course_lib"

# A module imports only what stands before it. A folder is one entry: its files share it.
ORDER = """
errors files dotenv startup world fields faults metrics config conversations chat_text rendering
validation batches losses engine client checkpoints rewards environments rollouts evaluation
comparison advantages rl_metrics sft preferences judges grpo diagnosis recordings export serve
modal_app deploy plots run_data run_judge stages estimate pipeline chat compare doctor lessons
widgets checks cli command
""".split()  # noqa: SIM905 (a list would take a screen)
MAY_IMPORT_ENGINE = {"engine", "client", "serve", "cli"}
TORCH_AT_THE_TOP = {"losses", "engine", "export", "serve"}
NEVER_TORCH = {"plots"}
# What `from course_lib import connect` means: see course_lib/__init__.py.
FRONT_DOOR = {
    "connect": "client",
    "check": "checks",
    "hint": "checks",
    "progress": "checks",
    "preset": "config",
    "CourseError": "errors",
}


@dataclass(frozen=True)
class Import:
    """One import statement: `module` (course_lib itself or a third party) as seen from `room`."""

    place: str  # file:line
    room: str  # the entry of ORDER that the importing file belongs to
    module: str  # e.g. course_lib.errors, torch.nn
    at_the_top: bool  # runs when the file is imported

    @property
    def imported_room(self) -> str | None:
        parts = self.module.split(".")
        return parts[1] if parts[0] == "course_lib" and len(parts) > 1 else None


def imports_of(source: str, path: Path, package: Path = PACKAGE) -> Iterator[Import]:
    """Every import of a file, wherever it stands: at the top, in functions, under TYPE_CHECKING."""
    parts = path.relative_to(package).with_suffix("").parts
    folder = ["course_lib", *parts[:-1]]
    tree = ast.parse(source, str(path))
    in_functions = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(outer)
    }
    for_types = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            modules = [start]
            if start == "course_lib":  # from course_lib import losses, connect
                modules = [f"{start}.{FRONT_DOOR.get(a.name, a.name)}" for a in node.names]
        else:
            continue
        top = id(node) not in in_functions and id(node) not in for_types
        for module in modules:
            place = f"{path.relative_to(package.parent)}:{node.lineno}"
            yield Import(place, parts[0], module, top)


@cache
def all_imports() -> list[Import]:
    return [
        one
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != PACKAGE / "__init__.py"  # the front door names modules, it needs none
        for one in imports_of(path.read_text(encoding="utf-8"), path)
    ]


def upward(imports: list[Import]) -> list[str]:
    """Imports of what stands below the importer; another test wants a place for every module."""
    place = {room: number for number, room in enumerate(ORDER)}
    return [
        f"{one.place} imports {one.module}"
        for one in imports
        if place.get(one.imported_room or "", -1) > place.get(one.room, len(ORDER))
    ]


def of_package(imports: list[Import], name: str) -> list[Import]:
    return [one for one in imports if one.module.split(".")[0] == name]


# --------------------------------------------------------------------------------------------------
# The import order


def test_every_module_has_its_place_in_the_order() -> None:
    rooms = {path.stem if path.suffix else path.name for path in PACKAGE.iterdir()}
    rooms -= {"__init__", "__pycache__"}
    assert rooms <= set(ORDER), f"give {rooms - set(ORDER)} a place in ORDER"
    assert len(ORDER) == len(set(ORDER))


def test_data_flows_one_way() -> None:
    assert upward(all_imports()) == []


def test_only_client_serve_and_cli_import_the_engine() -> None:
    guests = [one for one in all_imports() if one.imported_room == "engine"]
    assert [one.place for one in guests if one.room not in MAY_IMPORT_ENGINE] == []


def test_torch_is_imported_at_the_top_only_where_weights_live() -> None:
    heavy = of_package(all_imports(), "torch") + of_package(all_imports(), "peft")
    assert [one.place for one in heavy if one.at_the_top and one.room not in TORCH_AT_THE_TOP] == []
    assert [one.place for one in heavy if one.room in NEVER_TORCH] == []


def test_the_package_knows_nothing_of_notebooks_solutions_and_tests() -> None:
    outside = ("notebooks", "solutions", "tests", "data", "conftest", "pytest", "hypothesis")
    assert [
        f"{one.place} imports {one.module}"
        for name in outside
        for one in of_package(all_imports(), name)
    ] == []


@pytest.mark.parametrize(
    "statement",
    [
        "import course_lib.grpo",
        "from course_lib.grpo import train_grpo",
        "from course_lib import grpo",
        "from .grpo import train_grpo",
        "from . import grpo",
        "def later():\n    from course_lib.grpo import train_grpo",
        "if TYPE_CHECKING:\n    from course_lib.grpo import train_grpo",
        "from course_lib import check",
    ],
)
def test_the_reader_of_imports_sees_every_spelling(statement: str) -> None:
    """A file that stands above grpo and above the exercises imports them."""
    found = list(imports_of(statement, PACKAGE / "rewards.py"))
    assert len(upward(found)) == 1
    below = list(imports_of(statement, PACKAGE / "cli" / "__init__.py"))
    assert statement.startswith("from .") or upward(below) == []


def test_the_reader_of_imports_knows_folders_and_what_runs_at_once() -> None:
    [one] = imports_of("from ..client import connect", PACKAGE / "engine" / "app.py")
    assert (one.room, one.imported_room) == ("engine", "client")
    [one] = imports_of("from .wire import decode", PACKAGE / "engine" / "app.py")
    assert one.imported_room == "engine"
    source = "import torch\ndef later():\n    import torch\nclass Now:\n    import torch"
    assert [one.at_the_top for one in imports_of(source, PACKAGE / "sft.py")] == [True, False, True]


# --------------------------------------------------------------------------------------------------
# `import course_lib`


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=PROJECT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_course_lib_takes_less_than_0_3_s() -> None:
    """The median of five: one slow start on a busy machine is not the package's fault."""
    code = (
        "import time; start = time.perf_counter(); import course_lib\n"
        "print(time.perf_counter() - start)"
    )
    assert statistics.median(float(run_python(code)) for _ in range(5)) < 0.3


def test_import_course_lib_loads_nothing_heavy() -> None:
    code = "import sys, course_lib; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    heavy = {"torch", "tinker", "transformers", "datasets", "numpy", "matplotlib", "ipywidgets"}
    assert heavy & set(run_python(code).split()) == set()


@pytest.mark.parametrize("name", ["CourseError", "preset"])
def test_the_front_door_gives_the_thing_itself(name: str) -> None:
    code = (
        f"import course_lib; from course_lib import {name}; from course_lib.{FRONT_DOOR[name]} "
        f"import {name} as itself; print({name} is itself, course_lib.{name} is itself)"
    )
    assert run_python(code) == "True True"


def test_every_name_of_the_front_door_has_a_home() -> None:
    import course_lib

    assert sorted(FRONT_DOOR) == sorted(course_lib.__all__) == sorted(course_lib.__dir__())
    assert course_lib._HOME == FRONT_DOOR
    for name in course_lib.__all__:
        getattr(course_lib, name)


def test_an_unknown_name_is_an_ordinary_attribute_error() -> None:
    import course_lib

    with pytest.raises(AttributeError, match="no attribute 'conect'"):
        _ = course_lib.conect
    with pytest.raises(ImportError, match="cannot import name 'conect'"):
        exec("from course_lib import conect")


# --------------------------------------------------------------------------------------------------
# What is committed

MACHINE_PATH = re.compile(  # ada and you are nobody's; written so that it does not find itself
    r"(?<![\w.~-])(?:/(?:home|Users|root|work)/(?!ada\b|you\b)[A-Za-z0-9_]|[A-Z]:\\+Users\\+)"
)


def committed_texts() -> Iterator[tuple[str, str]]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, check=True, timeout=30
    )
    for name in listed.stdout.decode().split("\0"):
        path = PROJECT / name
        if not name or not path.is_file() or path.stat().st_size > 5_000_000:
            continue
        try:
            yield name, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # an image, weights, data/broken.jsonl


def test_no_path_of_somebodys_machine_is_committed() -> None:
    here = str(PROJECT)
    found = [
        f"{name}: {line.strip()[:100]}"
        for name, text in committed_texts()
        for line in text.splitlines()
        if MACHINE_PATH.search(line) or (len(here) > 6 and here in line)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("open('" + "/home" + "/grace/x.jsonl')", True),
        ("File " + "/Users" + "/adam/x", True),
        ("C:" + "\\Users\\ada", True),
        ("/home" + "/ada/x", False),
        ("https://example.org/home/page", False),
        ("~/home/page", False),
        ("the /home directory", False),
    ],
)
def test_what_counts_as_a_path_of_a_machine(text: str, is_one: bool) -> None:
    assert bool(MACHINE_PATH.search(text)) is is_one
