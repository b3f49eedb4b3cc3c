"""`POST /v1/chat/completions`."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import pydantic_core
from fastapi import APIRouter, Request
from starlette.responses import Response

from nioserve.api.answer import Answer
from nioserve.api.disconnect import EventStream, unless_gone
from nioserve.api.errors import ApiError, json_response
from nioserve.api.gate import RECORD
from nioserve.api.identify import identify
from nioserve.api.prompt import PromptError
from nioserve.api.schemas import ChatRequest, parse_chat_request
from nioserve.api.service import Service, service_of
from nioserve.engine.client import EngineUnavailableError, RejectedError
from nioserve.engine.messages import Sampling

router = APIRouter()

BODY_SECONDS = 30
"""How long a client may take to send its request."""


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """Answer a conversation, whole or as a stream."""
    service = service_of(request)
    identify(request, service)
    chat = parse_chat_request(await _read_json(request))
    if chat.model != service.model_name:
        raise ApiError(
            404, f"The model `{chat.model}` does not exist here; this server has `{service.model_name}`.",
            param="model", code="model_not_found",
        )  # fmt: skip
    answer = await unless_gone(request.receive, _begin(service, chat))

    def finish() -> None:
        answer.close()
        request.scope[RECORD].update(stream=chat.stream, **answer.log_fields())

    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.model_name}
    if chat.stream:
        usage = bool(chat.stream_options and chat.stream_options.include_usage)
        return EventStream(_stream(answer, head, usage), finish)
    try:
        text = await unless_gone(request.receive, _collect(answer))
    except EngineUnavailableError as error:
        raise _unavailable(str(error)) from error
    finally:
        finish()
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": None,
        "finish_reason": answer.finish_reason,
    }
    return json_response({**head, "object": "chat.completion", "choices": [choice], "usage": answer.usage()})


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


async def _begin(service: Service, chat: ChatRequest) -> Answer:
    """Make the prompt, check that it fits, and get the request admitted."""
    started = time.monotonic()
    prompt = await _encode(service, chat)
    limit = _token_limit(chat, len(prompt), service.max_model_len)
    sampling = Sampling(
        temperature=service.temperature if chat.temperature is None else chat.temperature,
        top_p=service.top_p if chat.top_p is None else chat.top_p,
        seed=chat.seed,
        ignore_eos=chat.ignore_eos,
    )
    if service.client.state.draining:
        service.metrics.rejected("draining")
        raise _unavailable("The server is shutting down")
    try:
        generation = await service.client.submit(uuid.uuid4().hex, prompt, limit, sampling)
    except RejectedError as error:
        service.metrics.rejected(error.reason)
        if error.reason != "queue_full":
            raise ApiError(500, "The engine refused the request.") from error
        text = f"The server is busy and its queue is full. Try again in {error.retry_after} s."
        raise ApiError(429, text, code="queue_full", retry_after=error.retry_after) from error
    except EngineUnavailableError as error:
        service.metrics.rejected("engine_unavailable")
        raise _unavailable(str(error)) from error
    return Answer(generation, service.prompter.tokenizer, chat.stops(), len(prompt), started, service.metrics)


async def _encode(service: Service, chat: ChatRequest) -> list[int]:
    # Templates know `system`; OpenAI renamed it for some models.
    roles = {"developer": "system"}
    turns = [(roles.get(message.role, message.role), message.text()) for message in chat.messages]
    try:
        # In a thread: a long conversation takes a while, and streams of others go on meanwhile.
        return await asyncio.to_thread(service.prompter.encode, turns)
    except PromptError as error:
        raise ApiError(400, f"The model does not take these messages: {error}.", param="messages") from error


def _token_limit(chat: ChatRequest, prompt: int, context: int) -> int:
    """Return how many tokens may be generated: as asked for, else all that fit."""
    left, asked = context - prompt, chat.token_limit()
    if left < 1:
        raise ApiError(
            400, f"The messages are {prompt} tokens long, and the model's context is {context} tokens including the "
            "answer. Shorten the conversation.", param="messages", code="context_length_exceeded",
        )  # fmt: skip
    if asked is not None and asked > left:
        name = "max_tokens" if chat.max_completion_tokens is None else "max_completion_tokens"
        raise ApiError(
            400, f"The messages are {prompt} tokens long and `{name}` asks for {asked} more, but the model's context "
            f"is {context} tokens. Send at most {left}, or leave `{name}` out to use what fits.",
            param=name, code="context_length_exceeded",
        )  # fmt: skip
    return asked or left


def _unavailable(detail: str) -> ApiError:
    text = f"The model is not available right now ({detail.rstrip('.')}). Try again in a few seconds."
    return ApiError(503, text, code="engine_unavailable", retry_after=5)


async def _collect(answer: Answer) -> str:
    return "".join([piece async for piece in answer.pieces()])


async def _stream(answer: Answer, head: dict[str, Any], include_usage: bool) -> AsyncGenerator[bytes, None]:
    """Yield the chunks. The status is out already, so an engine that is lost on the way ends in an error event."""
    shared = {**head, "object": "chat.completion.chunk", **({"usage": None} if include_usage else {})}

    def chunk(delta: dict[str, str], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return _event({**shared, "choices": [choice]})

    try:
        yield chunk({"role": "assistant", "content": ""})
        async for text in answer.pieces():
            yield chunk({"content": text})
        yield chunk({}, answer.finish_reason)
        if include_usage:
            yield _event({**shared, "choices": [], "usage": answer.usage()})
        yield b"data: [DONE]\n\n"
    except EngineUnavailableError as error:
        yield _event(_unavailable(str(error)).body())


def _event(value: object) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"
