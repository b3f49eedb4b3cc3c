"""The metrics port: Prometheus' page and the probes, served by the supervisor itself.

Probes are here too because the API's port may demand a client certificate, which a kubelet or a load balancer's check
does not have, and because this port still answers while the other drains.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from nioserve import health
from nioserve.config import ConfigError
from nioserve.engine.messages import ServiceState

log = logging.getLogger(__name__)

_SCRAPE_SECONDS = 10


class Monitoring:
    """The server, and the supervisor's own metrics. ConfigError when the address cannot be had."""

    def __init__(self, host: str, port: int, directory: Path, state: Callable[[], ServiceState]) -> None:
        self._directory = directory
        self._registry = registry = CollectorRegistry()
        MultiProcessCollector(registry, path=str(directory))  # type: ignore[no-untyped-call]  # upstream has no types
        self.ready = Gauge("nioserve_ready", "1 while the service takes traffic.", registry=registry)
        self.restarts = Counter(
            "nioserve_process_restarts", "Child processes that died or hung.", ["process"], registry=registry
        )
        for process in ("engine", "api"):
            self.restarts.labels(process)
        self.ready.set_function(lambda: float(health.probe("/readyz", state())[0] == 200))
        try:
            self._server = _Server(host, port, registry, state)
        except OSError as error:
            raise ConfigError([f"metrics: cannot listen on {host} port {port}: {error.strerror}"]) from error
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def include(self, collector: Collector) -> None:
        """Serve what a collector yields too; it must not raise."""
        self._registry.register(collector)

    def forget(self, pid: int) -> None:
        """Drop the gauges of a process that has ended; its counts stay."""
        mark_process_dead(pid, path=str(self._directory))  # type: ignore[no-untyped-call]  # upstream has no types


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, host: str, port: int, registry: CollectorRegistry, state: Callable[[], ServiceState]) -> None:
        self.registry, self.state = registry, state
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _SCRAPE_SECONDS
    server_version, sys_version = "nioserve", ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._answer(200, CONTENT_TYPE_LATEST, generate_latest(self.server.registry))
        elif path in health.PATHS:
            status, body = health.probe(path, self.server.state())
            self._answer(status, "application/json", json.dumps(body).encode())
        else:
            self._answer(404, "text/plain", b"/metrics is here\n")

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class names it so
        log.debug("metrics port", extra={"line": format % args})
