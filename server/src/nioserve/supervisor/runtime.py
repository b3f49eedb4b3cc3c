"""What must be there before any child starts: a private directory, the listening socket, and usable files."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nioserve import backends
from nioserve.backends import credentials
from nioserve.config import Config, ConfigError
from nioserve.engine.limits import resolve_max_model_len
from nioserve.models.spec import ModelError, load_spec
from nioserve.policy.identity import KeysError, read_keys

_LONGEST_SOCKET_PATH = 107  # sun_path, with its closing zero byte
_BACKLOG = 2048


def file_findings(config: Config) -> list[str]:
    """Return what is wrong with the files that the configuration names: model, keys, certificates."""
    findings: list[str] = []
    try:
        kind, wanted = backends.kind_of(config.model.path), config.engine.backend
        if wanted in ("torch", "onnx") and wanted != kind:
            findings.append(f"engine.backend: is {wanted}, but model.path holds a model for {kind}; leave it at auto")
        resolve_max_model_len(config, load_spec(config.model.path))
    except ModelError as error:
        findings.append(f"model.path: {error}")
    try:
        read_keys(config.auth.keys_file)
    except KeysError as error:
        findings += [f"auth.keys_file: {line}" for line in str(error).splitlines()]
    if config.engine.backend == "upstream":
        findings += credentials.file_findings(config.upstream)
    return findings + _tls_findings(config)


def _tls_findings(config: Config) -> list[str]:
    tls = config.server.tls
    if tls.certificate is None or tls.key is None:
        return []
    findings = []
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(tls.certificate, tls.key, password=_no_password)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        findings.append(f"server.tls: {tls.certificate} and {tls.key} cannot be used: {error}")
    try:
        if tls.client_ca is not None:
            context.load_verify_locations(tls.client_ca)
    except OSError as error:
        findings.append(f"server.tls.client_ca: {tls.client_ca} cannot be used: {error}")
    return findings


def _no_password() -> str:
    raise ValueError("the key is encrypted, and nobody is there to type its password")


@contextmanager
def runtime_directory(config: Config) -> Iterator[Path]:
    """Yield a private directory for sockets and metrics, fresh for each run, and remove it afterwards."""
    parent = config.runtime_dir or os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0] or None
    if parent is not None:
        Path(parent).mkdir(mode=0o700, parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="nioserve-", dir=parent))  # 0700
    try:
        if len(str(directory / "supervisor.sock")) + 8 > _LONGEST_SOCKET_PATH:
            raise ConfigError([f"runtime_dir: {directory} is too long for socket names; use a shorter path"])
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def listen(host: str, port: int) -> socket.socket:
    """Return the API's listening socket, which all workers will share; ConfigError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError([f"server: cannot listen on {host} port {port}: {error.strerror}"]) from error
    return listener
