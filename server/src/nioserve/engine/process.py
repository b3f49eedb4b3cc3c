"""The engine process: a loop that reads messages, runs a step, and sends what came of it.

Run by the supervisor as `python -m nioserve.engine.process CONFIG EPOCH`. SIGTERM and SIGINT are ignored: a service
manager sends them to every process of the unit, and running answers must finish first. The supervisor ends the engine
when the last API worker is gone; it has nothing to save.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import time
from pathlib import Path

import torch

from nioserve import logs
from nioserve.config import Config
from nioserve.engine import messages, transport
from nioserve.engine.core import Engine, StepResult
from nioserve.engine.limits import resolve_limits
from nioserve.engine.messages import Accepted, Cancel, EngineReady, FromEngine, Heartbeat, Outputs, Rejected
from nioserve.metrics import EngineMetrics
from nioserve.models import manifest
from nioserve.models.loader import load
from nioserve.models.spec import ModelError, load_spec
from nioserve.parent import die_with_parent

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 0.5
REFUSED = 2
"""Exit status for a model or setting that a restart would not mend."""


class EngineLoop:
    """Connects an engine to its sockets."""

    def __init__(self, engine: Engine, metrics: EngineMetrics, runtime_dir: Path, epoch: int) -> None:
        self._engine, self._metrics, self._epoch = engine, metrics, epoch
        addresses = transport.Addresses(runtime_dir)
        self._workers = transport.Switchboard(addresses.engine(epoch))
        self._supervisor = transport.Sender(addresses.supervisor())
        self._beat_at = 0.0
        self._preemptions = 0

    def run(self) -> None:
        """Serve until the process is killed."""
        self._supervisor.send(messages.encode(EngineReady(self._epoch)))
        while True:
            self._beat()
            self._read()
            if self._engine.scheduler.has_work:
                self._send(self._engine.step())
            self._observe()

    def _beat(self) -> None:
        now = time.monotonic()
        if now >= self._beat_at:
            self._supervisor.send(messages.encode(Heartbeat(self._epoch)))
            self._beat_at = now + HEARTBEAT_SECONDS

    def _read(self) -> None:
        """Take all messages there are; wait for one only when there is nothing to compute."""
        wait = 0 if self._engine.scheduler.has_work else int(HEARTBEAT_SECONDS * 1000)
        while received := self._workers.receive(wait):
            wait = 0
            worker, body = received
            self._handle(worker, messages.decode_to_engine(body))

    def _handle(self, worker: bytes, message: messages.ToEngine) -> None:
        if isinstance(message, Cancel):
            self._engine.cancel(worker, message.request_id)
            return
        try:
            admitted = self._engine.add(worker, message)
        except ValueError as error:
            # The API checks the same limits first, so this is a fault of ours; it must not take the engine down.
            log.error("request refused", extra={"request_id": message.request_id, "problem": str(error)})
            self._reply(worker, Rejected(message.request_id, "invalid", 0))
            return
        if admitted:
            self._reply(worker, Accepted(message.request_id))
        else:
            self._reply(worker, Rejected(message.request_id, "queue_full", self._engine.retry_after()))

    def _send(self, result: StepResult) -> None:
        for worker, outputs in result.outputs.items():
            self._reply(worker, Outputs(outputs))
        metrics = self._metrics
        metrics.iteration.observe(result.tokens)
        metrics.prompt_tokens.inc(result.prompt_tokens)
        metrics.generated.inc(result.generated)
        for seconds in result.queue_times:
            metrics.queue_time.observe(seconds)

    def _reply(self, worker: bytes, message: FromEngine) -> None:
        try:
            self._workers.send(worker, messages.encode(message))
        except transport.PeerGoneError:
            log.warning("an API worker is gone, its requests are dropped")
            self._engine.cancel_worker(worker)

    def _observe(self) -> None:
        scheduler, metrics = self._engine.scheduler, self._metrics
        metrics.running.set(len(scheduler.running))
        metrics.waiting.set(len(scheduler.waiting))
        metrics.cache.set(scheduler.pool.usage)
        if scheduler.preemptions > self._preemptions:
            metrics.preemptions.inc(scheduler.preemptions - self._preemptions)
            self._preemptions = scheduler.preemptions


def build(config: Config) -> Engine:
    """Load the model, make the engine and warm it up; ModelError when it cannot be served."""
    if config.engine.threads is not None:
        torch.set_num_threads(config.engine.threads)
    spec = load_spec(config.model.path)
    limits = resolve_limits(config, spec)
    engine = Engine(load(config.model.path, config.engine.dtype, limits.max_model_len), limits)
    engine.warm_up()
    log.info("engine warm", extra={"threads": torch.get_num_threads(), "max_model_len": limits.max_model_len,
                                   "kv_cache_tokens": limits.kv_cache_tokens})  # fmt: skip
    # The model lives as long as the process: collections need not walk it again and again.
    gc.collect()
    gc.freeze()
    return engine


def main() -> None:
    """Run the engine process."""
    die_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config_file, epoch = Path(sys.argv[1]), int(sys.argv[2])
    config = Config.model_validate_json(config_file.read_text(encoding="utf-8"))
    logs.set_up("engine", config.log.level, config.log.format)
    try:
        engine = build(config)
    except (ModelError, RuntimeError, MemoryError) as error:
        log.error("the model cannot be served", extra={"problem": str(error) or "out of memory"})
        sys.stderr.flush()
        os._exit(REFUSED)  # torch's threads need no farewell
    name = config.model.served_name or manifest.model_name(config.model.path)
    EngineLoop(engine, EngineMetrics(name), config_file.parent, epoch).run()


if __name__ == "__main__":
    main()
