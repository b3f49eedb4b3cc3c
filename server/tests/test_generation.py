"""What may be asked of an answer: several of them, log probabilities, penalties, a form; over HTTP."""

from __future__ import annotations

import contextlib
import json
import math
import string

import httpx
import pytest
import yaml
from support import EOS, events, make_tokenizer, text_of, wait_for

from nioserve.policy.identity import new_key

LETTERS = {str(make_tokenizer().token_to_id(letter)): 100 for letter in string.ascii_lowercase}
"""A bias under which the small model, which knows no characters, writes letters only."""


def choices(service, **changes) -> list[dict]:
    response = service.chat(**changes)
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def test_several_choices_come_whole_and_interleaved(service):
    asked = {"n": 3, "temperature": 1, "seed": 7, "max_tokens": 20, "ignore_eos": True}
    whole = service.chat(**asked).json()
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3, "one seed must not make all choices the same"
    assert whole["usage"]["completion_tokens"] == 60
    with service.stream(**asked) as response:
        chunks = events(response)
    parts = [choice for chunk in chunks for choice in chunk["choices"]]
    for index, text in enumerate(texts):
        own = [part for part in parts if part["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(part["delta"].get("content", "") for part in own) == text
        assert [part["finish_reason"] for part in own] == [None] * (len(own) - 1) + ["length"]


def test_one_choice_ends_at_a_stop_string_and_the_others_go_on(service):
    asked = {"n": 4, "temperature": 1, "seed": 3, "max_tokens": 40, "ignore_eos": True}
    texts = [choice["message"]["content"] for choice in choices(service, **asked)]
    stop = next(letter for letter in texts[0] if letter.isascii() and any(letter not in text for text in texts))
    cut = choices(service, **asked, stop=stop)
    assert [choice["message"]["content"] for choice in cut] == [text.partition(stop)[0] for text in texts]
    assert {choice["finish_reason"] for choice in cut} == {"stop", "length"}
    wait_for(lambda: service.metric("num_requests_running") == 0, what="the cut choice's end")


def test_log_probabilities(service):
    asked = {"max_tokens": 12, "logprobs": True, "top_logprobs": 3, "ignore_eos": True}
    choice = choices(service, **asked)[0]
    content = choice["logprobs"]["content"]
    assert len(content) == 12
    for token in content:
        assert set(token) == {"token", "logprob", "bytes", "top_logprobs"}
        assert bytes(token["bytes"]).decode(errors="replace") == token["token"]
        values = [top["logprob"] for top in token["top_logprobs"]]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert values[0] == pytest.approx(token["logprob"], abs=1e-4), "greedy takes the most likely"
        assert math.exp(values[0]) <= 1
    assert choice["message"]["content"] in b"".join(bytes(token["bytes"]) for token in content).decode(errors="replace")
    with service.stream(**asked) as response:
        parts = [choice for chunk in events(response) for choice in chunk["choices"]]
    streamed = [token for part in parts if part["logprobs"] for token in part["logprobs"]["content"]]
    assert [token["token"] for token in streamed] == [token["token"] for token in content]
    none = choices(service, max_tokens=3, logprobs=True)[0]["logprobs"]["content"]
    assert [token["top_logprobs"] for token in none] == [[], [], []]
    assert choices(service, max_tokens=3)[0]["logprobs"] is None


def test_what_a_stop_string_cuts_has_no_log_probabilities(service):
    asked = {"max_tokens": 60, "ignore_eos": True, "logit_bias": LETTERS}
    text = choices(service, **asked)[0]["message"]["content"]
    stop = text[30:33]
    choice = choices(service, **asked, stop=stop, logprobs=True)[0]
    assert choice["finish_reason"] == "stop"
    told = b"".join(bytes(token["bytes"]) for token in choice["logprobs"]["content"])
    assert told.decode(errors="replace") == choice["message"]["content"] == text.partition(stop)[0]


def test_bias_and_penalties_change_the_answer(service):
    plain = choices(service, max_tokens=20, ignore_eos=True)[0]["message"]["content"]
    written = choices(service, max_tokens=40, ignore_eos=True, logit_bias=LETTERS)[0]["message"]["content"]
    assert len(written) == 40
    assert set(written) <= set(string.ascii_lowercase)
    for penalty in ({"presence_penalty": 2}, {"frequency_penalty": 2}, {"repetition_penalty": 1.5}):
        other = choices(service, max_tokens=40, ignore_eos=True, logit_bias=LETTERS, **penalty)[0]["message"]["content"]
        assert len(set(other)) > len(set(written))
    for neutral in ({"top_k": 1, "temperature": 1}, {"min_p": 1, "temperature": 1}, {"repetition_penalty": 1.0}):
        assert choices(service, max_tokens=20, ignore_eos=True, **neutral)[0]["message"]["content"] == plain


def test_min_tokens_and_the_end_token(service):
    end = {"logit_bias": {str(EOS): 100}}
    stopped = service.chat(max_tokens=20, **end).json()
    assert (stopped["choices"][0]["finish_reason"], stopped["usage"]["completion_tokens"]) == ("stop", 1)
    later = service.chat(max_tokens=20, min_tokens=7, **end).json()
    assert (later["choices"][0]["finish_reason"], later["usage"]["completion_tokens"]) == ("stop", 8)


SCHEMA = {"type": "object", "properties": {"answer": {"enum": ["yes", "no"]}, "n": {"type": "integer", "maximum": 9,
          "minimum": 0}}, "required": ["answer", "n"], "additionalProperties": False}  # fmt: skip


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5, "seed": 1}])
def test_an_answer_by_a_schema(service, settings):
    form = {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": SCHEMA}}
    choice = choices(service, max_tokens=400, response_format=form, **settings)[0]
    assert choice["finish_reason"] == "stop"
    value = json.loads(choice["message"]["content"])
    assert value["answer"] in ("yes", "no")
    assert 0 <= value["n"] <= 9
    with service.stream(max_tokens=400, response_format=form, **settings) as response:
        assert text_of(events(response)) == choice["message"]["content"]


def test_a_second_turn_finds_the_first_in_the_cache(service):
    first = service.chat("what a long question this is " * 10, max_tokens=4).json()
    again = service.chat("what a long question this is " * 10, max_tokens=4).json()
    assert first["choices"][0]["message"] == again["choices"][0]["message"]
    cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert 100 < cached < again["usage"]["prompt_tokens"]


def test_an_answer_that_takes_too_long_is_ended(start_service):
    service = start_service(server={"request_timeout": 1})
    slow = {"max_tokens": 3500, "ignore_eos": True}
    response = service.chat(**slow)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "request_timeout")
    with service.stream(**slow) as stream:
        lines = [line for line in stream.iter_lines() if line]
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "request_timeout"
    wait_for(lambda: service.metric("num_requests_running") == 0, what="the slow answers' end")
    assert service.metric("request_success_total", finished_reason="error") == 2
    assert httpx.get(service.url + "/readyz").status_code == 200


def test_long_conversations_have_a_queue_of_their_own_and_departments_a_cache_of_their_own(start_service):
    service = start_service(engine={"max_num_seqs": 1, "max_num_queued_reqs": 1})
    slow = {"max_tokens": 3500, "ignore_eos": True}
    turn = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    question = "what nobody else may know of " * 10
    service.chat(question, max_tokens=1)
    key, record = new_key("bob", "Bob", "oncology")
    service.keys_file.write_text(yaml.safe_dump([*yaml.safe_load(service.keys_file.read_text()), record]))

    def cached(key: str) -> dict | None:
        response = httpx.post(service.url + "/v1/chat/completions", json=service.body(question, max_tokens=1),
                              headers={"Authorization": f"Bearer {key}"}, timeout=60)  # fmt: skip
        return response.json()["usage"]["prompt_tokens_details"] if response.is_success else None

    assert cached(service.key)["cached_tokens"] > 100
    assert wait_for(lambda: cached(key), what="the new key") == {"cached_tokens": 0}
    with contextlib.ExitStack() as stack:
        lines = stack.enter_context(service.stream(**slow)).iter_lines()
        next(lines)
        stack.enter_context(service.stream(**slow))
        wait_for(lambda: service.metric("num_requests_waiting") == 1, what="queueing")
        refused = service.chat()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert service.chat(messages=[*turn * 4, turn[0]]).status_code == 503, "five turns are not long"
        long = stack.enter_context(service.stream(messages=[*turn * 5, turn[0]], **slow))
        assert long.status_code == 200
