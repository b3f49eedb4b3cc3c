"""The HTTP application of one API worker."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from nioserve.api import chat, completions, embeddings, models, pages
from nioserve.api.errors import ApiError, on_api_error, on_crash, on_http_error
from nioserve.api.gate import Gate
from nioserve.api.service import Service


def create_app(service: Service, max_body_bytes: int) -> Gate:
    """Return the application; it follows the engine from start-up to shutdown."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.client.start()
        yield
        await service.client.stop()

    # No generated documentation: its pages load scripts from the internet.
    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.state.service = service
    for part in (chat, completions, embeddings, models, pages):
        app.include_router(part.router)
    app.mount("/ui", StaticFiles(directory=pages.UI))
    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_crash)
    return Gate(app, max_body_bytes)
