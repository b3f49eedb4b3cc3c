"""All metrics of the model, in vLLM's names and buckets under our prefix.

Each process writes its own memory-mapped files in PROMETHEUS_MULTIPROC_DIR, set by the supervisor before this module is
imported; the supervisor adds them up. So counts outlive the process that counted. Durations are differences of one
process's monotonic clock.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from nioserve.engine.messages import FinishReason

# The registry is only where they are declared; nothing is collected from it in the process that counts.
_REGISTRY = CollectorRegistry()
_MODEL = ("model_name",)
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160,
                640, 2560)  # fmt: skip
_PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


def _gauge(name: str, text: str) -> Gauge:
    # "live": gone with the process, so that a dead engine does not go on running three requests.
    return Gauge(f"nioserve_{name}", text, _MODEL, registry=_REGISTRY, multiprocess_mode="livemostrecent")


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(f"nioserve_{name}", text, (*_MODEL, *labels), registry=_REGISTRY)


def _histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(f"nioserve_{name}", text, _MODEL, registry=_REGISTRY, buckets=buckets)


class EngineMetrics:
    """What the engine process knows."""

    def __init__(self, model: str) -> None:
        self.running = _gauge("num_requests_running", "Requests in the running batch.").labels(model)
        self.waiting = _gauge("num_requests_waiting", "Requests in the queue.").labels(model)
        self.cache = _gauge("kv_cache_usage_perc", "Share of the cache's blocks in use, 0 to 1.").labels(model)
        self.preemptions = _counter("num_preemptions", "Requests put back for want of cache.").labels(model)
        self.shed = _counter("requests_shed", "Requests given up because memory ran out in a step.").labels(model)
        self.prefix_queries = _counter("prefix_cache_queries", "Prompt tokens looked up in the cache.").labels(model)
        self.prefix_hits = _counter("prefix_cache_hits", "Prompt tokens found there.").labels(model)
        self.drafts = _counter("spec_decode_num_draft_tokens", "Tokens guessed.").labels(model)
        self.accepted = _counter("spec_decode_num_accepted_tokens", "Guesses that were right.").labels(model)
        self.prompt_tokens = _counter("prompt_tokens", "Prompt tokens computed.").labels(model)
        self.generated = _counter("generation_tokens", "Tokens generated.").labels(model)
        self.queue_time = _histogram("request_queue_time_seconds", "Arrival to first step.", _REQUEST).labels(model)
        self.iteration = _histogram("iteration_tokens_total", "Tokens computed in a step.", _TOKENS).labels(model)


class ApiMetrics:
    """What an API worker knows: what its clients saw."""

    def __init__(self, model: str) -> None:
        success = _counter("request_success", "Requests ended, by reason.", "finished_reason")
        self.finished = {reason: success.labels(model, reason.value) for reason in FinishReason}
        self._rejections = _counter("admission_rejections", "Requests not admitted, by reason.", "reason")
        self._model = model
        self.first_token = _histogram(
            "time_to_first_token_seconds", "Request read to first token.", _FIRST_TOKEN
        ).labels(model)
        self.inter_token = _histogram("inter_token_latency_seconds", "Token to token.", _PER_TOKEN).labels(model)
        self.per_token = _histogram(
            "request_time_per_output_token_seconds", "Mean time per token after the first, by request.", _PER_TOKEN
        ).labels(model)
        self.latency = _histogram("e2e_request_latency_seconds", "Request read to last token.", _REQUEST).labels(model)
        self.prompt = _histogram("request_prompt_tokens", "Prompt tokens by request.", _TOKENS).labels(model)
        self.answer = _histogram("request_generation_tokens", "Generated tokens by request.", _TOKENS).labels(model)
        for reason in ("queue_full", "queue_tokens", "queue_timeout", "too_long", "engine_unavailable", "draining"):
            self._rejections.labels(model, reason)

    def rejected(self, reason: str) -> None:
        """Count a request that was not admitted."""
        self._rejections.labels(self._model, reason).inc()
