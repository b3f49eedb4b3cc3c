"""What the handlers of one API worker share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from fastapi import Request

from nioserve.api.logprobs import TokenTexts
from nioserve.api.prompt import Prompter
from nioserve.engine.client import EngineClient
from nioserve.metrics import ApiMetrics
from nioserve.policy.identity import KeyStore

if TYPE_CHECKING:
    from nioserve.backends.relay import Relay


@dataclass(frozen=True, slots=True)
class Service:
    """The model as this worker knows it, the way to the engine, and the keys in force.

    `temperature` and `top_p` are for requests that name none. `request_timeout` in seconds.
    """

    model_name: str
    model_created: int
    max_model_len: int
    vocab_size: int
    embedding_size: int
    long_conversation_turns: int
    request_timeout: float
    temperature: float
    top_p: float
    prompter: Prompter
    token_texts: TokenTexts
    client: EngineClient
    keys: KeyStore
    metrics: ApiMetrics
    relay: Relay | None = None
    """The way to an upstream, where that answers instead of the engine."""

    @property
    def context(self) -> int:
        """The longest prompt and answer together, in tokens: the model's, or less where the engine lacks the memory."""
        return self.client.state.max_model_len or self.max_model_len


def service_of(request: Request) -> Service:
    """Return the service that this request's worker was started with."""
    return cast(Service, request.app.state.service)
