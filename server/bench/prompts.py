"""Distinct prompts of an exact number of tokens, in plain English, the same for every peer and in every run.

A prompt is built of whole words, and each word's tokens are counted with the model's own tokeniser: byte-level BPE
splits at spaces first, so the counts of words add up. Plain text, not random tokens, because what a model answers to
noise (often one word for ever) flatters engines that guess ahead.
"""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import Tokenizer

_TOPICS = (
    "a hospital ward at night", "the price of bread", "a bridge over a wide river", "the first day at a new school",
    "a train that is late", "growing tomatoes on a balcony", "a letter from the tax office", "winter in the mountains",
    "the history of the bicycle", "a broken washing machine", "learning to play the piano", "a small island harbour",
    "how a clock keeps time", "a factory that makes glass", "the rules of football", "a dog that is afraid of thunder",
    "choosing a used car", "the moon and the tides", "a recipe for vegetable soup", "a library without books",
)  # fmt: skip
_TASKS = (
    "Write a short story about", "Explain to a child", "List the main facts about", "Give practical advice on",
    "Describe in a few sentences", "Write a polite letter about", "Compare two opinions on",
    "Summarise what is known of",
)  # fmt: skip
_FILL = (  # noqa: SIM905  prose is easier to read than a list of words
    "Please be brief and clear, use simple words, give one example from daily life, and say at the end what you are "
    "least sure of. The reader is a busy person who knows little about it and has five minutes before a meeting "
    "begins. Do not repeat the question, do not use lists, and keep a friendly tone all the way through the text. "
).split()
_DETAILS = (
    "old", "new", "quiet", "busy", "cold", "warm", "green", "empty", "happy", "strange", "modern", "simple", "famous",
    "local", "wooden", "early", "late", "cheap", "heavy", "bright",
)  # fmt: skip


class Prompts:
    """Texts and token ids of exact length."""

    def __init__(self, tokenizer_file: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(tokenizer_file))
        self._sizes: dict[str, int] = {}

    def text(self, tokens: int, seed: int) -> str:
        """Return a text of exactly `tokens` tokens; another seed gives another text. ValueError below 24 tokens."""
        if tokens < 24:
            raise ValueError(f"a distinct prompt needs at least 24 tokens, not {tokens}")
        draw = random.Random(seed)  # noqa: S311  texts, no secrets
        head = f"Question {seed + 1}. {draw.choice(_TASKS)} {draw.choice(_TOPICS)}."
        words = [*head.split(), "Think", "of", "something", draw.choice(_DETAILS), "and", draw.choice(_DETAILS) + "."]
        while sum(map(self._size, words)) > tokens - 1:  # a long head for a short prompt
            words.pop()
        fill = draw.randrange(len(_FILL))
        left = tokens - self.count(" ".join(words))
        passed_over = 0
        while left and passed_over < len(_FILL):
            word = _FILL[fill % len(_FILL)]
            fill += 1
            passed_over += 1
            if self._size(word) <= left:
                words.append(word)
                left -= self._size(word)
                passed_over = 0
        text = " ".join(words) + "." * left  # none at all, unless every word is longer than what is left
        if self.count(text) != tokens:
            raise ValueError(f"this tokeniser's words do not add up: wanted {tokens} tokens, got {self.count(text)}")
        return text

    def ids(self, tokens: int, seed: int) -> list[int]:
        """Return the same as token ids."""
        return list(self._tokenizer.encode(self.text(tokens, seed), add_special_tokens=False).ids)

    def count(self, text: str) -> int:
        """Return the number of tokens of a text."""
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _size(self, word: str) -> int:
        """Return the tokens of a word that follows a space."""
        if word not in self._sizes:
            self._sizes[word] = self.count(f"a {word}") - self.count("a")
        return self._sizes[word]
