"""`POST /v1/embeddings`: one vector of length 1 for each input."""

from __future__ import annotations

import asyncio
import base64
import struct
import time
import uuid
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from nioserve.api.disconnect import unless_gone
from nioserve.api.errors import ApiError, json_response
from nioserve.api.generate import as_api_error, check_available, encode_inputs, submit, too_long
from nioserve.api.intake import Intake, take_in
from nioserve.api.schemas import EmbeddingRequest
from nioserve.engine.client import EngineUnavailableError, RejectedError
from nioserve.engine.messages import FinishReason, Sampling, Submit

router = APIRouter()

_AT_A_TIME = 16
"""Inputs of one request in the engine at the same time, so that a long list leaves room in the queue for others."""


@router.post("/v1/embeddings")
async def embeddings(request: Request) -> Response:
    """Embed one or several inputs."""
    intake = await take_in(request, EmbeddingRequest)
    return await (intake.service.relay or answer_embeddings)(intake)


async def answer_embeddings(intake: Intake[EmbeddingRequest]) -> Response:
    """Answer a checked request by our own engine."""
    service, body, timeout = intake.service, intake.body, intake.service.request_timeout
    if body.dimensions not in (None, service.embedding_size):
        text = f"`dimensions`: this model's vectors have {service.embedding_size}; leave it out."
        raise ApiError(400, text, param="dimensions", code="unsupported_parameter")
    reason = FinishReason.ABORT
    try:
        async with asyncio.timeout(timeout):
            vectors, tokens = await unless_gone(intake.request.receive, _embed(intake))
        reason = FinishReason.STOP
    except (EngineUnavailableError, RejectedError) as error:
        reason = FinishReason.ERROR
        raise as_api_error(error) from error
    except TimeoutError as error:
        text = f"The vectors were not complete within {timeout:g} seconds. Send fewer inputs at a time."
        raise ApiError(504, text, code="request_timeout") from error
    finally:
        service.metrics.finished[reason].inc()
        intake.record.update(finish_reason=reason.value)
    service.metrics.latency.observe(time.monotonic() - intake.started)
    service.metrics.prompt.observe(tokens)
    intake.record.update(prompt_tokens=tokens)
    data = [
        {"object": "embedding", "index": index, "embedding": _written(vector, body.encoding_format)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return json_response({"object": "list", "data": data, "model": service.model_name, "usage": usage})


async def _embed(intake: Intake[EmbeddingRequest]) -> tuple[list[list[float]], int]:
    """Return the vectors and the number of tokens of all inputs."""
    service = intake.service
    check_available(service)
    inputs = await encode_inputs(intake, intake.body.inputs(), "input")
    for tokens in inputs:
        if not 0 < len(tokens) <= service.context:
            raise too_long("input", len(tokens), service.context)
    vectors: list[list[float]] = [[]] * len(inputs)
    for first in range(0, len(inputs), _AT_A_TIME):
        part = inputs[first : first + _AT_A_TIME]
        department = intake.identity.department
        generation = await submit(
            service,
            [Submit(uuid.uuid4().hex, tokens, 0, Sampling(), department=department, embed=True) for tokens in part],
        )
        try:
            while outputs := await generation.next():
                for index, output in outputs:
                    vectors[first + index] = output.embedding or []
        finally:
            generation.close()
    return vectors, sum(map(len, inputs))


def _written(vector: list[float], form: str) -> Any:  # noqa: ANN401  a list, or text
    """Return a vector as JSON holds it: numbers, or the base64 of 32-bit floats, little-endian."""
    return vector if form == "float" else base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
