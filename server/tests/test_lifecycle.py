"""Processes die, clients hang up, operators restart: the service survives, and nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import ssl
import subprocess
import threading
import time
from pathlib import Path

import httpx
import pytest
import yaml
from support import Service, wait_for

from nioserve.policy.identity import new_key

LONG = {"max_tokens": 3000, "ignore_eos": True}


@pytest.fixture(scope="module")
def robust(hf_model, tmp_path_factory):
    """A service that must survive what is done to it, one test after another."""
    with Service(tmp_path_factory.mktemp("robust"), hf_model, engine={"hang_timeout": 3}) as running:
        yield running


def idle(service: Service) -> bool:
    return all(service.metric(name) == 0 for name in
               ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"))  # fmt: skip


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_hanging_up_frees_the_place(service):
    aborted = service.metric("request_success_total", finished_reason="abort")
    with service.stream(**LONG) as response:
        lines = response.iter_lines()
        for _ in range(6):
            next(lines)
        assert service.metric("num_requests_running") == 1
    wait_for(lambda: idle(service), 5, "the stream's end")
    with contextlib.suppress(httpx.TimeoutException):
        httpx.post(service.url + "/v1/chat/completions", json=service.body(**LONG), headers=service.headers,
                   timeout=0.3)  # fmt: skip
    wait_for(lambda: idle(service), 5, "the end of the one that was not streaming")
    assert service.metric("request_success_total", finished_reason="abort") == aborted + 2


def test_a_full_queue_says_when_to_come_back_and_hanging_up_in_it_frees_it(start_service):
    service = start_service(engine={"max_num_seqs": 1, "max_num_queued_reqs": 1})
    with service.stream(**LONG) as running:
        lines = running.iter_lines()  # dropping it would close the stream
        next(lines)
        with contextlib.ExitStack() as stack:
            stack.enter_context(service.stream(**LONG))
            wait_for(lambda: service.metric("num_requests_waiting") == 1, what="queueing")
            refused = service.chat()
            assert refused.status_code == 503
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert refused.json()["error"]["code"] == "queue_full"
            assert service.metric("admission_rejections_total", reason="queue_full") == 1
            assert service.probe() == 200, "a busy service is ready"
        wait_for(lambda: service.metric("num_requests_waiting") == 0, what="leaving the queue")
        assert service.metric("num_requests_running") == 1
    wait_for(lambda: idle(service), what="idleness")


def test_a_context_that_does_not_fit_is_shortened_for_clients_too(start_service):
    service = start_service(engine={"kv_cache_tokens": 1500})
    (model,) = httpx.get(service.url + "/v1/models", headers=service.headers).json()["data"]
    assert model["max_model_len"] == 1024
    assert "max_model_len falls back" in service.log_text()
    too_long = service.chat("x" * 1100)
    assert (too_long.status_code, too_long.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert service.chat("x" * 900).status_code == 200


def test_draining_finishes_streams_and_refuses_new_connections(start_service, systemd):
    service = start_service(
        server={"workers": 2}, env={"NOTIFY_SOCKET": systemd.getsockname(), "WATCHDOG_USEC": "2000000"}
    )  # fmt: skip
    hear(systemd, b"READY=1")
    hear(systemd, b"WATCHDOG=1")
    pids = [service.process.pid, *service.children("nioserve")]
    with service.stream(max_tokens=1500, ignore_eos=True) as response:
        lines = response.iter_lines()
        next(lines)
        service.process.send_signal(signal.SIGTERM)
        wait_for(lambda: refused(service.port), 5, "refusing")
        assert service.probe() == 503
        assert service.process.poll() is None
        hear(systemd, b"STOPPING=1")
        rest = [line.removeprefix("data: ") for line in lines if line]
    assert rest[-1] == "[DONE]"
    assert json.loads(rest[-2])["choices"][0]["finish_reason"] == "length"
    assert service.process.wait(10) == 0
    assert not any(alive(pid) for pid in pids)
    assert not list(service.runtime_dir.iterdir())


@pytest.fixture
def systemd(tmp_path):
    """Where a service manager would listen."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(tmp_path / "notify"))
        channel.settimeout(10)
        yield channel


def hear(channel: socket.socket, word: bytes) -> None:
    """Wait until the service manager was told this."""
    while channel.recv(100) != word:
        pass


def refused(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_draining_is_bounded(start_service):
    service = start_service(server={"shutdown_timeout": 1})
    started = time.monotonic()
    with pytest.raises(httpx.TransportError), service.stream(**LONG) as response:
        for number, _ in enumerate(response.iter_lines()):
            if number == 0:
                service.kill("engine.process", signal.SIGSTOP)
                service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(10) == 0
    assert time.monotonic() - started < 8


def test_a_second_signal_ends_at_once(start_service):
    service = start_service()
    pids = service.children("nioserve")
    with contextlib.suppress(httpx.TransportError), service.stream(**LONG) as response:
        for number, _ in enumerate(response.iter_lines()):
            if number == 0:
                service.process.send_signal(signal.SIGTERM)
                wait_for(lambda: refused(service.port), 5, "refusing")
                service.process.send_signal(signal.SIGINT)
    assert service.process.wait(3) == 1
    assert not any(alive(pid) for pid in pids)


def test_a_dead_engine_fails_what_was_in_flight_and_comes_back(robust):
    service = robust
    before = text_of_chat(service)
    tokens, restarts = service.metric("generation_tokens_total"), service.metric("process_restarts_total")
    answers: list[httpx.Response] = []
    waiting = threading.Thread(target=lambda: answers.append(service.chat(**LONG)))
    with service.stream(**LONG) as response:
        lines = response.iter_lines()
        next(lines)
        waiting.start()
        wait_for(lambda: service.metric("num_requests_running") == 2, what="running")
        service.kill("engine.process")
        last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_unavailable"
    waiting.join(5)
    assert answers[0].status_code == 503
    assert answers[0].json()["error"]["type"] == "service_unavailable"
    assert "retry-after" in answers[0].headers
    assert service.probe() == 503
    assert (service.probe("/livez"), service.probe("/startupz")) == (200, 200)
    assert service.chat().status_code == 503
    wait_for(service.ready, 30, "recovery")
    wait_for(lambda: service.chat().status_code == 200, 5, "answering")
    assert text_of_chat(service) == before
    assert service.metric("process_restarts_total", process="engine") == restarts + 1
    assert service.metric("generation_tokens_total") > tokens, "counts survive"
    assert service.metric("request_success_total", finished_reason="error") == 2


def text_of_chat(service: Service) -> str:
    return service.chat().json()["choices"][0]["message"]["content"]


def test_a_hung_engine_is_noticed_and_replaced(robust):
    service = robust
    pid = service.kill("engine.process", signal.SIGSTOP)
    wait_for(lambda: service.probe("/livez") == 503, 8, "noticing")
    body = httpx.get(f"http://127.0.0.1:{service.metrics_port}/livez").json()
    assert (body["status"], body["detail"][:15]) == ("unavailable", "the engine hung")
    assert httpx.get(service.url + "/livez").status_code == 503
    wait_for(service.ready, 30, "recovery")
    assert service.probe("/livez") == 200
    assert service.children("engine.process") != [pid]
    assert not alive(pid)


def test_a_hung_worker_is_noticed_and_replaced(robust):
    service = robust
    pid = service.kill("api.worker", signal.SIGSTOP)
    wait_for(lambda: service.children("api.worker") not in ([], [pid]), 12, "a new worker")
    wait_for(lambda: answers(service), 15, "an answer")
    assert not alive(pid)


@pytest.mark.slow
def test_an_engine_killed_under_full_load_leaves_nothing_behind(start_service):
    """32 streams, three times: each ends with an error event in time, and everything is there again afterwards."""
    service = start_service(engine={"max_num_seqs": 32})
    assert service.chat().status_code == 200
    descriptors = []
    for _ in range(3):
        ends = run_streams_and_kill(service, 32)
        assert [code for code, _ in ends] == ["engine_unavailable"] * 32
        assert max(seconds for _, seconds in ends) < 2
        refused = service.chat()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")
        assert int(refused.headers["retry-after"]) >= 1
        wait_for(service.ready, 40, "recovery")
        wait_for(lambda: service.chat().status_code == 200, 5, "answering")
        wait_for(lambda: idle(service), 5, "idleness")
        pids = (service.process.pid, *service.children("api.worker"), *service.children("engine.process"))
        descriptors.append([len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids])
    assert descriptors[1:] == descriptors[:-1], "supervisor, worker and engine keep as many as before"
    assert len(list(service.runtime_dir.glob("*/engine-*.sock"))) == 1


def run_streams_and_kill(service: Service, count: int) -> list[tuple[str, float]]:
    """Kill the engine once all streams have begun; return how each ended, and how long after."""
    begun, killed, ends = threading.Barrier(count + 1, timeout=40), [0.0], []

    def read() -> None:
        with service.stream(**LONG) as response:
            lines = (line for line in response.iter_lines() if line)
            for _ in range(3):
                next(lines)
            begun.wait()
            last = [*lines][-1]
        ends.append((json.loads(last.removeprefix("data: "))["error"]["code"], time.monotonic() - killed[0]))

    threads = [threading.Thread(target=read) for _ in range(count)]
    for thread in threads:
        thread.start()
    begun.wait()
    killed[0] = time.monotonic()
    service.kill("engine.process")
    for thread in threads:
        thread.join(20)
    return ends


def test_a_dead_worker_is_replaced_and_its_requests_are_dropped(robust):
    service = robust
    with contextlib.suppress(httpx.TransportError), service.stream(**LONG) as response:
        for number, _ in enumerate(response.iter_lines()):
            if number == 0:
                pid = service.kill("api.worker")
    wait_for(lambda: service.children("api.worker") not in ([], [pid]), 10, "a new worker")
    wait_for(lambda: idle(service), 5, "dropping the dead worker's requests")
    wait_for(lambda: answers(service), 15, "an answer")
    assert service.metric("process_restarts_total", process="api") >= 1


def answers(service: Service) -> bool:
    try:
        return service.chat().status_code == 200
    except httpx.TransportError:
        return False


def test_no_process_outlives_a_killed_supervisor(start_service):
    service = start_service(server={"workers": 2})
    pids = service.children("nioserve")
    assert len(pids) == 3
    service.process.kill()
    service.process.wait()
    wait_for(lambda: not any(alive(pid) for pid in pids), 5, "their end")


def test_keys_are_read_again_on_sighup(robust):
    before = robust.keys_file.read_text()
    robust.keys_file.write_text(yaml.safe_dump([new_key("carol", "C", "D")[1]]))
    robust.process.send_signal(signal.SIGHUP)
    wait_for(lambda: robust.chat().status_code == 401, 3, "refusing the old key")
    robust.keys_file.write_text(before)
    robust.process.send_signal(signal.SIGHUP)
    wait_for(lambda: robust.chat().status_code == 200, 3, "taking it again")


def test_a_model_that_is_not_what_was_converted_is_not_served(int8_model, tmp_path):
    import shutil

    copy = shutil.copytree(int8_model, tmp_path / "copy")
    (copy / "tokenizer.json").write_bytes((copy / "tokenizer.json").read_bytes() + b" ")
    service = Service(tmp_path, copy)
    with pytest.raises(AssertionError, match=r"tokenizer\.json: sha256 differs"):
        service.__enter__()
    assert service.process.wait(5) == 1
    service.__exit__()


def test_an_int8_model_behind_mutual_tls(start_service, int8_model, tmp_path):
    authority(tmp_path)
    tls = {"certificate": str(tmp_path / "server.pem"), "key": str(tmp_path / "server.key"),
           "client_ca": str(tmp_path / "ca.pem")}  # fmt: skip
    service = start_service(server={"tls": tls}, model={"path": str(int8_model), "served_name": None})
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    url = service.url + "/v1/models"
    with pytest.raises(httpx.TransportError):
        httpx.get(url, headers=service.headers, verify=context)
    context.load_cert_chain(tmp_path / "client.pem", tmp_path / "client.key")
    models = httpx.get(url, headers=service.headers, verify=context)
    assert models.json()["data"][0]["id"] == "tiny", "the manifest's name"
    answer = httpx.post(service.url + "/v1/chat/completions", json=service.body(), headers=service.headers,
                        verify=context)  # fmt: skip
    assert answer.json()["usage"]["completion_tokens"] == 8
    with pytest.raises(httpx.TransportError):
        httpx.get(url.replace("https", "http"))


def authority(directory: Path) -> None:
    """Make a CA, and a certificate each for the server and a client."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)

    new = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    openssl(*new, "-x509", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=CA",
            "-addext", "keyUsage=critical,keyCertSign")  # fmt: skip
    for name in ("server", "client"):
        openssl(*new, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}",
                "-addext", "subjectAltName=IP:127.0.0.1")  # fmt: skip
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-copy_extensions", "copy",
                "-out", f"{name}.pem")  # fmt: skip
    (directory / "server.key").chmod(0o600)
