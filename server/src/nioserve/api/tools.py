"""Tool calls in the ways that models write them.

Hermes (Qwen2.5, Qwen3):  <tool_call>\n{"name": "f", "arguments": {...}}\n</tool_call>, any number of them in the text
Mistral (v3 tokenisers):  [TOOL_CALLS] [{"name": "f", "arguments": {...}}, ...]
Llama 3:                  {"name": "f", "parameters": {...}}, the whole answer, after <|python_tag|> or nothing

Where a call must be made, the grammar asks for that JSON without anything around it, and the same parser reads it.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from nioserve.api.detokenize import overlap
from nioserve.engine.messages import Grammar

Delta = dict[str, Any]
"""What a piece of text adds to a message: `content`, `tool_calls`, both or neither, as in OpenAI's chunks."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How calls begin and end in a model's text; without a beginning, a call is an answer that begins with `{`."""

    start: str
    end: str = ""
    bare: bool = False
    arguments: str = "arguments"
    id_prefix: str = "call_"
    id_length: int = 24


HERMES = ToolFormat("<tool_call>", "</tool_call>")
MISTRAL = ToolFormat("[TOOL_CALLS]", id_prefix="", id_length=9)  # its template takes no other ids
LLAMA = ToolFormat("<|python_tag|>", bare=True, arguments="parameters")

_HEAD = re.compile(
    r'\s*\[?\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"([\w.-]+)"\s*,\s*'
    r'"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_MAX_HEAD = 1024
"""Characters after which what looked like a call, and has no name and no arguments yet, is none."""
_BETWEEN = " \t\r\n]},;"


def tool_format(template: str) -> ToolFormat | None:
    """Return how a model writes calls, by its chat template; None when it is none of the above."""
    if "[TOOL_CALLS]" in template:
        return None if "[ARGS]" in template else MISTRAL
    if "<tool_call>" in template:
        return None if "<function=" in template else HERMES
    return LLAMA if "ipython" in template else None


class ToolCallParser:
    """Splits one answer into words and calls, as it comes. `done` once no more than one call was wanted and it is made.

    What begins like a call and turns out to be none is given as content, so that nothing the model said is lost.
    """

    def __init__(self, form: ToolFormat, *, forced: bool, parallel: bool) -> None:
        self._format, self._parallel = form, parallel
        self._step: Callable[[Delta], bool] = self._head if forced else self._beginning if form.bare else self._words
        self._rest = ""
        self._opening = ""  # what has to be given back if no call follows
        self._depth, self._quoted, self._escaped = 0, False, False
        self.calls = 0
        self.done = False

    def push(self, text: str) -> Delta:
        """Return what the text adds to the message."""
        self._rest += text
        delta: Delta = {}
        while not self.done and self._step(delta):
            pass
        return delta

    def end(self) -> Delta:
        """Return what is left when the answer is over."""
        delta: Delta = {}
        if not self.done and self._step != self._arguments and (self._opening + self._rest).strip(_BETWEEN):
            _say(delta, self._opening + self._rest)
        self._rest = self._opening = ""
        return delta

    # Each step takes what it can from the rest, and returns whether another step can go on.

    def _words(self, delta: Delta) -> bool:
        if self.calls:
            self._rest = self._rest.lstrip()  # between two calls there is nothing to be said
        before, start, after = self._rest.partition(self._format.start)
        if not start:
            keep = overlap(self._rest, self._format.start)
            before, self._rest = self._rest[: len(self._rest) - keep], self._rest[len(self._rest) - keep :]
        else:
            self._opening, self._rest, self._step = start, after, self._head
        _say(delta, before)
        return bool(start)

    def _beginning(self, delta: Delta) -> bool:
        text = self._rest.lstrip()
        if text.startswith("{"):
            self._step = self._head
        elif not self._format.start.startswith(text[: len(self._format.start)]):
            self._step = self._prose
        elif text.startswith(self._format.start):
            self._opening, self._rest, self._step = self._format.start, text[len(self._format.start) :], self._head
        else:
            return False
        return True

    def _prose(self, delta: Delta) -> bool:
        _say(delta, self._opening + self._rest)
        self._rest = self._opening = ""
        return False

    def _head(self, delta: Delta) -> bool:
        match = _HEAD.match(self._rest)
        if match is None:
            closed = bool(self._format.end) and self._format.end in self._rest
            if closed or len(self._rest) > _MAX_HEAD or self._is_other_json():
                self._step = self._prose if self._format.bare else self._words
                _say(delta, self._opening + self._rest)
                self._rest = self._opening = ""
            return False
        call = {"index": self.calls, "id": self._new_id(), "type": "function",
                "function": {"name": match[1], "arguments": ""}}  # fmt: skip
        delta.setdefault("tool_calls", []).append(call)
        self._rest, self._opening, self._step = self._rest[match.end() :], "", self._arguments
        self._depth, self._quoted, self._escaped = 0, False, False
        self.calls += 1
        return True

    def _is_other_json(self) -> bool:
        """Return whether the rest is a whole JSON value, and so no call."""
        if not self._rest.rstrip().endswith(("}", "]")):
            return False
        try:
            json.loads(self._rest)
        except ValueError:
            return False
        return True

    def _arguments(self, delta: Delta) -> bool:
        """Pass the arguments on, up to the brace that closes them."""
        for at, letter in enumerate(self._rest):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped, self._quoted = letter == "\\", letter != '"'
            elif letter == '"':
                self._quoted = True
            elif letter in "{}":
                self._depth += 1 if letter == "{" else -1
                if self._depth == 0:
                    _argue(delta, self.calls - 1, self._rest[: at + 1])
                    self._rest, self._step = self._rest[at + 1 :], self._after
                    self.done = not self._parallel
                    return True
        _argue(delta, self.calls - 1, self._rest)
        self._rest = ""
        return False

    def _after(self, delta: Delta) -> bool:
        self._rest = self._rest.lstrip(_BETWEEN)
        end = self._format.end
        if end and self._rest.startswith(end):
            self._rest, self._step = self._rest[len(end) :], self._words
        elif self._rest.startswith("{"):
            self._step = self._head
        elif not self._rest or end.startswith(self._rest):
            return False
        else:
            self._step = self._prose if self._format.bare else self._words
        return True

    def _new_id(self) -> str:
        letters = string.ascii_letters + string.digits
        return self._format.id_prefix + "".join(secrets.choice(letters) for _ in range(self._format.id_length))


def call_grammar(tools: Sequence[Delta], form: ToolFormat, *, parallel: bool) -> Grammar:
    """Return the grammar of a call of one of these functions, or of a list of calls.

    A function's schema may refer to its own definitions, so it is moved whole and its references with it.
    """
    definitions, calls = {}, []
    for tool in tools:
        name = tool["name"]
        definitions[name] = _moved(tool.get("parameters") or {"type": "object"}, f"#/$defs/{name}")
        calls.append({
            "type": "object",
            "properties": {"name": {"const": name}, form.arguments: {"$ref": f"#/$defs/{name}"}},
            "required": ["name", form.arguments],
            "additionalProperties": False,
        })  # fmt: skip
    call: Delta = calls[0] if len(calls) == 1 else {"anyOf": calls}
    schema = {"type": "array", "items": call, "minItems": 1} if parallel else call
    return Grammar("json_schema", msgspec.json.encode({**schema, "$defs": definitions}).decode())


def _moved(schema: Any, to: str) -> Any:  # noqa: ANN401  any JSON value
    """Return a schema whose references hold when its root is at another place of a larger one."""
    if isinstance(schema, list):
        return [_moved(item, to) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: to + item[1:] if name == "$ref" and isinstance(item, str) and item.startswith("#") else _moved(item, to)
        for name, item in schema.items()
    }


def _say(delta: Delta, text: str) -> None:
    if text:
        delta["content"] = delta.get("content", "") + text


def _argue(delta: Delta, index: int, text: str) -> None:
    """Add to a call's arguments; in the delta that brings the call itself, to that."""
    if not text:
        return
    calls = delta.setdefault("tool_calls", [])
    if not calls or calls[-1]["index"] != index:
        calls.append({"index": index, "function": {"arguments": ""}})
    calls[-1]["function"]["arguments"] += text
