"""How requests are checked, and the parameters that chat and completions share.

Names and ranges are OpenAI's. top_k, min_p, repetition_penalty, min_tokens and ignore_eos are extensions with the
meaning they have in vLLM.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nioserve.api.errors import ApiError
from nioserve.engine.messages import Grammar, Sampling

MAX_STOPS = 4
MAX_STOP_LENGTH = 256
MAX_CHOICES = 16
"""`n` at most. Each choice is a sequence of its own in the engine."""
MAX_LOGPROBS = 20

_EMPTY: tuple[Any, ...] = (None, [], {})


class Schema(BaseModel):
    """What the API takes. Unknown fields are refused; `check` adds what no single field shows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def check(self) -> None:
        """Raise ApiError when fields contradict each other."""


class Body(Schema):
    """A whole request body."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Parameters that are not supported, and the values of them that ask for what happens anyway."""
    ignored: ClassVar[frozenset[str]] = frozenset({
        "user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    })  # fmt: skip
    """Parameters that say something about the caller, and change no token."""

    model: str


class StreamOptions(Schema):
    """Options of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Count = Annotated[int, Field(ge=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenKey = Annotated[str, Field(pattern=r"^\d{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Parameters(Body):
    """What chat and completions share."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "store": (False,),
        "service_tier": ("auto", "default"),
        "use_beam_search": (False,),
        "length_penalty": (1,),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "include_stop_str_in_output": (False,),
    }

    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: Annotated[dict[TokenKey, Bias], Field(max_length=1024)] = {}
    max_tokens: Count | None = None
    min_tokens: Annotated[int, Field(ge=0)] = 0
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    ignore_eos: bool = False

    def check(self) -> None:
        """Refuse stream options without a stream, and a least length above the greatest."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "`stream_options` needs `stream`: true.", param="stream_options")
        limit = self.token_limit()
        if limit is not None and self.min_tokens > limit:
            text = f"`min_tokens` is {self.min_tokens}, more than the answer may have ({limit}). Lower it."
            raise ApiError(400, text, param="min_tokens")

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that carries the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def limit_name(self) -> str:
        """The name under which `token_limit` was sent."""
        return "max_tokens"

    def token_limit(self) -> int | None:
        """Return how many tokens were asked for at most; None is all that fit."""
        return self.max_tokens

    def top_logprobs_wanted(self) -> int | None:
        """Return how many alternatives to report at each position; None reports nothing."""
        return None

    def stops(self) -> tuple[str, ...]:
        """Return the stop strings."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self, temperature: float, top_p: float, choice: int, grammar: Grammar | None) -> Sampling:
        """Return how the tokens of one choice are drawn. The first two are for requests that name none."""
        return Sampling(
            temperature=temperature if self.temperature is None else self.temperature,
            top_p=top_p if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k),  # -1 says "all", too
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias={int(token): bias for token, bias in self.logit_bias.items()},
            # With one seed for all, the choices would all be the same.
            seed=None if self.seed is None else self.seed + choice,
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            logprobs=self.top_logprobs_wanted(),
            grammar=grammar,
        )


_B = TypeVar("_B", bound=Body)


def parse(schema: type[_B], value: object) -> _B:
    """Return the request; ApiError 400 names the first parameter that is wrong, and what it should be."""
    if not isinstance(value, dict):
        raise ApiError(400, "The body must be a JSON object.")
    fields = {*_names(schema)}
    given = {name: item for name, item in value.items() if name not in schema.ignored and item not in _EMPTY}
    for name, neutral in schema.neutral.items():
        if name in given and given.pop(name) not in neutral:
            wanted = " or ".join(repr(item) for item in neutral)
            raise _unsupported(name, f"`{name}` is not supported by this server; leave it out or send {wanted}.")
    unknown = sorted(name for name, item in given.items() if name not in fields and item != "")
    if unknown:
        raise _unsupported(unknown[0], f"`{unknown[0]}` is not a parameter of this server; leave it out.")
    try:
        request = schema.model_validate({name: given[name] for name in given if name in fields}, strict=True)
    except ValidationError as error:
        raise _explain(error) from error
    request.check()
    return request


def without_empty(value: object) -> object:
    """Return a JSON object without its empty fields: clients send back what they got, nulls included."""
    return {name: item for name, item in value.items() if item not in _EMPTY} if isinstance(value, dict) else value


def _unsupported(name: str, message: str) -> ApiError:
    return ApiError(400, message, param=name, code="unsupported_parameter")


def _explain(error: ValidationError) -> ApiError:
    """Name the parameter as the client wrote it, without the branches of a union that pydantic adds to the path."""
    first = error.errors(include_url=False)[0]
    known = {name for schema in _schemas(Schema) for name in _names(schema)}
    path = [part for part in first["loc"] if isinstance(part, int) or part in known]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    if first["type"] == "extra_forbidden":
        extra = str(first["loc"][-1])
        full = name if name.endswith(extra) else f"{name}.{extra}".lstrip(".")
        return _unsupported(full, f"`{extra}` is not supported in `{full.removesuffix(extra).rstrip('.')}`.")
    if path and path[-1] == "content":
        return ApiError(400, f"`{name}` must be a string or a list of text parts.", param=name, code="invalid_content")
    return ApiError(400, f"`{name}`: {first['msg']}.", param=name)


def _schemas(root: type[Schema]) -> Iterator[type[Schema]]:
    yield root
    for schema in root.__subclasses__():
        yield from _schemas(schema)


def _names(schema: type[Schema]) -> Iterator[str]:
    for name, field in schema.model_fields.items():
        yield field.alias or name
