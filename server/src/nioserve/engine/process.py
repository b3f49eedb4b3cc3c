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
from prometheus_client import Counter

from nioserve import logs
from nioserve.config import Config
from nioserve.engine import messages, transport
from nioserve.engine.core import Engine, StepResult
from nioserve.engine.grammar.compiler import GrammarCompiler
from nioserve.engine.limits import free_memory, resolve_limits, resolve_max_model_len
from nioserve.engine.messages import Accepted, Cancel, EngineReady, FromEngine, Heartbeat, Load, Outputs
from nioserve.metrics import EngineMetrics
from nioserve.models import manifest
from nioserve.models.device import device_memory, resolve_device
from nioserve.models.loader import load
from nioserve.models.spec import ModelError, load_spec
from nioserve.parent import die_with_parent

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 0.5
GRAMMAR_POLL_SECONDS = 0.005
"""How often to look whether a grammar is compiled, when there is nothing else to do."""

REFUSED = 2
"""Exit status for a model or setting that a restart would not mend."""


class EngineLoop:
    """Connects an engine to its sockets."""

    def __init__(self, engine: Engine, metrics: EngineMetrics, runtime_dir: Path, epoch: int) -> None:
        self._engine, self._metrics, self._epoch = engine, metrics, epoch
        addresses = transport.Addresses(runtime_dir)
        self._workers = transport.Switchboard(addresses.engine(epoch))
        self._supervisor = transport.Sender(addresses.supervisor())
        self._known: set[bytes] = set()  # workers that have said something
        self._load = Load(None, None)
        self._beat_at = 0.0
        self._counted = {"preemptions": 0, "queries": 0, "hits": 0}

    def run(self) -> None:
        """Serve until the process is killed."""
        self._supervisor.send(messages.encode(EngineReady(self._epoch, self._engine.limits.max_model_len)))
        while True:
            beat = self._beat()
            self._read()
            if self._engine.has_work:
                self._send(self._engine.step())
            self._tell_load(again=beat)
            self._observe()

    def _beat(self) -> bool:
        """Tell the supervisor that the loop comes round, twice a second; return whether it was time."""
        now = time.monotonic()
        if now < self._beat_at:
            return False
        self._supervisor.send(messages.encode(Heartbeat(self._epoch)))
        self._beat_at = now + HEARTBEAT_SECONDS
        return True

    def _read(self) -> None:
        """Take all messages there are; wait for one only when there is nothing to compute."""
        idle = GRAMMAR_POLL_SECONDS if len(self._engine.intake.compiling) else HEARTBEAT_SECONDS
        wait = 0 if self._engine.scheduler.has_work else int(idle * 1000)
        while received := self._workers.receive(wait):
            wait = 0
            worker, body = received
            self._known.add(worker)
            self._handle(worker, messages.decode_to_engine(body))

    def _handle(self, worker: bytes, message: messages.ToEngine) -> None:
        if isinstance(message, Cancel):
            self._engine.cancel(worker, message.request_id)
            return
        refused = self._engine.add(worker, message)
        if refused is not None and refused.reason == "invalid":
            # The API checks the same first, so this is a fault of ours; it must not take the engine down.
            log.error("request refused", extra={"request_id": message.request_id})
        self._reply(worker, refused or Accepted(message.request_id))

    def _send(self, result: StepResult) -> None:
        for worker, outputs in result.outputs.items():
            self._reply(worker, Outputs(outputs))
        for worker, rejected in result.rejected:
            self._reply(worker, rejected)
        metrics = self._metrics
        if result.shed:
            log.error("memory ran out in a step, the newest requests were given up", extra={"requests": result.shed})
            metrics.shed.inc(result.shed)
        if result.drafts:
            metrics.drafts.inc(result.drafts)
            metrics.accepted.inc(result.accepted)
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
            self._known.discard(worker)
            self._engine.cancel_worker(worker)

    def _tell_load(self, *, again: bool) -> None:
        """Tell all workers which queues are full: when that changes, and the waiting time now and then."""
        before, now = self._load, self._engine.admission.load()
        changed = (before.short is None, before.conversations is None) != (now.short is None, now.conversations is None)
        if changed or (again and now != before):
            self._load = now
            for worker in tuple(self._known):
                self._reply(worker, now)

    def _observe(self) -> None:
        scheduler, metrics = self._engine.scheduler, self._metrics
        metrics.running.set(len(scheduler.running))
        metrics.waiting.set(scheduler.waiting)
        metrics.cache.set(scheduler.pool.usage)
        self._count("preemptions", scheduler.preemptions, metrics.preemptions)
        if scheduler.prefix is not None:
            self._count("queries", scheduler.prefix.queries, metrics.prefix_queries)
            self._count("hits", scheduler.prefix.hits, metrics.prefix_hits)

    def _count(self, name: str, total: int, counter: Counter) -> None:
        """Raise a counter by what its total grew since the last time."""
        if total > self._counted[name]:
            counter.inc(total - self._counted[name])
            self._counted[name] = total


def build(config: Config) -> Engine:
    """Load the model, make the engine and warm it up; ModelError when it cannot be served."""
    if config.engine.threads is not None:
        torch.set_num_threads(config.engine.threads)
    longest = resolve_max_model_len(config, load_spec(config.model.path))
    model = load(
        config.model.path, config.engine.dtype, longest, config.engine.device,
        kernels=config.engine.kernels, kv_cache_dtype=config.engine.kv_cache_dtype,
    )  # fmt: skip
    free = _free_bytes(resolve_device(config.engine.device))
    limits = resolve_limits(config, model.spec, model.cache_bytes_per_token, free)
    vocabulary, eos = model.spec.vocab_size, model.spec.eos_token_ids
    engine = Engine(model, limits, GrammarCompiler(config.model.path / "tokenizer.json", vocabulary, eos))
    engine.warm_up()
    log.info("engine warm", extra={"threads": torch.get_num_threads(), "max_model_len": limits.max_model_len,
                                   "kv_cache_tokens": limits.kv_cache_tokens})  # fmt: skip
    # The model lives as long as the process: collections need not walk it again and again.
    gc.collect()
    gc.freeze()
    return engine


def _free_bytes(device: torch.device) -> int:
    """Return the memory that is left on the device where the model runs."""
    return free_memory() if device.type == "cpu" else device_memory(device)[0]


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
