"""OpenAI's error objects, for everything that goes wrong."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable",
}


class ApiError(Exception):
    """An answer that is no success: its status, what is wrong, and how to mend it."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        retry_after: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """Return the error object."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """Return the whole response."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return json_response(self.body(), self.status, headers)


def json_response(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a JSON response."""
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


async def on_api_error(_request: Request, error: Exception) -> Response:
    """Answer with the error's own object."""
    assert isinstance(error, ApiError)  # noqa: S101  registered for this class alone; tells the type checker
    return error.response()


async def on_http_error(request: Request, error: Exception) -> Response:
    """Answer the router's own refusals: no such path, no such method."""
    assert isinstance(error, HTTPException)  # noqa: S101  registered for this class alone; tells the type checker
    texts = {
        404: f"There is nothing at {request.url.path}. The API's paths begin with /v1/.",
        405: f"{request.method} is not allowed for {request.url.path}.",
    }
    message = texts.get(error.status_code, str(error.detail) or HTTPStatus(error.status_code).phrase)
    response = ApiError(error.status_code, message).response()
    response.headers.update(error.headers or {})
    return response


async def on_crash(_request: Request, _error: Exception) -> Response:
    """Answer when a handler failed; what failed is in the log, and no client's business."""
    return ApiError(500, "The server failed to handle the request. The log has it under this x-request-id.").response()
