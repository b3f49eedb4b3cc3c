"""The texts that conversions learn from and that evaluations measure on. No text is in both sets."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

CALIBRATION, EVALUATION = "calibration.yml", "evaluation.yml"


@dataclass(frozen=True, slots=True)
class TokenisedTexts:
    """One of the sets in a model's tokens, cut to the model's context; lists are empty where the set has none.

    A model without a chat template has no `chats`, and its `prompts` are plain text.
    """

    english: list[list[int]]
    code: list[list[int]]
    chinese: list[list[int]]
    chats: list[list[int]]
    prompts: list[list[int]]

    def all(self) -> list[list[int]]:
        """Return every text, one after the other."""
        return [*self.english, *self.code, *self.chinese, *self.chats, *self.prompts]


def sha256_of_texts(name: str) -> str:
    """Return the sha256 of a set's file as hex."""
    return hashlib.sha256((files(__package__) / name).read_bytes()).hexdigest()


def tokenised(name: str, directory: Path, longest: int) -> TokenisedTexts:
    """Return a set in the tokens of the model in `directory`, each text cut to `longest` tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    content: dict[str, list[Any]] = yaml.safe_load((files(__package__) / name).read_text(encoding="utf-8"))

    def encode(text: str, special: bool) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"][:longest]
        return ids

    def chat(turns: list[str], open_end: bool) -> list[int]:
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
        # The template writes the special tokens itself.
        return encode(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_end), False)

    has_template = tokenizer.chat_template is not None
    prompts = content.get("prompts", [])
    return TokenisedTexts(
        **{kind: [encode(text, True) for text in content.get(kind, [])] for kind in ("english", "code", "chinese")},
        chats=[chat(turns, False) for turns in content.get("chats", [])] if has_template else [],
        prompts=[chat([prompt], True) if has_template else encode(prompt, True) for prompt in prompts],
    )
