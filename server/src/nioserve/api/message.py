"""The assistant's message in a chat answer: words and tool calls, whole or piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nioserve.api.answer import Answer
from nioserve.api.choice import Choice
from nioserve.api.logprobs import TokenTexts
from nioserve.api.tools import Delta, ToolCallParser
from nioserve.engine.messages import FinishReason


class AssistantMessage:
    """The message of one choice. `parser` finds tool calls; None when there can be none."""

    def __init__(self, answer: Answer, choice: Choice, parser: ToolCallParser | None, texts: TokenTexts | None) -> None:
        self._answer, self._choice, self._parser, self._texts = answer, choice, parser, texts
        self._content: list[str] = []
        self._calls: list[Delta] = []

    def opening(self) -> dict[str, Any]:
        """Return the first chunk's choice."""
        return self._chunk({"role": "assistant", "content": ""}, None)

    def chunks(self, text: str) -> Iterator[dict[str, Any]]:
        """Yield the choices of the chunks that this text, or the end of the answer, makes."""
        delta = self._delta(text)
        if delta:
            yield self._chunk(delta, self._logprobs())
        if self._choice.finish_reason is not None:
            yield {**self._chunk({}, self._logprobs()), "finish_reason": self._reason()}

    def push(self, text: str) -> None:
        """Add text to the whole message."""
        delta = self._delta(text)
        self._content.append(delta.get("content", ""))
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                self._calls.append({name: call[name] for name in ("id", "type", "function")})
            else:
                self._calls[-1]["function"]["arguments"] += call["function"]["arguments"]

    def whole(self) -> dict[str, Any]:
        """Return the choice with all that was pushed."""
        content = "".join(self._content)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._calls:
            message.update(content=content or None, tool_calls=self._calls)
        return {"index": self._choice.index, "message": message, "logprobs": self._logprobs(),
                "finish_reason": self._reason()}  # fmt: skip

    def _delta(self, text: str) -> Delta:
        if self._parser is None:
            return {"content": text} if text else {}
        delta = self._parser.push(text)
        if self._parser.done and self._choice.finish_reason is None:
            self._answer.cut(self._choice)
        if self._choice.finish_reason is not None:
            rest = self._parser.end()
            if rest:
                delta["content"] = delta.get("content", "") + rest["content"]
        return delta

    def _chunk(self, delta: Delta, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": self._choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _logprobs(self) -> dict[str, Any] | None:
        scored = self._choice.scored() if self._texts else []
        return self._texts.chat(scored) if self._texts and scored else None

    def _reason(self) -> str | None:
        """Return OpenAI's reason. A call that was cut off by the length is not reported as one to carry out."""
        reason = self._choice.finish_reason
        if reason is FinishReason.STOP and self._parser is not None and self._parser.calls:
            return "tool_calls"
        return reason.value if reason else None
