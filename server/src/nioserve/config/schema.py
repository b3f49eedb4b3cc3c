"""All settings, their defaults and their ranges."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Port = Annotated[int, Field(ge=1, le=65535)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Settings never change once read, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Tls(Section):
    """PEM files. With `client_ca`, only clients with a certificate of that authority get in."""

    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None


class Server(Section):
    """The API's listener and its worker processes; `shutdown_timeout` in seconds."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Port = 8000
    workers: Annotated[int, Field(ge=1, le=64)] = 4
    shutdown_timeout: Annotated[float, Field(ge=0)] = 120
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
    """How much runs at a time. Lengths in tokens, `hang_timeout` in seconds."""

    max_num_seqs: Annotated[int, Field(ge=1, le=1024)] = 32
    max_model_len: Count | None = None
    max_num_batched_tokens: Count = 512
    max_num_queued_reqs: Annotated[int, Field(ge=0)] = 256
    kv_cache_tokens: Count | None = None
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    hang_timeout: Annotated[float, Field(ge=1)] = 60


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
    if tls.client_ca is not None and tls.certificate is None:
        found.append("server.tls.client_ca: needs server.tls.certificate and server.tls.key")
    if (config.server.host, config.server.port) == (config.metrics.host, config.metrics.port):
        found.append(f"metrics.port: {config.metrics.port} is the API's port already")
    return found
