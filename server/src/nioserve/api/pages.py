"""Health probes and the chat page: what is served without a key."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import FileResponse, Response

from nioserve import health
from nioserve.api.errors import json_response
from nioserve.api.service import service_of

UI = Path(__file__).parent.parent / "ui"

router = APIRouter()


@router.get("/livez")
@router.get("/readyz")
@router.get("/startupz")
@router.get("/health")
async def probe(request: Request) -> Response:
    """Answer a probe."""
    status, body = health.probe(request.url.path, service_of(request).client.state)
    return json_response(body, status, {"Cache-Control": "no-store"})


@router.get("/")
async def page() -> Response:
    """Return the chat page."""
    return FileResponse(UI / "index.html", headers={"Cache-Control": "no-cache"})
