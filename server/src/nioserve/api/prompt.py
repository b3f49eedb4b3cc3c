"""From messages to token ids: the model's chat template and tokeniser, without torch or transformers.

An API worker needs neither; leaving them out makes it start in a second and spares 300 MB per worker.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from nioserve.models.spec import ModelError, read_json


class PromptError(Exception):
    """Messages that the model's template does not take, such as two user turns in a row."""


class Prompter:
    """Renders conversations as the model was trained to read them, and turns text into tokens and back."""

    def __init__(self, directory: Path) -> None:
        settings = read_json(directory / "tokenizer_config.json")
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._directory = directory
        self._special = [
            token.content for token in self.tokenizer.get_added_tokens_decoder().values() if token.special
        ]  # fmt: skip
        self._template = _environment().from_string(_template_source(directory, settings))
        self._tokens = {
            name: value["content"] if isinstance(value, dict) else value
            for name, value in settings.items()
            if name in ("bos_token", "eos_token", "unk_token", "pad_token") and value is not None
        }
        self._mark = f"\ue000{secrets.token_hex(8)}:"

    def encode(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Return the prompt of (role, text) messages, ready for the answer; PromptError when the template refuses."""
        quoted: list[str] = []
        safe = [{"role": role, "content": self._quote(text, quoted)} for role, text in messages]
        try:
            prompt = self._template.render(messages=safe, add_generation_prompt=True, **self._tokens)
        except (TemplateError, TypeError) as error:
            raise PromptError(str(error)) from error
        ids: list[int] = []
        # Odd pieces are the numbers of quoted texts.
        for index, piece in enumerate(self._split(prompt)):
            if index % 2:
                ids += self._literal.encode(quoted[int(piece)], add_special_tokens=False).ids
            elif piece:
                ids += self.tokenizer.encode(piece, add_special_tokens=False).ids
        return ids

    @cached_property
    def _literal(self) -> Tokenizer:
        """The tokeniser with control tokens read as text: a second one, because that is a switch of the whole."""
        tokenizer = Tokenizer.from_file(str(self._directory / "tokenizer.json"))
        tokenizer.encode_special_tokens = True
        return tokenizer

    def _quote(self, text: str, quoted: list[str]) -> str:
        """Take control tokens out of what people wrote: `<|im_end|>` in a message is text, and ends nothing.

        Ordinary messages pass through untouched, so that they are tokenised together with the template around them.
        """
        for token in self._special:
            while token in text:
                text = text.replace(token, f"{self._mark}{len(quoted)};", 1)
                quoted.append(token)
        return text

    def _split(self, prompt: str) -> list[str]:
        pieces: list[str] = []
        rest = prompt
        while self._mark in rest:
            before, _, rest = rest.partition(self._mark)
            number, _, rest = rest.partition(";")
            pieces += [before, number]
        return [*pieces, rest]


def _environment() -> ImmutableSandboxedEnvironment:
    """Return what chat templates are written for: transformers' environment and helpers."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:  # noqa: ANN401  any value a template holds
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _template_source(directory: Path, settings: dict[str, Any]) -> str:
    path = directory / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if not isinstance(template, str):
        raise ModelError(f"{directory}: has no chat template (chat_template.jinja); only chat models can be served")
    return template
