"""The order of a run: who is measured when. One server at a time has the machine; the others are ended or frozen."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench import machine, scenarios
from bench.course import Load
from bench.environments import UnavailableError
from bench.goals import peak
from bench.models import Models
from bench.peers import HERE, PEERS, Nioserve, Peer
from bench.processes import StartError
from bench.prompts import Prompts
from bench.results import Results
from bench.sessions import STANDARD, HttpSession, Session, Workload

CLOSED, OPEN, OVERLOAD, FAIRNESS, MEMORY = "closed", "open", "overload", "fairness", "memory"
SCENARIOS = (CLOSED, OPEN, OVERLOAD, FAIRNESS, MEMORY)
OVERLOAD_FACTOR = 5.0
PEERS_OVERLOAD_SECONDS = 15.0

FILL_SECONDS = 300.0

Work = tuple[str, str, Callable[[Session], dict[str, Any]]]
"""A scenario, its level, and what measures it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure. Times in seconds, `overload_minutes` in minutes."""

    peers: tuple[str, ...]
    scenarios: tuple[str, ...]
    levels: tuple[int, ...]
    rates: tuple[float, ...]
    rounds: int
    seconds: float
    ramp: float
    overload_minutes: float


class Runner:
    """Measures what the results do not hold yet."""

    def __init__(self, plan: Plan, cache: Path, models: Models, settings: dict[str, str], results: Results) -> None:
        self.plan, self.cache, self.models, self.results = plan, cache, models, results
        self.ours = Nioserve(cache, models, settings)
        self.peers: list[Peer] = [self.ours, *(PEERS[name](cache, models) for name in plan.peers)]
        self._frozen: dict[str, Session] = {}

    def prepare(self) -> bool:
        """Install, compile and convert; return whether all peers can be had.

        One that cannot is left out, with its reason in the results.
        """
        for peer in list(self.peers):
            say(f"prepare {peer.name}")
            old = self.results.data["peers"].get(peer.name, {})
            entry: dict[str, Any] = {"title": peer.title, "precision": peer.precision, "over_http": peer.over_http}
            if "endpoint" in old:
                entry["endpoint"] = old["endpoint"]
            self.results.data["peers"][peer.name] = entry
            try:
                entry["version"] = peer.prepare()
            except UnavailableError as error:
                if peer is self.ours:
                    raise
                entry["skipped"] = str(error)
                self.peers.remove(peer)
                say(f"  skipped: {error}")
        self.results.save()
        return len(self.peers) == 1 + len(self.plan.peers)

    def run(self) -> None:
        """Measure everything that the plan names."""
        found = machine.measure(self.models.huggingface(), HERE)
        self.results.data.update(found, plan=asdict(self.plan), date=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()))
        say(f"machine: {found['ceilings']}")
        self.results.data["client"] = scenarios.client_cost(self.cache / "log" / "null.log", self.plan.seconds / 2)
        say(f"load generator against a server that computes nothing: {self.results.data['client']}")
        self.results.save()
        self._workload = Workload(Prompts(self.models.huggingface() / "tokenizer.json"), self.cache)
        try:
            if CLOSED in self.plan.scenarios:
                for number in range(1, self.plan.rounds + 1):
                    for peer in list(self.peers):
                        self._closed(peer, number)
            for peer in list(self.peers):
                self._once(peer)
        finally:
            for session in self._frozen.values():
                session.running.stop()
        self.results.data["settings"] = self.ours.applied or self.results.data.get("settings", {})
        self.results.data["evaluation"] = evaluate(self.models)
        self.results.save()

    def _closed(self, peer: Peer, number: int) -> None:
        loads = [Load(seconds=self.plan.seconds, ramp=self.plan.ramp, streams=level) for level in self.plan.levels]
        self._measure(
            peer, number, [(CLOSED, str(load.streams), partial(scenarios.measure, load=load)) for load in loads]
        )

    def _once(self, peer: Peer) -> None:
        """Measure what needs the peer's capacity, or is asked of ours alone."""
        best = peak(self.results, peer.name)
        if best:
            capacity = best / STANDARD.answer  # requests/s
            seconds = self.plan.seconds * (3 if peer is self.ours else 1)
            loads = [Load(seconds=seconds, ramp=self.plan.ramp, rate=capacity * factor) for factor in self.plan.rates]
            work: list[Work] = [
                (OPEN, f"{factor:g}", partial(scenarios.measure, load=load))
                for factor, load in zip(self.plan.rates, loads, strict=True)
            ]
            longest = self.plan.overload_minutes * 60
            longest = longest if peer is self.ours else min(longest, PEERS_OVERLOAD_SECONDS)
            flood = partial(scenarios.overload, rate=capacity * OVERLOAD_FACTOR, seconds=longest)
            work.append((OVERLOAD, f"{OVERLOAD_FACTOR:g}", flood))
            self._measure(peer, 1, work)
        if peer is self.ours:
            self._measure(peer, 1, [(FAIRNESS, "", lambda one: scenarios.fairness(_http(one), self.plan.seconds * 3))])
            self._measure(peer, 1, [(MEMORY, "", lambda one: scenarios.memory_filled(_http(one), FILL_SECONDS))])

    def _measure(self, peer: Peer, number: int, work: list[Work]) -> None:
        """Measure what the plan names and the results do not hold; a peer that fails is noted and leaves the run."""
        todo = [
            (scenario, level, measure)
            for scenario, level, measure in work
            if scenario in self.plan.scenarios and not self.results.has(scenario, peer.name, level, number)
        ]
        if not todo or peer not in self.peers:
            return
        session = self._frozen.pop(peer.name, None)
        try:
            if session is not None:
                session.running.thaw()
            else:
                session = self._start(peer)
            for scenario, level, measure in todo:
                session.settle()
                figures = measure(session)
                self.results.put(scenario, peer.name, level, number, figures)
                say(f"{scenario} {level:>4} round {number}  {peer.name:<13} {_in_short(figures)}")
            if peer.slow_start:
                session.running.freeze()
                self._frozen[peer.name] = session
        except StartError as error:
            self.results.data["peers"][peer.name]["failed"] = str(error)
            self.results.save()
            say(f"  {peer.name} failed: {error}")
            self.peers.remove(peer)
        finally:
            if session is not None and peer.name not in self._frozen:
                session.running.stop()

    def _start(self, peer: Peer) -> Session:
        session = peer.start(self._workload)
        self.results.data["peers"][peer.name]["endpoint"] = session.endpoint
        starts = len(self.results.cells("ready", peer.name))
        figures = {"ready_seconds": round(session.ready_seconds, 2), **asdict(session.idle)}
        self.results.put("ready", peer.name, "", starts + 1, figures)
        return session


def evaluate(models: Models) -> dict[str, Any]:
    """Return what `nioserve evaluate` says of the weights under test: its status, and its report or else its output."""
    nioserve = str(Path(sys.executable).with_name("nioserve"))
    say("nioserve evaluate")
    command = [nioserve, "evaluate", str(models.quantised()), "--reference", str(models.source()), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        report: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        return {"status": done.returncode, "text": (done.stdout or done.stderr)[-4000:]}
    return {"status": done.returncode, "report": report}


def _in_short(figures: dict[str, Any]) -> str:
    if "tokens_per_second" not in figures:
        return "done"
    return f"{figures['tokens_per_second']:8.1f} tokens/s, first token p50 {figures['ttft_ms']['p50']} ms"


def _http(session: Session) -> HttpSession:
    if not isinstance(session, HttpSession):
        raise TypeError("this scenario is for servers")
    return session


def say(text: str) -> None:
    """Tell the operator what goes on."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)
