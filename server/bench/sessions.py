"""A started peer that can be put under load, over HTTP or as a library."""

from __future__ import annotations

import http.client
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import uvloop

from bench.client import HOST, Client, drive
from bench.course import Load, Record
from bench.processes import Memory, Running, StartError
from bench.prompts import Prompts

POOL = 4096
"""Distinct prompts; a load takes the next ones, so that no two cells see the same before all were used."""

SETTLE_SECONDS, SETTLE_TIMEOUT = 0.5, 60.0

_WARM_UP = (Load(seconds=1, streams=1), Load(seconds=1, streams=32))


@dataclass(frozen=True, slots=True)
class Shape:
    """Tokens of each prompt and of each answer. With `chat`, a conversation of `turns` questions, else a plain text."""

    prompt: int = 64
    answer: int = 64
    turns: int = 1
    chat: bool = False


STANDARD = Shape()


class Workload:
    """The prompts of a run, made once: making them takes longer than sending them."""

    def __init__(self, prompts: Prompts, folder: Path, size: int = POOL) -> None:
        self.prompts = prompts
        self.ids = [prompts.ids(STANDARD.prompt, seed) for seed in range(size)]
        self.file = folder / "prompts.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.ids))
        self.turn = itertools.count()


class Session(Protocol):
    """What the scenarios need of a started peer."""

    running: Running
    ready_seconds: float
    endpoint: str
    idle: Memory

    def run(self, load: Load, shape: Shape = ...) -> tuple[list[Record], tuple[float, float]]:
        """Run a load; return the records and the window that counts."""

    def settle(self) -> None:
        """Wait until nothing of the last load runs any more; StartError when that takes too long."""


class HttpSession:
    """A server. The first answers tell which endpoint and parameters it takes."""

    def __init__(
        self, running: Running, port: int, ready: Callable[[], bool], workload: Workload, *,
        model: str, timeout: float, key: str = "", extra: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Wait until it is ready, and warm it up; StartError when it cannot be used."""
        self.running, self.port, self._workload, self._model = running, port, workload, model
        self._headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        self._extra: dict[str, Any] = {"ignore_eos": True, "min_tokens": 0, **(extra or {})}
        self._overhead: dict[int, int] = {}
        self.ready_seconds = running.wait_ready(ready, timeout)
        self.idle = running.memory()
        self.endpoint = self._negotiate()
        for load in _WARM_UP:
            self.run(load)

    def run(self, load: Load, shape: Shape = STANDARD) -> tuple[list[Record], tuple[float, float]]:
        """Run a load against it."""
        return run_all([(self, load, shape)])[0]

    def settle(self) -> None:
        """Wait until a short request is answered: what was cut off at the end of the last load has been freed."""
        time.sleep(SETTLE_SECONDS)
        deadline = time.monotonic() + SETTLE_TIMEOUT
        chat = self.endpoint == CHAT
        payload = next(self._chats(STANDARD) if chat else self._texts(STANDARD))
        path = "/v1/chat/completions" if chat else "/v1/completions"
        body = self._body(payload, Shape(answer=1), stream=False)
        while (answer := ask(self.port, path, body, self._headers))[0] != 200:
            if time.monotonic() > deadline:
                raise StartError(f"a load left it unable to answer, with status {answer[0]}: {str(answer[1])[:300]}")
            time.sleep(SETTLE_SECONDS)

    def requests(self, shape: Shape) -> Iterator[bytes]:
        """Yield requests with ever new prompts, as bytes to send."""
        chat = shape.chat or self.endpoint == CHAT
        path = "/v1/chat/completions" if chat else "/v1/completions"
        head = f"POST {path} HTTP/1.1\r\nHost: {HOST}:{self.port}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in self._headers.items())
        pool = self._chats(shape) if chat else self._texts(shape)
        for payload in pool:
            body = msgspec.json.encode(self._body(payload, shape))
            yield f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    def _texts(self, shape: Shape) -> Iterator[dict[str, Any]]:
        load = self._workload
        if shape.prompt == STANDARD.prompt:
            return ({"prompt": load.ids[number % len(load.ids)]} for number in load.turn)
        return ({"prompt": load.prompts.ids(shape.prompt, number)} for number in load.turn)

    def _chats(self, shape: Shape) -> Iterator[dict[str, Any]]:
        """Conversations that are exactly `shape.prompt` tokens by the server's own count."""
        overhead = self._chat_overhead(shape.turns)
        for number in self._workload.turn:
            yield {"messages": self._conversation(shape.turns, shape.prompt - overhead, number)}

    def _conversation(self, turns: int, tokens: int, seed: int) -> list[dict[str, str]]:
        """Return `turns` questions and the answers between them, `tokens` tokens of text in all."""
        messages = 2 * turns - 1
        sizes = [tokens // messages] * (messages - 1)
        sizes.append(tokens - sum(sizes))
        return [
            {
                "role": "assistant" if number % 2 else "user",
                "content": self._workload.prompts.text(size, seed * 100 + number),
            }
            for number, size in enumerate(sizes)
        ]

    def _chat_overhead(self, turns: int) -> int:
        """Return what the chat template adds, learnt from the usage of one answer."""
        if turns not in self._overhead:
            probe = (2 * turns - 1) * 32
            body = self._body({"messages": self._conversation(turns, probe, 0)}, Shape(answer=1), stream=False)
            status, answer = ask(self.port, "/v1/chat/completions", body, self._headers)
            if status != 200:
                raise StartError(f"POST /v1/chat/completions was answered by {status}: {str(answer)[:300]}")
            self._overhead[turns] = answer["usage"]["prompt_tokens"] - probe
        return self._overhead[turns]

    def _body(self, payload: dict[str, Any], shape: Shape, stream: bool = True) -> dict[str, Any]:
        body = {"model": self._model, **payload, "max_tokens": shape.answer, "temperature": 0, **self._extra}
        if "min_tokens" in body:
            body["min_tokens"] = shape.answer
        return {**body, "stream": True, "stream_options": {"include_usage": True}} if stream else body

    def _negotiate(self) -> str:
        """Find the endpoint: completions with token ids where there is one, else chat."""
        body = self._body({"prompt": self._workload.ids[0]}, Shape(answer=4), stream=False)
        status, answer = ask(self.port, "/v1/completions", body, self._headers)
        if status == 400 and "min_tokens" in str(answer):
            del self._extra["min_tokens"]
            return self._negotiate()
        if status in (404, 405):
            try:
                self._chat_overhead(1)
            except StartError as error:
                if "min_tokens" not in str(error):
                    raise
                del self._extra["min_tokens"]
                self._chat_overhead(1)
            return CHAT
        if status != 200:
            raise StartError(f"POST /v1/completions was answered by {status}: {str(answer)[:300]}")
        return COMPLETIONS


COMPLETIONS = "/v1/completions, token ids"
CHAT = "/v1/chat/completions"


def run_all(loads: list[tuple[HttpSession, Load, Shape]]) -> list[tuple[list[Record], tuple[float, float]]]:
    """Run several loads at the same time, against one server or more."""
    import asyncio

    async def all_of_them() -> list[tuple[list[Record], tuple[float, float]]]:
        return await asyncio.gather(
            *(drive(Client(session.port), load, session.requests(shape)) for session, load, shape in loads)
        )

    return uvloop.run(all_of_them())


class LibrarySession:
    """An adapter process (see `adapters`)."""

    endpoint = "library, no HTTP"

    def __init__(self, running: Running, timeout: float) -> None:
        """Wait until it is ready, and warm it up; StartError when it cannot be used."""
        self.running = running
        deadline = time.monotonic() + timeout
        self._answer(deadline)
        self.ready_seconds = time.monotonic() - running.started
        self.idle = running.memory()
        for load in _WARM_UP:
            self.run(load)

    def run(self, load: Load, shape: Shape = STANDARD) -> tuple[list[Record], tuple[float, float]]:
        """Run a load in it; its prompts are of 64 tokens."""
        line = json.dumps({"load": asdict(load), "tokens": shape.answer})
        self.running.tell(line)
        answer = self._answer(time.monotonic() + load.ramp + 8 * load.seconds + 120)
        records = [Record(**fields) for fields in answer["records"]]
        return records, (answer["window"][0], answer["window"][1])

    def settle(self) -> None:
        """Nothing to do: the adapter drops what is left before it answers."""

    def _answer(self, deadline: float) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.running.hear(deadline))
        return answer


def ask(port: int, path: str, body: dict[str, Any] | None, headers: Mapping[str, str]) -> tuple[int, Any]:
    """Ask once, at leisure; return the status (0: nobody listens) and the decoded body."""
    connection = http.client.HTTPConnection(HOST, port, timeout=120)
    try:
        connection.request(
            "GET" if body is None else "POST", path, None if body is None else json.dumps(body), dict(headers)
        )
        response = connection.getresponse()
        text = response.read().decode(errors="replace")
    except OSError:
        return 0, None
    finally:
        connection.close()
    try:
        return response.status, json.loads(text)
    except ValueError:
        return response.status, text
