"""What the scenarios' tests ask a lab with: places that packets come from, machines, and runs of Ansible."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
INVENTORY = ROOT / "inventories/lab"
LAB = os.environ.get("CHATNIO_LAB", "molecule")
CACHE = Path(os.environ.get("CHATNIO_CACHE") or "/var/cache/chatnio")
FOLDER = CACHE / "labs" / LAB

# Runs anywhere with a Python: knocks at every port at once and says how each answered.
KNOCK = """
import errno, json, socket, sys
from concurrent.futures import ThreadPoolExecutor
def knock(port):
    try:
        socket.create_connection((sys.argv[1], port), timeout=1).close()
    except TimeoutError:
        return "silent"
    except ConnectionRefusedError:
        return "refused"
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))
    return "open"
ports = [int(port) for port in sys.argv[2:]]
with ThreadPoolExecutor(len(ports)) as pool:
    print(json.dumps(dict(zip(ports, pool.map(knock, ports)))))
"""

# One ICMP echo; the exit code says whether it was answered.
PING = """
import os, socket, struct, sys
head = struct.pack("!BBHHH", 8, 0, 0, os.getpid() & 0xFFFF, 1)
total = sum(struct.unpack("!4H", head))
total = (total >> 16) + (total & 0xFFFF)
with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
    raw.settimeout(1)
    raw.sendto(head[:2] + struct.pack("!H", ~total & 0xFFFF) + head[4:], (sys.argv[1], 0))
    try:
        while True:
            packet, (sender, _) = raw.recvfrom(1024)
            if sender == sys.argv[1] and packet[20] == 0:
                sys.exit(0)
    except TimeoutError:
        sys.exit(1)
"""


@dataclass(frozen=True)
class Place:
    """Somewhere that packets come from: a network namespace of the lab on this machine."""

    namespace: str

    def command(self, *command: str) -> list[str]:
        """Return what runs `command` in this place."""
        return ["nsenter", f"--net=/run/netns/{self.namespace}", *command]

    def run(self, *command: str, text: str | None = None, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command here; `text` is its standard input."""
        return subprocess.run(
            self.command(*command), input=text or "", capture_output=True, text=True, timeout=timeout, check=False
        )

    def knock(self, address: str, *ports: int) -> dict[int, str]:
        """Connect to ports and say how each answered: open, refused, silent, or the error's name."""
        done = self.run(sys.executable, "-c", KNOCK, address, *map(str, ports))
        return {int(port): answer for port, answer in json.loads(done.stdout).items()}

    def pings(self, address: str) -> bool:
        """Say whether an ICMP echo is answered."""
        return self.run(sys.executable, "-c", PING, address).returncode == 0

    @contextmanager
    def listener(self, address: str, port: int) -> Iterator[None]:
        """Listen here for the time of the block."""
        listen = self.command(sys.executable, "-m", "http.server", "--bind", address, str(port))
        with subprocess.Popen(listen, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
            until(lambda: self.knock(address, port)[port] == "open")
            try:
                yield
            finally:
                server.terminate()

    @contextmanager
    def route(self, network: str, gateway: str) -> Iterator[None]:
        """Send what is for `network` by way of `gateway` for the time of the block."""
        self.run("ip", "route", "replace", network, "via", gateway)
        try:
            yield
        finally:
            self.run("ip", "route", "delete", network)


def knock_from(machine, address: str, *ports: int) -> dict[int, str]:
    """Connect from a machine of the lab, as `Place.knock` does from here."""
    done = machine.check_output("python3 -c %s %s" + " %s" * len(ports), KNOCK, address, *map(str, ports))
    return {int(port): answer for port, answer in json.loads(done).items()}


@dataclass(frozen=True)
class Run:
    """What a run of Ansible did."""

    code: int
    output: str
    # By host, the names of the tasks that changed it, and the messages of those that failed.
    changed: dict[str, list[str]]
    failed: dict[str, list[str]]


def play(*arguments: str, playbook: str | Path | None = None, **variables: object) -> Run:
    """Run the scenario's converge.yml, or another playbook, with extra variables."""
    playbook = playbook or Path(os.environ["MOLECULE_SCENARIO_DIRECTORY"], "converge.yml")
    command = [
        "ansible-playbook",
        f"--inventory={INVENTORY}",
        f"--extra-vars={json.dumps(variables)}",
        *arguments,
        playbook,
    ]
    environment = {**os.environ, "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "{\n" in done.stdout, f"{command} printed no result: {done.stdout}\n{done.stderr}"
    # Other callbacks print around it.
    report, _end = json.JSONDecoder().raw_decode(done.stdout, done.stdout.index("{\n"))
    changed: dict[str, list[str]] = {}
    failed: dict[str, list[str]] = {}
    for task in (task for part in report["plays"] for task in part["tasks"]):
        for host, result in task["hosts"].items():
            if result.get("changed"):
                changed.setdefault(host, []).append(task["task"]["name"])
            if result.get("failed") or result.get("unreachable"):
                failed.setdefault(host, []).append(str(result.get("msg", result)))
    return Run(done.returncode, done.stdout + done.stderr, changed, failed)


def until(true: Callable[[], object], seconds: float = 10, step: float = 0.1) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not true after {seconds} s: {true}"
        time.sleep(step)


def hosts() -> dict[str, dict[str, str]]:
    """Return the lab's machines with their addresses."""
    return yaml.safe_load((INVENTORY / "hosts.yml").read_text())["all"]["hosts"]


def group(name: str) -> list[str]:
    """Return the names of a group's machines."""
    return list(yaml.safe_load((INVENTORY / "hosts.yml").read_text())[name]["hosts"])


def secret(name: str) -> str:
    """Return a secret that the lab drew for itself (inventories/lab/group_vars/all/secrets.yml)."""
    return (FOLDER / "secrets" / name).read_text().split()[0]


def ssh_config() -> str:
    """Return OpenSSH's configuration for the lab's machines."""
    lines = [
        "Host *",
        "  User ansible",
        f"  IdentityFile {FOLDER}/ssh/id_ed25519",
        f"  UserKnownHostsFile {FOLDER}/ssh/known_hosts",
        f"  ProxyCommand nsenter --net=/run/netns/{LAB} socat - TCP:%h:%p",
        f"  ControlPath {FOLDER}/ssh/%C",
        "  BatchMode yes",
    ]
    for name, at in hosts().items():
        lines += [f"Host {name}", f"  HostName {at['management_address']}"]
    return "\n".join(lines) + "\n"
