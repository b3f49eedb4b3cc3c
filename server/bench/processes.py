"""Starting a server, asking it whether it is ready, freezing it while another one is measured, and its memory."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.client import HOST

PAGE = os.sysconf("SC_PAGE_SIZE")
MIB = 2**20


class StartError(Exception):
    """A server that ended or was not ready in time; the message has the end of its log."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory in MiB. `rss` counts pages that processes share once per process, `pss` counts them once."""

    rss: float
    pss: float
    engine_rss: float  # of the largest process, which in every server here is the one that computes
    engine_peak: float


class Running:
    """A started server and all its descendants."""

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path, pipes: bool = False) -> None:
        """Start it; with `pipes`, `tell` and `hear` talk to it."""
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        self.started = time.monotonic()
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipes else errors,
                stderr=errors,
                start_new_session=True,
            )

    def wait_ready(self, ready: Callable[[], bool], timeout: float) -> float:
        """Return the seconds from the start until `ready`; StartError when it ends or takes longer."""
        while not ready():
            if self._process.poll() is not None:
                raise StartError(f"ended with status {self._process.returncode} before it was ready: {self.log_end()}")
            if time.monotonic() - self.started > timeout:
                raise StartError(f"not ready after {timeout:.0f} s: {self.log_end()}")
            time.sleep(0.05)
        return time.monotonic() - self.started

    def tell(self, line: str) -> None:
        """Write a line to its standard input; StartError when it has gone."""
        try:
            if self._process.stdin is not None:
                self._process.stdin.write(line.encode() + b"\n")
                self._process.stdin.flush()
        except OSError as error:
            raise StartError(f"ended: {self.log_end()}") from error

    def hear(self, deadline: float) -> bytes:
        """Return the next line of its standard output; StartError when none comes before `deadline`."""
        output = self._process.stdout
        if output is None or not select.select([output], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise StartError(f"did not answer in time: {self.log_end()}")
        line = output.readline()
        if not line:
            raise StartError(f"ended: {self.log_end()}")
        return line

    def alive(self) -> bool:
        """Return whether the process that was started runs."""
        return self._process.poll() is None

    def log_end(self) -> str:
        """Return the log's last lines that say something."""
        lines = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        return " | ".join([line.strip() for line in lines if line.strip()][-4:])[-600:]

    def freeze(self) -> None:
        """Stop all its processes where they are: they use no core until `thaw`."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def stop(self, patience: float = 15) -> None:
        """End it and everything it started: asked first, killed after `patience` seconds."""
        family = self.pids()
        self._signal(signal.SIGCONT)
        self._process.terminate()
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pid in family:
            _kill(pid, signal.SIGKILL)
        while any(_runs(pid) for pid in family):  # the next server is to have the machine for itself
            time.sleep(0.01)

    def pids(self) -> list[int]:
        """Return the process and its descendants."""
        parents: dict[int, list[int]] = {}
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            parents.setdefault(parent, []).append(int(directory.name))
        found, todo = [], [self._process.pid]
        while todo:
            pid = todo.pop()
            found.append(pid)
            todo += parents.get(pid, [])
        return found

    def memory(self) -> Memory:
        """Return what its processes hold now."""
        each = [_memory_of(pid) for pid in self.pids()]
        engine = max(each, key=lambda one: one[0])
        return Memory(sum(one[0] for one in each), sum(one[1] for one in each), engine[0], engine[2])

    def cpu_seconds(self) -> float:
        """Return the processor time its living processes have used."""
        ticks = 0
        for pid in self.pids():
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def _signal(self, number: int) -> None:
        for pid in self.pids():
            _kill(pid, number)


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _runs(pid: int) -> bool:
    """Return whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return False


def _memory_of(pid: int) -> tuple[float, float, float]:
    """Return resident, proportional and peak resident MiB of a process; zeros when it has gone."""
    try:
        status = _kilobytes(Path(f"/proc/{pid}/status"))
        rollup = _kilobytes(Path(f"/proc/{pid}/smaps_rollup"))
    except (OSError, ProcessLookupError):
        return 0.0, 0.0, 0.0
    return status.get("VmRSS", 0) / 1024, rollup.get("Pss", 0) / 1024, status.get("VmHWM", 0) / 1024


def _kilobytes(file: Path) -> dict[str, int]:
    found = {}
    for line in file.read_text().splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            found[name] = int(value.split()[0])
    return found


def free_port() -> int:
    """Return a port of the loopback address that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
