"""How an API worker talks to the engine: submit, read the tokens, cancel. Engines come and go; a client stays."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path

from zmq.asyncio import Context, Socket

from nioserve.engine import messages, transport
from nioserve.engine.messages import Accepted, Cancel, FinishReason, Load, Output, Rejected, ServiceState, Submit

log = logging.getLogger(__name__)


class EngineUnavailableError(Exception):
    """The engine is starting, dead or hung, or the service shuts down; whatever was in flight is lost."""


class RejectedError(Exception):
    """The engine did not take the request; `retry_after` in seconds."""

    def __init__(self, reason: str, retry_after: int) -> None:
        super().__init__(reason)
        self.reason, self.retry_after = reason, retry_after


class Generation:
    """What the engine answers to one or several requests that belong together. Close it, however reading ended.

    Outputs gather here until somebody asks, so that a reader who is late gets them all at once.
    """

    def __init__(self, client: EngineClient, requests: Sequence[Submit]) -> None:
        self._client = client
        self._index = {request.request_id: index for index, request in enumerate(requests)}
        self._running = dict(self._index)
        self._unanswered = len(requests)
        self._outputs: list[tuple[int, Output]] = []
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def admitted(self) -> None:
        """Wait until all have a place; RejectedError or EngineUnavailableError when one has none."""
        while self._unanswered and self._failure is None:
            await self._wait()
        if self._failure is not None:
            raise self._failure

    async def next(self) -> list[tuple[int, Output]]:
        """Return all outputs since the last call, each with its request's index; nothing once all have ended.

        Raises what the generation failed with: EngineUnavailableError, RejectedError when a request waited too long in
        the queue, or what `fail` was given.
        """
        while not self._outputs:
            if self._failure is not None:
                raise self._failure
            if not self._running:
                return []
            await self._wait()
        outputs, self._outputs = self._outputs, []
        return outputs

    def take(self, message: Accepted | Rejected | Output) -> None:
        """Note what the engine said."""
        if isinstance(message, Accepted):
            self._unanswered -= 1
        elif isinstance(message, Rejected):
            self._forget(message.request_id)
            self.fail(RejectedError(message.reason, message.retry_after))
        elif message.finish_reason is FinishReason.ERROR:
            self._forget(message.request_id)
            self.fail(EngineUnavailableError("the engine had to give the request up"))
        else:
            self._outputs.append((self._index[message.request_id], message))
            if message.finish_reason is not None:
                self._forget(message.request_id)
        self._wake()

    def fail(self, error: Exception) -> None:
        """End the generation with an error, which its reader gets after the outputs that are here already."""
        self._failure = error
        self._wake()

    def cancel(self, index: int) -> None:
        """Have the engine drop one of the requests, if it still runs."""
        for request_id in [name for name in self._running if self._index[name] == index]:
            self._client.cancel(request_id)
            self._forget(request_id)

    def close(self) -> None:
        """Forget the requests, and have the engine drop those that still run."""
        for index in list(self._running.values()):
            self.cancel(index)

    def _forget(self, request_id: str) -> None:
        self._running.pop(request_id, None)
        self._client.forget(request_id)

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EngineClient:
    """The connection of one API worker."""

    def __init__(self, runtime_dir: Path) -> None:
        self._addresses = transport.Addresses(runtime_dir)
        self._context = Context()
        self._engine: Socket | None = None
        self._pending: dict[str, Generation] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._reader: asyncio.Task[None] | None = None
        self._load = Load(None, None)
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

    def check(self, *, long_conversation: bool = False) -> None:
        """Raise what `submit` would raise now, before any work is put into a request."""
        if self.state.draining or not self.state.engine_ready or self._engine is None:
            raise EngineUnavailableError(self.state.detail)
        full = self._load.conversations if long_conversation else self._load.short
        if full is not None:
            raise RejectedError(full.reason, full.retry_after)

    async def submit(self, requests: Sequence[Submit]) -> Generation:
        """Send requests and return once all are admitted; RejectedError or EngineUnavailableError, and none runs."""
        self.check(long_conversation=any(request.long_conversation for request in requests))
        generation = Generation(self, requests)
        for request in requests:
            self._pending[request.request_id] = generation
            self._send(request)
        try:
            await generation.admitted()
        except BaseException:  # cancelled, too: the client may hang up while it waits
            generation.close()
            raise
        return generation

    def cancel(self, request_id: str) -> None:
        """Have the engine drop a request."""
        self._send(Cancel(request_id))

    def forget(self, request_id: str) -> None:
        """Drop what may still come for a request."""
        self._pending.pop(request_id, None)

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
        self._load = Load(None, None)
        self._engine = transport.call(self._context, self._addresses.engine(epoch))
        self._reader = asyncio.create_task(self._read(self._engine))

    def _lose(self, detail: str) -> None:
        """Fail everything in flight and drop the connection; the next engine has another address."""
        if self._reader is not None:
            self._reader.cancel()
        if self._engine is not None:
            self._engine.close(linger=0)
        self._reader = self._engine = None
        for generation in set(self._pending.values()):
            generation.fail(EngineUnavailableError(detail))
        self._pending.clear()

    async def _read(self, socket: Socket) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            while True:
                message = messages.decode_from_engine(await socket.recv())
                if isinstance(message, Load):
                    self._load = message
                    continue
                items = message.outputs if isinstance(message, messages.Outputs) else [message]
                for item in items:
                    generation = self._pending.get(item.request_id)
                    if generation is not None:
                        generation.take(item)
