"""The answers to one request while they are generated: text, usage, and what is measured of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from nioserve.api.choice import Choice
from nioserve.engine.client import Generation
from nioserve.engine.messages import FinishReason
from nioserve.metrics import ApiMetrics


class AnswerTimeoutError(Exception):
    """The answer took longer than the configuration allows."""


class Answer:
    """Turns a generation's outputs into text. Its `close` must be called once, and tells engine and metrics the end.

    `prompt_tokens` counts each prompt once, however many choices it has; `per_prompt` is that number.
    """

    def __init__(
        self, generation: Generation, choices: Sequence[Choice], prompt_tokens: int, per_prompt: int,
        started: float, timeout: float, metrics: ApiMetrics,
    ) -> None:  # fmt: skip
        self.choices = choices
        self._generation, self._prompt_tokens, self._per_prompt = generation, prompt_tokens, per_prompt
        self._started, self._metrics = started, metrics
        late = AnswerTimeoutError(f"The answer was not complete within {timeout:g} seconds. Ask for a shorter one.")
        self._timer = asyncio.get_running_loop().call_later(timeout, generation.fail, late)

    async def pieces(self) -> AsyncIterator[list[tuple[Choice, str]]]:
        """Yield what came since the last time: choices that have new text or have ended, and that text.

        EngineUnavailableError when the engine is lost on the way, AnswerTimeoutError when it takes too long.
        """
        while outputs := await self._generation.next():
            now = time.monotonic()
            texts: dict[int, str] = {}  # a reader who is late gets several outputs of one choice as one text
            for index, output in outputs:
                choice = self.choices[index]
                if choice.finish_reason is not None:
                    continue  # cut off before its end; the engine had not heard of it yet
                self._measure(choice, len(output.tokens), now)
                text = choice.push(output)
                if choice.finish_reason is not None:
                    self._generation.cancel(index)
                if text or choice.finish_reason is not None:
                    texts[index] = texts.get(index, "") + text
            if texts:
                yield [(self.choices[index], text) for index, text in texts.items()]

    def cut(self, choice: Choice) -> None:
        """End a choice here, as if the model had."""
        choice.finish_reason = FinishReason.STOP
        self._generation.cancel(choice.index)

    def failed(self) -> None:
        """Note that the choices that still ran have ended in an error."""
        for choice in self.choices:
            choice.finish_reason = choice.finish_reason or FinishReason.ERROR

    def _measure(self, choice: Choice, tokens: int, now: float) -> None:
        if choice.first:
            self._metrics.inter_token.observe(now - choice.last)
        elif tokens:
            choice.first = now
            self._metrics.first_token.observe(now - self._started)
        choice.last = now

    def close(self, record: dict[str, Any]) -> None:
        """End the request: cancelled in the engine unless it is over, counted, each choice by itself, and logged."""
        self._timer.cancel()
        self._generation.close()
        record.update(self._log_fields())
        for choice in self.choices:
            reason = choice.finish_reason or FinishReason.ABORT
            self._metrics.finished[reason].inc()
            if reason in (FinishReason.STOP, FinishReason.LENGTH):
                self._metrics.latency.observe(choice.last - self._started)
                self._metrics.answer.observe(choice.tokens)
                if choice.tokens > 1:
                    self._metrics.per_token.observe((choice.last - choice.first) / (choice.tokens - 1))
        self._metrics.prompt.observe(self._prompt_tokens)

    def usage(self) -> dict[str, Any]:
        """Return OpenAI's usage object."""
        completion = sum(choice.tokens for choice in self.choices)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self._prompt_tokens + completion,
            # Of a prompt's choices only the first counts, as the prompt itself does.
            "prompt_tokens_details": {
                "cached_tokens": sum(choice.cached_tokens for choice in self.choices[:: self._per_prompt])
            },
        }

    def _log_fields(self) -> dict[str, Any]:
        firsts = [choice.first for choice in self.choices if choice.first]
        reason = next((choice.finish_reason for choice in self.choices if choice.finish_reason), FinishReason.ABORT)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": sum(choice.tokens for choice in self.choices),
            "finish_reason": reason.value,
            "first_token_ms": round((min(firsts) - self._started) * 1000, 1) if firsts else None,
        }
