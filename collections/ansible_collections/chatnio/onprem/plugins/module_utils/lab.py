# Copyright: the chatnio on-prem authors
# Apache License 2.0 (see LICENSE)
"""A lab: systemd containers on bridges in a network namespace of their own.

Nothing of a lab is in the machine's own network, so no packet of it can leave by the machine's routes::

    namespace NAME (the control machine)            namespace NAME-user (someone's desk)
      br-management  10.0.0.250                        eth0  192.168.1.250
      br-business    (no address) ------------------------'
        |  |  |
      nodes, each with an interface on either bridge

Every node is an overlay on one base, and all of its processes are in one control group, by which they are found
and ended again.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

NETNS = Path("/run/netns")
CGROUPS = Path("/sys/fs/cgroup")
FORWARDER = "forwarder"
# The hierarchies of the first version, and the one of the second that may stand beside them. A node has to be alone in
# each: systemd-nspawn moves it below the group that it finds in `unified`.
CONTROLLERS = ("unified", "systemd", "memory", "cpu", "cpuacct", "cpuset", "pids", "blkio", "devices", "freezer")
NETWORKD = """[Match]
Name={name}

[Network]
Address={address}
LinkLocalAddressing=no
IPv6AcceptRA=no
"""


class LabError(Exception):
    """A step failed; the message says which and why."""


@dataclass(frozen=True)
class Network:
    """A bridge, and the address with prefix that the control machine (or the desk) has on it."""

    name: str
    control_address: str | None = None
    desk_address: str | None = None


@dataclass(frozen=True)
class Interface:
    """An interface of a node. Without an address (with prefix), the node finds the link unconfigured."""

    name: str
    network: str
    address: str | None = None


@dataclass(frozen=True)
class Node:
    """A machine of the lab."""

    name: str
    interfaces: tuple[Interface, ...]
    binds: tuple[str, ...] = ()


def run(*command: str, fails: bool = True) -> str:
    """Run a command and return what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and fails:
        reason = done.stderr.strip() or done.stdout.strip() or f"exit {done.returncode}"
        raise LabError(f"{' '.join(command)}: {reason}")
    return done.stdout


@dataclass
class Lab:
    """The lab NAME, with its state in `folder`."""

    name: str
    folder: Path
    base: Path
    networks: tuple[Network, ...]
    nodes: tuple[Node, ...]
    log: list[str] = field(default_factory=list)

    # -- networks ------------------------------------------------------------------------------------------------

    @property
    def desk(self) -> str:
        """Name of the namespace of a user's machine, which is on the business network only."""
        return f"{self.name}-user"

    def ip(self, *arguments: str, namespace: str | None = None, fails: bool = True) -> str:
        """Run ip(8) in a namespace of the lab."""
        return run("ip", "-n", namespace or self.name, *arguments, fails=fails)

    def up_networks(self) -> None:
        """Make the namespaces, the bridges in the first, and the cable from the business bridge to the desk."""
        for namespace in (self.name, self.desk):
            if not (NETNS / namespace).exists():
                run("ip", "netns", "add", namespace)
                self.ip("link", "set", "lo", "up", namespace=namespace)
                self.log.append(f"namespace {namespace}")
        for network in self.networks:
            bridge = f"br-{network.name}"
            if f"{bridge}:" not in self.ip("-o", "link"):
                self.ip("link", "add", bridge, "type", "bridge")
                self.log.append(f"bridge {bridge}")
            self.ip("link", "set", bridge, "up")
            if network.control_address:
                self.ip("addr", "replace", network.control_address, "dev", bridge)
            if network.desk_address:
                self._cable_to_desk(bridge, network.desk_address)

    def _cable_to_desk(self, bridge: str, address: str) -> None:
        if "eth0" not in self.ip("-o", "link", namespace=self.desk):
            self.ip("link", "add", "desk", "type", "veth", "peer", "name", "eth0", "netns", self.desk)
        self.ip("link", "set", "desk", "master", bridge, "up")
        self.ip("addr", "replace", address, "dev", "eth0", namespace=self.desk)
        self.ip("link", "set", "eth0", "up", namespace=self.desk)

    def down_networks(self) -> None:
        """End what still runs in the namespaces (SSH's proxies, forwarders) and remove them."""
        for namespace in (self.desk, self.name):
            if (NETNS / namespace).exists():
                for pid in run("ip", "netns", "pids", namespace, fails=False).split():
                    end_process(int(pid))
                run("ip", "netns", "delete", namespace)
                self.log.append(f"namespace {namespace}")
        # ip(8) bound the folder to itself with its first namespace, which Path.is_mount() can't tell.
        if NETNS.exists() and not any(NETNS.iterdir()):
            run("umount", str(NETNS), fails=False)

    # -- control groups ------------------------------------------------------------------------------------------

    def cgroups(self, member: str) -> list[Path]:
        """Control groups of a node (or of the forwarder). On a machine with the unified hierarchy alone it is one."""
        roots = [CGROUPS] if (CGROUPS / "cgroup.controllers").exists() else [CGROUPS / name for name in CONTROLLERS]
        return [root / "chatnio-lab" / self.name / member for root in roots if root.exists()]

    def processes(self, member: str) -> set[int]:
        """Return the ids of all processes of a member."""
        procs = [procs for group in self.cgroups(member) if group.exists() for procs in group.rglob("cgroup.procs")]
        return {int(pid) for file in procs for pid in file.read_text().split()}

    def spawn(self, member: str, command: list[str]) -> None:
        """Start a command in the member's control groups; it outlives this process. Its output is the console."""
        groups = self.cgroups(member)
        for group in groups:
            group.mkdir(parents=True, exist_ok=True)
            for level in (group.parent.parent, group.parent, group):  # the first version's cpuset starts empty
                for name in ("cpuset.cpus", "cpuset.mems"):
                    if (level / name).exists() and not (level / name).read_text().strip():
                        (level / name).write_text((level.parent / name).read_text())

        def enter() -> None:
            for group in groups:
                (group / "cgroup.procs").write_text(str(os.getpid()))

        with self.console(member).open("ab") as console:
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
                preexec_fn=enter,
            )

    def console(self, member: str) -> Path:
        """File that a member's output goes to."""
        return self.folder / f"{member}.console"

    def end(self, member: str) -> None:
        """End every process of a member and remove its control groups."""
        deadline = time.monotonic() + 10
        while pids := self.processes(member):
            for pid in pids:
                end_process(pid)
            if time.monotonic() > deadline:
                raise LabError(f"processes of {member} don't end: {sorted(pids)}")
            time.sleep(0.05)
        for group in self.cgroups(member):
            inner = sorted((path for path in group.rglob("*") if path.is_dir()), reverse=True) if group.exists() else []
            for folder in (*inner, group, group.parent, group.parent.parent):
                if folder.exists() and not any(child.is_dir() for child in folder.iterdir()):
                    folder.rmdir()

    # -- the way in from this machine ----------------------------------------------------------------------------

    def up_forward(self, port: int, target: str) -> None:
        """Forward 127.0.0.1:port to an address that the desk reaches."""
        if self.processes(FORWARDER):
            return
        into = f"nsenter --net={NETNS / self.desk} socat - TCP\\:{target.replace(':', chr(92) + ':')}"
        self.spawn(FORWARDER, ["socat", f"TCP-LISTEN:{port},bind=127.0.0.1,fork,reuseaddr", f"EXEC:{into}"])
        time.sleep(0.3)
        if not self.processes(FORWARDER):
            reason = " ".join(self.console(FORWARDER).read_text().strip().splitlines()[-1:])
            raise LabError(f"127.0.0.1:{port} can't be forwarded ({reason}); CHATNIO_LAB_PORT names another port")
        self.log.append(f"forwarder 127.0.0.1:{port}")

    # -- nodes ---------------------------------------------------------------------------------------------------

    def root(self, node: Node) -> Path:
        """Folder that a node's file system is mounted on."""
        return self.folder / "nodes" / node.name / "root"

    def running(self, node: Node) -> bool:
        """Say whether a node has processes."""
        return bool(self.processes(node.name))

    def up_node(self, node: Node, authorized_key: str) -> None:
        """Boot a node that doesn't run (mount, furnish, start), and see that its cables are plugged in."""
        if not self.running(node):
            root = self.root(node)
            self._mount(root)
            self._furnish(root, node, authorized_key)
            self._start(node)
            self.log.append(f"node {node.name}")
        for interface in node.interfaces:  # of a running one too: the run that booted it may have been interrupted
            self._plug(node, interface)

    def _mount(self, root: Path) -> None:
        upper, work = root.parent / "upper", root.parent / "work"
        for folder in (root, upper, work):
            folder.mkdir(parents=True, exist_ok=True)
        if not root.is_mount():
            options = f"lowerdir={self.base},upperdir={upper},workdir={work}"
            run("mount", "-t", "overlay", "overlay", "-o", options, str(root))

    def _furnish(self, root: Path, node: Node, authorized_key: str) -> None:
        (root / "etc/hostname").write_text(f"{node.name}\n")
        # As Debian's installer leaves it. Without its own name in it, every sudo there waits for a name server.
        if not (hosts := root / "etc/hosts").exists():
            hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {node.name}\n")
        for interface in node.interfaces:
            unit = root / f"etc/systemd/network/10-{interface.name}.network"
            if interface.address and not unit.exists():
                unit.write_text(NETWORKD.format(name=interface.name, address=interface.address))
        ssh = root / "home/ansible/.ssh"
        ssh.mkdir(mode=0o700, parents=True, exist_ok=True)
        (ssh / "authorized_keys").write_text(authorized_key + "\n")
        owner = (root / "home/ansible").stat()
        for path in (ssh, ssh / "authorized_keys"):
            os.chown(path, owner.st_uid, owner.st_gid)
        keys = self.folder / "hostkeys" / node.name
        for suffix in ("", ".pub"):
            target = root / f"etc/ssh/ssh_host_ed25519_key{suffix}"
            shutil.copyfile(f"{keys}{suffix}", target)
            target.chmod(0o600 if not suffix else 0o644)

    def _start(self, node: Node) -> None:
        # Cables of a node that died without being taken down would make the new ones fail.
        for interface in node.interfaces:
            self.ip("link", "delete", self._cable(node, interface), fails=False)
        command = [
            "nsenter",
            f"--net={NETNS / self.name}",
            "systemd-nspawn",
            "--quiet",
            "--keep-unit",
            "--register=no",
            "--boot",
            f"--directory={self.root(node)}",
            f"--machine={node.name}",
            "--resolv-conf=off",
            "--timezone=off",
            "--link-journal=no",
            "--private-network",
        ]
        command += [f"--network-veth-extra={self._cable(node, i)}:{i.name}" for i in node.interfaces]
        command += [f"--bind-ro={bind}" for bind in node.binds]
        self.spawn(node.name, command)

    @staticmethod
    def _cable(node: Node, interface: Interface) -> str:
        return f"{node.name}-{interface.name}"[:15]  # IFNAMSIZ

    def _plug(self, node: Node, interface: Interface) -> None:
        cable, deadline = self._cable(node, interface), time.monotonic() + 20
        while f"{cable}@" not in self.ip("-o", "link"):
            if time.monotonic() > deadline or not self.running(node):
                console = self.console(node.name)
                raise LabError(f"{node.name} did not start; the end of {console}: {console.read_text()[-800:]}")
            time.sleep(0.05)
        self.ip("link", "set", cable, "master", f"br-{interface.network}", "up")

    def down_node(self, node: Node) -> None:
        """End a node's processes, unmount it and remove its files."""
        self.end(node.name)
        root = self.root(node)
        if root.is_mount():
            run("umount", str(root))
            self.log.append(f"node {node.name}")
        shutil.rmtree(root.parent, ignore_errors=True)


def end_process(pid: int) -> None:
    """Kill a process; one that is gone already is fine."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
