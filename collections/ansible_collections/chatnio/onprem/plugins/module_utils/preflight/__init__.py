# Copyright: the chatnio on-prem authors
# Apache License 2.0 (see LICENSE)
"""Checks of a whole site, as functions from what is known about it to what has to be mended.

`examine` runs them all. No check talks to a machine or stops the others: an operator sees everything at once.
"""

from __future__ import annotations

from collections.abc import Collection

from ansible_collections.chatnio.onprem.plugins.module_utils.preflight.addresses import check_addresses
from ansible_collections.chatnio.onprem.plugins.module_utils.preflight.finding import Finding, format_report
from ansible_collections.chatnio.onprem.plugins.module_utils.preflight.groups import check_groups
from ansible_collections.chatnio.onprem.plugins.module_utils.preflight.hardware import check_hardware
from ansible_collections.chatnio.onprem.plugins.module_utils.preflight.model import check_model
from ansible_collections.chatnio.onprem.plugins.module_utils.preflight.networks import check_networks
from ansible_collections.chatnio.onprem.plugins.module_utils.preflight.site import Machine, Rules, Site
from ansible_collections.chatnio.onprem.plugins.module_utils.preflight.system import check_system
from ansible_collections.chatnio.onprem.plugins.module_utils.preflight.variables import check_variables

__all__ = ["Finding", "Machine", "Rules", "Site", "examine", "format_report"]


def examine(site: Site, rules: Rules, models: Collection[str] | Finding | None) -> list[Finding]:
    """Return every finding about `site`, the fatal ones first.

    Args:
        site: the inventory and what its machines report.
        rules: what is required of them.
        models: the names of the bundle's models, or the finding that says why they can't be read, or None where another
            finding says so.
    """
    findings = [
        *check_groups(site),
        *check_networks(site),
        *check_addresses(site),
        *check_model(site, models),
        *check_variables(site, rules),
        *check_system(site, rules),
        *check_hardware(site, rules),
    ]
    return sorted(findings, key=lambda finding: not finding.fatal)
