"""A bundle: its manifest says what is in it, and its signature who says so."""

from __future__ import annotations

import hashlib
import json

import pytest
from ansible_collections.chatnio.onprem.plugins.module_utils import bundle
from ansible_collections.chatnio.onprem.plugins.module_utils.bundle import Artefact, BundleError
from hypothesis import given
from hypothesis import strategies as st
from modules import run_module

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
artefacts = st.lists(st.builds(Artefact, text, text, text, text, st.integers(0), text, text), max_size=8)


def names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@given(artefacts, st.randoms())
def test_manifest_does_not_depend_on_the_order(found, random):
    shuffled = list(found)
    random.shuffle(shuffled)
    manifest = bundle.write_manifest(shuffled)
    assert manifest == bundle.write_manifest(found)
    paths = [row["path"] for row in json.loads(manifest)["artefacts"]]
    assert paths == sorted(paths)


@given(artefacts)
def test_manifest_is_read_as_it_was_written(tmp_path_factory, found):
    inside = [row for row in found if not row.path.startswith("/") and ".." not in row.path.split("/")]
    folder = tmp_path_factory.mktemp("bundle")
    (folder / bundle.MANIFEST).write_text(bundle.write_manifest(inside), encoding="utf-8")
    assert bundle.read_manifest(folder) == sorted(inside)


@pytest.mark.parametrize("path", ["/etc/passwd", "../outside", "apt/../../outside", ".."])
def test_path_outside_is_refused(tmp_path, path):
    manifest = bundle.write_manifest([Artefact(path, "deb", "a", "1", 1, "0" * 64, "made up")])
    (tmp_path / bundle.MANIFEST).write_text(manifest)
    with pytest.raises(BundleError, match="outside of the bundle"):
        bundle.read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("manifest", "reason"),
    [
        (None, "is missing"),
        ("", "is no bundle manifest"),
        ("[]", "is no bundle manifest"),
        ('{"format": 1}', "is no bundle manifest"),
        ('{"format": 1, "artefacts": [{"path": "a"}]}', "is no bundle manifest"),
        ('{"format": 2, "artefacts": []}', "has format 2"),
    ],
)
def test_no_manifest(tmp_path, manifest, reason):
    if manifest is not None:
        (tmp_path / bundle.MANIFEST).write_text(manifest)
    with pytest.raises(BundleError, match=reason):
        bundle.read_manifest(tmp_path)


def test_signature_of_the_key(made, key):
    bundle.verify_signature(made, key.public)


def test_signature_by_another_key_is_refused(made, other_key):
    with pytest.raises(BundleError, match="not signed by the expected key"):
        bundle.verify_signature(made, other_key.public)


def test_signature_over_another_text_is_refused(made, key):
    manifest = made / bundle.MANIFEST
    manifest.write_text(manifest.read_text().replace("built here", "built there", 1))
    with pytest.raises(BundleError, match="not signed by the expected key"):
        bundle.verify_signature(made, key.public)


def test_unsigned_bundle_is_refused(made, key):
    (made / bundle.SIGNATURE).unlink()
    with pytest.raises(BundleError, match="unsigned"):
        bundle.verify_signature(made, key.public)


@pytest.mark.parametrize("public", ["", "no key", "-----BEGIN PGP PUBLIC KEY BLOCK-----\n\n!!\n"])
def test_something_else_than_a_key_is_refused(made, public):
    with pytest.raises(BundleError):
        bundle.verify_signature(made, public)


def test_every_fault_is_named(made):
    found = bundle.read_manifest(made)
    models = sorted(row.path for row in found if row.kind == "model")
    assert bundle.find_faults(made, found) == []
    longer, other, missing = (made / path for path in models)
    longer.write_bytes(longer.read_bytes() + b"!")
    other.write_bytes(bytes(len(other.read_bytes())))
    missing.unlink()
    faults = bundle.find_faults(made, found)
    assert [fault.split(":")[0] for fault in faults] == models
    assert "bytes" in faults[0]
    assert "sha256" in faults[1]
    assert "missing" in faults[2]


# -- bundle_build ------------------------------------------------------------------------------------------------------


def test_build_lays_out(made):
    found = {row.path: row for row in bundle.read_manifest(made)}
    assert names(made) == found.keys() | {bundle.MANIFEST, bundle.SIGNATURE, bundle.PUBLIC_KEY}
    # A repository's pool knows no epochs; the artefact's version has it.
    assert found["apt/pool/tool_1.2-3_amd64.deb"].version == "1:2-3"
    assert found["pypi/some-project/Some.Project-1.0-py3-none-any.whl"].name == "some-project"
    assert found["pypi/some-project/Some.Project-1.0-py3-none-any.whl"].origin == "made up"
    assert found["models/tiny/1/weights/a.gguf"].version == "1"
    assert "apt/dists/bookworm/InRelease" in found
    for path, row in found.items():
        assert row.sha256 == hashlib.sha256((made / path).read_bytes()).hexdigest()


def test_build_of_equal_parts_changes_nothing(made, build):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    assert build(made)["changed"] is False
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


def test_build_removes_what_no_part_has(made, build, parts, key):
    (made / "models/tiny/1/stranger").write_text("left over")
    (parts / "model/config.json").unlink()
    assert build(made)["changed"] is True
    assert not {"models/tiny/1/stranger", "models/tiny/1/config.json"} & names(made)
    bundle.verify_signature(made, key.public)
    assert bundle.find_faults(made, bundle.read_manifest(made)) == []


def test_build_signs_a_manifest_that_lost_its_signature(made, build, key):
    (made / bundle.SIGNATURE).unlink()
    assert build(made)["changed"] is True
    bundle.verify_signature(made, key.public)


# -- bundle_import -----------------------------------------------------------------------------------------------------


@pytest.fixture
def take(made, tmp_path, key):
    """Take the bundle over into a folder, which is returned with the answer."""

    def take(public: str = key.public, check: bool = False):
        return run_module("bundle_import", src=made, dest=tmp_path / "mirror", public_key=public, check=check)

    return take


def test_import_takes_the_bundle_over(take, made, tmp_path):
    answer = take()
    mirror = tmp_path / "mirror"
    assert answer["changed"] is True
    assert names(mirror) - {".imported.json"} == names(made)
    assert all((mirror / path).read_bytes() == (made / path).read_bytes() for path in names(made))
    assert {oct(path.stat().st_mode & 0o777) for path in mirror.rglob("*.gguf")} == {"0o644"}
    again = take()
    assert (again["changed"], again["copied"], again["removed"]) == (False, [], [])


def test_import_names_every_fault_and_changes_nothing(take, made, tmp_path):
    take()
    before = {path: (tmp_path / "mirror" / path).read_bytes() for path in names(tmp_path / "mirror")}
    damaged = sorted(path for path in names(made) if path.startswith("models/"))
    for path in damaged:
        (made / path).unlink()
        (made / path).write_text("damaged")
    (tmp_path / "mirror" / damaged[0]).write_text("damaged here too")
    before[damaged[0]] = b"damaged here too"
    answer = take()
    assert answer["failed"] is True
    assert [fault.split(":")[0] for fault in answer["faults"]] == damaged
    assert all(path in answer["msg"] for path in damaged)
    assert {path: (tmp_path / "mirror" / path).read_bytes() for path in names(tmp_path / "mirror")} == before


def test_import_refuses_another_key(take, other_key, tmp_path):
    answer = take(public=other_key.public)
    assert answer["failed"] is True
    assert "not signed by the expected key" in answer["msg"]
    assert not (tmp_path / "mirror").exists()


def test_import_puts_right_what_was_altered(take, tmp_path):
    take()
    mirror = tmp_path / "mirror"
    (mirror / "models/tiny/1/config.json").write_text("{ }")
    (mirror / "stranger").write_text("not ours")
    answer = take()
    assert answer["copied"] == ["models/tiny/1/config.json"]
    assert answer["removed"] == ["stranger"]
    assert (mirror / "models/tiny/1/config.json").read_text() == "{}"
    assert take()["changed"] is False


def test_import_in_check_mode_tells_and_changes_nothing(take, tmp_path):
    answer = take(check=True)
    assert answer["changed"] is True
    assert "models/tiny/1/config.json" in answer["copied"]
    assert not (tmp_path / "mirror").exists()


def test_import_follows_a_new_bundle(take, build, made, parts, tmp_path):
    take()
    (parts / "model/config.json").unlink()
    (parts / "model/new.json").write_text("[]")
    build(made)
    answer = take()
    assert "models/tiny/1/new.json" in answer["copied"]
    assert answer["removed"] == ["models/tiny/1/config.json"]


# -- bundle_fetch ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fetch(made, served, tmp_path):
    """Fetch the bundle's model from a web server."""

    def fetch(check: bool = False):
        rows = [vars(row) for row in bundle.read_manifest(made) if row.kind == "model"]
        dest = tmp_path / "models/tiny"
        return run_module("bundle_fetch", url=served.url, artefacts=rows, strip="models/tiny/1", dest=dest, check=check)

    return fetch


def test_fetch(fetch, made, tmp_path):
    model = tmp_path / "models/tiny"
    answer = fetch()
    assert answer["fetched"] == ["config.json", "weights/a.gguf", "weights/b c.gguf"]
    assert names(tmp_path / "models") == {f"tiny/{path}" for path in answer["fetched"]}
    assert all((model / path).read_bytes() == (made / "models/tiny/1" / path).read_bytes() for path in names(model))


def test_fetch_again_asks_nothing(fetch, served):
    fetch()
    served.asked.clear()
    assert fetch()["changed"] is False
    assert served.asked == []


def test_fetch_asks_for_what_differs_alone(fetch, served, tmp_path):
    fetch()
    served.asked.clear()
    model = tmp_path / "models/tiny"
    (model / "config.json").write_text("longer")
    (model / "stranger").write_text("not ours")
    assert fetch()["fetched"] == ["config.json"]
    assert served.asked == ["/models/tiny/1/config.json"]
    assert (model / "config.json").read_text() == "{}"
    assert names(model) == {"config.json", "weights/a.gguf", "weights/b c.gguf"}


@pytest.mark.parametrize("damage", ["differs", "missing"])
def test_fetch_of_a_damaged_file_leaves_no_folder(fetch, made, tmp_path, damage):
    file = made / "models/tiny/1/weights/a.gguf"
    size = len(file.read_bytes())
    file.unlink()
    if damage == "differs":
        file.write_bytes(bytes(size))
    answer = fetch()
    assert answer["failed"] is True
    assert "weights/a.gguf" in answer["msg"]
    assert not (tmp_path / "models/tiny").exists()


def test_fetch_without_a_mirror(fetch, served):
    served.stop()
    assert "Is the mirror up" in fetch()["msg"]


def test_fetch_in_check_mode(fetch, served, tmp_path):
    assert fetch(check=True)["changed"] is True
    assert served.asked == []
    assert not (tmp_path / "models").exists()


def test_fetch_of_nothing(served, tmp_path):
    answer = run_module("bundle_fetch", url=served.url, artefacts=[], strip="models/none", dest=tmp_path / "none")
    assert answer["failed"] is True
    assert "models/none" in answer["msg"]
