"""Who sent a request, by its Authorization header."""

from __future__ import annotations

from fastapi import Request

from nioserve.api.errors import ApiError
from nioserve.api.gate import RECORD
from nioserve.api.service import Service
from nioserve.policy.identity import Identity, InvalidKeyError


def identify(request: Request, service: Service) -> Identity:
    """Return whose request this is; ApiError 401 without a valid key."""
    header = request.headers.get("authorization")
    if not header:
        raise ApiError(
            401, "No API key was sent. Send yours as `Authorization: Bearer nio_...`.", code="missing_api_key"
        )
    scheme, _, key = header.partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise ApiError(
            401, "The Authorization header must be `Bearer` and an API key: `Authorization: Bearer nio_...`.",
            code="invalid_api_key",
        )  # fmt: skip
    try:
        identity = service.keys.authenticate(key.strip())
    except InvalidKeyError as error:
        raise ApiError(
            401, "The API key is not valid. Check that it was copied whole, or ask your administrator for a new one.",
            code="invalid_api_key",
        ) from error  # fmt: skip
    request.scope[RECORD].update(key_id=identity.key_id, user=identity.user, department=identity.department)
    return identity
