"""A request's grammar in the library's words, and the bounds on all of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer
    from llguidance._lib import JsonCompileOptions  # a type that exists for checkers alone

    from nioserve.engine.messages import Grammar

MAX_SOURCE = 64 * 1024
"""Characters of a schema or regular expression."""

_JSON_OPTIONS: JsonCompileOptions = {"whitespace_pattern": r"[ \n\r\t]{0,16}", "lenient": False, "coerce_one_of": False}
"""Bounded white space, or a model may produce nothing else until its tokens run out; unknown keywords are errors."""


class GrammarError(ValueError):
    """A grammar that cannot be used; the message says why, and is fit for the client that sent it."""


def translate(grammar: Grammar) -> str:
    """Return the grammar as llguidance takes it; GrammarError when it is no JSON or too long."""
    from llguidance import LLMatcher

    if len(grammar.source) > MAX_SOURCE:
        raise GrammarError(f"it is {len(grammar.source)} characters long; at most {MAX_SOURCE} are taken")
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.source)
    if grammar.kind == "json_object":
        return LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=_JSON_OPTIONS)
    if grammar.kind != "json_schema":
        raise GrammarError(f"{grammar.kind!r} is no kind of grammar; there are json_object, json_schema and regex")
    try:
        if not isinstance(json.loads(grammar.source), dict):
            raise GrammarError("a JSON schema must be an object")
        return LLMatcher.grammar_from_json_schema(grammar.source, overrides=_JSON_OPTIONS)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"it is no JSON schema: {error}" if str(error) else "it is nested too deep") from error


def build(text: str, tokenizer: LLTokenizer) -> LLMatcher:
    """Compile what `translate` returned; GrammarError with the library's reason.

    The limits bound what one step may cost and hold. They do not bound each way to compile: see check.py.
    """
    from llguidance import LLMatcher

    matcher = LLMatcher(tokenizer, text, log_level=0, limits=_limits())
    if not matcher.is_error():
        matcher.compute_bitmask()  # much is done on first use, and some grammars fail only then
    if matcher.is_error():
        raise GrammarError(explain(matcher))
    return matcher


def explain(matcher: LLMatcher) -> str:
    """Return the first line of the library's error."""
    return matcher.get_error().removesuffix("<non-verbose/>").strip().split("\n", 1)[0][:500]


def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=200_000,
        step_lexer_fuel=50_000,  # some 4 ms
        step_max_items=20_000,  # some 1 ms
        max_lexer_states=20_000,  # some 16 MB
        max_grammar_size=50_000,
        precompute_large_lexemes=False,
        verbose_errors=False,
    )
