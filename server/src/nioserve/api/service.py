"""What the handlers of one API worker share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from fastapi import Request

from nioserve.api.prompt import Prompter
from nioserve.engine.client import EngineClient
from nioserve.metrics import ApiMetrics
from nioserve.policy.identity import KeyStore


@dataclass(frozen=True, slots=True)
class Service:
    """The model as this worker knows it, the way to the engine, and the keys in force.

    `temperature` and `top_p` are for requests that name none.
    """

    model_name: str
    model_created: int
    max_model_len: int
    temperature: float
    top_p: float
    prompter: Prompter
    client: EngineClient
    keys: KeyStore
    metrics: ApiMetrics


def service_of(request: Request) -> Service:
    """Return the service that this request's worker was started with."""
    return cast(Service, request.app.state.service)
