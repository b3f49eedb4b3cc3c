"""Makes the collection importable under its real name, from wherever the tests are started."""

from __future__ import annotations

from pathlib import Path

from ansible.plugins.loader import init_plugin_loader

COLLECTIONS = Path(__file__).resolve().parents[5]

init_plugin_loader([str(COLLECTIONS)])
