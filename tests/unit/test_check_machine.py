"""The check that `make lab` begins with: everything that stands in the way, at once, before anything is done."""

import os
import subprocess
from pathlib import Path

import pytest

CHECK = Path(__file__).parents[2] / "roles/lab/files/check-machine.sh"
LIES = {
    "id": "echo 1000",
    "uname": "echo riscv64",
    "df": "printf 'Filesystem\\nx 1 1 99 1 /\\n'",
    "awk": 'case "$1" in *MemAvailable*) echo 512;; *) exec /usr/bin/awk "$@";; esac',
    "oldpython": "echo 3.9",
}


@pytest.fixture
def lying_machine(tmp_path: Path) -> dict[str, str]:
    """A machine that lacks everything: its tools answer for another one."""
    for name, answer in LIES.items():
        tool = tmp_path / name
        tool.write_text(f"#!/bin/sh\n{answer}\n")
        tool.chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "oldpython"}


def test_says_all_that_is_missing(lying_machine: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run([CHECK, tmp_path / "cache"], env=lying_machine, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    for finding in ("user", "root", "processor", "riscv64", "python", "3.9", "memory", "512 MB", "disk", "99 MB"):
        assert finding in done.stderr
    assert "5 findings, nothing was changed" in done.stderr
    assert not (tmp_path / "cache").exists()


def test_names_only_what_is_missing(lying_machine: dict[str, str], tmp_path: Path) -> None:
    for name in set(LIES) - {"id"}:
        (tmp_path / name).unlink()
    done = subprocess.run(
        [CHECK, tmp_path], env={**lying_machine, "PYTHON": "python3"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "run it with sudo" in done.stderr
    assert "processor" not in done.stderr
