"""The whole platform on a lab of its own: booted, installed by site.yml, used, and taken down again."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
import pytest

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("CHATNIO_CACHE", "/var/cache/chatnio"))
ADDRESSES = {"core1": "192.168.1.11", "model1": "192.168.1.21", "model2": "192.168.1.22"}


@dataclass
class Run:
    """What a playbook run printed, and what its recap says of every host."""

    code: int
    output: str

    @property
    def recap(self) -> dict[str, dict[str, int]]:
        rows = re.findall(r"^(\w+) +: (ok=.*)$", self.output, re.MULTILINE)
        return {host: {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", row)} for host, row in rows}

    @property
    def changes(self) -> list[str]:
        """Tasks that changed something, as `HOST: TASK`."""
        found, task = [], ""
        for line in self.output.splitlines():
            if line.startswith("TASK ["):
                task = line.split("[", 1)[1].rsplit("]", 1)[0]
            elif line.startswith("changed: ["):
                found.append(f"{line[10:].split(']')[0]}: {task}")
        return found


@dataclass
class Lab:
    """A running lab and the ways into it."""

    name: str
    port: int
    runs: dict[str, Run] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return CACHE / "labs" / self.name

    @property
    def authority(self) -> Path:
        return self.folder / "ca.pem"

    @property
    def key(self) -> str:
        return f"nio_alice_{(self.folder / 'secrets/alice').read_text().split()[0]}"

    def playbook(self, *arguments: str) -> Run:
        lab = {"CHATNIO_LAB": self.name, "CHATNIO_LAB_PORT": str(self.port)}
        environment = {**os.environ, **lab, "ANSIBLE_NOCOLOR": "1"}
        done = subprocess.run(
            ["ansible-playbook", *arguments],
            cwd=ROOT,
            env=environment,
            text=True,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        return Run(done.returncode, done.stdout)

    def on(self, host: str, command: str, check: bool = True) -> str:
        """Run a shell command on a machine, as root."""
        ssh = self.folder / "ssh"
        address = {"core1": "10.0.0.11", "model1": "10.0.0.21", "model2": "10.0.0.22"}[host]
        done = subprocess.run(
            [
                "ssh",
                "-q",
                "-i",
                ssh / "id_ed25519",
                "-o",
                f"UserKnownHostsFile={ssh}/known_hosts",
                "-o",
                f"ProxyCommand=nsenter --net=/run/netns/{self.name} socat - TCP:%h:%p",
                f"ansible@{address}",
                "sudo",
                "sh",
                "-s",
            ],
            input=command,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not check or done.returncode == 0, f"{host}: {command}: {done.stdout}{done.stderr}"
        return done.stdout

    def reaches(self, address: str, port: int, *, desk: bool) -> bool:
        """Say whether a TCP connection opens, from a user's desk or from the control machine."""
        space = f"/run/netns/{self.name}{'-user' if desk else ''}"
        command = ["nsenter", f"--net={space}", "socat", "-u", "/dev/null", f"TCP:{address}:{port},connect-timeout=1"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def http(self) -> httpx.Client:
        """A client that trusts the platform's authority and no other."""
        import ssl

        context = ssl.create_default_context(cafile=str(self.authority))
        return httpx.Client(base_url=f"https://localhost:{self.port}", verify=context, timeout=120)

    def openai(self) -> openai.OpenAI:
        """The official client, without retries of its own: nothing may be hidden."""
        return openai.OpenAI(
            api_key=self.key, base_url=f"https://localhost:{self.port}/v1", http_client=self.http(), max_retries=0
        )


@pytest.fixture(scope="session")
def machines() -> Iterator[Lab]:
    """Machines as they are after an installation: nothing of the platform is on them."""
    lab = Lab(os.environ.get("CHATNIO_LAB", "e2e"), int(os.environ.get("CHATNIO_LAB_PORT", "8643")))
    try:
        lab.playbook("playbooks/lab_down.yml")  # what a run that was killed may have left
        up = lab.playbook("playbooks/lab_up.yml")
        assert up.code == 0, up.output
        yield lab
    finally:
        down = lab.playbook("playbooks/lab_down.yml")
        print(down.output)
    assert down.code == 0


@pytest.fixture(scope="session")
def rehearsal(machines: Lab) -> Run:
    """site.yml in check mode, before anything is installed."""
    return machines.playbook("site.yml", "--check", "--diff")


@pytest.fixture(scope="session")
def platform(machines: Lab, rehearsal: Run) -> Lab:
    """The machines after site.yml."""
    machines.runs["rehearsal"] = rehearsal
    first = machines.runs["first"] = machines.playbook("site.yml")
    assert first.code == 0, first.output
    print(first.output[first.output.index("ROLE SUMMARY") :])
    return machines
