"""What a newcomer meets first: the package list, the pins, the Makefile and README's commands."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from test_architecture import ORDER

from course_lib.config import PRESETS, preset

PROJECT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
README = (PROJECT / "README.md").read_text(encoding="utf-8")
EXTRAS = PYPROJECT["optional-dependencies"]
OTHER_SYSTEMS = {"appnope", "colorama", "pywinpty"}  # pinned for Windows and macOS
DIRECT = [
    Requirement(line) for group in (PYPROJECT["dependencies"], *EXTRAS.values()) for line in group
]


def pins() -> dict[str, str]:
    lines = (PROJECT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    exact = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(each) == 2 for each in exact), "constraints.txt holds name==version lines only"
    return dict(exact)


def needed() -> dict[str, str]:
    """Name -> version of every installed package that the course needs, at whatever remove."""
    found: dict[str, str] = {}
    waiting, seen = list(DIRECT), set()
    while waiting:
        wanted = waiting.pop()
        for extra in ("", *wanted.extras):
            name = canonicalize_name(wanted.name)
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                package = distribution(name)
            except PackageNotFoundError:
                continue  # the bench extra, which `make test` does not install
            found[name] = package.version.split("+")[0]  # the pin covers CPU and CUDA builds alike
            for line in package.requires or []:
                requirement = Requirement(line)
                if not requirement.marker or requirement.marker.evaluate({"extra": extra}):
                    waiting.append(requirement)
    return found


def test_every_needed_package_is_pinned_and_no_other():
    bench = {canonicalize_name(Requirement(each).name) for each in EXTRAS["bench"]}

    assert set(pins()) - OTHER_SYSTEMS - bench <= set(needed())
    assert set(needed()) <= set(pins())


def test_the_tests_run_on_the_pinned_versions():
    pinned = pins()
    differing = [
        f"{name} {found} is installed, constraints.txt pins {pinned[name]}"
        for name, found in needed().items()
        if pinned[name] != found
    ]

    assert not differing, "install the pins: pip install -c constraints.txt -e .[dev]"


def test_the_pins_can_be_installed_on_the_oldest_python_that_is_promised():
    """soupsieve 4.1.2 wants 3.11.5: on the 3.11.2 of Debian 12 `make run` ended in pip's errors."""
    oldest = PYPROJECT["requires-python"].strip(">=") + ".0"
    asked = {name: distribution(name).metadata["Requires-Python"] or "" for name in needed()}
    refused = {name: pins()[name] for name in asked if oldest not in SpecifierSet(asked[name])}

    assert not refused


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda each: each.name)
def test_each_pin_lies_in_its_range(requirement: Requirement):
    assert requirement.specifier, "give a range"
    assert not any(each.operator == "==" for each in requirement.specifier), "pins stand elsewhere"
    pin = pins()[canonicalize_name(requirement.name)]
    remedy = "widen the range in pyproject.toml, or take another version"
    assert Version(pin) in requirement.specifier, f"{pin} is not {requirement}: {remedy}"


def test_conda_takes_the_same_packages_and_the_same_pins():
    environment = yaml.safe_load((PROJECT / "environment.yml").read_text(encoding="utf-8"))
    *plain, last = environment["dependencies"]
    python = next(each for each in plain if each.startswith("python="))

    assert [each.partition("=")[0] for each in plain] == ["python", "pip"]
    assert Version(python.partition("=")[2]) >= Version(PYPROJECT["requires-python"].strip(">="))
    assert last == {"pip": ["-c constraints.txt", "-e .[dev]"]}


# --------------------------------------------------------------------------------------------------
# Makefile


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The files that decide what make does, with a .venv that looks installed."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(PROJECT / name, tmp_path / name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    return tmp_path


def planned(clone: Path, target: str) -> str:
    """The commands that make would run."""
    command = ["make", "--dry-run", "--no-print-directory", target]
    done = subprocess.run(
        command, cwd=clone, capture_output=True, text=True, check=True, timeout=20
    )
    return done.stdout


def test_a_second_make_run_installs_nothing(clone: Path):
    assert "pip install" in planned(clone, "run")

    (clone / ".venv" / ".installed").touch()
    assert planned(clone, "run").strip() == ".venv/bin/posttrain all --config quick"


def test_a_moved_pin_is_installed(clone: Path):
    stamp, pinned = clone / ".venv" / ".installed", clone / "constraints.txt"
    stamp.touch()
    later = stamp.stat().st_mtime + 5
    os.utime(pinned, (later, later))

    assert "pip install" in planned(clone, "run")


def test_what_is_installed_is_what_readme_and_conda_install(clone: Path):
    install = "-m pip install -c constraints.txt -e .[dev]"

    assert install in README
    words = planned(clone, "run").replace("'", "")
    assert "-c constraints.txt -e .[dev]" in words


def test_ci_calls_the_test_commands():
    script = PROJECT / ".ci" / "run"

    assert script.stat().st_mode & 0o111
    assert {"make test", "make test-browser"} <= set(script.read_text("utf-8").splitlines())


# --------------------------------------------------------------------------------------------------
# README


def blocks(language: str) -> list[str]:
    """README's fenced blocks of one language ("" = none named)."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [text for named, text in found if named == language]


COMMANDS = [
    line for text in blocks("sh") for line in text.splitlines() if line.startswith("posttrain ")
]


@pytest.mark.parametrize("line", COMMANDS)
def test_readmes_commands_parse(line: str):
    from typer.main import get_command

    from course_lib.cli import app

    _, name, *arguments = shlex.split(line, comments=True)
    get_command(app).commands[name].make_context(name, arguments)


def test_readme_shows_every_command():
    from course_lib.cli import app

    shown = {shlex.split(line)[1] for line in COMMANDS}
    assert {command.name for command in app.registered_commands} - shown <= {"rollback"}


def test_readmes_make_targets_exist():
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"(?:^|`|[A-Z] )make (?:PYTHON=\S+ )?([a-z-]+)", README, re.MULTILINE))

    assert {"run", "lab", "test"} <= named <= targets
    listed = re.search(r"^Makefile +(.+)$", README, re.MULTILINE)[1]
    assert set(listed.split(" · ")) <= targets


def test_readmes_presets_are_the_presets():
    for name in PRESETS:
        sft, rl = preset(name).sft, preset(name).rl
        epochs = f"{sft.epochs} epoch{'s' if sft.epochs > 1 else ''}"
        row = (
            f"| `{name}` | batches of {sft.batch_size}, {epochs} | {rl.steps} steps of "
            f"{rl.prompts_per_step} prompts x {rl.group_size} samples |"
        )
        assert row in README


def test_readmes_own_task_runs(tmp_path: Path):
    """As printed, with 3 steps in place of 20, in a process of its own as a reader's would be."""
    (code,) = blocks("python")
    assert code.count("steps=20") == 1
    (tmp_path / "task.py").write_text(code.replace("steps=20", "steps=3"))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TINKER_", "COURSE_"))}
    run = subprocess.run(
        [sys.executable, "task.py"],
        cwd=tmp_path,
        env=environment | {"COURSE_ENV_FILE": ""},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert run.returncode == 0, run.stderr
    rewards = ast.literal_eval(run.stdout.splitlines()[-1])
    assert len(rewards) == 3
    assert all(0 < reward < 1 for reward in rewards)


def test_readmes_maps_name_what_is_there():
    folders, modules = blocks("")
    for name in re.findall(r"(?:^| {8})([\w./-]+?)/? {2,}", folders, re.MULTILINE):
        assert (PROJECT / name).exists(), name
    named = [
        line[start:].split()[0].strip("/")
        for line in modules.splitlines()
        for start in (0, 58)
        if line[start:].strip()
    ]
    assert named == ORDER  # which test_architecture compares with the folder and the imports
