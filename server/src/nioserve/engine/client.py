"""How an API worker talks to the engine: submit, read the tokens, cancel. Engines come and go; a client stays."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

from zmq.asyncio import Context, Socket

from nioserve.engine import messages, transport
from nioserve.engine.messages import Accepted, Cancel, Output, Rejected, Sampling, ServiceState, Submit

log = logging.getLogger(__name__)


class EngineUnavailableError(Exception):
    """The engine is starting, dead or hung; whatever was in flight is lost."""


class RejectedError(Exception):
    """The engine did not take the request; `retry_after` in seconds."""

    def __init__(self, reason: str, retry_after: int) -> None:
        super().__init__(reason)
        self.reason, self.retry_after = reason, retry_after


class Generation:
    """One admitted request: an iterator over its outputs. Close it, however reading ended."""

    def __init__(self, client: EngineClient, request_id: str) -> None:
        self._client, self._request_id = client, request_id
        self.events: asyncio.Queue[Accepted | Rejected | Output | EngineUnavailableError] = asyncio.Queue()
        self.ended = False

    async def admitted(self) -> None:
        """Wait for a place; RejectedError or EngineUnavailableError when there is none."""
        event = await self._next()
        if isinstance(event, Rejected):
            self.ended = True
            raise RejectedError(event.reason, event.retry_after)

    async def outputs(self) -> AsyncIterator[Output]:
        """Yield outputs up to and including the last; EngineUnavailableError when the engine is lost."""
        while not self.ended:
            event = await self._next()
            if isinstance(event, Output):
                self.ended = event.finish_reason is not None
                yield event

    async def _next(self) -> Accepted | Rejected | Output:
        event = await self.events.get()
        if isinstance(event, EngineUnavailableError):
            self.ended = True
            raise event
        return event

    def close(self) -> None:
        """Forget the request, and have the engine drop it if it still runs."""
        self._client.forget(self._request_id, cancel=not self.ended)


class EngineClient:
    """The connection of one API worker."""

    def __init__(self, runtime_dir: Path) -> None:
        self._addresses = transport.Addresses(runtime_dir)
        self._context = Context()
        self._engine: Socket | None = None
        self._pending: dict[str, Generation] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._reader: asyncio.Task[None] | None = None
        self.informed = asyncio.Event()
        """Set once the supervisor's first word is here."""
        self.state = ServiceState(epoch=0, engine_ready=False, draining=False, started=False, detail="starting")

    def start(self) -> None:
        """Begin to follow the supervisor's word."""
        self._tasks.append(asyncio.create_task(self._follow_state()))

    async def stop(self) -> None:
        """End all tasks and close the sockets."""
        tasks = [*self._tasks, *([self._reader] if self._reader else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._context.destroy(linger=0)

    async def submit(self, request_id: str, prompt: list[int], max_tokens: int, sampling: Sampling) -> Generation:
        """Send a request and return once it is admitted; RejectedError or EngineUnavailableError otherwise."""
        if self._engine is None or not self.state.engine_ready:
            raise EngineUnavailableError(self.state.detail)
        generation = self._pending[request_id] = Generation(self, request_id)
        self._send(Submit(request_id, prompt, max_tokens, sampling))
        try:
            await generation.admitted()
        except BaseException:  # cancelled, too: the client may hang up while it waits
            generation.close()
            raise
        return generation

    def forget(self, request_id: str, *, cancel: bool) -> None:
        """Drop a request on this side, and on the engine's if it may still run there."""
        if self._pending.pop(request_id, None) is not None and cancel:
            self._send(Cancel(request_id))

    def _send(self, message: messages.ToEngine) -> None:
        if self._engine is not None:
            # The queue has no limit: the message is on its way when the call returns, and the future is done.
            self._engine.send(messages.encode(message))

    async def _follow_state(self) -> None:
        subscriber = transport.listen_to(self._context, self._addresses.state())
        while True:
            self._apply(messages.decode_state(await subscriber.recv()))
            self.informed.set()

    def _apply(self, state: ServiceState) -> None:
        before, self.state = self.state, state
        if state.epoch != before.epoch or (before.engine_ready and not state.engine_ready):
            self._lose(state.detail)
        if state.engine_ready and self._engine is None:
            self._connect(state.epoch)

    def _connect(self, epoch: int) -> None:
        self._engine = transport.call(self._context, self._addresses.engine(epoch))
        self._reader = asyncio.create_task(self._read(self._engine))

    def _lose(self, detail: str) -> None:
        """Fail everything in flight and drop the connection; the next engine has another address."""
        if self._reader is not None:
            self._reader.cancel()
        if self._engine is not None:
            self._engine.close(linger=0)
        self._reader = self._engine = None
        for generation in self._pending.values():
            generation.events.put_nowait(EngineUnavailableError(detail))

    async def _read(self, socket: Socket) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            while True:
                message = messages.decode_from_engine(await socket.recv())
                items = message.outputs if isinstance(message, messages.Outputs) else [message]
                for item in items:
                    generation = self._pending.get(item.request_id)
                    if generation is not None:
                        generation.events.put_nowait(item)
