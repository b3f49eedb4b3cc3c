#!/usr/bin/python
# Copyright: the chatnio on-prem authors
# Apache License 2.0 (see LICENSE)

# This file only documents: the action plugin of the same name does the work, on the controller.

DOCUMENTATION = r"""
module: preflight
short_description: Check a whole site before anything is installed
description:
  - Checks the inventory, its variables, the bundle and what the machines report, for all hosts of the inventory at
    once. Run it with C(run_once), after facts were gathered.
  - Never fails and changes nothing. A task that fails prints its whole result, so the caller should register this
    one's and fail with RV(report) alone. A report of warnings only is shown as a warning.
options:
  roles_path:
    description: Where the roles are; the variables in their C(meta/argument_specs.yml) are those that exist.
    type: path
    required: true
  profiles:
    description:
      - What hardware each profile asks for, by name. Sizes are in GB; C(gpu_memory_gb) and C(nvme_gb) apply to model
        nodes, C(data_hosts) to the group C(data), and the others to every machine.
    type: dict
    required: true
  gpus:
    description: GPUs by PCI id, for machines without a driver, each with its C(memory_gb).
    type: dict
    required: true
  systems:
    description: Supported distributions, each with whether it is C(tested).
    type: dict
    required: true
  platform_variables:
    description: Variables that belong to no role, each with its description.
    type: dict
    required: true
  variable_prefixes:
    description: Prefixes of variables that aren't ours, each with whose they are.
    type: dict
    required: true
  removed_variables:
    description: Variables that no longer exist, each with its C(name), C(since) which release, and C(instead).
    type: list
    elements: dict
    required: true
  clock_tolerance:
    description: Seconds that a machine's clock may differ from the controller's.
    type: float
    required: true
  gathered:
    description: Names of the registered results of the tasks that gathered facts. They tell which machines are silent.
    type: list
    elements: str
    required: true
attributes:
  check_mode:
    description: Reads only, so check mode makes no difference.
    support: full
author: chatnio on-prem authors
"""

EXAMPLES = r"""
- name: Check the site
  chatnio.onprem.preflight:
    roles_path: "{{ role_path | dirname }}"
    profiles: "{{ __preflight_profiles }}"
    gpus: "{{ __preflight_gpus }}"
    systems: "{{ __preflight_systems }}"
    platform_variables: "{{ __preflight_platform_variables }}"
    variable_prefixes: "{{ __preflight_variable_prefixes }}"
    removed_variables: "{{ __preflight_removed_variables }}"
    clock_tolerance: "{{ preflight_clock_tolerance }}"
    gathered: [__preflight_setup, __preflight_hardware]
  run_once: true
  register: site

- name: Refuse a site with findings
  ansible.builtin.fail:
    msg: "{{ site.report }}"
  when: not site.passed
"""

RETURN = r"""
passed:
  description: Whether nothing stands in the way of an installation.
  returned: always
  type: bool
report:
  description: All findings as one aligned block of text.
  returned: always
  type: str
findings:
  description: The same as data.
  returned: always
  type: list
  elements: dict
  contains:
    host:
      description: The host, or the group of hosts, that it is about.
      type: str
    subject:
      description: The variable or property.
      type: str
    found:
      description: What is there.
      type: str
    needed:
      description: What has to be there.
      type: str
    mend:
      description: What to do.
      type: str
    fatal:
      description: Whether it stops the installation; a warning doesn't.
      type: bool
"""
