"""From messages to token ids: the model's chat template and tokeniser, without torch or transformers.

An API worker needs neither; leaving them out makes it start in a second and spares 300 MB per worker.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from nioserve.api.tools import tool_format
from nioserve.models.spec import ModelError, read_json


class PromptError(Exception):
    """Messages that the model's template does not take, such as two user turns in a row."""


class Prompter:
    """Renders conversations as the model was trained to read them, and turns text into tokens and back."""

    def __init__(self, directory: Path) -> None:
        settings = read_json(directory / "tokenizer_config.json")
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._directory = directory
        self._special = {
            token.content: number
            for number, token in self.tokenizer.get_added_tokens_decoder().items() if token.special
        }  # fmt: skip
        longest_first = sorted(self._special, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        source, environment = _template_source(directory, settings), _environment()
        self._template = environment.from_string(source)
        takes_tools = "tools" in meta.find_undeclared_variables(environment.parse(source))
        self.tool_format = tool_format(source) if takes_tools else None
        """How the model writes tool calls; None when its template knows no tools, or has a way that is unknown here."""
        marks = [self.tool_format.start, self.tool_format.end] if self.tool_format else []
        self.spoken = {self._special[mark]: mark for mark in marks if mark in self._special}
        """Control tokens that the model says to make a tool call."""
        self._tokens = {
            name: value["content"] if isinstance(value, dict) else value
            for name, value in settings.items()
            if name in ("bos_token", "eos_token", "unk_token", "pad_token") and value is not None
        }
        self._mark = f"\ue000{secrets.token_hex(8)}:"

    def encode(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Return the prompt of a conversation, ready for the answer; PromptError when the template refuses it.

        Messages and tools have the fields that chat templates know: `role`, `content`, `tool_calls` and so on.
        """
        quoted: list[str] = []
        values = {"messages": self._quote(messages, quoted), "tools": self._quote(tools, quoted) or None}
        try:
            prompt = self._template.render(**values, add_generation_prompt=True, **self._tokens)
        except (TemplateError, TypeError) as error:
            raise PromptError(str(error)) from error
        ids: list[int] = []
        # Odd pieces are the numbers of quoted texts.
        for index, piece in enumerate(re.split(f"{self._mark}([0-9]+);", prompt)):
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

    def _quote(self, value: Any, quoted: list[str]) -> Any:  # noqa: ANN401  whatever messages and tools hold
        """Take control tokens out of what people wrote: `<|im_end|>` in a message is text, and ends nothing.

        Ordinary messages pass through untouched, so that they are tokenised together with the template around them.
        """
        if isinstance(value, Mapping):
            return {self._quote(name, quoted): self._quote(item, quoted) for name, item in value.items()}
        if isinstance(value, str):
            return self._control.sub(lambda match: self._set_aside(match[0], quoted), value)
        return [self._quote(item, quoted) for item in value] if isinstance(value, Sequence) else value

    def encode_text(self, text: str) -> list[int]:
        """Return a bare prompt's tokens: control tokens in it count, and what the tokeniser adds (BOS) is added."""
        return self.tokenizer.encode(text).ids

    def _set_aside(self, token: str, quoted: list[str]) -> str:
        """Keep a text for later, and return what stands for it meanwhile."""
        quoted.append(token)
        return f"{self._mark}{len(quoted) - 1};"


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
