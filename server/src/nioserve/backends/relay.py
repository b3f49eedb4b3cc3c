"""Passing a checked request on to the upstream, and its answer back to the client as it comes.

What the gateway knows better is put right on the way: the model's name, errors, and usage, which is always asked for
because the accounts need it. All else passes as it is.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from starlette.responses import Response

from nioserve.api.disconnect import EventStream, unless_gone
from nioserve.api.errors import ApiError, json_response
from nioserve.api.generate import check_available
from nioserve.api.intake import Intake
from nioserve.api.schemas.common import Body
from nioserve.backends.upstream import Reply, UpstreamClient, UpstreamError, UpstreamTimeoutError
from nioserve.engine.messages import FinishReason

_LONGEST_EVENT = 16 << 20
"""Bytes; a server that sends no line end is not believed for ever."""

_BUSY = (429, 503)


class Relay:
    """Answers requests by the upstream's `model`."""

    def __init__(self, client: UpstreamClient, model: str) -> None:
        self._client, self._model = client, model

    async def __call__(self, intake: Intake[Body]) -> Response:
        """Return the upstream's answer; ApiError when there is none."""
        check_available(intake.service)
        asked: dict[str, Any] = msgspec.json.decode(await intake.request.body())
        options = asked.get("stream_options") or {}
        asked["model"] = self._model
        if asked.get("stream"):
            asked["stream_options"] = {**options, "include_usage": True}
        receive, path = intake.request.receive, intake.request.url.path
        try:
            call = self._client.post(path, msgspec.json.encode(asked), intake.record["request_id"])
            reply = await unless_gone(receive, call)
        except UpstreamError as error:
            intake.service.metrics.rejected("engine_unavailable")
            raise as_api_error(error) from error
        account = Account(intake)
        if asked.get("stream") and reply.status == 200:
            events = _stream(reply, account, usage_asked=bool(options.get("include_usage")))
            return EventStream(events, lambda: _finish(reply, account))
        try:
            return _whole(reply, await unless_gone(receive, reply.read()), account)
        except (UpstreamError, ApiError) as error:
            account.failed()
            raise (as_api_error(error) if isinstance(error, UpstreamError) else error) from error
        finally:
            _finish(reply, account)

    async def close(self) -> None:
        """Close all connections."""
        await self._client.close()


def _finish(reply: Reply, account: Account) -> None:
    reply.close()
    account.close()


def as_api_error(error: UpstreamError) -> ApiError:
    """Return what a client is told when the upstream cannot be had."""
    if isinstance(error, UpstreamTimeoutError):
        return ApiError(504, f"The model server did not finish: {error}.", code="upstream_timeout")
    text = f"The model server is not available right now: {error}. Try again in {error.retry_after} s."
    return ApiError(503, text, code="upstream_unavailable", retry_after=error.retry_after)


def _whole(reply: Reply, body: bytes, account: Account) -> Response:
    value = _object(body, "is")
    if reply.status != 200:
        raise refusal(reply.status, value, reply.retry_after)
    account.note(value)
    return json_response(value)


def _object(text: bytes, what: str) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise _malformed(f"{what} no JSON") from error
    if not isinstance(value, dict):
        raise _malformed(f"{what} no object")
    return value


def _malformed(what: str) -> ApiError:
    return ApiError(502, f"The model server's answer {what}.", code="upstream_error")


def refusal(status: int, value: dict[str, Any], retry_after: str) -> ApiError:
    """Return what a client is told of an error of the upstream: what is the client's to mend stays as it is."""
    error = value.get("error")
    # OpenAI's object, and what FastAPI and older vLLM write.
    given = error if isinstance(error, dict) else value
    message = str(given.get("message") or given.get("detail") or error or "no reason was given")
    if status in _BUSY:
        seconds = int(retry_after) if retry_after.isdecimal() else 5
        return ApiError(503, f"The model server is busy: {message}", code="upstream_busy", retry_after=seconds)
    if status in (400, 413, 422):
        param, code = given.get("param"), given.get("code")
        return ApiError(413 if status == 413 else 400, message, param=param if isinstance(param, str) else None,
                        code=code if isinstance(code, str) else None)  # fmt: skip
    # The gateway's own credentials, the model's name, or a fault over there: nothing a client could change.
    return ApiError(502, f"The model server failed with status {status}.", code="upstream_error")


async def _stream(reply: Reply, account: Account, *, usage_asked: bool) -> AsyncGenerator[bytes, None]:
    """Yield the upstream's events as they come. One that fails on the way ends in an error event."""
    try:
        rest = b""
        async for piece in reply.pieces():
            *lines, rest = (rest + piece).split(b"\n")
            if len(rest) > _LONGEST_EVENT:
                raise _malformed("has an event without end")
            events, failure = b"", None
            for line in lines:
                try:
                    events += _event(line.strip(), account, usage_asked=usage_asked)
                except (UpstreamError, ApiError) as error:
                    failure = error
                    break
            if events:
                yield events
            if failure is not None:  # what came before it went out first
                raise failure
        if not account.complete:
            raise UpstreamError("it ended in the middle of an answer")
    except (UpstreamError, ApiError) as error:
        account.failed()
        told = as_api_error(error) if isinstance(error, UpstreamError) else error
        yield b"data: " + msgspec.json.encode(told.body()) + b"\n\n"


def _event(line: bytes, account: Account, *, usage_asked: bool) -> bytes:
    """Return what a line becomes: nothing, where it only parts events or tells the usage nobody asked for."""
    if not line.startswith(b"data:"):
        return line + b"\n\n" if line.startswith(b":") else b""  # a comment keeps proxies on the way awake
    data = line.removeprefix(b"data:").strip()
    if data == b"[DONE]":
        account.complete = True
        return b"data: [DONE]\n\n"
    value = _object(data, "has an event that is")
    if "error" in value:
        raise refusal(500, value, "")
    account.note(value)
    if not usage_asked and not value.get("choices"):
        return b""
    if not usage_asked:
        value.pop("usage", None)
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


class Account:
    """What is counted of one answer, as of one by our own engine: times, tokens, and why each choice ended."""

    def __init__(self, intake: Intake[Body]) -> None:
        self._intake = intake
        self._first = self._last = 0.0
        self._usage: dict[str, int] = {}
        self._pieces = 0
        self._reasons: dict[int, str | None] = {}
        self._failed = False
        self.complete = False

    def note(self, value: dict[str, Any]) -> None:
        """Note an answer or a chunk of one, and call the model by our name in it; ApiError when it is neither."""
        if "model" in value:
            value["model"] = self._intake.service.model_name
        try:
            self._count(value)
        except (AttributeError, TypeError) as error:
            raise _malformed("is not of OpenAI's form") from error

    def _count(self, value: dict[str, Any]) -> None:
        self._usage = value.get("usage") or self._usage
        metrics, now = self._intake.service.metrics, time.monotonic()
        for choice in value.get("choices") or ():
            reason = choice.get("finish_reason")
            index = choice.get("index", 0)
            self._reasons[index] = self._reasons.get(index) or reason
            if (choice.get("delta") or {}).get("content") or choice.get("text"):
                if self._first:
                    metrics.inter_token.observe(now - self._last)
                else:
                    self._first = now
                    metrics.first_token.observe(now - self._intake.started)
                self._last = now
                self._pieces += 1

    def failed(self) -> None:
        """Note that the answer ended in an error."""
        self._failed = True

    def close(self) -> None:
        """Count the answer and put it into the request's log line. To be called once."""
        metrics = self._intake.service.metrics
        # Embeddings have no choices: once their usage is here, they are whole.
        given = list(self._reasons.values()) or [FinishReason.STOP.value if self._usage else None]
        reasons = [self._reason(reason) for reason in given]
        for reason in reasons:
            metrics.finished[reason].inc()
        # An answer that is cut off tells no usage; servers send a piece for each token, or nearly.
        prompt, answer = self._usage.get("prompt_tokens", 0), self._usage.get("completion_tokens", self._pieces)
        if self._usage:
            metrics.latency.observe(time.monotonic() - self._intake.started)
            metrics.prompt.observe(prompt)
            metrics.answer.observe(answer)
            if answer > 1 and self._first:
                metrics.per_token.observe((self._last - self._first) / (answer - 1))
        first = round((self._first - self._intake.started) * 1000, 1) if self._first else None
        self._intake.record.update(
            prompt_tokens=prompt, completion_tokens=answer, finish_reason=reasons[0].value, first_token_ms=first
        )

    def _reason(self, reason: str | None) -> FinishReason:
        if self._failed:
            return FinishReason.ERROR
        if reason is None:
            return FinishReason.ABORT
        return FinishReason.LENGTH if reason == "length" else FinishReason.STOP
