"""The gateway in front of another server: what passes, what is mapped, and what happens when the other one fails."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from support import Service, events, free_port, text_of, wait_for

from nioserve.backends.breaker import Breaker
from nioserve.backends.credentials import file_findings
from nioserve.config import ConfigError
from nioserve.config.load import load_config

MODEL = "over-there"
WORDS = ["Par", "is", "."]


class Scripted(ThreadingHTTPServer):
    """An upstream that does what it is told, once per entry of `plan`, and answers well when the plan is empty."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.plan: list[str | int] = []
        self.seen: list[tuple[str, dict[str, str], dict]] = []
        self.healthy, self.metrics = True, "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 3\n"
        self.release = threading.Event()
        self.written, self.hung_up = 0, threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_args: object) -> None:
        """Clients that hang up are what is tested here."""


class _Handler(BaseHTTPRequestHandler):
    server: Scripted
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/health":
            self._answer(200 if self.server.healthy else 503, b"{}")
        elif self.server.metrics == "hang":
            self.server.release.wait(20)
        else:
            self._answer(200, self.server.metrics.encode(), "text/plain")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
        step = self.server.plan.pop(0) if self.server.plan else "answer"
        if isinstance(step, int):
            self._answer(step, json.dumps({"error": {"message": "told so", "type": "x", "param": "top_p",
                                                     "code": "told"}}).encode())  # fmt: skip
        elif step == "reset":
            self._reset()
        elif step == "hang":
            self.server.release.wait(20)
        elif step == "no json":
            self._answer(200, b"<html>")
        elif step == "no answer":
            self._answer(200, b'{"choices": [7]}')
        elif step == "answer" and not body.get("stream"):
            self._answer(200, json.dumps(self._whole()).encode())
        else:
            self._stream(step)

    def _whole(self) -> dict:
        message = {"role": "assistant", "content": "".join(WORDS), "reasoning_content": "kept"}
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        return {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": MODEL, "usage": usage,
                "choices": [{"index": 0, "message": message, "finish_reason": "length"}]}  # fmt: skip

    def _stream(self, step: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if step == "flood":
            self._flood()
            return
        for word in WORDS[: 2 if step in ("reset mid-stream", "cut") else None]:
            self._event({"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]})
        if step == "reset mid-stream":
            time.sleep(0.1)
            self._reset()
            return
        if step == "hang mid-stream":
            self.server.release.wait(20)
            return
        if step == "error mid-stream":
            self._event({"error": {"message": "out of memory"}})
        if step == "answer":
            self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
            self._event({"choices": [], "usage": self._whole()["usage"]})
            self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _flood(self) -> None:
        """Write until nobody reads any more."""
        try:
            while True:
                self._event({"choices": [{"index": 0, "delta": {"content": "x" * 8000}, "finish_reason": None}]})
                self.server.written += 8000
        except OSError:
            self.server.hung_up.set()

    def _event(self, value: dict) -> None:
        # In two pieces, as a network may cut it.
        data = b"data: " + json.dumps({"id": "chatcmpl-1", "model": MODEL, **value}).encode() + b"\n\n"
        self._chunk(data[:20])
        self._chunk(data[20:])

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())  # not close(): the request's files keep it open

    def _answer(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if status in (429, 503):
            self.send_header("Retry-After", "17")
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def scripted():
    upstream = Scripted()
    yield upstream
    upstream.shutdown()


@pytest.fixture(scope="module")
def gateway(scripted, hf_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("gateway")
    (directory / "key").write_text("secret-of-the-gateway\n")
    upstream = {"urls": [f"{scripted.url}/v1/"], "model": MODEL, "api_key_file": str(directory / "key"),
                "connect_timeout": 1, "read_timeout": 1, "breaker_failures": 3, "breaker_cooldown": 1}  # fmt: skip
    with Service(directory, hf_model, engine={"backend": "upstream"}, upstream=upstream) as running:
        yield running


@pytest.fixture
def upstream(scripted, gateway):
    """The scripted upstream, as good as new and with the breaker closed."""
    scripted.plan, scripted.healthy, scripted.written = [], True, 0
    scripted.release.clear()
    scripted.hung_up.clear()
    wait_for(lambda: gateway.chat().status_code == 200, 10, "a closed breaker")
    scripted.seen.clear()
    yield scripted
    scripted.release.set()


def error_of(response: httpx.Response) -> dict:
    return response.json()["error"]


def test_no_engine_runs_and_the_request_passes_with_the_gateways_own_key(gateway, upstream):
    response = httpx.post(gateway.url + "/v1/chat/completions", json=gateway.body("Capital?", max_tokens=5, top_p=0.5),
                          headers={**gateway.headers, "x-request-id": "audit-7"})  # fmt: skip
    answer = response.json()
    assert response.status_code == 200
    assert response.headers["x-request-id"] == "audit-7"
    assert answer["model"] == "tiny"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "Paris.", "reasoning_content": "kept"}
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    [(path, headers, body)] = upstream.seen
    assert path == "/v1/chat/completions"
    assert headers["authorization"] == "Bearer secret-of-the-gateway"
    assert headers["x-request-id"] == "audit-7"
    assert (body["model"], body["max_tokens"], body["top_p"]) == (MODEL, 5, 0.5)
    assert gateway.key not in json.dumps(headers)
    assert gateway.children("nioserve.engine.process") == []
    assert '"completion_tokens": 3' in gateway.log_text()


def test_a_stream_passes_with_its_finish_reason_and_usage_only_if_asked(gateway, upstream):
    with gateway.stream() as response:
        chunks = events(response)
    assert text_of(chunks) == "Paris."
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert {chunk["model"] for chunk in chunks} == {"tiny"}
    assert not any("usage" in chunk for chunk in chunks)
    with gateway.stream(stream_options={"include_usage": True}) as response:
        assert events(response)[-1]["usage"]["completion_tokens"] == 3
    assert all(body["stream_options"]["include_usage"] for _, _, body in upstream.seen)


def test_what_the_gateway_refuses_never_reaches_the_upstream(gateway, upstream):
    body = gateway.body()
    url = gateway.url + "/v1/chat/completions"
    assert httpx.post(url, json=body).status_code == 401
    assert httpx.post(url, json={**body, "model": MODEL}, headers=gateway.headers).status_code == 404
    assert httpx.post(url, json={**body, "nonsense": 1}, headers=gateway.headers).status_code == 400
    assert upstream.seen == []


def test_the_upstreams_errors_become_openais_objects(gateway, upstream):
    upstream.plan = [400, 429, 401, "no json", "no answer", 302]
    refused = gateway.chat()
    assert (refused.status_code, error_of(refused)["message"], error_of(refused)["param"]) == (400, "told so", "top_p")
    busy = gateway.chat()
    assert (busy.status_code, busy.headers["retry-after"], error_of(busy)["code"]) == (503, "17", "upstream_busy")
    for _ in range(4):  # its opinion of our key is not the client's business
        failed = gateway.chat()
        assert (failed.status_code, error_of(failed)["code"]) == (502, "upstream_error")


def test_a_reset_before_the_first_byte_is_tried_once_more_and_not_twice(gateway, upstream):
    upstream.plan = ["reset"]
    assert gateway.chat().status_code == 200
    assert len(upstream.seen) == 2
    upstream.plan = ["reset", "reset"]
    response = gateway.chat()
    assert (response.status_code, error_of(response)["code"]) == (503, "upstream_unavailable")
    assert int(response.headers["retry-after"]) > 0
    assert len(upstream.seen) == 4


@pytest.mark.parametrize("fault", ["reset mid-stream", "cut", "error mid-stream", "hang mid-stream"])
def test_a_stream_that_breaks_ends_in_an_error_event_and_is_not_tried_again(gateway, upstream, fault):
    upstream.plan = [fault]
    with gateway.stream() as response:
        lines = [json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line]
    assert text_of(lines[:2]) == "Paris"
    assert lines[-1]["error"]["type"] in ("service_unavailable", "server_error")
    assert len(upstream.seen) == 1


def test_an_upstream_that_hangs_is_given_up_in_time_and_not_asked_twice(gateway, upstream):
    upstream.plan = ["hang"]
    response = gateway.chat()
    assert (response.status_code, error_of(response)["code"]) == (504, "upstream_timeout")
    assert len(upstream.seen) == 1


def test_the_breaker_opens_and_closes(gateway, upstream):
    upstream.plan = [500] * 1000
    seen = 0

    def left_alone() -> httpx.Response | None:
        nonlocal seen
        seen = len(upstream.seen)
        response = gateway.chat()
        assert response.status_code in (502, 503)
        return response if response.status_code == 503 else None

    response = wait_for(left_alone, 20, "an open breaker")
    assert response.headers["retry-after"] == "1"
    assert len(upstream.seen) == seen >= 3  # nobody knocked
    upstream.plan = []
    wait_for(lambda: gateway.chat().status_code == 200, 20, "a trial that closes it")
    assert [gateway.chat().status_code for _ in range(3)] == [200] * 3


def test_a_client_that_hangs_up_cancels_the_upstream(gateway, upstream):
    upstream.plan = ["flood"]
    with gateway.stream() as response:
        lines = response.iter_lines()
        assert next(lines)
        time.sleep(0.2)
        assert not upstream.hung_up.is_set()
    lines.close()
    assert upstream.hung_up.wait(10)
    upstream.plan = ["hang"]
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(gateway.url + "/v1/chat/completions", json=gateway.body(), headers=gateway.headers, timeout=0.3)
    assert gateway.chat().status_code == 200


def test_a_slow_reader_holds_the_upstream_back_instead_of_filling_memory(gateway, upstream):
    upstream.plan = ["flood"]
    with gateway.stream() as response:
        lines, level = response.iter_lines(), -1
        assert next(lines)

        def stands() -> bool:
            nonlocal level
            before, level = level, upstream.written
            return before == level

        wait_for(stands, 20, "back pressure")
        assert upstream.written < 32 << 20  # what sockets hold, and no more
        assert not upstream.hung_up.is_set()
        assert len([line for _, line in zip(range(200), lines, strict=False)]) == 200  # it is late, and loses nothing
    assert upstream.hung_up.wait(10)


def test_readiness_and_models_follow_the_upstreams_health(gateway, upstream):
    models = gateway.url + "/v1/models"
    assert httpx.get(models, headers=gateway.headers).json()["data"][0]["id"] == "tiny"
    upstream.healthy = False
    wait_for(lambda: gateway.probe() == 503, 15, "not ready")
    assert gateway.probe("/livez") == gateway.probe("/startupz") == 200
    answer = httpx.get(models, headers=gateway.headers)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert gateway.chat().status_code == 503
    upstream.healthy = True
    wait_for(lambda: gateway.probe() == 200, 15, "ready again")


def test_its_metrics_are_served_with_ours_and_cannot_break_them(gateway, upstream):
    gateway.chat()
    assert gateway.metric("upstream_vllm_num_requests_running", upstream=upstream.url.removeprefix("http://")) == 3
    assert gateway.metric("upstream_scrape_success") == 1
    assert gateway.metric("request_success_total", finished_reason="length") > 0
    good = upstream.metrics
    for bad in ("hang", "{ this is no metric"):
        upstream.metrics = bad
        page = httpx.get(f"http://127.0.0.1:{gateway.metrics_port}/metrics").text
        assert re.search(r"^nioserve_upstream_scrape_success\{.*\} 0.0$", page, re.MULTILINE)
        assert "\nnioserve_ready 1.0\n" in page
        assert "nioserve_request_success_total" in page
    upstream.metrics = good


def test_an_upstream_that_is_not_there_is_waited_for(hf_model, tmp_path):
    port = free_port()
    service = Service(tmp_path, hf_model, engine={"backend": "upstream"},
                      upstream={"urls": [f"http://127.0.0.1:{port}"]})  # fmt: skip
    service.ready = lambda: service.probe() == 503  # up, and not ready
    with service:
        response = service.chat()
        assert (response.status_code, error_of(response)["code"]) == (503, "engine_unavailable")
        assert "retry-after" in response.headers


@pytest.fixture(scope="module")
def chain(service, hf_model, tmp_path_factory):
    """A gateway in front of a second nioserve, which has a department's key for it."""
    directory = tmp_path_factory.mktemp("chain")
    (directory / "key").write_text(service.key)
    metrics = f"http://127.0.0.1:{service.metrics_port}/metrics"
    upstream = {"urls": [service.url], "api_key_file": str(directory / "key"), "metrics_urls": [metrics]}
    with Service(directory, hf_model, engine={"backend": "upstream"}, upstream=upstream) as running:
        yield running


def test_another_nioserve_stands_behind_it(chain, service):
    ours, theirs = (running.chat("Hello", max_tokens=12, seed=1).json() for running in (chain, service))
    assert ours["choices"] == theirs["choices"]
    assert ours["usage"]["completion_tokens"] == theirs["usage"]["completion_tokens"] > 0
    with chain.stream("Hello", max_tokens=12, seed=1) as response:
        assert text_of(events(response)) == ours["choices"][0]["message"]["content"]
    too_long = chain.chat(max_tokens=10**6)
    assert (too_long.status_code, error_of(too_long)["code"]) == (400, "context_length_exceeded")
    assert chain.metric("upstream_prompt_tokens_total") > 0
    vector = httpx.post(chain.url + "/v1/embeddings", json={"model": "tiny", "input": "x"}, headers=chain.headers)
    assert len(vector.json()["data"][0]["embedding"]) > 1


def test_several_urls_are_asked_in_turn_and_stand_in_for_each_other(service, tmp_path, hf_model):
    other = Scripted()
    key = tmp_path / "key"
    key.write_text(service.key)
    upstream = {"urls": [other.url, service.url], "api_key_file": str(key), "model": "tiny"}
    with Service(tmp_path, hf_model, engine={"backend": "upstream"}, upstream=upstream) as running:
        texts = {running.chat(seed=1).json()["choices"][0]["message"]["content"] for _ in range(4)}
        assert len(texts) == 2
        assert "Paris." in texts
        other.plan = ["reset"] * 4
        assert {running.chat(seed=1).status_code for _ in range(4)} == {200}
    other.shutdown()


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    """A real vLLM on the CPU, from the environment that the benchmarks make."""
    cache = Path(os.environ.get("CHATNIO_CACHE", "/var/cache/chatnio")) / "bench"
    python, model = cache / "vllm" / "bin" / "python", cache / "models" / "hf"
    if not python.exists() or not model.is_dir():
        pytest.skip(f"no vLLM in {cache}: `python -m bench` in server/ puts it there")
    port, log = free_port(), tmp_path_factory.mktemp("vllm") / "log"
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", MODEL,
               "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16", "--max-model-len", "1024",
               "--max-num-seqs", "4", "--enforce-eager", "--enable-request-id-headers"]  # fmt: skip
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CACHE_ROOT": str(cache / "vllm-cache"),
                   "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
        try:
            wait_for(lambda: process.poll() is not None or _healthy(url), 300, "vLLM's readiness")
            assert process.poll() is None, log.read_text()[-2000:]
            yield url, model
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.slow
def test_vllm_stands_behind_it(vllm, tmp_path):
    url, model = vllm
    upstream = {"urls": [url], "model": MODEL}
    with Service(tmp_path, model, engine={"backend": "upstream"}, upstream=upstream) as running:
        asked = {"max_tokens": 12, "ignore_eos": True, "min_tokens": 12}
        whole = running.chat("What is the capital of France?", **asked).json()
        assert whole["model"] == "tiny"
        assert whole["usage"]["completion_tokens"] == 12
        with running.stream("What is the capital of France?", stream_options={"include_usage": True}, **asked) as reply:
            chunks = events(reply)
        assert text_of(chunks) == whole["choices"][0]["message"]["content"]
        assert chunks[-1]["usage"]["completion_tokens"] == 12
        assert chunks[-2]["choices"][0]["finish_reason"] == "length"
        too_long = running.chat("word " * 2000)
        assert (too_long.status_code, error_of(too_long)["type"]) == (400, "invalid_request_error")
        assert running.metric("upstream_vllm_generation_tokens_total") >= 24
        with running.stream("Count to a thousand.", max_tokens=900, ignore_eos=True) as reply:
            lines = reply.iter_lines()  # which would close the reply if nobody held it
            assert next(lines)
            wait_for(lambda: running.metric("upstream_vllm_num_requests_running") >= 1, 10, "a running request")
        wait_for(lambda: running.metric("upstream_vllm_num_requests_running") == 0, 10, "its cancellation")


def test_settings_are_checked_before_anything_starts(tmp_path):
    flags = {"model": str(tmp_path), "backend": "upstream"}
    with pytest.raises(ConfigError, match=r"upstream\.urls: must be set"):
        load_config(None, {}, flags)
    with pytest.raises(ConfigError, match=r"upstream\.urls"):
        load_config(None, {}, {**flags, "upstream-urls": "ftp://there"})
    environment = {"NIOSERVE_UPSTREAM_URLS": "http://one:1/v1/, https://two"}
    config = load_config(None, environment, {**flags, "upstream-api-key-file": str(tmp_path / "none"),
                                             "upstream-tls-ca": str(tmp_path / "no.pem")})  # fmt: skip
    assert config.upstream.urls == ("http://one:1", "https://two")
    key, tls = file_findings(config.upstream)
    assert key.startswith("upstream.api_key_file: ")
    assert tls.startswith("upstream.tls: ")


def test_breaker_states():
    now = 0.0
    breaker = Breaker(2, 10, lambda: now)
    assert breaker.allow()
    breaker.failed()
    breaker.succeeded()
    breaker.failed()
    assert breaker.state == "closed"
    breaker.failed()
    assert (breaker.state, breaker.wait, breaker.allow()) == ("open", 10, False)
    now = 10.0
    assert (breaker.state, breaker.allow(), breaker.allow()) == ("half-open", True, False)
    breaker.abandoned()
    assert (breaker.state, breaker.allow()) == ("half-open", True)
    breaker.failed()
    assert breaker.state == "open"
    now = 20.0
    assert breaker.allow()
    breaker.succeeded()
    assert (breaker.state, breaker.wait) == ("closed", 0)
