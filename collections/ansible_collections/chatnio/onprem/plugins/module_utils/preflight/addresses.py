# Copyright: the chatnio on-prem authors
# Apache License 2.0 (see LICENSE)
"""Each host's addresses: one per network it serves, valid, its own, and on an interface of its own."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network

from ansible_collections.chatnio.onprem.plugins.module_utils.preflight.finding import Finding
from ansible_collections.chatnio.onprem.plugins.module_utils.preflight.networks import NETWORKS, read_network
from ansible_collections.chatnio.onprem.plugins.module_utils.preflight.site import Machine, Site

BUSINESS_GROUPS = ("gateway", "model_nodes")


def check_addresses(site: Site) -> Iterator[Finding]:
    """Yield addresses that are missing, wrong or taken, and machines that don't carry them as the inventory says."""
    on_business = set(site.members(*BUSINESS_GROUPS))
    for machine in site.machines.values():
        for name in NETWORKS:
            required = name == "management" or machine.name in on_business
            yield from _check_address(site, machine, name, required=required)
        if machine.facts:
            yield from _check_interfaces(machine)
    for name in NETWORKS:
        variable = f"{name}_address"
        for address, hosts in site.by_value(variable, site.machines).items():
            if address is not None and len(hosts) > 1:
                yield Finding(
                    ", ".join(hosts),
                    variable,
                    found=f"{address}, on {len(hosts)} hosts",
                    needed="an address of its own for each host",
                    mend=f"give all but one of them another {variable} in {site.inventory}",
                )


def _check_address(site: Site, machine: Machine, name: str, *, required: bool) -> Iterator[Finding]:
    variable = f"{name}_address"
    if variable in machine.broken:
        return
    value = machine.values.get(variable)
    network = read_network(machine.values.get(f"{name}_network"))
    needed = f"an address in {network}" if network else f"an address in {name}_network"
    mend = f"set {variable} for {machine.name} in {site.inventory}"
    if value is None:
        if required:
            yield Finding(machine.name, variable, "not set", needed, mend)
        return
    try:
        address = IPv4Address(str(value))
    except ValueError:
        yield Finding(machine.name, variable, f"{value}, which is no IPv4 address", needed, mend)
        return
    if network and (fault := _fault(address, network)):
        yield Finding(machine.name, variable, f"{address}, {fault}", needed, mend)


def _fault(address: IPv4Address, network: IPv4Network) -> str | None:
    """Return what keeps a host from having `address` in `network`."""
    if address not in network:
        return f"which is not in {network}"
    # A /31 or /32 has neither (RFC 3021).
    if network.prefixlen < 31:
        if address == network.network_address:
            return "which is the network's own address"
        if address == network.broadcast_address:
            return "which is the broadcast address"
    return None


def _check_interfaces(machine: Machine) -> Iterator[Finding]:
    """Compare the interfaces that the inventory names with those the machine has."""
    addresses = _interface_addresses(machine)
    used: dict[str, str] = {}
    for name in NETWORKS:
        variable = f"{name}_interface"
        address = machine.values.get(f"{name}_address")
        if address is None:
            # The interface of the other machines may be named for all; this one has no need of it.
            continue
        wanted = machine.values.get(variable)
        holder = next((interface for interface, held in addresses.items() if str(address) in held), None)
        if wanted and wanted not in addresses:
            present = ", ".join(sorted(addresses))
            mend = f"set {variable} to one of these, or mend the cabling or driver of {wanted}"
            yield Finding(machine.name, variable, f"no {wanted}; there are {present}", "an interface it has", mend)
        elif wanted and holder and holder != wanted:
            mend = f"set {variable} to {holder}, or move the address"
            yield Finding(machine.name, variable, f"{address} is on {holder}", f"{address} on {wanted}", mend)
        elif not holder and not (wanted and name == "business"):
            # A business address may be missing where its interface is named: the network role configures it.
            mend = f"configure {address} on {machine.name}, or correct {name}_address"
            if name == "business":
                mend = f"set {variable}, and the network role configures it; or correct {name}_address"
            yield Finding(machine.name, f"{name}_address", f"{address} is on no interface", "it configured", mend)
        if interface := wanted or holder:
            used[name] = str(interface)
    if len(used) == len(NETWORKS) and used["management"] == used["business"]:
        yield Finding(
            machine.name,
            "business_interface",
            found=f"{used['business']} carries both networks",
            needed="an interface for each network",
            mend="connect the business network to an interface of its own and put business_address there",
        )


def _interface_addresses(machine: Machine) -> dict[str, set[str]]:
    """Return the IPv4 addresses of each interface but the loopback."""
    addresses: dict[str, set[str]] = {}
    for interface in machine.facts.get("interfaces", ()):
        # The interface br-mgmt is the fact br_mgmt.
        details = machine.facts.get(interface.replace("-", "_"), {})
        if interface != "lo":
            held = [details.get("ipv4", {}), *details.get("ipv4_secondaries", ())]
            addresses[interface] = {entry["address"] for entry in held if "address" in entry}
    return addresses
