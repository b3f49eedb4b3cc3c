"""Answers as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec

from nioserve.api.answer import Answer
from nioserve.api.choice import Choice
from nioserve.api.generate import GENERATION_ERRORS, failed
from nioserve.api.service import Service


class Chunks:
    """Writes the chunks of one answer. What all of them have in common is encoded once."""

    def __init__(self, head: dict[str, Any], *, include_usage: bool) -> None:
        self._open = b"data: " + msgspec.json.encode(head)[:-1] + b',"choices":['
        self._close = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._include_usage = include_usage

    def choice(self, choice: dict[str, Any]) -> bytes:
        """Return the chunk of one choice."""
        return b"".join((self._open, msgspec.json.encode(choice), self._close))

    def usage(self, answer: Answer) -> bytes:
        """Return the chunk with the usage and no choices, if it was asked for."""
        if not self._include_usage:
            return b""
        return b"".join((self._open, b'],"usage":', msgspec.json.encode(answer.usage()), b"}\n\n"))


async def stream(
    service: Service, answer: Answer, chunks: Chunks, opening: bytes, render: Callable[[Choice, str], bytes]
) -> AsyncGenerator[bytes, None]:
    """Yield the events of an answer: what comes at one time is sent at one time.

    The status is out already, so an answer that fails on the way ends in an error event.
    """
    try:
        yield opening
        async for pieces in answer.pieces():
            events = b"".join([render(choice, text) for choice, text in pieces])
            if events:
                yield events
        yield chunks.usage(answer) + b"data: [DONE]\n\n"
    except GENERATION_ERRORS as error:
        yield b"data: " + msgspec.json.encode(failed(service, answer, error).body()) + b"\n\n"
