# Copyright: the chatnio on-prem authors
# Apache License 2.0 (see LICENSE)
"""The two networks: given, valid, the same for every host, and apart from each other."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Network

from ansible_collections.chatnio.onprem.plugins.module_utils.preflight.finding import Finding
from ansible_collections.chatnio.onprem.plugins.module_utils.preflight.site import Site

NETWORKS = ("management", "business")


def read_network(value: object) -> IPv4Network | None:
    """Return the network that a variable's value names, or None where it names none."""
    try:
        return IPv4Network(str(value))
    except ValueError:
        return None


def check_networks(site: Site) -> Iterator[Finding]:
    """Yield networks that are missing, malformed or told differently to different hosts, and an overlap of the two."""
    valid: list[IPv4Network] = []
    for name in NETWORKS:
        variable = f"{name}_network"
        owners = site.by_value(variable, site.machines)
        if len(owners) > 1:
            told = "; ".join(f"{value or 'not set'} on {site.label(hosts)}" for value, hosts in owners.items())
            yield Finding(
                "all", variable, told, "one value for the whole site", f"set {variable} once, for the group all"
            )
        for value, hosts in owners.items():
            if network := read_network(value):
                valid.append(network)
            elif len(owners) == 1 or value is not None:
                yield Finding(
                    site.label(hosts),
                    variable,
                    found="not set" if value is None else str(value),
                    needed="an IPv4 network, for example 10.0.0.0/24",
                    mend=_mend(variable, value),
                )
    if len(valid) == len(NETWORKS) and valid[0].overlaps(valid[1]):
        yield Finding(
            "all",
            "business_network",
            found=f"{valid[1]}, which overlaps management_network {valid[0]}",
            needed="two networks that share no address",
            mend="correct whichever is wrong; users must not reach the management network",
        )


def _mend(variable: str, value: object) -> str:
    """Return what to write; a host's address with a prefix length is the mistake most people make."""
    try:
        return f"set {variable} to {IPv4Network(str(value), strict=False)}"
    except ValueError:
        return f"set {variable} for the group all"
