"""The playbook on a bad inventory: one message with everything in it, a failure, and nothing changed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ansible_collections.chatnio.onprem.plugins.module_utils.bundle import Artefact, write_manifest

REPOSITORY = Path(__file__).resolve().parents[6]
ROLE = REPOSITORY / "roles/preflight"
MODEL = Artefact("models/tiny/1/model.gguf", "model", "tiny", "1", 1, "0" * 64, "made up")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run the playbook once, in check mode, on an inventory with a fault of every origin."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "manifest.json").write_text(write_manifest([MODEL]))
    everyone = {
        "ansible_connection": "local",
        "ansible_python_interpreter": sys.executable,
        "management_network": "10.0.0.0/24",
        "business_network": "192.168.1.0/24",
        "preflight_profile": "lab",
        "bundle_dir": "{{ inventory_dir }}",
        "model_service_model": "tinny",
        "site_secret": "{{ vault_secret }}",
        # Naming variables must not evaluate them.
        "site_never": "{{ lookup('ansible.builtin.file', '/nonexistent') }}",
    }
    down = {
        "ansible_connection": "ssh",
        "ansible_host": "127.0.0.1",
        "ansible_port": 9,
        "management_address": "10.0.0.11",
        "platfrom_name": "typo",
    }
    gateway = {"management_address": "192.0.2.7", "business_address": "{{ site_nowhere }}", "preflight_profile": "labb"}
    inventory = {
        "all": {
            "vars": everyone,
            "hosts": {"c1": down, "gw1": gateway, "m1": {"ansible_python_interpreter": "/bin/false"}},
        },
        "control": {"hosts": {"c1": {}}},
        "data": {"hosts": {"c1": {}}},
        "mirror": {"hosts": {"c1": {}}},
        "gateway": {"hosts": {"gw1": {}}},
    }
    (folder / "hosts.yml").write_text(yaml.safe_dump(inventory))
    return subprocess.run(
        [
            Path(sys.executable).parent / "ansible-playbook",
            "-i",
            folder / "hosts.yml",
            "playbooks/preflight.yml",
            "--check",
        ],
        cwd=REPOSITORY,
        env={**os.environ, "ANSIBLE_NOCOLOR": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_fails_once(run):
    assert run.returncode == 2, run.stdout + run.stderr
    assert re.findall(r"failed=1", run.stdout) == ["failed=1"]


def test_changes_nothing(run):
    assert set(re.findall(r"changed=(\d+)", run.stdout)) == {"0"}


@pytest.mark.parametrize(
    ("host", "subject", "text"),
    [
        ("model_nodes", "groups", "found: no host"),
        ("gw1", "management_address", "found: 192.0.2.7, which is not in 10.0.0.0/24"),
        ("gw1", "business_address", "found: 'site_nowhere' is undefined"),
        ("gw1", "preflight_profile", "mend: did you mean lab?"),
        ("all", "vault_secret", "found: not set, but site_secret uses it"),
        ("c1", "platfrom_name", "mend: did you mean platform_name?"),
        ("c1", "connection", "Connection refused"),
        ("m1", "connection", "found: Module result deserialization failed"),
        ("m1", "groups", "found: in none of the platform's groups"),
    ],
)
def test_lists_every_finding(run, host, subject, text):
    message = run.stdout[run.stdout.index("preflight: ") :] + run.stderr
    assert re.search(rf"{host} +{subject}.*{re.escape(text)}", message), message


def test_defaults_are_those_of_the_argument_specs():
    defaults = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
    specs = yaml.safe_load((ROLE / "meta/argument_specs.yml").read_text())["argument_specs"]["main"]["options"]
    assert defaults == {name: spec["default"] for name, spec in specs.items()}
