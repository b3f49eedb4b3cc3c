"""The API from outside: a really running service, over HTTP."""

from __future__ import annotations

import contextlib
import json
import socket
import threading

import httpx
import pytest
from support import CONTEXT, events, text_of, wait_for


def error_of(response: httpx.Response) -> dict:
    """Return the error object, which must have all its four fields."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def test_an_answer_is_a_chat_completion(service):
    response = service.chat()
    body = response.json()
    assert response.status_code == 200, body
    assert (body["object"], body["model"]) == ("chat.completion", "tiny")
    choice = body["choices"][0]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "length"
    prompt = len("<s>user\nhello<e>\n<s>assistant\n") - 6  # special tokens are one token each
    assert body["usage"].pop("prompt_tokens_details").keys() == {"cached_tokens"}
    assert body["usage"] == {"prompt_tokens": prompt, "completion_tokens": 8, "total_tokens": prompt + 8}


@pytest.mark.parametrize("content", ["hello", "Grüße 中文 🚀", "x" * 300])
@pytest.mark.parametrize("changes", [{}, {"temperature": 1, "seed": 5, "top_p": 0.9}])
def test_streaming_equals_not_streaming(service, content, changes):
    service.chat(content, max_tokens=1)  # what a prompt that is in the cache costs is the same for both, then
    whole = service.chat(content, max_tokens=60, **changes).json()
    with service.stream(content, max_tokens=60, stream_options={"include_usage": True}, **changes) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        chunks = events(response)
    assert text_of(chunks) == whole["choices"][0]["message"]["content"]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], whole["usage"])
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_without_the_option_a_stream_has_no_usage(service):
    with service.stream() as response:
        assert not any("usage" in chunk for chunk in events(response))


def test_a_stop_string_ends_the_answer_and_does_not_show(service):
    text = service.chat(max_tokens=80).json()["choices"][0]["message"]["content"]
    stop = next(text[i : i + 3] for i in range(5, 70) if text[i : i + 3].isascii() and len(set(text[i : i + 3])) > 1)
    for extra in ({"stop": stop}, {"stop": ["never in it", stop]}):
        choice = service.chat(max_tokens=80, **extra).json()["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert choice["message"]["content"] == text[: text.find(stop)]
        with service.stream(max_tokens=80, **extra) as response:
            assert text_of(events(response)) == text[: text.find(stop)]
    wait_for(lambda: service.metric("num_requests_running") == 0, what="the cut sequence's end")


def test_without_a_limit_the_answer_may_fill_the_context(service):
    body = service.body("x" * (CONTEXT - 100), ignore_eos=True)
    del body["max_tokens"]
    response = httpx.post(service.url + "/v1/chat/completions", json=body, headers=service.headers, timeout=60)
    assert response.json()["usage"]["total_tokens"] == CONTEXT
    assert response.json()["choices"][0]["finish_reason"] == "length"


def test_the_openai_client_works(service):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=service.url + "/v1", api_key=service.key, max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": [
        {"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]  # fmt: skip
    settings = {"model": "tiny", "messages": messages, "max_completion_tokens": 9, "temperature": 0, "user": "u"}
    whole = client.chat.completions.create(**settings)
    pieces = [c.choices[0].delta.content or "" for c in client.chat.completions.create(**settings, stream=True)]
    assert "".join(pieces) == whole.choices[0].message.content
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**{**settings, "model": "gpt-4"})
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="nio_alice_wrong").models.list()


BAD = {
    "unknown model": ({"model": "other"}, 404, "model", "model_not_found"),
    "no messages": ({"messages": []}, 400, "messages", None),
    "messages missing": ({"messages": ...}, 400, "messages", None),
    "content null": ({"messages": [{"role": "user", "content": None}]}, 400, "messages[0].content", "invalid_content"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400,
              "messages[0].content", "invalid_content"),
    "role": ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages[0].role", None),
    "template refuses": ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "messages", None),
    "too long": ({"messages": [{"role": "user", "content": "x" * CONTEXT}]}, 400, "messages",
                 "context_length_exceeded"),
    "max_tokens 0": ({"max_tokens": 0}, 400, "max_tokens", None),
    "max_tokens negative": ({"max_tokens": -5}, 400, "max_tokens", None),
    "max_tokens a million": ({"max_tokens": 10**6}, 400, "max_tokens", "context_length_exceeded"),
    "max_tokens text": ({"max_tokens": "7"}, 400, "max_tokens", None),
    "two limits": ({"max_tokens": 3, "max_completion_tokens": 4}, 400, "max_tokens", None),
    "temperature": ({"temperature": 2.5}, 400, "temperature", None),
    "top_p": ({"top_p": 0}, 400, "top_p", None),
    "five stops": ({"stop": list("abcde")}, 400, "stop", None),
    "empty stop": ({"stop": ""}, 400, "stop", None),
    "tools the template does not know": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools",
                                         "unsupported_parameter"),
    "a tool's answer": ({"messages": [{"role": "user", "content": "x"}, {"role": "tool", "content": "x",
                        "tool_call_id": "1"}]}, 400, "messages", "unsupported_parameter"),
    "a tool's answer to nothing": ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].tool_call_id",
                                   None),
    "a user's tool call": ({"messages": [{"role": "user", "tool_calls": [{"id": "1", "function": {"name": "f",
                           "arguments": "{}"}}]}]}, 400, "messages[0].tool_calls", None),
    "a call without arguments": ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "function": {
                                 "name": "f"}}]}]}, 400, "messages[0].tool_calls[0].function.arguments", None),
    "a tool without a name": ({"tools": [{"type": "function", "function": {}}]}, 400, "tools[0].function.name", None),
    "a tool's wrong name": ({"tools": [{"type": "function", "function": {"name": "f g"}}]}, 400,
                            "tools[0].function.name", None),
    "a choice that is no tool": ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": {
                                 "type": "function", "function": {"name": "g"}}}, 400, "tool_choice", None),
    "required without tools": ({"tool_choice": "required"}, 400, "tool_choice", None),
    "old functions": ({"functions": [{"name": "f"}]}, 400, "functions", "unsupported_parameter"),
    "top_logprobs alone": ({"top_logprobs": 3}, 400, "top_logprobs", None),
    "too many top_logprobs": ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", None),
    "n": ({"n": 17}, 400, "n", None),
    "n 0": ({"n": 0}, 400, "n", None),
    "response_format": ({"response_format": {"type": "xml"}}, 400, "response_format.type", None),
    "a schema missing": ({"response_format": {"type": "json_schema"}}, 400, "response_format", None),
    "a schema that is none": ({"response_format": {"type": "json_schema", "json_schema": {
                              "name": "x", "schema": {"type": "nonsense"}}}}, 400, "response_format", "invalid_schema"),
    "penalty": ({"frequency_penalty": 2.5}, 400, "frequency_penalty", None),
    "top_k": ({"top_k": -2}, 400, "top_k", None),
    "min_p": ({"min_p": 1.5}, 400, "min_p", None),
    "repetition_penalty": ({"repetition_penalty": 0}, 400, "repetition_penalty", None),
    "a bias of no token": ({"logit_bias": {"a": 1}}, 400, "logit_bias", None),
    "a bias beyond the vocabulary": ({"logit_bias": {"999999": 1}}, 400, "logit_bias", None),
    "a bias too strong": ({"logit_bias": {"5": 101}}, 400, "logit_bias", None),
    "min_tokens": ({"min_tokens": 9}, 400, "min_tokens", None),
    "beam search": ({"use_beam_search": True}, 400, "use_beam_search", "unsupported_parameter"),
    "store": ({"store": True}, 400, "store", "unsupported_parameter"),
    "audio": ({"modalities": ["audio"]}, 400, "modalities", "unsupported_parameter"),
    "unknown in a message": ({"messages": [{"role": "user", "content": "x", "mood": "good"}]}, 400, "messages[0].mood",
                             "unsupported_parameter"),
    "unknown": ({"temprature": 1}, 400, "temprature", "unsupported_parameter"),
    "options without stream": ({"stream_options": {"include_usage": True}}, 400, "stream_options", None),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_say_what_is_wrong(service, name):
    changes, status, param, code = BAD[name]
    body = {key: value for key, value in {**service.body(), **changes}.items() if value is not ...}
    response = httpx.post(service.url + "/v1/chat/completions", json=body, headers=service.headers)
    error = error_of(response)
    assert (response.status_code, error["param"], error["code"]) == (status, param, code), error


def test_parameters_that_change_nothing_are_accepted(service):
    same = {"n": 1, "logprobs": False, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": None,
            "tools": [], "response_format": {"type": "text"}, "user": "u", "metadata": {"a": "b"}, "stop": [],
            "top_k": -1, "functions": [], "function_call": "none", "tool_choice": "none", "modalities": ["text"],
            "parallel_tool_calls": True, "suffix": "", "audio": None, "prediction": None, "store": False,
            "service_tier": "auto", "skip_special_tokens": True, "safety_identifier": "s"}  # fmt: skip
    assert service.chat(**same).status_code == 200


@pytest.mark.parametrize("content", [b"{", b"", b"[]", b"\xff\xfe", b"5", b"[" * 60000, b'{"model": "tiny"'])
def test_malformed_bodies(service, content):
    response = httpx.post(service.url + "/v1/chat/completions", content=content, headers=service.headers)
    assert response.status_code == 400
    error_of(response)


@pytest.mark.parametrize(
    ("headers", "code"),
    [({}, "missing_api_key"), ({"Authorization": "Bearer nio_alice_0"}, "invalid_api_key"),
     ({"Authorization": "Basic eDp5"}, "invalid_api_key"), ({"Authorization": "Bearer"}, "invalid_api_key")],
)  # fmt: skip
def test_without_a_valid_key_nothing_is_served(service, headers, code):
    for response in (
        httpx.post(service.url + "/v1/chat/completions", json=service.body(), headers=headers),
        httpx.get(service.url + "/v1/models", headers=headers),
        httpx.get(service.url + "/v1/models/tiny", headers=headers),
    ):
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert error_of(response)["code"] == code


def test_bodies_are_bounded_before_they_are_read(service):
    def endless():
        for _ in range(100):
            yield b" " * 65536

    url = service.url + "/v1/chat/completions"
    with socket.create_connection(("127.0.0.1", service.port), timeout=5) as raw:  # announced, and never sent
        raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000000\r\n\r\n{")
        answer = b"".join(iter(lambda: raw.recv(65536), b""))  # until the server closes
        assert answer.startswith(b"HTTP/1.1 413")
        assert b'"code":"request_too_large"' in answer
        assert b"connection: close" in answer
    # Without a length: cut off as soon as the limit is passed, maybe while the rest is still being sent.
    with contextlib.suppress(httpx.TransportError):
        assert httpx.post(url, content=endless(), headers=service.headers).status_code == 413
    assert service.chat().status_code == 200


def test_other_paths_and_methods_get_error_objects(service):
    assert httpx.get(service.url + "/v2/chat").status_code == 404
    error_of(httpx.get(service.url + "/v2/chat"))
    response = httpx.get(service.url + "/v1/chat/completions")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    error_of(response)
    assert error_of(httpx.get(service.url + "/v1/models/gpt-4", headers=service.headers))["code"] == "model_not_found"


def test_request_ids(service):
    url = service.url + "/livez"
    assert httpx.get(url, headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = [httpx.get(url, headers={"x-request-id": bad}).headers["x-request-id"] for bad in ("", "a b", "x" * 999)]
    assert len(set(made)) == 3
    assert all(len(one) == 32 for one in made)


def test_the_page_and_its_headers(service):
    for path, kind in (("/", "text/html"), ("/ui/app.js", "javascript"), ("/ui/style.css", "text/css")):
        response = httpx.get(service.url + path)
        assert response.status_code == 200
        assert kind in response.headers["content-type"]
        assert response.headers["content-security-policy"].startswith("default-src 'self'")
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-frame-options"] == "DENY"
        assert "http://" not in response.text.replace("http://www.w3.org", "")
        assert "https://" not in response.text
    page = httpx.get(service.url + "/").text
    assert "style=" not in page
    assert "onclick" not in page
    assert "generated by AI" in page
    assert httpx.get(service.url + "/ui/../api/chat.py").status_code == 404


def test_probes_on_both_ports(service):
    for path in ("/livez", "/readyz", "/startupz", "/health"):
        assert httpx.get(service.url + path).json() == {"status": "ok", "detail": "ready"}
        assert service.probe(path) == 200


def test_logs_tell_who_and_how_much_but_neither_text_nor_key(service):
    marker = "sesame-4711"
    service.chat(marker)
    lines = [json.loads(line) for line in service.log_text().splitlines()]
    line = [one for one in lines if one.get("path") == "/v1/chat/completions"][-1]
    assert (line["user"], line["department"], line["status"]) == ("Alice", "cardiology", 200)
    assert line["completion_tokens"] == 8
    assert line["finish_reason"] == "length"
    assert marker not in service.log_text()
    assert service.key.split("_")[2] not in service.log_text()


def test_metrics_count_what_happened(service):
    names = ("prompt_tokens_total", "generation_tokens_total", "time_to_first_token_seconds_count",
             "inter_token_latency_seconds_count", "e2e_request_latency_seconds_count",
             "request_queue_time_seconds_count", "iteration_tokens_total_sum")  # fmt: skip
    before = {name: service.metric(name) for name in names}
    ended = service.metric("request_success_total", finished_reason="length", model_name="tiny")
    usage = service.chat("never asked before", max_tokens=10, ignore_eos=True).json()["usage"]
    computed = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"] + 9
    grown = [service.metric(name) - before[name] for name in names]
    assert grown == [usage["prompt_tokens"], 10, 1, 9, 1, 1, computed]
    assert service.metric("request_success_total", finished_reason="length", model_name="tiny") == ended + 1
    assert 0 <= service.metric("kv_cache_usage_perc") <= 1


def test_many_at_once_get_the_answers_they_get_alone(service):
    contents = [f"question {number} " * (number + 1) for number in range(12)]
    alone = [service.chat(content, max_tokens=30).json()["choices"][0]["message"] for content in contents]
    together: dict[int, dict] = {}

    def ask(number: int) -> None:
        together[number] = service.chat(contents[number], max_tokens=30).json()["choices"][0]["message"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[number] for number in range(12)] == alone


def test_half_a_surrogate_is_no_text(service):
    body = json.dumps(service.body("\ud800")).encode()
    response = httpx.post(service.url + "/v1/chat/completions", content=body, headers=service.headers)
    assert response.status_code == 400
    assert error_of(response)["code"] == "invalid_json"
