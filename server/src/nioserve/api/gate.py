"""What every request passes, whatever it asks for: an id, a bound on its body, security headers, one log line."""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nioserve.api.disconnect import ClientGoneError
from nioserve.api.errors import ApiError

log = logging.getLogger(__name__)

RECORD = "nioserve.record"
"""Where handlers leave fields for the request's log line in the ASGI scope."""

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_QUIET = frozenset({"/livez", "/readyz", "/startupz", "/health"})
_SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_GONE = 499
"""nginx's status for a client that hung up; it appears in the log only."""


class Gate:
    """The outermost ASGI application."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app, self._max_body_bytes = app, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and log what became of it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, headers = time.monotonic(), Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        record: dict[str, Any] = {"request_id": request_id, "status": 500}
        scope[RECORD] = record

        async def dressed_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                record["status"] = message["status"]
                out = MutableHeaders(scope=message)
                out["x-request-id"] = request_id
                for name, value in _SECURITY_HEADERS.items():
                    out[name] = value
            await send(message)

        try:
            await self._serve(scope, headers, receive, dressed_send)
        except ClientGoneError:
            record["status"] = _GONE
        except Exception:  # the client has its error object; the log learns whose request it was
            log.exception("request failed", extra={"request_id": request_id})
        level = logging.DEBUG if scope["path"] in _QUIET else logging.INFO
        duration = round((time.monotonic() - started) * 1000, 1)
        line = {"method": scope["method"], "path": scope["path"], "duration_ms": duration, **record}
        log.log(level, "request", extra=line)

    async def _serve(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        limit, received = self._max_body_bytes, 0

        async def bounded_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise too_large(limit)
            return message

        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > limit:
            response = too_large(limit).response()
            response.headers["Connection"] = "close"  # rather than read on for the next request
            await response(scope, receive, send)
            return
        await self._app(scope, bounded_receive, send)


def too_large(limit: int) -> ApiError:
    """Return the error of a body beyond the limit."""
    return ApiError(
        413,
        f"The request body is larger than {limit} bytes. Shorten the conversation, or raise server.max_body_bytes.",
        code="request_too_large",
    )
