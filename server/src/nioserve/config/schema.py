"""All settings, their defaults and their ranges."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

Port = Annotated[int, Field(ge=1, le=65535)]
Count = Annotated[int, Field(ge=1)]


def _split(value: object) -> object:
    """Take a list from a flag or the environment too: words between commas."""
    return tuple(word.strip() for word in value.split(",") if word.strip()) if isinstance(value, str) else value


def _base(url: str) -> str:
    """Return a base URL as paths are added to it: OpenAI's clients write it with /v1 at the end."""
    return url.rstrip("/").removesuffix("/v1")


Url = Annotated[str, Field(pattern=r"^https?://[^/\s]+(/\S*)?$"), AfterValidator(_base)]


def _default_workers() -> int:
    """Return how many API processes run: one is enough for the tokens, two outlive each other, more share bursts."""
    return min(4, len(os.sched_getaffinity(0)))


class Section(BaseModel):
    """Settings never change once read, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Tls(Section):
    """PEM files. With `client_ca`, only clients with a certificate of that authority get in."""

    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None


class Server(Section):
    """The API's listener and its worker processes; timeouts in seconds.

    `request_timeout`: for a whole answer. `stalled_read_timeout`: how long a client may leave an answer unread.
    """

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Port = 8000
    workers: Annotated[int, Field(ge=1, le=64)] = Field(default_factory=_default_workers)
    shutdown_timeout: Annotated[float, Field(ge=0)] = 120
    request_timeout: Annotated[float, Field(ge=1)] = 600
    stalled_read_timeout: Annotated[float, Field(ge=1)] = 30
    max_body_bytes: Annotated[int, Field(ge=1024)] = 1048576
    tls: Tls = Tls()


class Metrics(Section):
    """Where Prometheus scrapes, and where probes may ask without a client certificate."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Port = 8001


class Model(Section):
    """The model directory; `served_name` is the manifest's name unless set."""

    path: Path
    served_name: Annotated[str, Field(min_length=1)] | None = None


class Engine(Section):
    """How much runs at a time. Lengths in tokens, timeouts in seconds.

    `max_num_queued_reqs` and `max_num_queued_tokens` (of prompts) bound each of the two queues; `conversation_share` is
    what the queue of long conversations gets of tokens and seats when the other is busy too. `speculate_tokens` is how
    many tokens are guessed at most, for greedy answers, while at most `speculate_max_num_seqs` run; 0 guesses none.

    Where the user has spoken more than `long_conversation_turns` times, the request waits in the queue of long ones.
    """

    max_num_seqs: Annotated[int, Field(ge=1, le=1024)] = 32
    max_model_len: Count | None = None
    max_num_batched_tokens: Count = 256
    max_num_queued_reqs: Annotated[int, Field(ge=0)] = 256
    max_num_queued_tokens: Count = 131072
    conversation_share: Annotated[float, Field(ge=0.05, le=0.95)] = 0.5
    queue_timeout: Annotated[float, Field(gt=0)] = 60
    prefix_cache: bool = True
    speculate_tokens: Annotated[int, Field(ge=0, le=32)] = 0
    speculate_max_num_seqs: Count = 4
    kv_cache_tokens: Count | None = None
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    device: Annotated[str, Field(pattern=r"^(auto|cpu|(cuda|rocm)(:\d+)?)$")] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    kernels: Literal["auto", "amx", "bf16", "avx512", "torch"] = "auto"
    kv_cache_dtype: Literal["auto", "int8"] = "auto"
    hang_timeout: Annotated[float, Field(ge=1)] = 30
    backend: Literal["auto", "torch", "onnx", "upstream"] = "auto"
    long_conversation_turns: Count = 5


class UpstreamTls(Section):
    """PEM files: the authority of https URLs (default: the system's), and a certificate for this client if need be."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None


class Upstream(Section):
    """An OpenAI-compatible server to ask, for `engine.backend: upstream`. Timeouts in seconds; an answer's whole time
    is `server.request_timeout`.

    `urls` are asked in turn. `metrics_urls` are each URL's /metrics unless set. `model` is the upstream's name for the
    model. After `breaker_failures` in a row a URL is left alone for `breaker_cooldown` seconds.
    """

    urls: Annotated[tuple[Url, ...], BeforeValidator(_split)] = ()
    metrics_urls: Annotated[tuple[Url, ...], BeforeValidator(_split)] = ()
    model: Annotated[str, Field(min_length=1)] | None = None
    api_key_file: Path | None = None
    tls: UpstreamTls = UpstreamTls()
    connect_timeout: Annotated[float, Field(gt=0)] = 5
    read_timeout: Annotated[float, Field(gt=0)] = 300
    breaker_failures: Count = 5
    breaker_cooldown: Annotated[float, Field(gt=0)] = 10


class Auth(Section):
    """Where the API keys' records are."""

    keys_file: Path = Path("/etc/nioserve/keys.yml")


class Log(Section):
    """What is written to stderr."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "text"] = "json"


class Config(Section):
    """The whole configuration."""

    server: Server = Server()
    metrics: Metrics = Metrics()
    model: Model
    engine: Engine = Engine()
    upstream: Upstream = Upstream()
    auth: Auth = Auth()
    log: Log = Log()
    runtime_dir: Path | None = None


def contradictions(config: Config) -> list[str]:
    """Return what no single key shows: settings that do not go together."""
    found = []
    engine, tls = config.engine, config.server.tls
    if engine.max_num_batched_tokens < engine.max_num_seqs:
        found.append(
            f"engine.max_num_batched_tokens: must be >= engine.max_num_seqs ({engine.max_num_seqs}), "
            f"is {engine.max_num_batched_tokens}"
        )
    if engine.kv_cache_tokens and engine.max_model_len and engine.kv_cache_tokens < engine.max_model_len:
        found.append(
            f"engine.kv_cache_tokens: must be >= engine.max_model_len ({engine.max_model_len}), "
            f"is {engine.kv_cache_tokens}"
        )
    if (tls.certificate is None) != (tls.key is None):
        found.append("server.tls: certificate and key must be set together")
    upstream = config.upstream
    if (upstream.tls.certificate is None) != (upstream.tls.key is None):
        found.append("upstream.tls: certificate and key must be set together")
    if (engine.backend == "upstream") != bool(upstream.urls):
        found.append("upstream.urls: must be set with engine.backend: upstream, and with no other")
    if tls.client_ca is not None and tls.certificate is None:
        found.append("server.tls.client_ca: needs server.tls.certificate and server.tls.key")
    if (config.server.host, config.server.port) == (config.metrics.host, config.metrics.port):
        found.append(f"metrics.port: {config.metrics.port} is the API's port already")
    return found
