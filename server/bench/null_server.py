"""A server that computes nothing: it streams a token to every request every `interval` seconds, or as fast as it can.

Each chunk's text is the time it was sent, so the client's delay can be read off the answer. What is measured against
it is the load generator, the socket and nothing else.

usage: python -m bench.null_server PORT INTERVAL
"""

from __future__ import annotations

import asyncio
import sys
import time

import uvloop

from bench.client import HOST

TOKENS = 64
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":64,"completion_tokens":64}}\n\ndata: [DONE]\n\n'


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _event() -> bytes:
    """Return a chunk as large as a real one."""
    head = b'data: {"id":"cmpl-0123456789abcdef0123456789abcdef","object":"text_completion","created":1700000000,'
    return head + b'"model":"null","choices":[{"index":0,"text":"%.6f","logprobs":null}]}\n\n' % time.monotonic()


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, interval: float) -> None:
    """Answer the requests of one connection."""
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]
            await reader.readexactly(int(length or 0))
            writer.write(_HEAD)
            for _ in range(TOKENS):
                await asyncio.sleep(interval)
                writer.write(_chunk(_event()))
                await writer.drain()
            writer.write(_chunk(_USAGE) + b"0\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def _main(port: int, interval: float) -> None:
    server = await asyncio.start_server(lambda r, w: serve(r, w, interval), HOST, port)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_main(int(sys.argv[1]), float(sys.argv[2])))
