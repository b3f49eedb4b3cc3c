# Copyright: the chatnio on-prem authors
# Apache License 2.0 (see LICENSE)
"""Collects what Ansible knows about the whole site, and returns everything that has to be mended in it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleError
from ansible.plugins.action import ActionBase
from ansible.vars.hostvars import HostVars
from ansible_collections.chatnio.onprem.plugins.module_utils.bundle import BundleError, read_manifest
from ansible_collections.chatnio.onprem.plugins.module_utils.preflight import (
    Finding,
    Machine,
    Rules,
    Site,
    examine,
    format_report,
)

# The variables whose values are checked. No other is templated: that could ask for secrets or run lookups.
READS = (
    "management_network",
    "management_address",
    "management_interface",
    "business_network",
    "business_address",
    "business_interface",
    "bundle_dir",
    "model_service_model",
    "preflight_profile",
)


class ActionModule(ActionBase):  # type: ignore[misc]  # Ansible ships no types
    """See the documentation in plugins/modules/preflight.py."""

    _requires_connection = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Check the site that `task_vars` describes."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        _validation, options = self.validate_argument_spec(
            {
                "roles_path": {"type": "path", "required": True},
                "profiles": {"type": "dict", "required": True},
                "gpus": {"type": "dict", "required": True},
                "systems": {"type": "dict", "required": True},
                "platform_variables": {"type": "dict", "required": True},
                "variable_prefixes": {"type": "dict", "required": True},
                "removed_variables": {"type": "list", "elements": "dict", "required": True},
                "clock_tolerance": {"type": "float", "required": True},
                "gathered": {"type": "list", "elements": "str", "required": True},
            }
        )
        role_options = self._read_role_options(options["roles_path"])
        defaults = {name: role_options[name].get("default") for name in READS if name in role_options}
        site = read_site(task_vars or {}, defaults, options["gathered"])
        rules = Rules(
            known_variables={*role_options, *options["platform_variables"]},
            free_prefixes=list(options["variable_prefixes"]),
            removed_variables=options["removed_variables"],
            profiles=options["profiles"],
            gpus=options["gpus"],
            systems=options["systems"],
            clock_tolerance=options["clock_tolerance"],
        )
        findings = examine(site, rules, read_models(site))
        passed = not any(finding.fatal for finding in findings)
        result.update(
            changed=False,
            passed=passed,
            report=format_report(findings, site.label),
            findings=[vars(finding) for finding in findings],
        )
        if passed and findings:
            result["warnings"] = [result["report"]]
        return result

    def _read_role_options(self, roles_path: str) -> dict[str, dict[str, Any]]:
        """Return every role's variables with their specification."""
        options: dict[str, dict[str, Any]] = {}
        for path in sorted(Path(roles_path).glob("*/meta/argument_specs.yml")):
            specs = self._loader.load_from_file(str(path))["argument_specs"]
            for entry_point in specs.values():
                options.update(entry_point.get("options", {}))
        return options


def read_site(task_vars: dict[str, Any], defaults: dict[str, Any], gathered: list[str]) -> Site:
    """Return the whole inventory.

    Args:
        task_vars: the variables of any task of any host.
        defaults: what applies where the inventory sets nothing.
        gathered: names of the registered results of the tasks that gathered facts.
    """
    hostvars = task_vars["hostvars"]
    return Site(
        machines={name: _read_machine(name, hostvars, defaults, gathered) for name in hostvars},
        groups=task_vars["groups"],
        inventory=_short_path(task_vars.get("inventory_dir")),
    )


def _short_path(folder: str | None) -> str:
    """Return an inventory's folder as an operator would write it; an inventory may have none."""
    if folder is None:
        return "the inventory"
    relative = os.path.relpath(folder)
    return folder if relative.startswith("..") else relative


def _read_machine(name: str, hostvars: HostVars, defaults: dict[str, Any], gathered: list[str]) -> Machine:
    raw, templated = hostvars.raw_get(name), hostvars[name]
    facts = raw.get("ansible_facts", {})
    values, broken = dict(defaults), {}
    for variable in READS:
        try:
            if variable in templated:
                values[variable] = templated[variable]
        except AnsibleError as error:
            broken[variable] = str(error)
    # A task that gathers facts returns a message only where it couldn't.
    messages = (raw[register]["msg"] for register in gathered if "msg" in raw.get(register, {}))
    silence = next((" ".join(message.removeprefix("Task failed: ").split()) for message in messages), None)
    return Machine(
        name=name,
        values=values,
        broken=broken,
        variables={key: value for key, value in raw.items() if key not in facts},
        # Facts of another day may still be in a cache: they say nothing about a machine that is down.
        facts={} if silence else facts,
        silence=silence,
    )


def read_models(site: Site) -> set[str] | Finding | None:
    """Return the names of the models in the bundle on this controller, or what keeps it from being read.

    None stands for a template that can't be read, which is a finding already.
    """
    folders = list(site.by_value("bundle_dir", site.machines))
    if not folders:
        return None
    bundle = next(filter(None, folders), None)
    if bundle is None:
        mend = f"set bundle_dir for the group all in {site.inventory}"
        return Finding("all", "bundle_dir", "not set", "the bundle's folder on this controller", mend)
    try:
        artefacts = read_manifest(Path(bundle).expanduser())
    except (BundleError, OSError) as error:
        return Finding(
            "controller",
            "bundle",
            found=str(error),
            needed=f"a bundle in {bundle}",
            mend="run `ansible-playbook playbooks/bundle.yml` on a connected machine and put its folder there",
        )
    return {artefact.name for artefact in artefacts if artefact.kind == "model"}
