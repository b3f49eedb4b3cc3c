"""What users notice when replicas restart, die, or are left hanging."""

import re
import threading
import time

import httpx
import openai

from .conftest import Lab
from .test_chat import MODEL

STREAMS = 16


def stream(lab: Lab, tokens: int) -> str:
    """Take one streamed answer and return its finish reason; any error of the gateway or a replica is raised."""
    chunks = lab.openai().chat.completions.create(
        model=MODEL,
        stream=True,
        temperature=0,
        max_tokens=tokens,
        messages=[{"role": "user", "content": "Tell me a long story about a lighthouse."}],
    )
    return [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1]


def test_a_rolling_restart_costs_no_answer(platform: Lab) -> None:
    done, failed, finished = threading.Event(), [], []

    def user() -> None:
        while not done.is_set():
            try:
                finished.append(stream(platform, tokens=24))
            except (openai.OpenAIError, httpx.HTTPError) as error:
                failed.append(repr(error))

    users = [threading.Thread(target=user) for _ in range(STREAMS)]
    for one in users:
        one.start()
    time.sleep(2)
    try:
        for host in ("model1", "model2"):
            platform.on(host, "systemctl restart nioserve")
            time.sleep(2)
    finally:
        done.set()
        for one in users:
            one.join()
    print(f"{len(finished)} answers while both replicas restarted")
    assert not failed
    assert len(finished) > 2 * STREAMS
    assert set(finished) <= {"stop", "length"}
    log = platform.on("core1", f"tail -n {len(finished)} /var/log/nginx/gateway.log")
    assert set(re.findall(r'"status":(\d+)', log)) == {"200"}


def test_a_dead_replica_leaves_the_service_answering(platform: Lab) -> None:
    platform.on("model1", "systemctl kill --signal=KILL --kill-whom=all nioserve")
    for _ in range(4):
        assert stream(platform, tokens=4) == "length"
    deadline = time.monotonic() + 60
    while platform.on("model1", "systemctl is-active nioserve", check=False).strip() != "active":
        assert time.monotonic() < deadline, "the replica did not come back by itself"
        time.sleep(1)


def running(lab: Lab) -> float:
    """Return how many answers the replicas are working on, by their own metrics."""
    ask = "python3 -c \"import urllib.request as u; print(u.urlopen('http://{}:8001/metrics').read().decode())\""
    texts = [lab.on("core1", ask.format(address)) for address in ("10.0.0.21", "10.0.0.22")]
    gauges = r"^nioserve_num_requests_(?:running|waiting)(?:\{.*?\})? (\S+)$"
    return sum(float(value) for text in texts for value in re.findall(gauges, text, re.MULTILINE))


def test_a_user_who_hangs_up_frees_the_place(platform: Lab) -> None:
    client = platform.openai()
    opened = [
        client.chat.completions.create(
            model=MODEL,
            stream=True,
            temperature=0,
            max_tokens=2000,
            extra_body={"ignore_eos": True},
            messages=[{"role": "user", "content": f"Count upwards from {start}, one number a line."}],
        )
        for start in range(4)
    ]
    for one in opened:
        next(iter(one))
    assert running(platform) >= 1
    for one in opened:
        one.close()
    deadline = time.monotonic() + 20
    while running(platform) > 0:
        assert time.monotonic() < deadline, "answers that nobody reads go on"
        time.sleep(0.5)
