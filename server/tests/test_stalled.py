"""Clients that do not read their answers are cut off, and those that are slow are not."""

from __future__ import annotations

import json
import socket
import time

import pytest
from support import Service, wait_for


@pytest.fixture(scope="module")
def impatient(hf_model, tmp_path_factory):
    with Service(tmp_path_factory.mktemp("impatient"), hf_model, server={"stalled_read_timeout": 1}) as running:
        yield running


def begin(service: Service, **changes) -> socket.socket:
    """Send a request for a long stream and read nothing; small buffers on this side make that show sooner."""
    body = json.dumps(service.body(stream=True, ignore_eos=True, **changes)).encode()
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.settimeout(30)
    raw.connect(("127.0.0.1", service.port))
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {service.key}\r\n"
    )
    raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return raw


# Each token brings its log probabilities, several kilobytes, so that little computing fills the buffers.
MUCH = {"max_tokens": 3500, "logprobs": True, "top_logprobs": 20}


def test_who_does_not_read_loses_the_place(impatient):
    aborted = impatient.metric("request_success_total", finished_reason="abort")
    with begin(impatient, **MUCH):
        wait_for(lambda: impatient.metric("num_requests_running") == 1, what="the start")
        wait_for(lambda: impatient.metric("num_requests_running") == 0, 10, "the cut")
        assert impatient.metric("request_success_total", finished_reason="abort") == aborted + 1
        assert impatient.metric("generation_tokens_total") < 3000, "it was not the answer's own end"
    assert "a client that does not read was cut off" in impatient.log_text()


def test_who_reads_slowly_gets_everything(impatient):
    with begin(impatient, **{**MUCH, "max_tokens": 150}) as raw:
        answer = b""
        while piece := raw.recv(65536):
            answer += piece
            time.sleep(0.02)
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"data: [DONE]" in answer
