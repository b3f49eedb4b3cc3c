"""The hardware is read from sysfs alone, here a made-up one."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ansible_collections.chatnio.onprem.plugins.modules import hardware_facts

T4 = {"address": "0000:3b:00.0", "id": "10de:1eb8"}
MI300X = {"address": "0000:43:00.0", "id": "1002:74a1"}


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    """A server: two GPUs of two vendors, one GPU's audio function, the BMC's display, and two NVMe drives."""
    for address, vendor, device, kind in [
        ("0000:3b:00.0", "0x10de", "0x1eb8", "0x030200"),
        ("0000:3b:00.1", "0x10de", "0x10f8", "0x040300"),
        ("0000:43:00.0", "0x1002", "0x74a1", "0x120000"),
        ("0000:03:00.0", "0x1a03", "0x2000", "0x030000"),
    ]:
        folder = tmp_path / "bus/pci/devices" / address
        folder.mkdir(parents=True)
        for name, content in (("vendor", vendor), ("device", device), ("class", kind)):
            (folder / name).write_text(content + "\n")
    for name in ("nvme0n1", "nvme1n1", "nvme1c1n1", "sda"):
        folder = tmp_path / "block" / name
        folder.mkdir(parents=True)
        (folder / "size").write_text("1875385008\n")
    return tmp_path


def test_gpus_without_driver(sysfs):
    assert hardware_facts.read_gpus(sysfs, {}) == [{**T4, "memory_bytes": None}, {**MI300X, "memory_bytes": None}]


def test_gpu_with_driver(sysfs):
    memory = hardware_facts.parse_nvidia_smi("00000000:3B:00.0, 15360\n")
    assert hardware_facts.read_gpus(sysfs, memory)[0] == {**T4, "memory_bytes": 15360 * 2**20}


@pytest.mark.parametrize("output", ["", "No devices were found\n", "00000000:3B:00.0, [N/A]\n"])
def test_driver_that_tells_nothing(output):
    assert hardware_facts.parse_nvidia_smi(output) == {}


def test_nvme_namespaces_count_once(sysfs):
    size = 1875385008 * 512
    assert hardware_facts.read_nvme(sysfs) == [{"name": "nvme0n1", "bytes": size}, {"name": "nvme1n1", "bytes": size}]


def test_machine_without_pci_or_nvme(tmp_path):
    assert hardware_facts.read_gpus(tmp_path, {}) == []
    assert hardware_facts.read_nvme(tmp_path) == []


def test_module(sysfs, tmp_path):
    arguments = {"controller_epoch": time.time() - 100, "sysfs": str(sysfs), "data_path": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, hardware_facts.__file__],
        input=json.dumps({"ANSIBLE_MODULE_ARGS": arguments}),
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(run.stdout)
    hardware = result["ansible_facts"]["onprem_hardware"]
    assert result["changed"] is False
    assert [gpu["id"] for gpu in hardware["gpus"]] == ["10de:1eb8", "1002:74a1"]
    assert 100 <= hardware["clock_offset"] < 110
    assert hardware["cores"] >= 1
    assert hardware["memory_bytes"] > 2**28
    assert hardware["free_bytes"] > 0
