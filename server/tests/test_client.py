"""The API worker's end of the line to the engine: a scripted engine on the other end, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nioserve.engine import messages, transport
from nioserve.engine.client import EngineClient, EngineUnavailableError, RejectedError
from nioserve.engine.messages import (
    Accepted,
    Cancel,
    FinishReason,
    Full,
    Load,
    Output,
    Outputs,
    Rejected,
    Sampling,
    ServiceState,
    Submit,
)  # fmt: skip

READY = ServiceState(epoch=1, engine_ready=True, draining=False, started=True, detail="ready")


class Line:
    """A client, the engine it talks to, and the supervisor it listens to."""

    def __init__(self, directory: Path) -> None:
        addresses = transport.Addresses(directory)
        self.supervisor = transport.Broadcast(addresses.state())
        self.engine = transport.Switchboard(addresses.engine(1))
        self.client = EngineClient(directory)
        self.worker = b""

    async def tell(self, state: ServiceState) -> None:
        """Publish until it is heard."""
        while self.client.state != state:
            self.supervisor.send(messages.encode(state))
            await asyncio.sleep(0.01)

    async def hear(self) -> Submit | Cancel:
        """Return the engine's next message."""
        for _ in range(500):
            if received := self.engine.receive(0):
                self.worker, body = received
                return messages.decode_to_engine(body)
            await asyncio.sleep(0.01)
        raise AssertionError("nothing was sent")

    def say(self, *said: messages.FromEngine) -> None:
        for message in said:
            self.engine.send(self.worker, messages.encode(message))

    async def submit(self, *names: str) -> tuple[asyncio.Task, list[str]]:
        """Submit requests and return the pending submission once the engine has them."""
        requests = [Submit(name, [1], 8, Sampling(), long_conversation=name.startswith("long")) for name in names]
        task = asyncio.create_task(self.client.submit(requests))
        return task, [(await self.hear()).request_id for _ in names]


@contextlib.asynccontextmanager
async def connected() -> AsyncIterator[Line]:
    with tempfile.TemporaryDirectory(prefix="nio-test-") as directory:
        line = Line(Path(directory))
        line.client.start()
        await line.tell(READY)
        try:
            yield line
        finally:
            await line.client.stop()


def run(scenario) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20), connected() as line:
            await scenario(line)

    asyncio.run(bounded())


def test_a_late_reader_gets_all_outputs_at_once():
    async def scenario(line: Line) -> None:
        task, names = await line.submit("a", "b")
        line.say(*map(Accepted, names))
        generation = await task
        line.say(Outputs([Output("a", [1]), Output("b", [2])]), Outputs([Output("a", [3], FinishReason.STOP)]))
        got = []
        while len(got) < 3:
            got += [(index, output.tokens) for index, output in await generation.next()]
        assert got == [(0, [1]), (1, [2]), (0, [3])]
        generation.cancel(1)
        assert await line.hear() == Cancel("b")
        assert await generation.next() == []
        generation.close()  # nothing runs any more, so nothing is said

    run(scenario)


def test_one_refusal_takes_the_others_back():
    async def scenario(line: Line) -> None:
        task, _ = await line.submit("a", "b", "c")
        line.say(Accepted("a"), Rejected("b", "queue_full", 3))
        with pytest.raises(RejectedError) as caught:
            await task
        assert (caught.value.reason, caught.value.retry_after) == ("queue_full", 3)
        assert {(await line.hear()).request_id for _ in range(2)} == {"a", "c"}

    run(scenario)


def test_what_waited_too_long_or_was_given_up_fails_its_reader():
    async def scenario(line: Line) -> None:
        for last, error in (
            (Rejected("a", "queue_timeout", 9), RejectedError),
            (Outputs([Output("a", [], FinishReason.ERROR)]), EngineUnavailableError),
        ):
            task, _ = await line.submit("a")
            line.say(Accepted("a"))
            generation = await task
            line.say(last)
            with pytest.raises(error):
                await generation.next()

    run(scenario)


def test_a_full_queue_is_refused_without_asking_until_it_has_room():
    async def scenario(line: Line) -> None:
        task, _ = await line.submit("a")
        line.say(Accepted("a"), Load(Full("queue_full", 4), None))
        await task
        while True:  # the load comes after the admission
            try:
                line.client.check()
            except RejectedError as error:
                assert error.retry_after == 4
                break
            await asyncio.sleep(0.01)
        with pytest.raises(RejectedError):
            await line.client.submit([Submit("b", [1], 8, Sampling())])
        line.client.check(long_conversation=True)
        task, _ = await line.submit("long")  # the next thing the engine hears
        line.say(Accepted("long"), Load(None, None))
        await task
        while True:
            with contextlib.suppress(RejectedError):
                line.client.check()
                break
            await asyncio.sleep(0.01)

    run(scenario)


def test_a_lost_engine_fails_what_was_in_flight_and_what_comes():
    async def scenario(line: Line) -> None:
        task, _ = await line.submit("a")
        line.say(Accepted("a"))
        generation = await task
        waiting, _ = await line.submit("b")
        line.supervisor.send(messages.encode(ServiceState(2, False, False, True, "the engine died")))
        for lost in (generation.next(), waiting):
            with pytest.raises(EngineUnavailableError, match="the engine died"):
                await lost
        with pytest.raises(EngineUnavailableError):
            await line.client.submit([Submit("c", [1], 8, Sampling())])

    run(scenario)


def test_who_hangs_up_while_it_waits_is_taken_back():
    async def scenario(line: Line) -> None:
        task, _ = await line.submit("a")
        task.cancel()
        assert await line.hear() == Cancel("a")

    run(scenario)
