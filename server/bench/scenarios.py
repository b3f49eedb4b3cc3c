"""The measurements, one function each. Figures come back as JSON types; what they mean is said in README.md."""

from __future__ import annotations

import itertools
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import uvloop

from bench.client import HOST, Client, Exchange, drive
from bench.course import Load
from bench.null_server import TOKENS
from bench.processes import Running, free_port
from bench.sessions import HttpSession, Session, Shape, ask, run_all
from bench.stats import milliseconds, summarise

SHORT, LONG = Shape(), Shape(prompt=768, turns=6)
"""A single question, and a conversation of more than five turns."""

FILL = Shape(prompt=1024, answer=1024)
"""What fills a slot to 2048 tokens; the answers are long, so that all slots are full at the same time."""

SLOTS = 32
FLOOD_STREAMS = 64
TRICKLE_RATE = 2.0
NULL_RATE = 2000.0
"""Tokens/s at which the client's own cost is measured: more than any server here makes."""


def measure(session: Session, load: Load) -> dict[str, Any]:
    """Run one load of 64-token prompts and answers; the processor time of client and server is noted beside it."""
    client, server, begin = time.process_time(), session.running.cpu_seconds(), time.monotonic()
    records, window = session.run(load)
    passed = time.monotonic() - begin
    return {
        **summarise(records, window),
        "client_cores": round((time.process_time() - client) / passed, 3),
        "server_cores": round((session.running.cpu_seconds() - server) / passed, 3),
    }


def overload(session: Session, rate: float, seconds: float) -> dict[str, Any]:
    """Run an open loop far above capacity, and look whether the processes are still those that were there before."""
    before = set(session.running.pids())
    figures = measure(session, Load(seconds=seconds, ramp=5, rate=rate))
    return {**figures, "processes_lost": len(before - set(session.running.pids())), "alive": session.running.alive()}


def fairness(session: HttpSession, seconds: float) -> dict[str, Any]:
    """Return a trickle's figures alone and beside a flood of the other class, both ways."""
    found: dict[str, Any] = {}
    for name, trickle, flood in (("short", SHORT, LONG), ("long", LONG, SHORT)):
        slow = Load(seconds=seconds, ramp=2, rate=TRICKLE_RATE, seed=1)
        many = Load(seconds=seconds, ramp=2, streams=FLOOD_STREAMS)
        alone = summarise(*_chat(session, [(slow, trickle)])[0])
        # Ends with the trickle, whose seconds are fixed: a closed loop may go on until all its streams are complete.
        beside, flooding = (summarise(*one) for one in _chat(session, [(slow, trickle), (many, flood)]))
        found[name] = {"alone": alone, "flooded": beside, "flood": flooding}
    return found


def _chat(session: HttpSession, loads: list[tuple[Load, Shape]]) -> Any:  # noqa: ANN401  as run_all
    """Run loads at once over the chat endpoint: the class of a conversation is told by its messages."""
    return run_all([(session, load, replace(shape, chat=True)) for load, shape in loads])


def memory_filled(session: HttpSession, timeout: float) -> dict[str, Any]:
    """Fill all slots to 2048 tokens at the same time; return the memory afterwards and at its peak, in MiB."""
    records, _ = session.run(Load(seconds=timeout, streams=SLOTS, requests=SLOTS), FILL)
    complete = [record for record in records if record.finished and not record.error]
    return {
        "slots_filled": len(complete),
        "tokens_each": sorted({record.prompt_tokens + record.completion_tokens for record in complete}),
        "first_failure": next((record.error for record in records if record.error), ""),
        **asdict(session.running.memory()),
    }


def client_cost(log: Path, seconds: float) -> dict[str, Any]:
    """Drive a server that computes nothing: at a steady rate for the client's delay, and as fast as it can."""
    return {
        "steady": _null(SLOTS / NULL_RATE, log, seconds),
        "flat_out": _null(0.0, log, seconds),
    }


def _null(interval: float, log: Path, seconds: float) -> dict[str, Any]:
    port = free_port()
    command = [sys.executable, "-m", "bench.null_server", str(port), str(interval)]
    running = Running(command, {"PYTHONPATH": str(Path(__file__).parents[1])}, log)
    try:
        running.wait_ready(lambda: ask(port, "/", {}, {})[0] == 200, 20)
        request = f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 2\r\n\r\n{{}}".encode()
        sent: list[Exchange] = []
        client = Client(port)
        begin = time.process_time()
        records, window = uvloop.run(
            drive(client, Load(seconds=seconds, ramp=0.5, streams=SLOTS), itertools.repeat(request), sent)
        )
        used = time.process_time() - begin
    finally:
        running.stop()
    figures = summarise(records, window)
    events = sum(len(record.times) for record in records)
    delays = [arrived - float(stamp) for exchange in sent for arrived, stamp in _stamps(exchange)]
    return {
        "tokens_per_second": figures["tokens_per_second"],
        "client_microseconds_per_token": round(used / max(events, 1) * 1e6, 1),
        "delay_ms": milliseconds(delays),
        "wrong": figures["failed"] + sum(record.completion_tokens not in (0, TOKENS) for record in records),
    }


def _stamps(exchange: Exchange) -> list[tuple[float, str]]:
    """Return when each piece came and when the null server sent it."""
    found = []
    for arrived, data in exchange.pieces:
        for part in data.split(b'"text":"')[1:]:
            found.append((arrived, part.partition(b'"')[0].decode()))
    return found
