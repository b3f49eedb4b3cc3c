"""One answer while it is generated: its text, its usage, why it ended, and what is measured of it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from tokenizers import Tokenizer

from nioserve.api.detokenize import Detokenizer, StopStrings
from nioserve.engine.client import EngineUnavailableError, Generation
from nioserve.engine.messages import FinishReason, Output
from nioserve.metrics import ApiMetrics


class Answer:
    """Turns a generation's tokens into text. Its `close` must be called once, and tells engine and metrics the end."""

    def __init__(
        self, generation: Generation, tokenizer: Tokenizer, stops: tuple[str, ...], prompt_tokens: int,
        started: float, metrics: ApiMetrics,
    ) -> None:  # fmt: skip
        self._generation, self._metrics = generation, metrics
        self._text, self._stops = Detokenizer(tokenizer), StopStrings(stops)
        self._started, self._first, self._last = started, 0.0, 0.0
        self.prompt_tokens, self.completion_tokens = prompt_tokens, 0
        self.finish_reason: FinishReason | None = None

    async def pieces(self) -> AsyncIterator[str]:
        """Yield the text as it comes; EngineUnavailableError when the engine is lost on the way."""
        try:
            async for output in self._generation.outputs():
                self._measure(output)
                text = self._stops.push(self._text.push(output.tokens))
                if output.finish_reason is not None:
                    text += self._stops.push(self._text.end()) + self._stops.end()
                if text:
                    yield text
                if self._stops.hit or output.finish_reason is not None:
                    self.finish_reason = FinishReason.STOP if self._stops.hit else output.finish_reason
                    return
        except EngineUnavailableError:
            self.finish_reason = FinishReason.ERROR
            raise

    def _measure(self, output: Output) -> None:
        now = time.monotonic()
        self.completion_tokens += len(output.tokens)
        if self._first:
            self._metrics.inter_token.observe(now - self._last)
        else:
            self._first = now
            self._metrics.first_token.observe(now - self._started)
        self._last = now

    def close(self) -> None:
        """End the request: cancelled in the engine unless it is over, and counted."""
        self._generation.close()
        reason = self.finish_reason or FinishReason.ABORT
        self._metrics.finished[reason].inc()
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._metrics.latency.observe(time.monotonic() - self._started)
            self._metrics.prompt.observe(self.prompt_tokens)
            self._metrics.answer.observe(self.completion_tokens)
            if self.completion_tokens > 1:
                self._metrics.per_token.observe((self._last - self._first) / (self.completion_tokens - 1))

    def usage(self) -> dict[str, int]:
        """Return OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    def log_fields(self) -> dict[str, Any]:
        """Return what the request's log line says of the answer."""
        first = round((self._first - self._started) * 1000, 1) if self._first else None
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "finish_reason": (self.finish_reason or FinishReason.ABORT).value,
            "first_token_ms": first,
        }
