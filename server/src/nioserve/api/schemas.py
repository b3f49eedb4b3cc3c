"""What `/v1/chat/completions` takes. A parameter that would change the answer and is not supported is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nioserve.api.errors import ApiError

MAX_STOPS = 4
MAX_STOP_LENGTH = 256

# Values that mean what we do anyway; any other value would be a promise we cannot keep.
_ONLY: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none",),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
}
# They say something about the caller or the transport, and change no token.
_IGNORED = frozenset({
    "user", "metadata", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
})  # fmt: skip


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextPart(_Model):
    """A piece of a message's text."""

    type: Literal["text"]
    text: str


class Message(_Model):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def text(self) -> str:
        """Return the content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(_Model):
    """Options of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


class ChatRequest(_Model):
    """A chat completion. `ignore_eos` is an extension, as in vLLM: measure without the model deciding how long."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    ignore_eos: bool = False

    def stops(self) -> tuple[str, ...]:
        """Return the stop strings."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def token_limit(self) -> int | None:
        """Return how many tokens were asked for at most, under either name."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


def parse_chat_request(value: object) -> ChatRequest:
    """Return the request; ApiError 400 names the first parameter that is wrong, and what it should be."""
    if not isinstance(value, dict):
        raise ApiError(400, "The body must be a JSON object.")
    known = {name: item for name, item in value.items() if name not in _IGNORED and name not in _ONLY}
    for name, meant in _ONLY.items():
        given = value.get(name)
        if given is not None and given not in meant:
            wanted = " or ".join(repr(item) for item in meant)
            raise _unsupported(name, f"`{name}` is not supported by this server; leave it out or send {wanted}.")
    unknown = sorted(known.keys() - ChatRequest.model_fields.keys())
    if unknown:
        raise _unsupported(unknown[0], f"`{unknown[0]}` is not a parameter of this server; leave it out.")
    try:
        request = ChatRequest.model_validate(known, strict=True)
    except ValidationError as error:
        raise _explain(error) from error
    if request.max_tokens and request.max_completion_tokens and request.max_tokens != request.max_completion_tokens:
        raise ApiError(400, "`max_tokens` and `max_completion_tokens` differ; send one of them.", param="max_tokens")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "`stream_options` needs `stream`: true.", param="stream_options")
    return request


def _unsupported(name: str, message: str) -> ApiError:
    return ApiError(400, message, param=name, code="unsupported_parameter")


def _explain(error: ValidationError) -> ApiError:
    """Name the parameter as the client wrote it, without the branches of a union that pydantic adds to the path."""
    first = error.errors(include_url=False)[0]
    fields = {*ChatRequest.model_fields, *Message.model_fields, *TextPart.model_fields, *StreamOptions.model_fields}
    path = [part for part in first["loc"] if isinstance(part, int) or part in fields]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    if first["type"] == "extra_forbidden":
        extra = str(first["loc"][-1])
        return _unsupported(f"{name}.{extra}" if name else extra, f"`{extra}` is not supported in `{name}`.")
    if path and path[-1] == "content":
        return ApiError(400, f"`{name}` must be a string or a list of text parts.", param=name, code="invalid_content")
    return ApiError(400, f"`{name}`: {first['msg']}.", param=name)
