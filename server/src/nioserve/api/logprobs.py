"""Log probabilities of tokens, in the two forms that OpenAI's API has for them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from nioserve.engine.messages import TokenLogprobs

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class Scored(NamedTuple):
    """A token of an answer: where in the text it begins, in characters, and how likely it and its rivals were."""

    offset: int
    token: int
    logprobs: TokenLogprobs


class TokenTexts:
    """What each token stands for. Half a character has bytes, too: the text shows U+FFFD for it, the bytes are true."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {number: added.content for number, added in tokenizer.get_added_tokens_decoder().items()}
        decoder = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else {}
        parts = decoder.get("decoders", [decoder])
        self._byte_level = any(part.get("type") == "ByteLevel" for part in parts)

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes that the token adds to the text."""
        if token in self._added:
            return self._added[token].encode()
        piece = self._tokenizer.id_to_token(token) or ""
        if self._byte_level:
            table = _byte_level_alphabet()
            return b"".join(table.get(letter) or letter.encode() for letter in piece)
        byte = _BYTE_PIECE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace("\u2581", " ").encode()

    def chat(self, tokens: Sequence[Scored]) -> dict[str, Any]:
        """Return the `logprobs` object of a chat choice."""
        return {"content": [
            {**self._entry(scored.token, scored.logprobs.chosen),
             "top_logprobs": [self._entry(token, value) for token, value in scored.logprobs.top]}
            for scored in tokens
        ], "refusal": None}  # fmt: skip

    def completion(self, tokens: Sequence[Scored], prompt_length: int) -> dict[str, Any]:
        """Return the `logprobs` object of a completion, whose text begins with `prompt_length` echoed characters."""
        return {
            "tokens": [self._text(scored.token) for scored in tokens],
            "token_logprobs": [_finite(scored.logprobs.chosen) for scored in tokens],
            "top_logprobs": [
                {self._text(token): _finite(value) for token, value in scored.logprobs.top} for scored in tokens
            ],
            "text_offset": [prompt_length + scored.offset for scored in tokens],
        }

    def _text(self, token: int) -> str:
        return self.bytes_of(token).decode(errors="replace")

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.bytes_of(token)
        return {"token": data.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(data)}


def _finite(logprob: float) -> float:
    """Return the value as JSON can hold it; -9999 is what OpenAI says for the impossible."""
    return max(logprob, -9999.0)


@cache
def _byte_level_alphabet() -> dict[str, bytes]:
    """Return GPT-2's letters for bytes: printable ones stand for themselves, the others come after U+0100 in order."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {
        **{chr(byte): bytes([byte]) for byte in printable},
        **{chr(256 + place): bytes([byte]) for place, byte in enumerate(others)},
    }
