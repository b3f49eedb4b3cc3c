"""The load generator: many streamed answers over real HTTP, at a few microseconds an event.

While a load runs, bytes are only stored with the time they came (uvloop reads, the C parser of httptools takes the
transfer coding off). Events are decoded after the load, so that the client takes little of the cores that the server
under test needs as well. `scenarios.client_cost` measures what is left.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, cast

import httptools
import msgspec

from bench.course import Course, Load, Record

HOST = "127.0.0.1"
_POLL_SECONDS = 0.05


@dataclass(slots=True)
class Exchange:
    """A request and what came back, as bytes; `error` says why nothing more came."""

    start: float
    status: int = 0
    answered: float | None = None
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    finished: float | None = None
    retry_after: bool = False
    error: str = ""


class Connection(asyncio.Protocol):
    """A kept-alive HTTP/1.1 connection with one request at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._parser: Any = httptools.HttpResponseParser(self)
        self._exchange: Exchange | None = None
        self._done: Callable[[Connection | None, Exchange], None] | None = None

    def send(self, request: bytes, exchange: Exchange, done: Callable[[Connection | None, Exchange], None]) -> None:
        """Send a request; `done` gets the connection back, or None when it cannot be used again."""
        self._exchange, self._done = exchange, done
        if self.transport is not None:
            self.transport.write(request)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its base class

    def data_received(self, data: bytes) -> None:
        """Hand bytes to the parser, which calls the methods below."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(None, f"not HTTP: {error}")
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the request that was running."""
        self._end(None, f"the connection was lost: {exc or 'closed by the server'}")

    def on_header(self, name: bytes, _value: bytes) -> None:
        """Notice `Retry-After`."""
        if self._exchange is not None and name.lower() == b"retry-after":
            self._exchange.retry_after = True

    def on_headers_complete(self) -> None:
        """Note the status and its time."""
        if self._exchange is not None:
            self._exchange.status = self._parser.get_status_code()
            self._exchange.answered = time.monotonic()

    def on_body(self, body: bytes) -> None:
        """Store a piece of the answer with its time."""
        if self._exchange is not None:
            self._exchange.pieces.append((time.monotonic(), body))

    def on_message_complete(self) -> None:
        """End the exchange well."""
        if self._exchange is not None:
            self._exchange.finished = time.monotonic()
        self._end(self if self._parser.should_keep_alive() else None, "")

    def abort(self) -> None:
        """Drop the connection at once; the server notices, and must free what the request held."""
        self._exchange = self._done = None
        if self.transport is not None:
            self.transport.abort()

    def _end(self, reusable: Connection | None, error: str) -> None:
        exchange, done = self._exchange, self._done
        self._exchange = self._done = None
        if exchange is not None and done is not None:
            exchange.error = error
            done(reusable, exchange)


class Client:
    """Connections to one server, opened when needed and used again."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[Connection] = []
        self._open: set[Connection] = set()
        self._opening: set[asyncio.Task[None]] = set()

    def send(self, request: bytes, start: float, done: Callable[[Exchange], None]) -> Exchange:
        """Send a request that was due at `start`; `done` is called when its answer is complete or has failed."""
        exchange = Exchange(start)

        def ended(connection: Connection | None, exchange: Exchange) -> None:
            if connection is not None:
                self._idle.append(connection)
            done(exchange)

        while self._idle:
            connection = self._idle.pop()
            if connection.transport is not None and not connection.transport.is_closing():
                connection.send(request, exchange, ended)
                return exchange
            self._open.discard(connection)
        task = asyncio.ensure_future(self._open_and_send(request, exchange, ended))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)
        return exchange

    async def _open_and_send(
        self, request: bytes, exchange: Exchange, ended: Callable[[Connection | None, Exchange], None]
    ) -> None:
        try:
            _, connection = await asyncio.get_running_loop().create_connection(Connection, HOST, self._port)
        except OSError as error:
            exchange.error = f"cannot connect: {error}"
            ended(None, exchange)
            return
        self._open.add(connection)
        connection.send(request, exchange, ended)

    async def close(self) -> None:
        """Abort everything that is still running."""
        for task in list(self._opening):
            task.cancel()
        for connection in self._open:
            connection.abort()
        self._idle.clear()
        self._open.clear()
        await asyncio.sleep(0)


async def drive(
    client: Client, load: Load, requests: Iterator[bytes], exchanges: list[Exchange] | None = None
) -> tuple[list[Record], tuple[float, float]]:
    """Run a load; return its records, those that were cut off at its end included, and the window that counts.

    `exchanges`, if given, is filled with the bytes that came.
    """
    loop = asyncio.get_running_loop()
    course = Course(load, time.monotonic())
    exchanges = [] if exchanges is None else exchanges
    wake = asyncio.Event()

    def done(exchange: Exchange) -> None:
        course.ended(time.monotonic(), exchange.status == HTTPStatus.OK and not exchange.error)
        wake.set()

    while not course.over(now := time.monotonic()):
        exchanges += [client.send(next(requests), start, done) for start in course.due(now)]
        due = course.next_due()
        wait = _POLL_SECONDS if due is None else min(due - time.monotonic(), _POLL_SECONDS)
        wake.clear()
        timer = loop.call_later(max(wait, 0), wake.set)
        await wake.wait()
        timer.cancel()
    window = course.window(time.monotonic())
    await client.close()
    return [decode(exchange) for exchange in exchanges], window


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(_Event)


def decode(exchange: Exchange) -> Record:
    """Return what a client of the stream saw: when each piece of text came, and the usage that the server reported."""
    record = Record(
        exchange.start, exchange.status, exchange.answered, [], exchange.finished,
        retry_after=exchange.retry_after, error=exchange.error,
    )  # fmt: skip
    if exchange.status != HTTPStatus.OK:
        if exchange.pieces and not record.error:
            record.error = b"".join(data for _, data in exchange.pieces)[:300].decode(errors="replace")
        return record
    for arrived, payload in _events(exchange.pieces):
        if payload == b"[DONE]":
            continue
        try:
            event = _decoder.decode(payload)
        except msgspec.MsgspecError as error:
            record.error = f"an event that is no completion chunk ({error}): {payload[:200].decode(errors='replace')}"
            continue
        if event.error:
            record.error = f"error event: {event.error}"
        if event.usage is not None:
            record.prompt_tokens, record.completion_tokens = event.usage.prompt_tokens, event.usage.completion_tokens
        if any(choice.text or (choice.delta and choice.delta.content) for choice in event.choices):
            record.times.append(arrived)
    return record


def _events(pieces: list[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """Yield the data of each event with the time its last byte came; an event may span pieces, and a piece events."""
    rest = b""
    for arrived, data in pieces:
        *events, rest = (rest + data.replace(b"\r\n", b"\n")).split(b"\n\n")
        for event in events:
            for line in event.split(b"\n"):
                if line.startswith(b"data:"):
                    yield arrived, line[5:].strip()
