# Copyright: the chatnio on-prem authors
# Apache License 2.0 (see LICENSE)
"""Each machine's hardware, held against the profile that its inventory chose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ansible_collections.chatnio.onprem.plugins.module_utils.preflight.finding import Finding, did_you_mean
from ansible_collections.chatnio.onprem.plugins.module_utils.preflight.site import Machine, Rules, Site

VARIABLE = "preflight_profile"
# Sizes may fall short by this share: firmware keeps memory to itself (64 GB report 62.8 GiB), GPUs do for error
# correction, and a drive sold as 1 TB for servers holds 960 GB.
TOLERANCE = 0.05

Profile = Mapping[str, float]


def check_hardware(site: Site, rules: Rules) -> Iterator[Finding]:
    """Yield profiles that don't exist, and the machines that are below theirs."""
    for value, hosts in site.by_value(VARIABLE, site.machines).items():
        if value in rules.profiles:
            yield from _check_profile(site, rules, value, hosts)
        else:
            yield Finding(
                site.label(hosts),
                VARIABLE,
                found=str(value),
                needed=f"one of {', '.join(rules.profiles)}",
                mend=did_you_mean(str(value), rules.profiles) or f"correct {VARIABLE} in {site.inventory}",
            )


def _check_profile(site: Site, rules: Rules, name: str, hosts: list[str]) -> Iterator[Finding]:
    profile = rules.profiles[name]
    storage, model_nodes = site.members("data"), site.members("model_nodes")
    if set(storage) & set(hosts) and 0 < len(storage) < profile["data_hosts"]:
        yield _short("data", "hosts", name, len(storage), profile["data_hosts"], "", "add hosts to data")
    for host in hosts:
        machine = site.machines[host]
        if hardware := machine.facts.get("onprem_hardware"):
            yield from _check_machine(machine, hardware, name, profile)
            if host in model_nodes:
                yield from _check_model_node(machine, hardware, name, profile, rules.gpus)


def _check_machine(machine: Machine, hardware: Mapping[str, Any], name: str, profile: Profile) -> Iterator[Finding]:
    mend = f"use a bigger machine, or another {VARIABLE} for this host"
    if hardware["cores"] < profile["cores"]:
        yield _short(machine.name, "cores", name, hardware["cores"], profile["cores"], "", mend)
    if _below(memory := hardware["memory_bytes"] / 2**30, profile["memory_gb"]):
        yield _short(machine.name, "memory", name, memory, profile["memory_gb"], " GB", mend)
    if (free := hardware["free_bytes"] / 1e9) < profile["free_disk_gb"]:
        subject = f"free disk, {hardware['data_path']}"
        yield _short(machine.name, subject, name, free, profile["free_disk_gb"], " GB", "free space or add a disk")


def _check_model_node(
    machine: Machine, hardware: Mapping[str, Any], name: str, profile: Profile, known: Mapping[str, Mapping[str, Any]]
) -> Iterator[Finding]:
    nvme = sum(drive["bytes"] for drive in hardware["nvme"]) / 1e9
    if _below(nvme, profile["nvme_gb"]):
        yield _short(
            machine.name, "NVMe", name, nvme, profile["nvme_gb"], " GB", "add an NVMe drive for models and cache"
        )
    if not profile["gpu_memory_gb"]:
        return
    sizes = [_gpu_memory(gpu, known) for gpu in hardware["gpus"]]
    largest = max((size for size in sizes if size is not None), default=0)
    if not _below(largest, profile["gpu_memory_gb"]):
        return
    if None in sizes:
        unknown = [gpu["id"] for gpu, size in zip(hardware["gpus"], sizes, strict=True) if size is None]
        yield Finding(
            machine.name,
            "GPU memory",
            found=f"unknown: PCI device {', '.join(unknown)}, no driver yet",
            needed=f"{profile['gpu_memory_gb']:g} GB (profile {name})",
            mend="compare with the vendor's data sheet; after the driver is installed this check reads it",
            fatal=False,
        )
    else:
        mend = "add a GPU, or use a backend without one and another preflight_profile"
        yield _short(machine.name, "GPU memory", name, largest, profile["gpu_memory_gb"], " GB", mend)


def _gpu_memory(gpu: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Return a GPU's memory in GB as its driver says, else as its PCI id does, else None."""
    if gpu["memory_bytes"] is not None:
        return float(gpu["memory_bytes"] / 2**30)
    return float(known[gpu["id"]]["memory_gb"]) if gpu["id"] in known else None


def _below(actual: float, wanted: float) -> bool:
    return actual < wanted * (1 - TOLERANCE)


def _short(host: str, subject: str, profile: str, actual: float, wanted: float, unit: str, mend: str) -> Finding:
    return Finding(
        host, subject, found=f"{actual:.4g}{unit}", needed=f"{wanted:g}{unit} (profile {profile})", mend=mend
    )
