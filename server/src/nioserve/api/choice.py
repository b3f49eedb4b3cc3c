"""One of the answers to a request: from the engine's outputs to text that may go out."""

from __future__ import annotations

from nioserve.api.detokenize import Detokenizer, StopStrings
from nioserve.api.logprobs import Scored
from nioserve.engine.messages import FinishReason, Output


class Choice:
    """Its text so far, how many tokens it took, and why it ended; `first` and `last` are when tokens came, else 0."""

    def __init__(self, index: int, detokenizer: Detokenizer, stops: tuple[str, ...]) -> None:
        self.index = index
        self.tokens = self.cached_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.first = self.last = 0.0
        self._detokenizer, self._stops = detokenizer, StopStrings(stops)
        self._known = self._out = 0  # characters that are known, and that went out
        self._scored: list[Scored] = []

    def push(self, output: Output) -> str:
        """Return the text that may go out now; `finish_reason` is set when it is the last."""
        self.tokens += len(output.tokens)
        self.cached_tokens += output.cached_tokens
        text = ""
        for position, token in enumerate(output.tokens):
            if output.logprobs is not None:
                self._scored.append(Scored(self._known + len(text), token, output.logprobs[position]))
            text += self._detokenizer.push(token)
        self._known += len(text)
        out = self._stops.push(text)
        if output.finish_reason is not None:
            out += self._stops.push(self._detokenizer.end()) + self._stops.end()
            self.finish_reason = output.finish_reason
        if self._stops.hit:
            self.finish_reason = FinishReason.STOP
        self._out += len(out)
        return out

    def scored(self) -> list[Scored]:
        """Return the tokens of the text that went out since the last call.

        At the end: those of a stop string are left out, and so is the end token, as OpenAI does.
        """
        if self.finish_reason is FinishReason.LENGTH:
            count = len(self._scored)
        else:
            count = sum(one.offset < self._out for one in self._scored)
        ready, self._scored = self._scored[:count], self._scored[count:]
        return ready
