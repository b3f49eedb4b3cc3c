"""From tokens to text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

_HALF = "\ufffd"
_PATIENCE = 8
"""Tokens to wait for a character to complete. None is longer than four bytes; beyond, the bytes are simply wrong."""


class Detokenizer:
    """Text of one answer. A token may hold a part of a character, or a part of several."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._known = 0  # tokens whose text is out
        self._context = 0  # where the text to compare with begins: what a token means depends on the one before

    def push(self, tokens: Sequence[int]) -> str:
        """Return the text that these tokens complete."""
        return "".join(self._push(token) for token in tokens)

    def _push(self, token: int) -> str:
        self._ids.append(token)
        before = self._tokenizer.decode(self._ids[self._context : self._known])
        text = self._tokenizer.decode(self._ids[self._context :])
        if text.endswith(_HALF) and len(self._ids) - self._known < _PATIENCE:
            return ""
        self._context, self._known = self._known, len(self._ids)
        return text[len(before) :]

    def end(self) -> str:
        """Return what is left at the end of the answer, without a character that was cut off."""
        before = self._tokenizer.decode(self._ids[self._context : self._known])
        text = self._tokenizer.decode(self._ids[self._context :])
        self._known = len(self._ids)
        return text[len(before) :].rstrip(_HALF)


class StopStrings:
    """Holds back what may be the beginning of a stop string, and cuts the text at the first one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """Return what may go out; `hit` is set once a stop string was seen, and nothing follows."""
        if self.hit:
            return ""
        self._held += text
        found = [position for stop in self._stops if (position := self._held.find(stop)) >= 0]
        if found:
            self.hit = True
            out, self._held = self._held[: min(found)], ""
            return out
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def end(self) -> str:
        """Return what was held back for nothing."""
        out, self._held = self._held, ""
        return "" if self.hit else out

    def _overlap(self, stop: str) -> int:
        """Return how many characters at the end could begin `stop`."""
        for size in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:size]):
                return size
        return 0
