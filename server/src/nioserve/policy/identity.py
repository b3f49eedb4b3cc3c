"""API keys: who is asking, and for which department.

A key is `nio_<id>_<secret>`. Its record holds the id, the user, the department and `sha256$<salt>$<hex>`, the hash of
salt and secret. The secret is 256 random bits and no password: nobody can guess or enumerate it, so a slow hash would
only cost time on every request, and one salted SHA-256 keeps a stolen file as useless.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

log = logging.getLogger(__name__)

PREFIX = "nio"
_FIELDS = ("id", "user", "department", "hash")
_ID = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?")
_HASH = re.compile(r"sha256\$([0-9a-f]{16,64})\$([0-9a-f]{64})")
_CHECK_SECONDS = 1.0


class KeysError(Exception):
    """A keys file that cannot be used; the message names each entry at fault."""


class InvalidKeyError(Exception):
    """A key that opens nothing. It does not say whether the id exists."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who asks, and whose data and quota it concerns."""

    key_id: str
    user: str
    department: str


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """One entry of the keys file."""

    identity: Identity
    salt: str
    digest: str


def new_key(key_id: str, user: str, department: str) -> tuple[str, dict[str, str]]:
    """Return a fresh key, which is shown once and stored nowhere, and its record; ValueError for a bad id."""
    if not _ID.fullmatch(key_id):
        raise ValueError(f"id {key_id!r}: use 1 to 64 of a-z, 0-9 and -, not beginning or ending with -")
    secret, salt = secrets.token_hex(32), secrets.token_hex(16)
    record = {"id": key_id, "user": user, "department": department, "hash": f"sha256${salt}${_digest(salt, secret)}"}
    return f"{PREFIX}_{key_id}_{secret}", record


def read_keys(path: Path) -> dict[str, KeyRecord]:
    """Return the records by id; KeysError names every entry that is wrong."""
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise KeysError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise KeysError(f"{path}: is not valid YAML") from error  # the parser's message would quote the file
    if not isinstance(entries, list):
        raise KeysError(f"{path}: must hold a list of records (make one with `nioserve key new`)")
    records: dict[str, KeyRecord] = {}
    findings: list[str] = []
    for number, entry in enumerate(entries, start=1):
        problem = _problem(entry, records)
        if problem:
            findings.append(f"{path}: entry {number}: {problem}")
            continue
        _, salt, digest = entry["hash"].split("$")
        records[entry["id"]] = KeyRecord(Identity(entry["id"], entry["user"], entry["department"]), salt, digest)
    if findings:
        raise KeysError("\n".join(findings))
    return records


def _problem(entry: Any, known: dict[str, KeyRecord]) -> str | None:  # noqa: ANN401  whatever the YAML holds
    if not isinstance(entry, dict):
        return "must be a mapping with id, user, department and hash"
    wrong = [name for name in _FIELDS if not isinstance(entry.get(name), str) or not entry[name].strip()]
    if wrong:
        return f"{', '.join(wrong)}: must be text and not empty (id {entry.get('id')!r})"
    unknown = sorted(str(name) for name in entry.keys() - set(_FIELDS))
    if unknown:
        return f"{', '.join(unknown)}: not known here (id {entry['id']!r})"
    if not _ID.fullmatch(entry["id"]):
        return f"id {entry['id']!r}: use 1 to 64 of a-z, 0-9 and -"
    if entry["id"] in known:
        return f"id {entry['id']!r} is used twice"
    if not _HASH.fullmatch(entry["hash"]):
        return f"hash: must be sha256$<salt>$<64 hex digits> (id {entry['id']!r})"
    return None


def _digest(salt: str, secret: str) -> str:
    return hashlib.sha256((salt + secret).encode()).hexdigest()


class KeyStore:
    """The keys in force. The file is read again when it changes; one that is wrong leaves the old keys in force."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = self._read_stamp()
        self._records = read_keys(path)
        self._checked = time.monotonic()

    def authenticate(self, key: str) -> Identity:
        """Return whose key this is; InvalidKeyError otherwise."""
        if time.monotonic() - self._checked >= _CHECK_SECONDS:
            self.refresh()
        prefix, _, rest = key.partition("_")
        key_id, _, secret = rest.partition("_")
        record = self._records.get(key_id)
        # An unknown id costs the same hash and comparison, so that time does not tell which ids exist.
        digest = _digest(record.salt if record else "0" * 32, secret)
        matches = hmac.compare_digest(digest, record.digest if record else "0" * 64)
        if prefix != PREFIX or record is None or not matches:
            raise InvalidKeyError
        return record.identity

    def refresh(self, force: bool = False) -> None:
        """Read the file again if it changed, or in any case when forced (SIGHUP)."""
        self._checked = time.monotonic()
        stamp = self._read_stamp()
        if stamp == self._stamp and not force:
            return
        self._stamp = stamp
        try:
            self._records = read_keys(self._path)
        except KeysError as error:
            log.error("keys file refused, the keys read before stay in force", extra={"problem": str(error)})
            return
        log.info("keys file read", extra={"path": str(self._path), "keys": len(self._records)})

    def _read_stamp(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino
