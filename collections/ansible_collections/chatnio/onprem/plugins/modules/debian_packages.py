#!/usr/bin/python
# Copyright: the chatnio on-prem authors
# Apache License 2.0 (see LICENSE)

DOCUMENTATION = r"""
module: debian_packages
short_description: Download Debian packages with every package they need
description:
  - Resolves the packages against an empty system, so that the result installs on any machine of the release,
    and downloads them with the machine's own APT configuration (sources, proxies, keys).
  - Nothing is installed and the machine's own APT state is not touched.
options:
  packages:
    description: Names of the packages.
    type: list
    elements: str
    required: true
  dest:
    description: Folder for the C(.deb) files and for C(origins.json), which maps each file to the address it came from.
    type: path
    required: true
  refresh:
    description: Resolve again although nothing was added since the last time; picks up security updates.
    type: bool
    default: false
author: chatnio on-prem authors
"""

EXAMPLES = r"""
- name: Gather nginx and all it needs
  chatnio.onprem.debian_packages:
    packages: [nginx-light]
    dest: /var/cache/chatnio/parts/debian
"""

RETURN = r"""
count:
  description: Number of packages in the folder.
  returned: always
  type: int
"""

import hashlib
import json
import re
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

URI_LINE = re.compile(r"^'(?P<uri>[^']+)' (?P<file>\S+) (?P<size>\d+)")


class Apt:
    """apt-get with a state of its own, in which no package is installed."""

    def __init__(self, module: AnsibleModule, dest: Path) -> None:
        self.module = module
        state = dest / ".apt"
        for folder in (state / "lists/partial", state / "cache", dest / "partial"):
            folder.mkdir(parents=True, exist_ok=True)
        (state / "status").touch()
        settings = {
            "Dir::State": state,
            "Dir::State::status": state / "status",
            "Dir::Cache": state / "cache",
            "Dir::Cache::archives": dest,
            "APT::Install-Recommends": "false",
            "APT::Sandbox::User": "root",
            "APT::Get::List-Cleanup": "true",
            "APT::Keep-Downloaded-Packages": "true",
            # The machine's own clean-up hooks are about its own caches.
            "APT::Update::Post-Invoke-Success::": "",
        }
        self.command = ["apt-get", "-qq", *(f"-o{key}={value}" for key, value in settings.items())]

    def run(self, *arguments: str) -> str:
        """Run apt-get and return what it printed; fail the module with its own words if it fails."""
        code, out, err = self.module.run_command([*self.command, *arguments])
        if code:
            what = f"apt-get {' '.join(arguments[:3])} …"
            self.module.fail_json(msg=f"{what} failed: {err.strip() or out.strip()}", rc=code)
        return str(out)


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "packages": {"type": "list", "elements": "str", "required": True},
            "dest": {"type": "path", "required": True},
            "refresh": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    # An empty system lacks what every package may take for granted (Debian policy 3.8).
    packages = ["?essential", "apt", *sorted(set(module.params["packages"]))]
    dest = Path(module.params["dest"])
    key = hashlib.sha256("\n".join(packages).encode()).hexdigest()
    index = dest / "origins.json"
    known = json.loads(index.read_text()) if index.is_file() else {"key": None, "origins": {}}
    complete = known["key"] == key and all((dest / name).is_file() for name in known["origins"])
    if complete and not module.params["refresh"]:
        module.exit_json(changed=False, count=len(known["origins"]))
    if module.check_mode:
        module.exit_json(changed=True, count=len(known["origins"]))

    apt = Apt(module, dest)
    apt.run("update")
    lines = apt.run("install", "-y", "--print-uris", *packages).splitlines()
    # apt escapes the epoch's colon in the file's name only.
    found = {m["file"]: m["uri"] for m in map(URI_LINE.match, lines) if m}
    # What is already here is not in the list that apt prints, so the closure is asked of a simulation.
    apt.run("install", "-y", "--download-only", *packages)
    simulated = apt.run("install", "-s", *packages)
    wanted = set(re.findall(r"^Inst (\S+) \((\S+)", simulated, re.MULTILINE))
    kept = {}
    for path in sorted(dest.glob("*.deb")):
        name, version, _arch = path.stem.split("_")
        if (name, version.replace("%3a", ":")) in wanted:
            kept[path.name] = found.get(path.name) or known["origins"].get(path.name, "apt")
        else:
            path.unlink()
    index.write_text(json.dumps({"key": key, "origins": kept}, indent=1, sort_keys=True))
    module.exit_json(changed=kept != known["origins"], count=len(kept))


if __name__ == "__main__":
    main()
