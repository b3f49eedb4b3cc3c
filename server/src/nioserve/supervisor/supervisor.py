"""The supervisor's loop.

It owns the listening socket and every child. A dead or hung API worker is started again. A dead or hung engine makes
the service not ready, has every worker fail what was in flight, and is started again under a new epoch. SIGTERM drains:
nobody listens any more, running answers finish, then the workers end, then the engine.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from pathlib import Path
from types import FrameType

import msgspec

from nioserve.backends.watch import HealthWatch, UpstreamCollector
from nioserve.config import Config, ConfigError
from nioserve.engine import messages, transport
from nioserve.engine.messages import EngineReady, Heartbeat, ServiceState, WorkerReady
from nioserve.supervisor.child import Backoff, Child
from nioserve.supervisor.monitoring import Monitoring
from nioserve.supervisor.runtime import file_findings, listen, runtime_directory
from nioserve.supervisor.systemd import notify, watchdog_seconds

log = logging.getLogger(__name__)

_TICK_MS = 100
_PUBLISH_SECONDS = 0.5
_GRACE_SECONDS = 2.0
"""Beyond the shutdown timeout: for workers to send the end of what they cut off."""


class StartError(Exception):
    """The service could not start; the log says why."""


class Supervisor:
    """One run of the service."""

    def __init__(self, config: Config, directory: Path, listener: socket.socket) -> None:
        self._config, self._directory, self._listener = config, directory, listener
        metrics = directory / "metrics"
        metrics.mkdir(mode=0o700)
        self._environment = {"PROMETHEUS_MULTIPROC_DIR": str(metrics)}
        self._config_file = directory / "config.json"
        self._config_file.write_text(config.model_dump_json(), encoding="utf-8")
        self._state = ServiceState(epoch=0, engine_ready=False, draining=False, started=False, detail="starting")
        self._monitoring = Monitoring(config.metrics.host, config.metrics.port, metrics, self._public_state)
        self._upstream: HealthWatch | None = None
        if config.engine.backend == "upstream":
            self._upstream = HealthWatch(config.upstream)
            self._monitoring.include(UpstreamCollector(config.upstream))
        self._addresses = transport.Addresses(directory)
        self._inbox = transport.Inbox(self._addresses.supervisor())
        self._outbox = transport.Broadcast(self._addresses.state())
        self._engine: Child | None = None
        self._engine_backoff = Backoff()
        self._heartbeat = 0.0
        self._workers: list[Child] = []
        self._worker_backoff = Backoff()
        self._published = 0.0
        self._watchdog, self._watchdog_at = watchdog_seconds(), 0.0
        self._deadline: float | None = None
        self._terminations = 0
        self._announced = False

    def run(self) -> int:
        """Serve until told to stop; return the exit status. StartError when it never got ready."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_terminate)
        signal.signal(signal.SIGHUP, self._on_reload)
        try:
            while True:
                self._read_inbox()
                if self._terminations > 1:
                    log.warning("ended at once by a second signal")
                    return 1
                if self._terminations and self._deadline is None:
                    self._begin_drain()
                self._watch_engine()
                self._watch_workers()
                if self._deadline is not None and self._drained(self._deadline):
                    log.info("stopped")
                    return 0
                self._announce()
        finally:
            for child in [*self._workers, *([self._engine] if self._engine else [])]:
                child.kill()

    def _on_terminate(self, _number: int, _frame: FrameType | None) -> None:
        self._terminations += 1

    def _on_reload(self, _number: int, _frame: FrameType | None) -> None:
        for worker in self._workers:
            if worker.ready:  # one that is starting reads the file anyway
                worker.send(signal.SIGHUP)

    def _read_inbox(self) -> None:
        wait = _TICK_MS
        while (body := self._inbox.receive(wait)) is not None:
            wait = 0
            message = messages.decode_to_supervisor(body)
            if isinstance(message, WorkerReady):
                for worker in self._workers:
                    if worker.pid == message.pid:
                        worker.ready, worker.heard = True, time.monotonic()
            elif self._engine is not None and message.epoch == self._state.epoch:
                self._hear_engine(self._engine, message)

    def _hear_engine(self, engine: Child, message: EngineReady | Heartbeat) -> None:
        self._heartbeat = time.monotonic()
        if isinstance(message, EngineReady):
            engine.ready = True
            log.info("engine ready", extra={"pid": engine.pid, "seconds": round(engine.lifetime, 1)})
            self._change(
                engine_ready=True, started=True, detail="ready", hung=False, max_model_len=message.max_model_len
            )

    def _watch_engine(self) -> None:
        if self._upstream is not None:
            self._follow_upstream(self._upstream)
            return
        if self._engine is None:
            if self._deadline is None and self._engine_backoff.over:
                self._start_engine()
            return
        status = self._engine.exit_status()
        silent = time.monotonic() - self._heartbeat
        if status is not None:
            self._lose_engine(self._engine, "the engine died", status)
        elif self._engine.ready and silent > self._config.engine.hang_timeout:
            self._engine.kill()
            self._lose_engine(self._engine, "the engine hung", -signal.SIGKILL, hung=True)

    def _follow_upstream(self, upstream: HealthWatch) -> None:
        """Where an upstream answers, its health stands for the engine's."""
        problem = upstream.problem()
        if self._deadline is not None or (problem is None) == self._state.engine_ready:
            return
        log.log(logging.INFO if problem is None else logging.ERROR, "the upstream %s",
                "is healthy" if problem is None else "is not healthy", extra={"problem": problem})  # fmt: skip
        ready, detail = problem is None, problem or "ready"
        self._change(engine_ready=ready, started=ready or self._state.started, detail=detail)

    def _start_engine(self) -> None:
        epoch = self._state.epoch + 1
        environment = {**self._environment, **_thread_settings()}
        self._engine = Child.start("nioserve.engine.process", [str(self._config_file), str(epoch)], environment)
        detail = "the engine hung, a new one is loading" if self._state.hung else "the engine is loading the model"
        self._change(epoch=epoch, engine_ready=False, detail=detail)

    def _lose_engine(self, engine: Child, what: str, status: int, *, hung: bool = False) -> None:
        log.error(what, extra={"pid": engine.pid, "exit_status": status, "seconds": round(engine.lifetime, 1)})
        self._monitoring.forget(engine.pid)
        self._addresses.forget_engine(self._state.epoch)
        self._engine = None
        if not self._state.started:
            # It never worked: a wrong model or setting, which the service manager should see as a failed start.
            raise StartError
        self._monitoring.restarts.labels("engine").inc()
        self._engine_backoff.died(engine.lifetime)
        hung = hung or self._state.hung
        self._change(engine_ready=False, detail=f"{what} and is being restarted", hung=hung)

    def _watch_workers(self) -> None:
        for worker in list(self._workers):
            status = worker.exit_status()
            if status is None and self._hangs(worker):
                log.error("an API worker hung", extra={"pid": worker.pid})
                worker.kill()
                status = -signal.SIGKILL
            if status is None:
                continue
            self._workers.remove(worker)
            self._monitoring.forget(worker.pid)
            if self._deadline is not None:
                continue
            log.error("an API worker died", extra={"pid": worker.pid, "exit_status": status})
            if not worker.ready and not self._announced:
                raise StartError
            self._monitoring.restarts.labels("api").inc()
            self._worker_backoff.died(worker.lifetime)
        if self._deadline is None and self._worker_backoff.over:
            while len(self._workers) < self._config.server.workers:
                self._workers.append(self._start_worker())

    def _hangs(self, worker: Child) -> bool:
        """Return whether a worker that gave signs of life has stopped; one that drains has no loop to give them."""
        silent = time.monotonic() - worker.heard
        return self._deadline is None and worker.ready and silent > self._config.engine.hang_timeout

    def _start_worker(self) -> Child:
        descriptor = self._listener.fileno()
        arguments = [str(self._config_file), str(descriptor)]
        return Child.start("nioserve.api.worker", arguments, self._environment, keep=[descriptor])

    def _public_state(self) -> ServiceState:
        """Return the state as the metrics port tells it: without a worker, nothing is served."""
        if self._state.engine_ready and not any(worker.ready for worker in list(self._workers)):
            return msgspec.structs.replace(self._state, engine_ready=False, detail="no API worker is running")
        return self._state

    def _begin_drain(self) -> None:
        log.info("draining", extra={"timeout": self._config.server.shutdown_timeout})
        notify("STOPPING=1")
        self._change(draining=True, detail="the server is shutting down")
        # The port refuses once every process has closed it: this one, and each worker when it gets its SIGTERM.
        self._listener.close()
        for worker in self._workers:
            worker.send(signal.SIGTERM)
        self._deadline = time.monotonic() + self._config.server.shutdown_timeout

    def _drained(self, deadline: float) -> bool:
        if not self._workers:
            return True
        if time.monotonic() > deadline + _GRACE_SECONDS:
            log.warning("the shutdown timeout is over, running answers are cut off")
            return True
        return False

    def _announce(self) -> None:
        now = time.monotonic()
        if not self._announced and self._state.engine_ready and self._all_workers_ready():
            self._announced = True
            notify("READY=1")
            log.info("serving", extra={"host": self._config.server.host, "port": self._config.server.port})
        if now - self._published >= _PUBLISH_SECONDS:
            self._publish()
        if self._watchdog is not None and now >= self._watchdog_at:
            notify("WATCHDOG=1")
            self._watchdog_at = now + self._watchdog

    def _all_workers_ready(self) -> bool:
        return len(self._workers) == self._config.server.workers and all(worker.ready for worker in self._workers)

    def _change(self, **changes: int | bool | str) -> None:
        self._state = msgspec.structs.replace(self._state, **changes)
        self._publish()

    def _publish(self) -> None:
        self._published = time.monotonic()
        self._outbox.send(messages.encode(self._state))


def _thread_settings() -> dict[str, str]:
    """Return how the engine's threads wait for each other, unless the operator has said it.

    torch's OpenMP lets a thread that is done spin for about a millisecond. Alone on two cores that is the fastest; but
    when another process takes a core, the spinning keeps the late thread from it: measured 47 tokens/s at batch 1 alone
    and 3 beside a busy machine. 10,000 turns cost 5 % alone and are four times as fast then.
    """
    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        return {}
    return {"GOMP_SPINCOUNT": "10000"}


def serve(config: Config) -> int:
    """Run the service; return the exit status. ConfigError lists what keeps it from starting."""
    findings = file_findings(config)
    if findings:
        raise ConfigError(findings)
    with runtime_directory(config) as directory:
        listener = listen(config.server.host, config.server.port)
        try:
            return Supervisor(config, directory, listener).run()
        except StartError:
            log.error("the service could not start; see the lines above")
            return 1
        finally:
            listener.close()
