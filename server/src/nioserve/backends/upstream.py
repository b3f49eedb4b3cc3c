"""Asking an OpenAI-compatible server: vLLM, TensorRT-LLM, SGLang, llama.cpp, or another nioserve.

One client with one pool of connections in each API worker. A request goes to the next base URL whose breaker lets it
pass. If the connection fails before anything of the answer is here, it is sent once more, to another URL where there is
one; never twice, and never after the first byte, because somebody may have read it.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import aiohttp

from nioserve.backends.breaker import Breaker
from nioserve.backends.credentials import request_headers, tls_context
from nioserve.config.schema import Upstream as Settings

log = logging.getLogger(__name__)

_FAULTS = frozenset({500, 502, 503, 504})
"""What says that the upstream is broken, where other statuses say that the request is."""


class UpstreamError(Exception):
    """The upstream cannot be reached, or broke off; `retry_after` in seconds."""

    def __init__(self, message: str, retry_after: int = 5) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UpstreamTimeoutError(UpstreamError):
    """The upstream did not answer, or fell silent, within its time."""


class _LostError(UpstreamError):
    """The connection failed; of the answer nothing is here yet."""


class Reply:
    """An answer of which the status and the headers are here. It must be closed."""

    def __init__(self, response: aiohttp.ClientResponse, breaker: Breaker) -> None:
        self._response, self._breaker = response, breaker
        self.status = response.status
        self.retry_after = response.headers.get("retry-after", "")

    async def read(self) -> bytes:
        """Return the whole body; UpstreamError when it breaks off."""
        with _watched(self._breaker):
            return await self._response.read()

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes; UpstreamError when it breaks off."""
        pieces = aiter(self._response.content.iter_any())
        while True:
            with _watched(self._breaker):
                piece = await anext(pieces, None)
            if piece is None:
                return
            yield piece

    def close(self) -> None:
        """Give the connection back, or cut it when the answer is not over: that tells the upstream to stop."""
        self._response.close()


class UpstreamClient:
    """The way of one API worker to the upstream. `total_timeout`, in seconds, covers a request from end to end."""

    def __init__(self, settings: Settings, total_timeout: float) -> None:
        self._targets = [(url, Breaker(settings.breaker_failures, settings.breaker_cooldown)) for url in settings.urls]
        self._timeout = aiohttp.ClientTimeout(
            total=total_timeout, sock_connect=settings.connect_timeout, sock_read=settings.read_timeout
        )
        self._headers = request_headers(settings)
        self._tls = tls_context(settings)
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    async def post(self, path: str, body: bytes, request_id: str) -> Reply:
        """Send a JSON body; return once the answer's head is here. UpstreamError when there is none."""
        try:
            return await self._post(path, body, request_id)
        except _LostError as error:
            log.warning("upstream lost, asking once more", extra={"request_id": request_id, "problem": str(error)})
        return await self._post(path, body, request_id)

    async def _post(self, path: str, body: bytes, request_id: str) -> Reply:
        url, breaker = self._choose()
        headers = {**self._headers, "Content-Type": "application/json", "X-Request-Id": request_id}
        with _watched(breaker, _LostError):
            response = await self._open().post(url + path, data=body, headers=headers, allow_redirects=False)
        if response.status in _FAULTS:
            breaker.failed()
        else:
            breaker.succeeded()
        return Reply(response, breaker)

    def _choose(self) -> tuple[str, Breaker]:
        """Return the next URL in turn that may be asked; UpstreamError when none may."""
        for _ in self._targets:
            self._targets.append(self._targets.pop(0))
            if self._targets[-1][1].allow():
                return self._targets[-1]
        wait = min(breaker.wait for _, breaker in self._targets)
        raise UpstreamError("it failed too often and is left alone for a while", max(1, math.ceil(wait)))

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:  # needs a running loop
            connector = aiohttp.TCPConnector(limit=0, ssl=self._tls)  # what is in flight is bounded elsewhere
            # trust_env stays off: no proxy from the environment comes between.
            self._session = aiohttp.ClientSession(
                connector=connector, timeout=self._timeout, cookie_jar=aiohttp.DummyCookieJar()
            )
        return self._session


@contextmanager
def _watched(breaker: Breaker, lost: type[UpstreamError] = UpstreamError) -> Iterator[None]:
    """Tell the breaker how the block ended, and turn aiohttp's errors into ours; `lost` is for broken connections."""
    try:
        yield
    except TimeoutError as error:  # aiohttp's own are subclasses
        breaker.failed()
        if isinstance(error, aiohttp.ConnectionTimeoutError):
            raise lost("no connection in time") from error
        raise UpstreamTimeoutError("it did not answer in time") from error
    except (aiohttp.ClientError, OSError) as error:
        breaker.failed()
        raise lost(f"the connection failed: {error or type(error).__name__}") from error
    except asyncio.CancelledError:
        breaker.abandoned()
        raise
