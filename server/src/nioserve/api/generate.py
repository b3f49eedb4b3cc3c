"""What all routes that use the engine share: limits checked, requests admitted, engine errors told to the client."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from fastapi import Request

from nioserve.api.answer import Answer, AnswerTimeoutError
from nioserve.api.choice import Choice
from nioserve.api.detokenize import Detokenizer
from nioserve.api.disconnect import unless_gone
from nioserve.api.errors import ApiError
from nioserve.api.intake import Intake
from nioserve.api.schemas import Body, Parameters
from nioserve.api.service import Service
from nioserve.engine.client import EngineUnavailableError, Generation, RejectedError
from nioserve.engine.messages import Grammar, Submit

GENERATION_ERRORS = (EngineUnavailableError, RejectedError, AnswerTimeoutError)
"""What reading an answer may end in."""

_QUICK_BYTES = 8192
"""A body up to this size is tokenised at once, in 2 ms at most; beyond, in a thread, and other answers go on."""

_T = TypeVar("_T")


def check_available(service: Service, *, long_conversation: bool = False) -> None:
    """Refuse, before any work is done, what would be refused anyway; ApiError 503."""
    try:
        service.client.check(long_conversation=long_conversation)
    except (EngineUnavailableError, RejectedError) as error:
        raise _refused(service, error) from error


async def tokenise(request: Request, work: Callable[[], _T]) -> _T:
    """Return what `work` makes of the texts in a request."""
    quick = len(await request.body()) <= _QUICK_BYTES
    return work() if quick else await asyncio.to_thread(work)


async def encode_inputs(intake: Intake[Body], inputs: Sequence[str | list[int]], param: str) -> list[list[int]]:
    """Return the tokens of bare texts, and token ids as they are; ApiError 400 when the model has no such token."""
    service = intake.service
    for tokens in inputs:
        wrong = [] if isinstance(tokens, str) else [token for token in tokens if token >= service.vocab_size]
        if wrong:
            text = f"`{param}`: the model has tokens 0 to {service.vocab_size - 1}, and no {wrong[0]}."
            raise ApiError(400, text, param=param)
    encode = service.prompter.encode_text
    encode = service.prompter.encode_text
    return await tokenise(intake.request, lambda: [encode(text) if isinstance(text, str) else text for text in inputs])


async def begin(
    intake: Intake[Parameters], prompts: Sequence[list[int]], param: str, *, grammar: Grammar | None = None,
    long_conversation: bool = False, spoken: Mapping[int, str] | None = None,
) -> Answer:  # fmt: skip
    """Get `n` answers to each prompt admitted. `param` is what the client calls its prompt; ApiError when refused."""
    service, body = intake.service, intake.body
    intake.record["stream"] = body.stream
    outside = [token for token in body.logit_bias if int(token) >= service.vocab_size]
    if outside:
        text = f"`logit_bias`: the model has tokens 0 to {service.vocab_size - 1}, and no {outside[0]}."
        raise ApiError(400, text, param="logit_bias")
    requests = [
        Submit(
            uuid.uuid4().hex, prompt, token_limit(body, len(prompt), service.context, param),
            body.sampling(service.temperature, service.top_p, choice, grammar),
            department=intake.identity.department, long_conversation=long_conversation,
        )
        for prompt in prompts for choice in range(body.n)
    ]  # fmt: skip
    generation = await submit(service, requests)
    choices = [
        Choice(index, Detokenizer(service.prompter.tokenizer, spoken), body.stops()) for index in range(len(requests))
    ]
    prompt_tokens = sum(len(prompt) for prompt in prompts)
    return Answer(generation, choices, prompt_tokens, body.n, intake.started, service.request_timeout, service.metrics)


async def collect(intake: Intake[Parameters], answer: Answer, push: Callable[[Choice, str], None]) -> None:
    """Read an answer to its end and close it; ApiError when it fails, ClientGoneError when nobody waits any more."""

    async def read() -> None:
        async for pieces in answer.pieces():
            for choice, text in pieces:
                push(choice, text)

    try:
        await unless_gone(intake.request.receive, read())
    except GENERATION_ERRORS as error:
        raise failed(intake.service, answer, error) from error
    finally:
        answer.close(intake.record)


async def submit(service: Service, requests: Sequence[Submit]) -> Generation:
    """Return the admitted requests; ApiError when the engine does not take them."""
    try:
        return await service.client.submit(requests)
    except (EngineUnavailableError, RejectedError) as error:
        raise _refused(service, error) from error


def token_limit(body: Parameters, prompt: int, context: int, param: str) -> int:
    """Return how many tokens may be generated: as asked for, else all that fit. ApiError 400 when it does not fit."""
    left, asked = context - prompt, body.token_limit()
    if prompt < 1 or left < 1:
        raise too_long(param, prompt, context)
    if asked is not None and asked > left:
        name = body.limit_name
        text = (
            f"`{param}` is {prompt} tokens long and `{name}` asks for {asked} more, but the model's context is "
            f"{context} tokens. Send at most {left} as `{name}`."
        )
        raise ApiError(400, text, param=name, code="context_length_exceeded")
    if body.min_tokens > (asked or left):
        raise ApiError(400, f"`min_tokens` is more than the {asked or left} that fit.", param="min_tokens")
    return asked or left


def too_long(param: str, length: int, context: int) -> ApiError:
    """Return the error of a prompt that is empty or leaves no room for an answer."""
    if length < 1:
        return ApiError(400, f"`{param}` is empty.", param=param)
    text = f"`{param}` is {length} tokens long, and the model's context is {context} tokens including the answer."
    return ApiError(400, f"{text} Shorten it.", param=param, code="context_length_exceeded")


def failed(service: Service, answer: Answer, error: Exception) -> ApiError:
    """Note that an answer ended in one of GENERATION_ERRORS, and return what the client is told."""
    answer.failed()
    return _refused(service, error) if isinstance(error, RejectedError) else as_api_error(error)


def as_api_error(error: Exception) -> ApiError:
    """Return what a client is told of one of GENERATION_ERRORS."""
    if isinstance(error, AnswerTimeoutError):
        return ApiError(504, str(error), code="request_timeout")
    if isinstance(error, RejectedError):
        return _refusal(error)
    text = f"The model is not available right now ({str(error).rstrip('.')}). Try again in a few seconds."
    return ApiError(503, text, code="engine_unavailable", retry_after=5)


def _refused(service: Service, error: EngineUnavailableError | RejectedError) -> ApiError:
    """Count a request that was not admitted."""
    if isinstance(error, RejectedError):
        reason = error.reason
    else:
        reason = "draining" if service.client.state.draining else "engine_unavailable"
    service.metrics.rejected(reason)
    return as_api_error(error)


def _refusal(error: RejectedError) -> ApiError:
    if error.reason == "too_long":
        text = "The request is longer than the engine's context. Shorten it."
        return ApiError(400, text, code="context_length_exceeded")
    if not error.reason.startswith("queue_"):
        return ApiError(500, "The engine refused the request.")
    what = "the request waited too long" if error.reason == "queue_timeout" else "its queue is full"
    text = f"The server is busy: {what}. Try again in {error.retry_after} s."
    return ApiError(503, text, code=error.reason, retry_after=error.retry_after)
