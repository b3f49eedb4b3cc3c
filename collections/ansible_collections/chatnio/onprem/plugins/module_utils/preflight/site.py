# Copyright: the chatnio on-prem authors
# Apache License 2.0 (see LICENSE)
"""What the checks look at: the inventory, what its machines report, and what is required of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Machine:
    """One host of the inventory."""

    name: str
    # The values the checks read (`Rules.reads`), templated.
    values: Mapping[str, Any] = field(default_factory=dict)
    # Those of them that could not be templated, each with the reason.
    broken: Mapping[str, str] = field(default_factory=dict)
    # Everything set for it in the inventory or on the command line, as it was written: secrets stay encrypted.
    variables: Mapping[str, Any] = field(default_factory=dict)
    # What it reports of itself; empty where it wasn't asked (outside of --limit) or couldn't answer.
    facts: Mapping[str, Any] = field(default_factory=dict)
    # Why it couldn't answer.
    silence: str | None = None


@dataclass(frozen=True)
class Site:
    """An inventory: its machines by name, its groups, and where an operator finds its files."""

    machines: Mapping[str, Machine]
    groups: Mapping[str, Sequence[str]]
    inventory: str = "the inventory"

    def members(self, *groups: str) -> list[str]:
        """Return the hosts that are in any of `groups`, each once."""
        return list(dict.fromkeys(host for group in groups for host in self.groups.get(group, ())))

    def reporting(self) -> Iterator[Machine]:
        """Yield the machines that answered."""
        return (machine for machine in self.machines.values() if machine.facts)

    def label(self, hosts: Collection[str]) -> str:
        """Return the shortest name for `hosts`: a host, all, a group of exactly these, or a list."""
        if len(set(hosts)) == 1:
            return next(iter(hosts))
        if set(hosts) == set(self.machines):
            return "all"
        names = (group for group, members in self.groups.items() if set(members) == set(hosts))
        return next(names, ", ".join(sorted(set(hosts))))

    def by_value(self, name: str, hosts: Iterable[str]) -> dict[Any, list[str]]:
        """Return which of `hosts` have which value of the variable `name`; unset is None, unreadable left out."""
        owners: dict[Any, list[str]] = {}
        for host in hosts:
            machine = self.machines[host]
            if name not in machine.broken:
                owners.setdefault(machine.values.get(name), []).append(host)
        return owners


@dataclass(frozen=True)
class Rules:
    """What is required, as the preflight role's data says it."""

    known_variables: Collection[str]
    free_prefixes: Collection[str]
    removed_variables: Sequence[Mapping[str, str]]
    profiles: Mapping[str, Mapping[str, float]]
    gpus: Mapping[str, Mapping[str, Any]]
    systems: Mapping[str, Mapping[str, bool]]
    clock_tolerance: float
