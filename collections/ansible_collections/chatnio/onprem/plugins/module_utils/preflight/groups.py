# Copyright: the chatnio on-prem authors
# Apache License 2.0 (see LICENSE)
"""The groups of the inventory: every machine has work, and every kind of work has a machine."""

from __future__ import annotations

from collections.abc import Iterator

from ansible_collections.chatnio.onprem.plugins.module_utils.preflight.finding import Finding, closest
from ansible_collections.chatnio.onprem.plugins.module_utils.preflight.site import Site

REQUIRED_GROUPS = ("control", "model_nodes", "gateway", "data", "mirror")
GROUPS = (*REQUIRED_GROUPS, "monitoring")


def check_groups(site: Site) -> Iterator[Finding]:
    """Yield hosts without a group, groups without a host, and a second mirror."""
    for host in sorted(set(site.machines) - set(site.members(*GROUPS))):
        yield Finding(
            host,
            "groups",
            found="in none of the platform's groups",
            needed=f"at least one of {', '.join(GROUPS)}",
            mend=f"put {host} into a group, or take it out of {site.inventory}",
        )
    for group in REQUIRED_GROUPS:
        if not site.groups.get(group):
            mistyped = closest(group, (name for name in site.groups if name not in GROUPS))
            yield Finding(
                group,
                "groups",
                found="no host",
                needed="at least one host",
                mend=f"rename the group {mistyped}" if mistyped else f"add a host to {group} in {site.inventory}",
            )
    if len(mirrors := site.groups.get("mirror", ())) > 1:
        yield Finding(
            "mirror",
            "groups",
            found=f"{len(mirrors)} hosts: {', '.join(mirrors)}",
            needed="one host, which all others install from",
            mend=f"leave one host in mirror in {site.inventory}",
        )
