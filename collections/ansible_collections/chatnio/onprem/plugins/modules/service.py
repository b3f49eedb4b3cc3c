#!/usr/bin/python
# Copyright: the chatnio on-prem authors
# Apache License 2.0 (see LICENSE)

DOCUMENTATION = r"""
module: service
short_description: Ensure a unit is enabled, runs, and has read its files as they are now
description:
  - Restarts (or reloads) a unit when one of its files changed after the unit last read them. That is found out from
    the machine itself, not from what this run changed, so a run that was interrupted between a change and its
    restart is made good by the next one, and a renewed certificate reaches every service that names it.
  - What was read is kept in C(/run/chatnio/services), since a unit's start time says nothing about its reloads.
options:
  name:
    description: Name of the unit.
    type: str
    required: true
  files:
    description: Files that the unit reads when it starts, as shell patterns.
    type: list
    elements: str
    default: []
  reload:
    description: Whether a reload is enough for the unit to read them again.
    type: bool
    default: false
  stale:
    description: The caller found that the unit doesn't do what its files say; restart or reload it in any case.
    type: bool
    default: false
author: chatnio on-prem authors
"""

EXAMPLES = r"""
- name: Ensure nginx runs with its present configuration
  chatnio.onprem.service:
    name: nginx
    files: [/etc/nginx/nginx.conf, /etc/nginx/conf.d/*.conf]
    reload: true
"""

RETURN = r"""
did:
  description: What was done (or would be, in check mode), in order.
  returned: always
  type: list
  elements: str
"""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

STAMPS = Path("/run/chatnio/services")
PROPERTIES = (
    "LoadState",
    "ActiveState",
    "UnitFileState",
    "InvocationID",
    "NeedDaemonReload",
    "FragmentPath",
    "DropInPaths",
    "ActiveEnterTimestampMonotonic",
)


class Unit:
    """A systemd unit and the files that it reads."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.name = module.params["name"] if "." in module.params["name"] else f"{module.params['name']}.service"
        self.did: list[str] = []
        self.look()

    def systemctl(self, *arguments: str) -> str:
        """Run systemctl and return what it printed."""
        return str(self.module.run_command(["systemctl", *arguments], check_rc=True)[1])

    def look(self) -> None:
        """Read what systemd knows of the unit, and the files."""
        lines = self.systemctl("show", self.name, f"--property={','.join(PROPERTIES)}").splitlines()
        self.state: dict[str, str] = dict(line.partition("=")[::2] for line in lines)
        own = [self.state["FragmentPath"], *self.state["DropInPaths"].split()]
        named = (path for pattern in self.module.params["files"] for path in Path("/").glob(pattern.lstrip("/")))
        self.files = sorted({*(Path(path) for path in own if path), *named})
        digest = hashlib.sha256()
        for path in self.files:
            # With its time: a file that was altered, read by a reload, and put right again is not what the unit runs.
            digest.update(f"{path} {path.stat().st_mtime_ns}\n".encode() + path.read_bytes())
        self.digest = digest.hexdigest()

    @property
    def stamp(self) -> Path:
        """File that keeps what the unit has read."""
        return STAMPS / self.name

    def has_read(self) -> bool:
        """Say whether the running unit has read the files as they are now."""
        if self.stamp.is_file():
            invocation, digest = json.loads(self.stamp.read_text())
            if invocation == self.state["InvocationID"]:
                return bool(digest == self.digest)
        started = int(self.state["ActiveEnterTimestampMonotonic"]) / 1e6
        booted = time.time() - time.clock_gettime(time.CLOCK_MONOTONIC)
        return all(path.stat().st_ctime < booted + started for path in self.files)

    def act(self, *arguments: str) -> None:
        """Run systemctl unless in check mode; a failure tells the end of the unit's own log."""
        self.did.append(arguments[0])
        if self.module.check_mode:
            return
        code, _out, err = self.module.run_command(["systemctl", *arguments])
        if code:
            journalctl = ["journalctl", "--unit", self.name, "--lines=20", "--no-pager", "--output=cat"]
            _code, log, _err = self.module.run_command(journalctl)
            self.module.fail_json(
                msg=f"systemctl {' '.join(arguments)} failed: {err.strip()}\nThe end of its log:\n{log}", did=self.did
            )

    def ensure(self) -> None:
        """Bring the unit where it should be."""
        read = self.has_read() and not self.module.params["stale"]
        running = self.state["ActiveState"] in ("active", "reloading")
        enabled = self.state["UnitFileState"] not in ("disabled", "masked", "")
        if read and running and enabled and self.state["NeedDaemonReload"] == "no":
            return
        # In any case: NeedDaemonReload doesn't tell of the first drop-in of a unit.
        self.act("daemon-reload")
        self.look()
        if self.state["LoadState"] == "not-found" and not self.module.check_mode:
            self.module.fail_json(
                msg=f"There is no unit {self.name}; the package or template that brings it did not run"
            )
        if self.state["UnitFileState"] in ("disabled", "masked", ""):
            self.act("enable", self.name)
        if not running:
            self.act("restart", self.name)
        elif not read:
            self.act("reload" if self.module.params["reload"] else "restart", self.name)

    def remember(self) -> None:
        """Keep what the unit has read by now."""
        self.look()
        STAMPS.mkdir(parents=True, exist_ok=True)
        self.stamp.write_text(json.dumps([self.state["InvocationID"], self.digest]))


def main() -> None:
    """Entry point."""
    spec: dict[str, Any] = {
        "name": {"type": "str", "required": True},
        "files": {"type": "list", "elements": "str", "default": []},
        "reload": {"type": "bool", "default": False},
        "stale": {"type": "bool", "default": False},
    }
    module = AnsibleModule(argument_spec=spec, supports_check_mode=True)
    unit = Unit(module)
    unit.ensure()
    if not module.check_mode:
        unit.remember()
    module.exit_json(changed=bool(unit.did), did=unit.did)


if __name__ == "__main__":
    main()
