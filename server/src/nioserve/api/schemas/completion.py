"""What `/v1/completions` takes."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from nioserve.api.errors import ApiError
from nioserve.api.schemas.common import Parameters

MAX_PROMPTS = 64
"""Prompts times `n` at most in one request."""
DEFAULT_TOKENS = 16
"""OpenAI's length of an answer when the request names none."""

TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class CompletionRequest(Parameters):
    """A completion of one or several prompts, each a text or token ids."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {**Parameters.neutral, "add_special_tokens": (True,)}

    prompt: str | TokenIds | Annotated[list[str], Field(max_length=MAX_PROMPTS)] | Annotated[
        list[TokenIds], Field(max_length=MAX_PROMPTS)
    ]  # fmt: skip
    best_of: int | None = None
    echo: bool = False
    # OpenAI allows 5; what chat can do costs nothing more here.
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def check(self) -> None:
        """Refuse what contradicts itself."""
        super().check()
        if self.best_of is not None and self.best_of != self.n:
            text = "`best_of` is not supported by this server; leave it out or send the same as `n`."
            raise ApiError(400, text, param="best_of", code="unsupported_parameter")
        if self.echo and self.logprobs is not None:
            text = "`echo` with `logprobs` is not supported by this server: the prompt's are not computed."
            raise ApiError(400, text, param="echo", code="unsupported_parameter")
        if len(self.prompts()) * self.n > MAX_PROMPTS:
            raise ApiError(400, f"Prompts times `n` may be {MAX_PROMPTS} at most. Send several requests.", param="n")

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts one by one."""
        return several(self.prompt)

    def token_limit(self) -> int:
        """Return how many tokens are generated at most."""
        return self.max_tokens or DEFAULT_TOKENS

    def top_logprobs_wanted(self) -> int | None:
        """Return how many alternatives to report at each position; None reports nothing."""
        return self.logprobs


def several(value: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    """Return one text or token list, or several of them, as a list."""
    if isinstance(value, str) or isinstance(value[0], int):
        return [value]
    return list(value)
