"""From tokens to text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer

_HALF = "\ufffd"
_PATIENCE = 8
"""Tokens to wait for a character to complete. None is longer than four bytes; beyond, the bytes are simply wrong."""


class Detokenizer:
    """Text of one answer. A token may hold a part of a character, or a part of several.

    tokenizers' own DecodeStream does nearly the same, but waits without end for bytes that never become a character,
    and keeps all of them. `spoken` are control tokens whose text counts, such as the one that begins a tool call.
    """

    def __init__(self, tokenizer: Tokenizer, spoken: Mapping[int, str] | None = None) -> None:
        self._tokenizer = tokenizer
        self._spoken = spoken or {}
        self._context: list[int] = []  # the tokens whose text went out last: what a token means depends on them
        self._waiting: list[int] = []  # tokens whose text is still to come

    def push(self, token: int) -> str:
        """Return the text that this token completes."""
        if token in self._spoken:
            return self.end() + self._spoken[token]
        self._waiting.append(token)
        text = self._tokenizer.decode(self._context + self._waiting)
        if text.endswith(_HALF) and len(self._waiting) < _PATIENCE:
            return ""
        return self._advance(text)

    def end(self) -> str:
        """Return what is left at the end of the answer, without a character that was cut off."""
        return self._advance(self._tokenizer.decode(self._context + self._waiting)).rstrip(_HALF)

    def _advance(self, text: str) -> str:
        known = len(self._tokenizer.decode(self._context)) if self._context else 0
        self._context, self._waiting = self._waiting, []
        return text[known:]


class StopStrings:
    """Holds back what may be the beginning of a stop string, and cuts the text at the first one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """Return what may go out; `hit` is set once a stop string was seen, and nothing follows."""
        if self.hit or not self._stops:
            return "" if self.hit else text
        self._held += text
        found = [position for stop in self._stops if (position := self._held.find(stop)) >= 0]
        if found:
            self.hit = True
            out, self._held = self._held[: min(found)], ""
            return out
        keep = max((overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def end(self) -> str:
        """Return what was held back for nothing."""
        out, self._held = self._held, ""
        return "" if self.hit else out


def overlap(text: str, word: str) -> int:
    """Return how many characters at the end of the text could begin the word, which is not in it yet."""
    return next((size for size in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:size])), 0)
