"""Whatever the logits say, an answer under a grammar has its form; and no grammar harms the others."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import jsonschema
import pytest
import torch
from support import CONTEXT, EOS, SPECIAL, make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nioserve.engine.core import Engine
from nioserve.engine.grammar.check import check
from nioserve.engine.grammar.compiler import GrammarCompiler
from nioserve.engine.grammar.matcher import Matcher
from nioserve.engine.grammar.source import MAX_SOURCE, GrammarError
from nioserve.engine.grammar.waiting import TIMEOUT_SECONDS, WaitingRoom
from nioserve.engine.limits import Limits
from nioserve.engine.messages import FinishReason, Grammar, Sampling, Submit
from nioserve.engine.sampling import SamplerState, sample
from nioserve.models.loader import load

SCHEMAS = {
    "nested": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "born": {"type": "integer", "minimum": 1900, "maximum": 2026},
            "address": {
                "type": "object",
                "properties": {"city": {"enum": ["Köln", "北京", "São Paulo"]}, "zip": {"type": "null"}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
        "required": ["name", "born", "address"],
        "additionalProperties": False,
    },
    "arrays": {
        "type": "array",
        "items": {"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"const": "x"}, "maxItems": 2}]},
        "minItems": 2,
        "maxItems": 4,
    },
    "unicode": {"enum": ["红色", "naïve", "🙂🙃", 'quote " and \\ backslash\n', 7, None]},
    "tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "number", "minimum": -1, "maximum": 1},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        },
    },
    "pattern": {"type": "object", "patternProperties": {"^k[0-9]$": {"type": "string", "pattern": "^[a-f红]{1,5}$"}},
                "minProperties": 0, "additionalProperties": False},
}  # fmt: skip


def trained_tokenizer() -> Tokenizer:
    """Tokens of several characters, of parts of characters, and of several with their punctuation."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = [json.dumps(schema, ensure_ascii=False) for schema in SCHEMAS.values()]
    text += ['{"name": "北京市红色", "born": 1999, "city":"Köln"}, [true,false],["x"]', '"}]}', "\n\n  ", "null}}"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text * 3, trainer)
    return tokenizer


@pytest.fixture(scope="module", params=["bytes", "trained"])
def tokenizer(request) -> Tokenizer:
    return make_tokenizer() if request.param == "bytes" else trained_tokenizer()


@pytest.fixture(scope="module")
def compiler(tokenizer, tmp_path_factory) -> GrammarCompiler:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return GrammarCompiler(path, vocabulary(tokenizer), [tokenizer.token_to_id("<|im_end|>")])


def vocabulary(tokenizer: Tokenizer) -> int:
    return tokenizer.get_vocab_size() + 5  # models round theirs up: no token has these numbers


def json_schema(schema: object) -> Grammar:
    return Grammar("json_schema", json.dumps(schema))


def generate(compiler, tokenizer, grammar: Grammar, seed: int, limit: int = 1500, **sampling):
    """Return an answer to random logits, and why it ended. Ends are likelier, or most would be cut off."""
    one = SamplerState(
        Sampling(**{"seed": seed, "grammar": grammar, **sampling}), [0], [tokenizer.token_to_id("<|im_end|>")],
        compiler.request(grammar).result(20),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    likely = [tokenizer.token_to_id(token) for token in ('"', "}", "]", "<|im_end|>")]
    answer: list[int] = []
    while len(answer) < limit:
        logits = torch.randn(1, vocabulary(tokenizer), generator=generator) * 3
        logits[0, likely] += 4
        answer.append(sample(logits, [one])[0].token)
        reason = one.accept(answer[-1])
        if reason is not None:
            return tokenizer.decode(answer), reason
    return tokenizer.decode(answer, skip_special_tokens=False), FinishReason.LENGTH


@pytest.mark.parametrize("name", SCHEMAS)
def test_any_logits_give_json_that_the_schema_accepts(compiler, tokenizer, name):
    for seed in range(12):
        text, reason = generate(compiler, tokenizer, json_schema(SCHEMAS[name]), seed)
        assert reason is FinishReason.STOP
        jsonschema.validate(json.loads(text), SCHEMAS[name])


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5}, {"frequency_penalty": 2.0}])
def test_other_parameters_do_not_lead_out_of_the_grammar(compiler, tokenizer, sampling):
    for seed in range(5):
        text, reason = generate(compiler, tokenizer, json_schema(SCHEMAS["nested"]), seed, **sampling)
        assert reason is FinishReason.STOP
        jsonschema.validate(json.loads(text), SCHEMAS["nested"])


def test_a_bias_does_not_lead_out_of_the_grammar(compiler, tokenizer):
    bias = dict.fromkeys(range(0, vocabulary(tokenizer), 3), 100.0)
    text, _ = generate(compiler, tokenizer, json_schema(SCHEMAS["unicode"]), 1, logit_bias=bias)
    assert json.loads(text) in SCHEMAS["unicode"]["enum"]


def test_any_json_object(compiler, tokenizer):
    for seed in range(10):
        text, reason = generate(compiler, tokenizer, Grammar("json_object"), seed)
        assert text.lstrip().startswith("{")
        if reason is FinishReason.STOP:
            assert isinstance(json.loads(text), dict)


def test_a_regular_expression_matches_the_whole_answer(compiler, tokenizer):
    expression = r"(红|blau|verde){2,4} [0-9]{3}-[A-Z]+"
    for seed in range(10):
        text, reason = generate(compiler, tokenizer, Grammar("regex", expression), seed)
        assert reason is FinishReason.STOP
        assert re.fullmatch(expression, text)


def test_an_answer_cut_off_is_the_beginning_of_one_with_the_form(compiler, tokenizer):
    schema = {"const": "a long text that does not end within a few tokens " * 4}
    text, reason = generate(compiler, tokenizer, json_schema(schema), 0, limit=6)
    assert reason is FinishReason.LENGTH
    assert text.strip()
    assert json.dumps(schema["const"]).startswith(text.lstrip())


@pytest.mark.parametrize("changes", [{"min_tokens": 200}, {"ignore_eos": True}])
def test_an_answer_that_can_only_end_ends(compiler, tokenizer, changes):
    text, reason = generate(compiler, tokenizer, Grammar("regex", "yes|no"), 3, **changes)
    assert reason is FinishReason.STOP
    assert text in ("yes", "no")


def test_min_tokens_keeps_an_answer_going_that_can_go_on(compiler, tokenizer):
    one = SamplerState(
        Sampling(0, min_tokens=5, grammar=Grammar("regex", "a+")), [0], [tokenizer.token_to_id("<|im_end|>")],
        compiler.request(Grammar("regex", "a+")).result(20),
    )  # fmt: skip
    logits = torch.zeros(1, vocabulary(tokenizer))
    logits[0, tokenizer.token_to_id("<|im_end|>")] = 9
    reasons = [one.accept(sample(logits.clone(), [one])[0].token) for _ in range(6)]
    assert reasons == [None] * 5 + [FinishReason.STOP]


def test_a_grammar_that_goes_beyond_the_bounds_ends_its_own_answer_alone(compiler, tokenizer):
    hostile = Grammar("regex", "|".join(f"a{{{count}}}b" for count in range(1, 1500)))
    grammars = [hostile, Grammar("regex", "a+")]
    matchers = [compiler.request(grammar).result(20) for grammar in grammars]
    end, letter = (tokenizer.token_to_id(token) for token in ("<|im_end|>", "a"))
    failing, other = (
        SamplerState(Sampling(0, grammar=grammar), [0], [end], matcher)
        for grammar, matcher in zip(grammars, matchers, strict=True)
    )
    logits = torch.zeros(2, vocabulary(tokenizer))
    logits[:, letter] = 9
    reason = None
    while reason is None and failing.generated < 1600:
        draws = sample(logits.clone(), [failing, other])
        assert other.accept(draws[1].token) is None
        assert draws[1].token == letter
        reason = failing.accept(draws[0].token)
    assert reason is FinishReason.ERROR
    assert "too many" in matchers[0].error
    assert compiler.request(hostile).result(20).error == "", "the next request begins anew"


def test_a_grammar_is_compiled_once_and_only_the_latest_are_kept(compiler):
    grammar = Grammar("regex", "once[0-9]")
    compiler.request(grammar).result(20)
    assert compiler.request(grammar).done()
    for number in range(40):
        compiler.request(Grammar("regex", f"other{number}")).result(20)
    again = compiler.request(grammar)
    assert isinstance(again.result(20), Matcher)


def test_matchers_of_one_grammar_go_their_own_ways(compiler, tokenizer):
    one, other = (compiler.request(Grammar("regex", "ab|cd")).result(20) for _ in range(2))
    a, c, d = (tokenizer.token_to_id(letter) for letter in "acd")
    assert one.accept(a)
    assert other.accept(c)
    assert other.allowed(keep_going=False)[d]
    assert not one.allowed(keep_going=False)[d]


@pytest.mark.parametrize(
    ("grammar", "says"),
    [
        (Grammar("json_schema", '{"type": "strin"}'), "strin"),
        (json_schema({"not": {"type": "string"}}), "not"),
        (Grammar("json_schema", "{"), "JSON schema"),
        (Grammar("json_schema", "[]"), "object"),
        (Grammar("json_schema", '{"a":' * 5000), "JSON schema"),
        (Grammar("regex", "(["), "regex"),
        (Grammar("regex", "a" * (MAX_SOURCE + 1)), str(MAX_SOURCE)),
        (Grammar("lark", "start: x"), "lark"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(grammar, says):
    for _ in range(2):  # the answer is kept
        with pytest.raises(GrammarError, match=re.escape(says)):
            check(grammar)


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_can_be_used_passes(name):
    check(json_schema(SCHEMAS[name]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "multipleOf": 99999999},
        {"allOf": [{"type": "string", "pattern": f".*a.{{{count}}}"} for count in range(1, 30)]},
    ],
)
def test_a_schema_that_takes_hours_to_compile_is_refused_in_seconds(schema):
    with pytest.raises(GrammarError, match="too complex"):
        check(json_schema(schema))


def test_neither_engine_nor_worker_pays_for_grammars_before_there_is_one():
    code = (
        "import sys; import nioserve.engine.grammar.check; assert 'torch' not in sys.modules;"
        "import nioserve.engine.core; assert 'llguidance' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class Compiler:
    """Compiles when it is told to."""

    def __init__(self) -> None:
        self.futures: list[Future] = []

    def request(self, _grammar: Grammar) -> Future:
        self.futures.append(Future())
        return self.futures[-1]


def submit(name: str, grammar: Grammar | None = None, **sampling) -> Submit:
    return Submit(name, [1, 2, 3], 200, Sampling(grammar=grammar, **sampling))


def test_requests_wait_for_their_grammar_and_no_longer_than_the_limit():
    now, compiler = [0.0], Compiler()
    room = WaitingRoom(compiler, lambda: now[0])
    grammar = Grammar("json_object")
    for name in ("fine", "wrong", "late", "gone"):
        assert room.add(b"w", submit(name, grammar), grammar)
    room.drop(b"w", "gone")
    assert room.take_ready() == []
    compiler.futures[0].set_result("matcher")
    compiler.futures[1].set_exception(GrammarError("bad"))
    assert [(ready.request.request_id, str(ready.outcome)) for ready in room.take_ready()] == [
        ("fine", "matcher"), ("wrong", "bad"),
    ]  # fmt: skip
    now[0] = TIMEOUT_SECONDS + 1
    (late,) = room.take_ready()
    assert "within" in str(late.outcome)
    assert len(room) == 0


def finish(engine: Engine, names: set[str]) -> dict[str, tuple[list[int], FinishReason]]:
    tokens: dict[str, list[int]] = {name: [] for name in names}
    reasons: dict[str, FinishReason] = {}
    while len(reasons) < len(names):
        for output in engine.step().outputs.get(b"w", []):
            tokens[output.request_id] += output.tokens
            if output.finish_reason is not None:
                reasons[output.request_id] = output.finish_reason
    return {name: (tokens[name], reasons[name]) for name in names}


def engine_of(directory: Path) -> Engine:
    model = load(directory, "float32", CONTEXT)
    limits = Limits(max_model_len=512, max_num_seqs=8, max_num_batched_tokens=256, kv_cache_tokens=8192)
    return Engine(model, limits, GrammarCompiler(directory / "tokenizer.json", model.spec.vocab_size, [EOS]))


def test_the_engine_keeps_the_form_of_some_answers_beside_others_without(hf_model):
    engine = engine_of(hf_model)
    ends = {EOS: 4.0, make_tokenizer().token_to_id('"'): 4.0, make_tokenizer().token_to_id("}"): 4.0}
    for name, schema in SCHEMAS.items():
        assert engine.add(b"w", submit(name, json_schema(schema), seed=1, logit_bias=ends)) is None
    for name in ("free", "greedy"):
        assert engine.add(b"w", submit(name, temperature=float(name == "free"), ignore_eos=True)) is None
    answers = finish(engine, {*SCHEMAS, "free", "greedy"})
    for name, schema in SCHEMAS.items():
        tokens, reason = answers[name]
        assert reason in (FinishReason.STOP, FinishReason.LENGTH)
        if reason is FinishReason.STOP:
            jsonschema.validate(json.loads(make_tokenizer().decode(tokens)), schema)
    assert sum(answers[name][1] is FinishReason.STOP for name in SCHEMAS) >= 3
    assert len(answers["free"][0]) == len(answers["greedy"][0]) == 200
    assert not engine.has_work


def test_a_grammar_that_fails_in_the_engine_ends_its_request_and_no_other(hf_model):
    engine = engine_of(hf_model)
    assert engine.add(b"w", submit("bad", Grammar("regex", "(["))) is None
    assert engine.add(b"w", submit("good", Grammar("regex", "ok"))) is None
    assert engine.add(b"w", submit("gone", Grammar("regex", "[a-z]+"))) is None
    engine.cancel(b"w", "gone")
    answers = finish(engine, {"bad", "good"})
    assert answers["bad"] == ([], FinishReason.ERROR)
    assert make_tokenizer().decode(answers["good"][0]) == "ok"
    assert not engine.has_work


def test_an_engine_without_a_tokeniser_refuses_grammars(hf_model):
    model = load(hf_model, "float32", CONTEXT)
    engine = Engine(model, Limits(512, 8, 256, 8192))
    assert engine.add(b"w", submit("r", Grammar("json_object"))).reason == "invalid"
