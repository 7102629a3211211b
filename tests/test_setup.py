"""The set-up: Makefile, requirements, CI, container. Nothing is installed or downloaded."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
MAKE = shutil.which("make")
needs_make = pytest.mark.skipif(MAKE is None, reason="no make on this machine")


def run_make(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run make in a folder, unaware of any make (and its settings) that runs these tests."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name in {"HOME", "PATH", "TMPDIR", "LANG", "LC_ALL"}
    }
    return subprocess.run(
        [str(MAKE), *arguments],
        cwd=folder,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def script(path: Path, *lines: str) -> Path:
    """Write an executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of what the set-up reads, without a virtual environment."""
    folder = tmp_path / "stitch"
    folder.mkdir()
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


@needs_make
@pytest.mark.parametrize("goal", ["train", "test"])
@pytest.mark.parametrize(
    ("says", "found"),
    [("3.9", "is 3.9"), ("Python 3.9.18", "is Python 3.9.18"), (None, "does not run")],
)
def test_wrong_python_is_one_line(
    clone: Path, tmp_path: Path, goal: str, says: str | None, found: str
) -> None:
    python = tmp_path / "bin" / "python3.9"
    if says is not None:
        script(python, f"echo '{says}'")
    result = run_make(clone, goal, f"PYTHON={python}")
    lines = (result.stdout + result.stderr).splitlines()
    assert result.returncode != 0
    assert len(lines) == 1, lines
    assert "3.11, 3.12 or 3.13" in lines[0]
    assert f"{python} {found}" in lines[0]
    assert f"make PYTHON=/path/to/python3.12 {goal}" in lines[0]
    assert not (clone / ".venv").exists()


@needs_make
def test_no_venv_module_is_one_line(clone: Path, tmp_path: Path) -> None:
    python = script(
        tmp_path / "bin" / "python",
        'case "$2" in *ensurepip*) exit 1 ;; *) echo 3.12 ;; esac',
    )
    result = run_make(clone, "train", f"PYTHON={python}")
    lines = (result.stdout + result.stderr).splitlines()
    assert result.returncode != 0
    assert len(lines) == 1, lines
    assert "apt install python3.12-venv" in lines[0]
    assert not (clone / ".venv").exists()


@needs_make
def test_first_python_that_fits_is_taken(clone: Path, tmp_path: Path) -> None:
    # Newer ones on the path do not run, have another version or no ensurepip.
    folder = tmp_path / "bin"
    script(folder / "python3.13", "exit 127")
    script(folder / "python3.12", 'case "$2" in *ensurepip*) exit 1 ;; *) echo 3.12 ;; esac')
    script(folder / "python3.11", "echo 3.10")
    script(folder / "python3", "echo 3.11")
    result = run_make(clone, "-n", "setup", PATH=f"{folder}:{os.environ['PATH']}")
    assert result.returncode == 0, result.stderr
    assert "'python3' -m venv --clear .venv" in result.stdout


def sound_venv(clone: Path) -> None:
    """A stand-in for a whole virtual environment, set up from the requirements as they are."""
    script(clone / ".venv" / "bin" / "python", "echo 3.11")
    stamp = clone / ".venv" / ".installed"
    stamp.touch()
    os.utime(clone / "requirements.txt", (1, 1))


@needs_make
def test_set_up_once_and_again_when_requirements_change(clone: Path) -> None:
    sound_venv(clone)
    assert "pip install" not in run_make(clone, "-n", "train").stdout
    os.utime(clone / ".venv" / ".installed", (0, 0))
    again = run_make(clone, "-n", "train", TORCH_INDEX="https://example.org/cpu").stdout
    assert "pip install" in again
    assert "--extra-index-url 'https://example.org/cpu'" in again
    assert "-m venv" not in again  # what is there is kept


@needs_make
@pytest.mark.parametrize(("goal", "names"), [("train", "hopper"), ("challenge", "hopper maze")])
def test_the_exercise_and_its_length(clone: Path, goal: str, names: str) -> None:
    sound_venv(clone)
    settings = ("UPDATES=300", "SEEDS=3", "ARGS=--workers 1")
    commands = run_make(clone, "-n", goal, *settings).stdout
    told = f"tools/challenge.py {names} --seeds 3 --updates 300 --workers 1"
    assert " ".join(commands.split()).endswith(told)
    assert "--updates" not in run_make(clone, "-n", goal).stdout
    assert (ROOT / "tools/challenge.py").is_file()


@needs_make
def test_make_test_checks_style_and_runs_workers_of_one_thread(clone: Path) -> None:
    sound_venv(clone)
    commands = run_make(clone, "-n", "test", "ARGS=tests/test_setup.py").stdout
    assert "ruff check ." in commands
    assert "ruff format --check ." in commands
    assert "OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto tests/test_setup.py" in commands


@needs_make
def test_help_names_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, flags=re.M)
    shown = run_make(ROOT, "help").stdout
    for target in set(phony.split()) - {"help"}:
        assert f"make {target}" in shown


def test_requirements_are_pinned() -> None:
    lines = [
        line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()
    ]
    names = []
    for line in filter(None, lines):
        match = re.fullmatch(r"([A-Za-z0-9_.-]+)(\[[a-z,]+\])?==\d+(\.\d+)+", line)
        assert match, f"requirements.txt: {line!r} is not pinned as name==version"
        names.append(match[1].lower())
    assert len(names) == len(set(names))
    assert {"torch", "numpy", "gymnasium", "mujoco", "minari", "pyrallis", "pytest"} <= set(names)


def test_ci_calls_make_test() -> None:
    path = ROOT / ".ci" / "run"
    lines = path.read_text().splitlines()
    assert lines[0].endswith("bash")
    assert "set -euo pipefail" in lines
    assert lines[-1] == "make test"
    assert os.access(path, os.X_OK)


def test_workflow_calls_make_test() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    job = workflow["jobs"]["test"]
    assert job["strategy"]["matrix"]["python-version"] == ["3.11", "3.13"]
    assert job["timeout-minutes"] <= 60
    (step,) = [step for step in job["steps"] if step.get("run") == "make test"]
    assert step["env"]["PYTHON"] == "python"  # else the newest on the runner is taken


def test_dockerfile() -> None:
    text = (ROOT / "Dockerfile").read_text()
    bases = re.findall(r"^FROM (\S+)", text, flags=re.M)
    assert bases
    for base in bases:
        assert ":" in base and not base.endswith(":latest"), f"{base} names no fixed version"
    users = re.findall(r"^USER (\S+)", text, flags=re.M)
    assert users and users[-1] not in {"root", "0"}
    assert re.search(r"^ARG TORCH_INDEX=\S+/cpu$", text, flags=re.M)
    assert "make setup" in text
    assert "pip install" not in text, "its steps are the Makefile's"
