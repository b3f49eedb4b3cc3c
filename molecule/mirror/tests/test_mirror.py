"""The bundle is served on the management network alone, and only as it was signed."""

import hashlib
import json
import subprocess

import pytest
from labtools import CACHE, until

MIRROR = "http://10.0.0.11"
TAMPERED = "/var/tmp/tampered"


def fetch(place, path):
    """Return what the mirror serves, as bytes."""
    return subprocess.run(
        place.command("curl", "--silent", "--fail", "--max-time", "10", f"{MIRROR}/{path}"),
        capture_output=True,
        check=True,
    ).stdout


@pytest.fixture(scope="module")
def artefacts():
    """The manifest's rows."""
    return json.loads((CACHE / "bundle/manifest.json").read_text())["artefacts"]


def test_every_artefact_is_served_as_the_manifest_says(control, artefacts):
    rest = {row["path"]: row for row in artefacts}
    for kind in {row["kind"] for row in artefacts}:
        smallest = min((row for row in rest.values() if row["kind"] == kind), key=lambda row: row["size"])
        assert hashlib.sha256(fetch(control, smallest["path"])).hexdigest() == smallest["sha256"], smallest["path"]
    urls = "".join(f"url = {MIRROR}/{path}\n" for path in rest)
    heads = control.run("curl", "--silent", "--head", "--config", "-", text=urls).stdout
    sizes = [int(line.split()[1]) for line in heads.splitlines() if line.lower().startswith("content-length")]
    assert sizes == [row["size"] for row in rest.values()]


def test_the_repository_is_signed_and_its_index_whole(control, tmp_path):
    for name in ("InRelease", "main/binary-amd64/Packages.gz"):
        (tmp_path / name.rpartition("/")[2]).write_bytes(fetch(control, f"apt/dists/bookworm/{name}"))
    (tmp_path / "key.asc").write_bytes((CACHE / "bundle/key.asc").read_bytes())
    subprocess.run(["gpg", "--homedir", tmp_path, "--dearmor", tmp_path / "key.asc"], check=True, capture_output=True)
    subprocess.run(
        ["gpgv", "--keyring", tmp_path / "key.asc.gpg", tmp_path / "InRelease"], check=True, capture_output=True
    )
    index = hashlib.sha256((tmp_path / "Packages.gz").read_bytes()).hexdigest()
    assert f"{index} " in (tmp_path / "InRelease").read_text()


def test_python_finds_its_packages(control, tmp_path):
    done = control.run(
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--dest",
        str(tmp_path),
        "--index-url",
        f"{MIRROR}/pypi/",
        "--trusted-host",
        "10.0.0.11",
        "idna",
    )
    assert done.returncode == 0, done.stderr
    assert [path.suffix for path in tmp_path.iterdir()] == [".whl"]


def test_apt_installs_from_the_folder_that_is_served(core1):
    core1.check_output("apt-get --quiet --quiet update --error-on=any")
    assert core1.package("nginx-light").is_installed


def test_the_business_network_gets_nothing(core1, desk, addresses):
    address = addresses["core1"]["business_address"]
    added = core1.run(f"ip addr add {address}/24 dev biz0 && ip link set biz0 up").rc == 0
    answers = [
        desk.run(
            "curl", "--silent", "--max-time", "3", "--header", f"Host: {host}", f"http://{address}/manifest.json"
        ).stdout
        for host in ("10.0.0.11", address)
    ]
    if added:
        core1.check_output(f"ip addr delete {address}/24 dev biz0")
    assert not any("artefacts" in answer for answer in answers)


@pytest.fixture
def tampered(core1):
    """A copy of the bundle in which one byte of one wheel is another."""
    core1.check_output(f"rm -rf {TAMPERED} && cp -rs /srv/bundle {TAMPERED}")
    wheel = core1.check_output(f"cd {TAMPERED} && find pypi/idna -name '*.whl'")
    core1.check_output(f"cp --remove-destination /srv/bundle/{wheel} {TAMPERED}/{wheel}")
    core1.check_output(f"printf X | dd of={TAMPERED}/{wheel} bs=1 seek=1000 conv=notrunc status=none")
    yield wheel
    core1.check_output(f"rm -rf {TAMPERED}")


def test_a_tampered_artefact_is_refused_by_name_and_nothing_changes(play, core1, control, tampered):
    run = play(mirror_source=TAMPERED, mirror_root="/srv/elsewhere")
    assert run.code != 0
    assert not run.changed
    assert f"{tampered}: sha256 is" in run.failed["core1"][0]
    assert not core1.file("/srv/elsewhere").exists
    assert fetch(control, "manifest.json")


def test_a_manifest_that_was_changed_after_signing_is_refused(play, core1, tampered):
    core1.check_output(f"cp --remove-destination /srv/bundle/manifest.json {TAMPERED}/manifest.json")
    core1.check_output(f'sed -i \'0,/"size": /s//"size": 1/\' {TAMPERED}/manifest.json')
    run = play(mirror_source=TAMPERED)
    assert run.code != 0
    assert not run.changed
    assert "not signed by the expected key" in run.failed["core1"][0]


def test_what_was_altered_by_hand_is_put_right(play, core1, control, artefacts):
    index = next(row for row in artefacts if row["path"].endswith("/Packages"))
    core1.check_output(f"echo 'Package: by-hand' >> /srv/mirror/{index['path']}")
    core1.check_output("touch /srv/mirror/stranger")
    core1.check_output("sed -i 's/autoindex on/autoindex off/' /etc/nginx/conf.d/mirror.conf && systemctl reload nginx")
    until(lambda: control.run("curl", "--silent", "--fail", f"{MIRROR}/pypi/idna/").returncode != 0)

    run = play()

    assert set(run.changed) == {"core1"}
    assert hashlib.sha256(fetch(control, index["path"])).hexdigest() == index["sha256"]
    assert not core1.file("/srv/mirror/stranger").exists
    assert b".whl" in fetch(control, "pypi/idna/")
