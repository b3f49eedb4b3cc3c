"""`/v1/completions` and `/v1/embeddings`, over HTTP."""

from __future__ import annotations

import base64
import struct

import httpx
import pytest
from support import CONTEXT, events, make_tokenizer

TOKENIZER = make_tokenizer()


def ask(service, path: str = "completions", **changes) -> httpx.Response:
    base = {"prompt": "hello", "temperature": 0, "max_tokens": 8} if path == "completions" else {"input": "hello"}
    body = {key: value for key, value in {"model": "tiny", **base, **changes}.items() if value is not ...}
    return httpx.post(f"{service.url}/v1/{path}", json=body, headers=service.headers, timeout=60)


def texts(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    assert [choice["index"] for choice in response.json()["choices"]] == list(range(len(response.json()["choices"])))
    return [choice["text"] for choice in response.json()["choices"]]


def test_prompts_in_all_their_forms(service):
    ids, other = TOKENIZER.encode("hello").ids, TOKENIZER.encode("bye").ids
    hello, bye = texts(ask(service, prompt=["hello", "bye"]))
    assert hello != bye
    assert texts(ask(service)) == texts(ask(service, prompt=ids)) == texts(ask(service, prompt=[ids])) == [hello]
    assert texts(ask(service, prompt=[ids, other])) == [hello, bye]
    body = ask(service, prompt=["hello", "bye"], n=2, temperature=1, seed=1, ignore_eos=True).json()
    assert (body["object"], len(body["choices"])) == ("text_completion", 4)
    assert body["usage"]["prompt_tokens"] == len(ids) + len(other)
    assert body["usage"]["completion_tokens"] == 32


def test_without_a_limit_a_completion_has_sixteen_tokens(service):
    assert ask(service, max_tokens=..., ignore_eos=True).json()["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("changes", [{}, {"echo": True}, {"n": 2, "temperature": 1, "seed": 9}, {"logprobs": 2}])
def test_streaming_equals_not_streaming(service, changes):
    asked = {"prompt": ["hello", "bye"], "max_tokens": 12, "ignore_eos": True, **changes}
    whole = ask(service, **asked).json()
    body = {"model": "tiny", "temperature": 0, **asked, "stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", service.url + "/v1/completions", json=body, headers=service.headers) as response:
        chunks = events(response)
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    parts = [choice for chunk in chunks for choice in chunk["choices"]]
    for choice in whole["choices"]:
        own = [part for part in parts if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        assert own[-1]["finish_reason"] == choice["finish_reason"] == "length"
        if "logprobs" in changes:
            for name, values in choice["logprobs"].items():
                assert [item for part in own for item in part["logprobs"][name]] == values
        else:
            assert choice["logprobs"] is None


def test_echo_and_log_probabilities_in_their_old_form(service):
    assert texts(ask(service, echo=True)) == ["hello" + text for text in texts(ask(service))]
    assert texts(ask(service, prompt=TOKENIZER.encode("hello").ids, echo=True))[0].startswith("hello")
    logprobs = ask(service, logprobs=2, ignore_eos=True).json()["choices"][0]["logprobs"]
    assert {name: len(values) for name, values in logprobs.items()} == dict.fromkeys(
        ("tokens", "token_logprobs", "top_logprobs", "text_offset"), 8
    )
    assert logprobs["text_offset"][0] == 0
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    assert all(value <= 0 for value in logprobs["token_logprobs"])


BAD = {
    "suffix": ({"suffix": "x"}, "suffix", "unsupported_parameter"),
    "best_of": ({"best_of": 3}, "best_of", "unsupported_parameter"),
    "echo with logprobs": ({"echo": True, "logprobs": 1}, "echo", "unsupported_parameter"),
    "chat's parameter": ({"messages": [{"role": "user", "content": "x"}]}, "messages", "unsupported_parameter"),
    "no prompt": ({"prompt": ...}, "prompt", None),
    "an empty prompt": ({"prompt": ""}, "prompt", None),
    "an empty list": ({"prompt": []}, "prompt", None),
    "no token": ({"prompt": [1, 10**6]}, "prompt", None),
    "a negative token": ({"prompt": [-1]}, "prompt", None),
    "mixed": ({"prompt": ["x", 1]}, "prompt", None),
    "too many": ({"prompt": ["x"] * 40, "n": 2}, "n", None),
    "too long": ({"prompt": "x" * CONTEXT}, "prompt", "context_length_exceeded"),
    "too much": ({"max_tokens": CONTEXT}, "max_tokens", "context_length_exceeded"),
    "logprobs": ({"logprobs": True}, "logprobs", None),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_completions_say_what_is_wrong(service, name):
    changes, param, code = BAD[name]
    response = ask(service, **changes)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, code), error


def test_embeddings_are_vectors_of_length_one_whatever_their_form(service):
    ids = TOKENIZER.encode("hello").ids
    body = ask(service, "embeddings", input=["hello", "good bye"]).json()
    assert (body["object"], body["model"]) == ("list", "tiny")
    assert [(item["object"], item["index"]) for item in body["data"]] == [("embedding", 0), ("embedding", 1)]
    assert body["usage"] == {"prompt_tokens": 13, "total_tokens": 13}
    hello, other = (item["embedding"] for item in body["data"])
    assert len(hello) == len(other) == 64
    assert sum(value * value for value in hello) == pytest.approx(1, abs=1e-3)
    assert hello != pytest.approx(other, abs=1e-2)
    for same in ("hello", ids, [ids]):
        alone = ask(service, "embeddings", input=same).json()["data"][0]["embedding"]
        assert alone == pytest.approx(hello, abs=1e-3)
    packed = ask(service, "embeddings", encoding_format="base64", dimensions=64).json()["data"][0]["embedding"]
    assert struct.unpack("<64f", base64.b64decode(packed)) == pytest.approx(hello, abs=1e-3)


def test_more_inputs_than_the_batch_holds(service):
    inputs = [f"input {number}" for number in range(40)]
    data = ask(service, "embeddings", input=inputs).json()["data"]
    alone = ask(service, "embeddings", input=inputs[33]).json()["data"][0]["embedding"]
    assert data[33]["embedding"] == pytest.approx(alone, abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [({"input": ""}, "input", None), ({"input": []}, "input", None), ({"input": ["x", ""]}, "input", None),
     ({"input": "x" * (CONTEXT + 1)}, "input", "context_length_exceeded"), ({"input": [10**6]}, "input", None),
     ({"dimensions": 32}, "dimensions", "unsupported_parameter"), ({"encoding_format": "hex"}, "encoding_format", None),
     ({"stream": True}, "stream", "unsupported_parameter")],
)  # fmt: skip
def test_bad_embeddings_say_what_is_wrong(service, changes, param, code):
    response = ask(service, "embeddings", **changes)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["param"].partition("[")[0] == param
    assert error["code"] == code


def test_the_openai_client_reads_both(service):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=service.url + "/v1", api_key=service.key, max_retries=0)
    whole = client.completions.create(model="tiny", prompt="hello", temperature=0, max_tokens=9, logprobs=1)
    assert len(whole.choices[0].logprobs.tokens) <= 9
    stream = client.completions.create(model="tiny", prompt="hello", temperature=0, max_tokens=9, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
    vector = client.embeddings.create(model="tiny", input="hello").data[0].embedding  # asks for base64 by itself
    assert vector == pytest.approx(ask(service, "embeddings").json()["data"][0]["embedding"], abs=1e-3)
