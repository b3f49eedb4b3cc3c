"""Makes the collection importable under its real name, from wherever the tests are started, and a small bundle."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import threading
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from ansible.plugins.loader import init_plugin_loader
from modules import COLLECTIONS, run_module

init_plugin_loader([str(COLLECTIONS)])


@dataclass
class Key:
    """A key that bundles are signed with."""

    home: Path
    public: str


def _make_key():
    # gpg's agent listens on a socket in its home, and a socket's path is short.
    home = Path(tempfile.mkdtemp(prefix="gpg-"))
    gpg = ["gpg", "--homedir", home, "--batch"]
    generate = ["--passphrase", "", "--quick-generate-key", "test", "ed25519", "sign", "never"]
    subprocess.run([*gpg, *generate], capture_output=True, check=True)
    public = subprocess.run([*gpg, "--armor", "--export"], capture_output=True, text=True, check=True).stdout
    yield Key(home, public)
    subprocess.run(["gpgconf", "--homedir", home, "--kill", "all"], check=True)
    shutil.rmtree(home)


@pytest.fixture(scope="session")
def key():
    """The bundle's key."""
    yield from _make_key()


@pytest.fixture(scope="session")
def other_key():
    """Somebody else's."""
    yield from _make_key()


@pytest.fixture
def parts(tmp_path):
    """What a bundle is made from: a package with an epoch, a wheel with its origin, a model in two folders."""
    folder = tmp_path / "parts"
    (folder / "model/weights").mkdir(parents=True)
    (folder / "model/config.json").write_text("{}")
    (folder / "model/weights/a.gguf").write_bytes(b"a" * 1000)
    (folder / "model/weights/b c.gguf").write_bytes(b"b" * 1000)
    (folder / "wheels").mkdir()
    wheel = "Some.Project-1.0-py3-none-any.whl"
    (folder / "wheels" / wheel).write_bytes(b"wheel")
    (folder / "wheels/requirements.txt").write_text("some-project==1.0\n")
    (folder / "wheels/origins.json").write_text(json.dumps({wheel: "made up"}))
    tree = tmp_path / "tool"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        "Package: tool\nVersion: 1:2-3\nArchitecture: amd64\nMaintainer: nobody <n@example.org>\nDescription: a tool\n"
    )
    (folder / "debian").mkdir()
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "--build", tree, folder / "debian/tool_1%3a2-3_amd64.deb"],
        capture_output=True,
        check=True,
    )
    return folder


@pytest.fixture
def build(parts, key):
    """Build the parts into a folder."""
    layout = [
        {"path": parts / "debian", "kind": "deb"},
        {"path": parts / "wheels", "kind": "wheel"},
        {"path": parts / "wheels", "kind": "requirements", "name": "service"},
        {"path": parts / "model", "kind": "model", "name": "tiny", "version": "1"},
    ]
    layout = [{name: str(value) for name, value in part.items()} for part in layout]
    return lambda dest: run_module("bundle_build", dest=dest, suite="bookworm", gnupg_home=key.home, parts=layout)


@pytest.fixture
def made(build, tmp_path):
    """A bundle."""
    folder = tmp_path / "bundle"
    answer = build(folder)
    assert answer.get("changed") is True, answer
    return folder


@dataclass
class Served:
    """A web server on a bundle, and what it was asked for."""

    server: ThreadingHTTPServer
    asked: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server.server_port}"

    def stop(self) -> None:
        """Answer no more."""
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def served(made):
    """The bundle as the mirror serves it."""

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, *_):
            served.asked.append(self.path)

        def log_error(self, *_):
            pass

    served = Served(ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(made))))
    threading.Thread(target=served.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield served
    served.stop()
