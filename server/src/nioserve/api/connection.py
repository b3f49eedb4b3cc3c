"""One HTTP connection, and what is done about a client that does not read.

Data that a client does not read fills its own buffer first, then the socket's here, then the transport's. All are kept
small, so that an unread answer is noticed after about a hundred kilobytes; from then on the client has a limited time.
Then the connection is dropped, which cancels its request like any other disconnect, and the engine goes on without it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

log = logging.getLogger(__name__)

_SOCKET_BYTES = 32768
"""What the kernel keeps of an answer that is not read; it grants itself twice as much. Plenty for a local network."""
_TRANSPORT_BYTES = 16384


def protocol(stalled_read_timeout: float) -> type[asyncio.Protocol]:
    """Return uvicorn's protocol, with a bound in seconds on how long a client may leave an answer unread."""

    class Connection(HttpToolsProtocol):
        _stalled: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            transport.set_write_buffer_limits(high=_TRANSPORT_BYTES)
            connection = cast(socket.socket, transport.get_extra_info("socket"))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._watch()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._unwatch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._unwatch()

        def _watch(self) -> None:
            """Look again when the time is over: by then a client must have read something worth mentioning."""
            self._unwatch()
            allowed = self.transport.get_write_buffer_size() - _TRANSPORT_BYTES
            self._stalled = self.loop.call_later(stalled_read_timeout, self._judge, allowed)

        def _judge(self, allowed: int) -> None:
            if self.transport.get_write_buffer_size() <= allowed:
                self._watch()
                return
            log.warning("a client that does not read was cut off", extra={"seconds": stalled_read_timeout})
            self.transport.abort()

        def _unwatch(self) -> None:
            if self._stalled is not None:
                self._stalled.cancel()
                self._stalled = None

    return Connection
