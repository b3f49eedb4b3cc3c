"""Runs a module as Ansible does: in a process of its own, arguments in, one JSON object out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

COLLECTIONS = Path(__file__).resolve().parents[5]
MODULES = Path(__file__).resolve().parents[2] / "plugins/modules"


def run_module(name: str, *, check: bool = False, **arguments: object) -> dict[str, object]:
    """Return what the module answered."""
    run = subprocess.run(
        [sys.executable, MODULES / f"{name}.py"],
        input=json.dumps({"ANSIBLE_MODULE_ARGS": {**arguments, "_ansible_check_mode": check}}, default=str),
        env={**os.environ, "PYTHONPATH": str(COLLECTIONS)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout, run.stderr
    return json.loads(run.stdout)
