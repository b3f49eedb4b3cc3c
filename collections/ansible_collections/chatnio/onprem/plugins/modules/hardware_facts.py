#!/usr/bin/python
# Copyright: the chatnio on-prem authors
# Apache License 2.0 (see LICENSE)

from __future__ import annotations

DOCUMENTATION = r"""
module: hardware_facts
short_description: Read what a machine has for serving models
description:
  - Reads cores, memory, free disk, NVMe drives and GPUs from sysfs, so it needs neither drivers nor packages
    (C(lspci) isn't part of a minimal system). Changes nothing.
  - Also compares the machine's clock with the controller's.
options:
  controller_epoch:
    description:
      - The controller's time in seconds since 1970, templated when the task runs, so that only the connection lies
        between the two clocks.
    type: float
    required: true
  data_path:
    description: A directory on the file system whose free space counts.
    type: path
    default: /var
  sysfs:
    description: Where sysfs is mounted.
    type: path
    default: /sys
attributes:
  check_mode:
    description: Reads only, so check mode makes no difference.
    support: full
author: chatnio on-prem authors
"""

EXAMPLES = r"""
- name: Read the hardware
  chatnio.onprem.hardware_facts:
    controller_epoch: "{{ now(fmt='%s') }}"
"""

RETURN = r"""
ansible_facts:
  description: The facts.
  returned: always
  type: dict
  contains:
    onprem_hardware:
      description: What the machine has.
      returned: always
      type: dict
      contains:
        cores:
          description: Logical CPUs that may be used.
          type: int
        memory_bytes:
          description: Memory that the kernel manages.
          type: int
        data_path:
          description: The option O(data_path).
          type: str
        free_bytes:
          description: Free space there for services.
          type: int
        nvme:
          description: NVMe namespaces, each with RV(ignore:name) and RV(ignore:bytes).
          type: list
          elements: dict
        gpus:
          description:
            - GPUs by NVIDIA and AMD, each with its PCI RV(ignore:address) and RV(ignore:id) (vendor:device), and
              RV(ignore:memory_bytes) where its driver tells.
          type: list
          elements: dict
        clock_offset:
          description: Seconds that this machine's clock is ahead of the controller's.
          type: float
"""

import os
import re
import time
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

GPU_VENDORS = {"10de", "1002"}  # NVIDIA, AMD
# Base classes of PCI: display controllers, and the processing accelerators that some compute cards report as.
GPU_CLASSES = ("0x03", "0x12")
# nvme0c0n1 is one path to a namespace that nvme0n1 already stands for.
NVME_NAMESPACE = re.compile(r"nvme\d+n\d+")
SECTOR = 512  # sysfs counts in sectors of this size, whatever the drive's are


def read_gpus(sysfs: Path, memory: dict[str, int]) -> list[dict[str, Any]]:
    """Return the GPUs on the PCI bus, with what `memory` tells by PCI address."""
    gpus = []
    for device in sorted((sysfs / "bus/pci/devices").glob("*")):
        vendor, model, kind = ((device / name).read_text().strip() for name in ("vendor", "device", "class"))
        if vendor[2:] in GPU_VENDORS and kind.startswith(GPU_CLASSES):
            gpu = {"address": device.name, "id": f"{vendor[2:]}:{model[2:]}", "memory_bytes": memory.get(device.name)}
            gpus.append(gpu)
    return gpus


def read_nvme(sysfs: Path) -> list[dict[str, Any]]:
    """Return the NVMe namespaces and their sizes."""
    drives = sorted(path for path in (sysfs / "block").glob("nvme*") if NVME_NAMESPACE.fullmatch(path.name))
    return [{"name": drive.name, "bytes": int((drive / "size").read_text()) * SECTOR} for drive in drives]


def parse_nvidia_smi(output: str) -> dict[str, int]:
    """Return GPU memory in bytes by PCI address, from lines such as ``00000000:3B:00.0, 15360`` (MiB)."""
    memory = {}
    for line in output.splitlines():
        address, _, mebibytes = line.partition(", ")
        if mebibytes.strip().isdigit():
            # nvidia-smi writes the PCI domain with eight digits, the kernel with four.
            memory[address.strip().lower()[-len("0000:3b:00.0") :]] = int(mebibytes) * 2**20
    return memory


def read_nvidia_memory(module: AnsibleModule) -> dict[str, int]:
    """Return what NVIDIA's driver says about memory; nothing where it isn't installed yet."""
    tool = module.get_bin_path("nvidia-smi")
    if not tool:
        return {}
    query = [tool, "--query-gpu=pci.bus_id,memory.total", "--format=csv,noheader,nounits"]
    rc, output, _error = module.run_command(query)
    return parse_nvidia_smi(output) if rc == 0 else {}


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "controller_epoch": {"type": "float", "required": True},
            "data_path": {"type": "path", "default": "/var"},
            "sysfs": {"type": "path", "default": "/sys"},
        },
        supports_check_mode=True,
    )
    clock_offset = time.time() - module.params["controller_epoch"]
    sysfs = Path(module.params["sysfs"])
    file_system = os.statvfs(module.params["data_path"])
    hardware = {
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "data_path": module.params["data_path"],
        "free_bytes": file_system.f_bavail * file_system.f_frsize,
        "nvme": read_nvme(sysfs),
        "gpus": read_gpus(sysfs, read_nvidia_memory(module)),
        "clock_offset": round(clock_offset, 1),
    }
    module.exit_json(changed=False, ansible_facts={"onprem_hardware": hardware})


if __name__ == "__main__":
    main()
