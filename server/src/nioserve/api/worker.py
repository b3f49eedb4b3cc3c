"""An API worker: one process with one event loop, on the listening socket that all workers share.

Run by the supervisor as `python -m nioserve.api.worker CONFIG SOCKET_FD`. SIGTERM drains it; SIGHUP makes it read the
keys again.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
import uvloop

from nioserve import logs
from nioserve.api.app import create_app
from nioserve.api.connection import protocol
from nioserve.api.logprobs import TokenTexts
from nioserve.api.prompt import Prompter
from nioserve.api.service import Service
from nioserve.config import Config
from nioserve.engine import messages, transport
from nioserve.engine.client import EngineClient
from nioserve.engine.limits import resolve_max_model_len
from nioserve.metrics import ApiMetrics
from nioserve.models import manifest
from nioserve.models.spec import load_spec, sampling_defaults
from nioserve.parent import die_with_parent
from nioserve.policy.identity import KeyStore

if TYPE_CHECKING:
    from nioserve.backends.relay import Relay

log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """uvicorn, with its signals kept to draining, and word to the supervisor once it serves."""

    def __init__(self, config: uvicorn.Config, client: EngineClient, runtime_dir: Path) -> None:
        super().__init__(config)
        self._client = client
        self._supervisor = transport.Sender(transport.Addresses(runtime_dir).supervisor())

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Drain on SIGTERM. uvicorn's own version would raise the signal again and make a clean exit look like death.

        SIGINT is ignored: at a terminal it reaches every process, and the supervisor decides.
        """
        signal.signal(signal.SIGTERM, self.handle_exit)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to serve, and go on once the service's state is known: before, every answer would be 503."""
        await super().startup(sockets)
        await self._client.informed.wait()

    async def on_tick(self, counter: int) -> bool:
        """Tell the supervisor twice a second that this loop comes round; uvicorn calls it ten times a second."""
        if counter % 5 == 0:
            self._supervisor.send(messages.encode(messages.WorkerReady(os.getpid())))
        return await super().on_tick(counter)


def make_service(config: Config, runtime_dir: Path) -> Service:
    """Put together what the handlers need."""
    directory = config.model.path
    name = config.model.served_name or manifest.model_name(directory)
    temperature, top_p = sampling_defaults(directory)
    spec, prompter = load_spec(directory), Prompter(directory)
    return Service(
        model_name=name,
        model_created=int((directory / "config.json").stat().st_mtime),
        max_model_len=resolve_max_model_len(config, spec),
        vocab_size=spec.vocab_size,
        embedding_size=spec.hidden_size,
        long_conversation_turns=config.engine.long_conversation_turns,
        request_timeout=config.server.request_timeout,
        temperature=temperature,
        top_p=top_p,
        prompter=prompter,
        token_texts=TokenTexts(prompter.tokenizer),
        client=EngineClient(runtime_dir),
        keys=KeyStore(config.auth.keys_file),
        metrics=ApiMetrics(name),
        relay=_relay(config, name) if config.engine.backend == "upstream" else None,
    )


def _relay(config: Config, name: str) -> Relay:
    # Imported here: its HTTP client takes memory that workers in front of our own engine do without.
    from nioserve.backends.relay import Relay
    from nioserve.backends.upstream import UpstreamClient

    client = UpstreamClient(config.upstream, config.server.request_timeout)
    return Relay(client, config.upstream.model or name)


def uvicorn_config(config: Config, service: Service) -> uvicorn.Config:
    """Return uvicorn's settings. Access lines are the gate's; forwarded headers are believed from nobody."""
    tls = config.server.tls
    return uvicorn.Config(
        create_app(service, config.server.max_body_bytes),
        loop="uvloop",
        http=protocol(config.server.stalled_read_timeout),
        ws="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, int(config.server.shutdown_timeout)),
        ssl_certfile=tls.certificate,
        ssl_keyfile=tls.key,
        ssl_ca_certs=str(tls.client_ca) if tls.client_ca else None,
        ssl_cert_reqs=ssl.CERT_REQUIRED if tls.client_ca else ssl.CERT_NONE,
    )


async def serve(config: Config, runtime_dir: Path, listener: socket.socket) -> None:
    """Serve until drained."""
    service = make_service(config, runtime_dir)
    # What is there now stays: collections need not walk it again and again.
    gc.collect()
    gc.freeze()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, service.keys.refresh, True)
    await Server(uvicorn_config(config, service), service.client, runtime_dir).serve(sockets=[listener])
    if service.relay is not None:
        await service.relay.close()


def main() -> None:
    """Run an API worker."""
    die_with_parent()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there are keys to read again
    config_file, descriptor = Path(sys.argv[1]), int(sys.argv[2])
    config = Config.model_validate_json(config_file.read_text(encoding="utf-8"))
    logs.set_up("api", config.log.level, config.log.format)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(config, config_file.parent, socket.socket(fileno=descriptor)))


if __name__ == "__main__":
    main()
