#!/usr/bin/python
# Copyright: the chatnio on-prem authors
# Apache License 2.0 (see LICENSE)

DOCUMENTATION = r"""
module: lab
short_description: Boot or remove a lab of systemd containers on isolated networks
description:
  - Boots systemd containers with systemd-nspawn on bridges in a network namespace of their own, so that nothing
    of the lab reaches beyond it.
  - What runs already is left alone; an interrupted start can be repeated.
options:
  name:
    description: Name of the lab and of its network namespace.
    type: str
    required: true
  folder:
    description: Folder for the nodes' file systems and consoles. Removing the lab removes the nodes in it.
    type: path
    required: true
  base:
    description: Root file system that every node is an overlay on.
    type: path
  state:
    description: Whether the lab runs.
    type: str
    choices: [started, absent]
    default: started
  networks:
    description: The bridges.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Name of the network.
        type: str
        required: true
      control_address:
        description: Address with prefix that this machine has on it, in the lab's namespace.
        type: str
      desk_address:
        description: Address with prefix of a user's machine on it, a namespace of its own named NAME-user.
        type: str
  nodes:
    description: The machines.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Host name.
        type: str
        required: true
      interfaces:
        description: Its interfaces.
        type: list
        elements: dict
        required: true
        suboptions:
          name:
            description: Name of the interface.
            type: str
            required: true
          network:
            description: Network that it is plugged into.
            type: str
            required: true
          address:
            description: Address with prefix that the node boots with; none leaves the interface unconfigured.
            type: str
      binds:
        description: Folders of this machine that the node sees read-only, as C(SOURCE:TARGET).
        type: list
        elements: str
        default: []
  forward:
    description: A port of 127.0.0.1 on this machine that leads to an address on the business network.
    type: dict
    suboptions:
      port:
        description: The port.
        type: int
        required: true
      target:
        description: The address and port that it leads to.
        type: str
        required: true
  authorized_key:
    description: SSH public key that may sign in as C(ansible).
    type: str
author: chatnio on-prem authors
"""

EXAMPLES = r"""
- name: Boot one node
  chatnio.onprem.lab:
    name: chatnio-lab
    folder: /var/cache/chatnio/labs/chatnio-lab
    base: /var/cache/chatnio/base/0123abcd
    networks:
      - {name: management, control_address: 10.0.0.250/24}
    nodes:
      - {name: n1, interfaces: [{name: mgmt0, network: management, address: 10.0.0.11/24}]}
    authorized_key: ssh-ed25519 AAAA…
"""

RETURN = r"""
log:
  description: What was made or removed.
  returned: always
  type: list
  elements: str
"""

import shutil
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.chatnio.onprem.plugins.module_utils.lab import (
    FORWARDER,
    Interface,
    Lab,
    LabError,
    Network,
    Node,
)

TEXT = {"type": "str"}
NAME = {"type": "str", "required": True}


def options() -> dict[str, object]:
    """Return the module's argument specification."""
    interface = {"name": NAME, "network": NAME, "address": TEXT}
    node = {
        "name": NAME,
        "interfaces": {"type": "list", "elements": "dict", "required": True, "options": interface},
        "binds": {"type": "list", "elements": "str", "default": []},
    }
    network = {"name": NAME, "control_address": TEXT, "desk_address": TEXT}
    return {
        "name": NAME,
        "folder": {"type": "path", "required": True},
        "base": {"type": "path"},
        "state": {"type": "str", "choices": ["started", "absent"], "default": "started"},
        "networks": {"type": "list", "elements": "dict", "required": True, "options": network},
        "nodes": {"type": "list", "elements": "dict", "required": True, "options": node},
        "forward": {"type": "dict", "options": {"port": {"type": "int", "required": True}, "target": NAME}},
        "authorized_key": {"type": "str", "no_log": False},
    }


def main() -> None:
    """Entry point."""
    module = AnsibleModule(argument_spec=options(), required_if=[("state", "started", ("base", "authorized_key"))])
    asked = module.params
    lab = Lab(
        name=asked["name"],
        folder=Path(asked["folder"]),
        base=Path(asked["base"] or "/nonexistent"),
        networks=tuple(Network(**network) for network in asked["networks"]),
        nodes=tuple(
            Node(node["name"], tuple(Interface(**interface) for interface in node["interfaces"]), tuple(node["binds"]))
            for node in asked["nodes"]
        ),
    )
    try:
        if asked["state"] == "started":
            lab.up_networks()
            for node in lab.nodes:
                lab.up_node(node, asked["authorized_key"])
            if asked["forward"]:
                lab.up_forward(**asked["forward"])
        else:
            lab.end(FORWARDER)
            for node in lab.nodes:
                lab.down_node(node)
            lab.down_networks()
            shutil.rmtree(lab.folder, ignore_errors=True)
    except (LabError, OSError) as error:
        module.fail_json(msg=str(error), log=lab.log)
    module.exit_json(changed=bool(lab.log), log=lab.log)


if __name__ == "__main__":
    main()
