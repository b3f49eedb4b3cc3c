# Copyright: the chatnio on-prem authors
# Apache License 2.0 (see LICENSE)
"""The variables of the inventory: each one exists, none was removed, and every secret they use is there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ansible_collections.chatnio.onprem.plugins.module_utils.preflight.finding import Finding, did_you_mean
from ansible_collections.chatnio.onprem.plugins.module_utils.preflight.site import Rules, Site

# What Ansible itself sets for every host, beside ansible_*.
MAGIC_VARIABLES = frozenset(
    {
        "group_names",
        "groups",
        "inventory_dir",
        "inventory_file",
        "inventory_hostname",
        "inventory_hostname_short",
        "playbook_dir",
    }
)
_SECRET = re.compile(r"\bvault_\w+")


def check_variables(site: Site, rules: Rules) -> Iterator[Finding]:
    """Yield variables that can't be templated, don't exist or no longer do, and secrets that are used but not set."""
    yield from _check_values(site)
    yield from _check_names(site, rules)
    yield from _check_secrets(site)


def _check_values(site: Site) -> Iterator[Finding]:
    faults: dict[tuple[str, str], list[str]] = {}
    for machine in site.machines.values():
        for name, reason in machine.broken.items():
            faults.setdefault((name, reason), []).append(machine.name)
    for (name, reason), hosts in faults.items():
        yield Finding(site.label(hosts), name, reason, "a value", f"correct the template of {name} in {site.inventory}")


def _check_names(site: Site, rules: Rules) -> Iterator[Finding]:
    removed = {entry["name"]: entry for entry in rules.removed_variables}
    known = {*rules.known_variables, *MAGIC_VARIABLES}
    free = tuple(rules.free_prefixes)
    for name, hosts in _owners(site).items():
        if name in removed:
            since, instead = removed[name]["since"], removed[name]["instead"]
            yield Finding(site.label(hosts), name, f"removed in {since}", instead, f"set {instead} instead of {name}")
        elif name not in known and not name.startswith(free):
            yield Finding(
                site.label(hosts),
                name,
                found="no such variable",
                needed="a variable of a role or of the platform",
                mend=did_you_mean(name, known) or f"take it out, or call it site_{name} if it is your own",
            )


def _check_secrets(site: Site) -> Iterator[Finding]:
    """Look for vault_* names in the text of the other variables: a run must not discover their absence halfway."""
    users: dict[str, tuple[str, list[str]]] = {}
    for machine in site.machines.values():
        for name, value in machine.variables.items():
            for secret in sorted(_secrets_in(value) - set(machine.variables)):
                users.setdefault(secret, (name, []))[1].append(machine.name)
    for secret, (name, hosts) in users.items():
        yield Finding(
            site.label(hosts),
            secret,
            found=f"not set, but {name} uses it",
            needed="a secret in the inventory's vault",
            mend=f"add {secret} to the vault; inventories/production/README.md says how",
        )


def _secrets_in(value: object) -> set[str]:
    """Return the vault variables that a variable's untemplated value names, at any depth."""
    if isinstance(value, str):
        # Only a template uses a variable; elsewhere vault_* is text.
        return set(_SECRET.findall(value)) if "{{" in value else set()
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list):
        return set()
    return {secret for element in value for secret in _secrets_in(element)}


def _owners(site: Site) -> dict[str, list[str]]:
    """Return which hosts have which variable."""
    owners: dict[str, list[str]] = {}
    for machine in site.machines.values():
        for name in machine.variables:
            owners.setdefault(name, []).append(machine.name)
    return dict(sorted(owners.items()))
