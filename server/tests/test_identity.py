"""API keys: made once, stored as hashes, read again when the file changes."""

from __future__ import annotations

import pytest
import yaml

from nioserve.cli import main
from nioserve.policy import identity
from nioserve.policy.identity import InvalidKeyError, KeysError, KeyStore, new_key, read_keys


@pytest.fixture
def keys_file(tmp_path):
    return tmp_path / "keys.yml"


def write(path, *records) -> None:
    path.write_text(yaml.safe_dump(list(records)))


def test_a_key_opens_its_department(keys_file):
    key, record = new_key("a-1", "Ann", "Oncology")
    write(keys_file, record)
    found = KeyStore(keys_file).authenticate(key)
    assert (found.key_id, found.user, found.department) == ("a-1", "Ann", "Oncology")
    assert key.split("_")[2] not in keys_file.read_text()


def test_what_key_new_prints_works(keys_file, capsys):
    assert main(["key", "new", "--id", "bob", "--user", "Bob Ü", "--department", "IT"]) == 0
    printed = capsys.readouterr().out
    keys_file.write_text(printed)
    key = next(word for word in printed.split() if word.startswith("nio_"))
    assert KeyStore(keys_file).authenticate(key).user == "Bob Ü"
    assert main(["key", "new", "--id", "no_underscore", "--user", "B", "--department", "IT"]) == 2


def test_other_keys_open_nothing(keys_file):
    key, record = new_key("a", "Ann", "X")
    write(keys_file, record)
    store = KeyStore(keys_file)
    for wrong in (
        key[:-1],
        key + "0",
        key.replace("nio_", "oin_"),
        key.replace("_a_", "_b_"),
        "",
        "nio",
        "nio_a_",
        "ключ",
    ):
        with pytest.raises(InvalidKeyError):
            store.authenticate(wrong)


def test_the_file_is_read_again_and_a_broken_one_changes_nothing(keys_file, monkeypatch):
    monkeypatch.setattr(identity, "_CHECK_SECONDS", 0.0)
    (first, one), (second, two) = new_key("a", "A", "X"), new_key("b", "B", "Y")
    write(keys_file, one)
    store = KeyStore(keys_file)
    write(keys_file, two)
    assert store.authenticate(second).user == "B"
    with pytest.raises(InvalidKeyError):
        store.authenticate(first)
    keys_file.write_text("- {id: c}")
    assert store.authenticate(second).user == "B"
    keys_file.unlink()
    assert store.authenticate(second).user == "B"


def test_wrong_entries_are_named(keys_file):
    _, good = new_key("good", "A", "X")
    write(keys_file, good, {**good, "id": "Bad Id"}, good, {**good, "id": "x", "hash": "md5"}, {"id": "y"}, 5,
          {**good, "id": "z", "role": "admin"})  # fmt: skip
    with pytest.raises(KeysError) as error:
        read_keys(keys_file)
    lines = str(error.value).splitlines()
    assert len(lines) == 6
    for number, part in enumerate(("Bad Id", "used twice", "hash", "user, department, hash", "mapping", "role"), 2):
        assert f"entry {number}: " in lines[number - 2]
        assert part in lines[number - 2]
    assert good["hash"] not in str(error.value)
    for text in ("a: b", "[", ""):
        keys_file.write_text(text)
        with pytest.raises(KeysError, match=r"must hold a list|not valid YAML"):
            read_keys(keys_file)
