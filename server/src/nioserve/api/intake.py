"""From an HTTP request to a checked one: who asks, the body's JSON, its fields, and whether the model is ours."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import pydantic_core
from fastapi import Request

from nioserve.api.errors import ApiError
from nioserve.api.gate import RECORD
from nioserve.api.identify import identify
from nioserve.api.schemas import Body, parse
from nioserve.api.service import Service, service_of
from nioserve.policy.identity import Identity

BODY_SECONDS = 30
"""How long a client may take to send its request."""

_B = TypeVar("_B", bound=Body, covariant=True)


@dataclass(frozen=True, slots=True)
class Intake(Generic[_B]):
    """A request that may be answered; `started` is the monotonic time when it came."""

    request: Request
    service: Service
    identity: Identity
    body: _B
    started: float

    @property
    def record(self) -> dict[str, Any]:
        """The fields of the request's log line."""
        return cast(dict[str, Any], self.request.scope[RECORD])


async def take_in(request: Request, schema: type[_B]) -> Intake[_B]:
    """Return the checked request; ApiError says what is wrong with it."""
    started = time.monotonic()
    service = service_of(request)
    identity = identify(request, service)
    body = parse(schema, await _read_json(request))
    if body.model != service.model_name:
        raise ApiError(
            404, f"The model `{body.model}` does not exist here; this server has `{service.model_name}`.",
            param="model", code="model_not_found",
        )  # fmt: skip
    return Intake(request, service, identity, body, started)


async def _read_json(request: Request) -> object:
    try:
        async with asyncio.timeout(BODY_SECONDS):
            body = await request.body()
    except TimeoutError as error:
        raise ApiError(408, f"The request body did not arrive within {BODY_SECONDS} seconds.") from error
    try:
        # Stricter than the json module: half a surrogate and NaN are no JSON, and nesting is bounded.
        return pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.", code="invalid_json") from error
