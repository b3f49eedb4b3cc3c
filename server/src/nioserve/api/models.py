"""`GET /v1/models`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from nioserve.api.errors import ApiError, json_response
from nioserve.api.generate import check_available
from nioserve.api.identify import identify
from nioserve.api.service import Service, service_of

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """List the models."""
    service = service_of(request)
    identify(request, service)
    if service.relay is not None:  # what an upstream serves is there while it is
        check_available(service)
    return json_response({"object": "list", "data": [_model(service)]})


@router.get("/v1/models/{name:path}")
async def get_model(request: Request, name: str) -> Response:
    """Describe one model."""
    service = service_of(request)
    identify(request, service)
    if name != service.model_name:
        raise ApiError(404, f"The model `{name}` does not exist here.", param="model", code="model_not_found")
    return json_response(_model(service))


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.model_created,
        "owned_by": "nioserve",
        "max_model_len": service.context,
    }
