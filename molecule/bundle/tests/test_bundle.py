"""The bundle holds what every role installs, all of it named in a signed manifest."""

import hashlib
import json
import re
import subprocess

import pytest
import yaml
from labtools import CACHE, ROOT, play

BUNDLE = CACHE / "bundle"
OWN = {"manifest.json", "manifest.json.asc", "key.asc"}


@pytest.fixture(scope="module")
def artefacts():
    """The manifest's rows."""
    return json.loads((BUNDLE / "manifest.json").read_text())["artefacts"]


@pytest.fixture(scope="module")
def keyring(tmp_path_factory):
    """The bundle's public key, as gpgv reads it."""
    ring = tmp_path_factory.mktemp("key") / "key.gpg"
    subprocess.run(["gpg", "--output", ring, "--dearmor", BUNDLE / "key.asc"], check=True, capture_output=True)
    return ring


def test_the_manifest_names_every_file_and_each_is_as_it_says(artefacts):
    named = {row["path"]: (row["size"], row["sha256"]) for row in artefacts}
    found = {
        str(path.relative_to(BUNDLE)): (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in BUNDLE.rglob("*")
        if path.is_file() and str(path.relative_to(BUNDLE)) not in OWN
    }
    assert found == named


def test_every_artefact_tells_where_it_is_from(artefacts):
    assert [row["path"] for row in artefacts if not row["origin"] or not row["name"]] == []


def test_manifest_and_repository_are_signed(keyring):
    detached = ["gpgv", "--keyring", keyring, BUNDLE / "manifest.json.asc"]
    assert subprocess.run([*detached, BUNDLE / "manifest.json"], check=False).returncode == 0
    assert subprocess.run([*detached, BUNDLE / "key.asc"], check=False).returncode != 0
    subprocess.run(["gpgv", "--keyring", keyring, BUNDLE / "apt/dists/bookworm/InRelease"], check=True)


def test_the_key_that_signs_is_not_in_it():
    kept = subprocess.run(["grep", "-rl", "PGP PRIVATE KEY", BUNDLE], capture_output=True, text=True, check=False)
    assert kept.stdout == ""


def test_every_package_of_every_role_can_be_installed(tmp_path):
    wanted = [
        package
        for file in ROOT.glob("roles/*/vars/main.yml")
        for key, packages in yaml.safe_load(file.read_text()).items()
        if re.fullmatch("__[a-z_]+_packages", key)
        for package in packages
    ]
    # An APT of its own: a machine with nothing installed, and no source but the bundle.
    for folder in ("state/lists/partial", "cache/archives/partial", "parts"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "status").touch()
    (tmp_path / "list").write_text(f"deb [signed-by={BUNDLE}/key.asc] copy:{BUNDLE}/apt bookworm main\n")
    (tmp_path / "apt.conf").write_text(
        f'Dir::State "{tmp_path}/state";\nDir::State::status "{tmp_path}/status";\nDir::Cache "{tmp_path}/cache";\n'
        f'Dir::Etc::sourcelist "{tmp_path}/list";\nDir::Etc::sourceparts "{tmp_path}/parts";\n'
        'APT::Sandbox::User "root";\n'
    )
    apt = ["env", f"APT_CONFIG={tmp_path}/apt.conf", "apt-get", "--quiet", "--quiet", "--no-install-recommends"]
    subprocess.run([*apt, "update"], check=True)
    plan = subprocess.run([*apt, "--simulate", "install", *wanted], capture_output=True, text=True, check=False)
    assert plan.returncode == 0, plan.stderr
    assert "E:" not in plan.stderr


def test_every_requirement_of_the_service_is_there_with_its_hash(artefacts):
    wheels = {row["sha256"] for row in artefacts if row["kind"] == "wheel"}
    lines = (BUNDLE / "pypi/nioserve.txt").read_text().splitlines()
    assert any(line.startswith("nioserve==") for line in lines)
    assert [line for line in lines if line.rpartition("sha256:")[2] not in wheels] == []


def test_what_was_altered_by_hand_is_gathered_again(artefacts):
    before = (BUNDLE / "manifest.json").read_bytes()
    wheel = next(row for row in artefacts if row["name"] == "idna")
    (BUNDLE / wheel["path"]).unlink()
    (BUNDLE / "stranger").touch()
    run = play(playbook=ROOT / "playbooks/bundle.yml")
    assert run.changed == {"localhost": ["bundle : Lay out, index and sign the bundle"]}
    assert hashlib.sha256((BUNDLE / wheel["path"]).read_bytes()).hexdigest() == wheel["sha256"]
    assert not (BUNDLE / "stranger").exists()
    rows = json.loads(before)["artefacts"]
    after = json.loads((BUNDLE / "manifest.json").read_text())["artefacts"]
    assert [row for row in after if row["kind"] != "apt-index"] == [row for row in rows if row["kind"] != "apt-index"]
