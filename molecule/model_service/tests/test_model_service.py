"""The model answers gateways and nobody else, in a cage, and comes back when it dies."""

import json
import re

import pytest
from labtools import group, knock_from, secret, until

REPLICAS = group("model_nodes")
MODEL = "smollm2-135m-instruct"
API, METRICS = 8000, 8001
FILES = f"/srv/models/{MODEL}/1"

# Asks over mutual TLS with nothing but Python's own library; prints the status and the body.
ASK = """
import http.client, json, ssl, sys
address, path, key, certificate, body = json.load(sys.stdin)
context = ssl.create_default_context(cafile="/etc/pki/chatnio/ca.pem")
if certificate:
    context.load_cert_chain("/etc/pki/chatnio/node.pem", "/etc/pki/chatnio/node.key")
try:
    with_tls = http.client.HTTPSConnection(address, 8000, context=context, timeout=120)
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    with_tls.request("POST" if body else "GET", path, json.dumps(body) if body else None, headers)
    answer = with_tls.getresponse()
    print(json.dumps([answer.status, json.loads(answer.read())]))
except OSError as error:
    print(json.dumps([0, f"{type(error).__name__}: {error}"]))
"""


@pytest.fixture(scope="session")
def ask(feed, addresses):
    """Asks a replica as the gateway does and returns the status and the answer."""

    def send(name, path="/v1/models", key=None, certificate=True, body=None):
        key = f"nio_alice_{secret('alice')}" if key is None else key
        question = json.dumps([addresses[name]["business_address"], path, key, certificate, body])
        done = feed("core1", question, "python3", "-c", ASK)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return send


def main_process(machine):
    """Return the service's main process."""
    return machine.check_output("systemctl show nioserve --property=MainPID --value")


def invocation(machine):
    """Return what is another with every start of the service."""
    return machine.check_output("systemctl show nioserve --property=InvocationID --value")


@pytest.mark.parametrize("name", REPLICAS)
def test_it_answers_the_gateway(ask, name):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    body = {"model": MODEL, "messages": question, "temperature": 0, "max_tokens": 24}
    status, answer = ask(name, "/v1/chat/completions", body=body)
    assert status == 200, answer
    assert "Paris" in answer["choices"][0]["message"]["content"]


def test_not_without_the_platforms_certificate(ask):
    status, answer = ask("model1", certificate=False)
    assert status == 0, answer


def test_not_without_a_key(ask):
    assert ask("model1", key="")[0] == 401
    assert ask("model1", key=f"nio_alice_{'x' * 43}")[0] == 401


def test_not_users_nor_other_machines(desk, control, model2, addresses):
    at = addresses["model1"]
    assert set(desk.knock(at["business_address"], API, METRICS).values()) == {"silent"}
    assert set(control.knock(at["management_address"], API, METRICS).values()) == {"silent"}
    assert knock_from(model2, at["business_address"], API) == {API: "silent"}
    assert knock_from(model2, at["management_address"], METRICS) == {METRICS: "silent"}


def test_metrics_are_on_the_management_network_alone(core1, model1, addresses):
    at = addresses["model1"]
    read = "import urllib.request as u; print(u.urlopen('http://%s:8001/metrics', timeout=10).read().decode())"
    assert "nioserve_num_requests_running" in core1.check_output("python3 -c %s", read % at["management_address"])
    # On the machine itself no firewall stands between: who listens where.
    assert knock_from(model1, at["business_address"], API, METRICS) == {API: "open", METRICS: "refused"}
    assert knock_from(model1, at["management_address"], API, METRICS) == {API: "refused", METRICS: "open"}


@pytest.mark.parametrize("name", REPLICAS)
def test_it_has_no_rights_to_lose(machines, name):
    machine = machines[name]
    status = machine.check_output(f"cat /proc/{main_process(machine)}/status")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert (fields["NoNewPrivs"], fields["Seccomp"], int(fields["CapBnd"], 16)) == ("1", "2", 0)
    assert "0" not in fields["Uid"].split()
    report = machine.check_output("systemd-analyze security nioserve --no-pager | tail -n 1")
    assert float(re.search(r"\d+\.\d+", report).group()) < 2.5, report


@pytest.mark.parametrize(
    "place", ["/etc", "/opt/nioserve", "/srv/models", "/usr/lib", "/var/lib", "/root", "/sys/fs/cgroup"]
)
def test_not_even_root_in_its_cage_writes_outside(model1, place):
    inside = f"nsenter --target {main_process(model1)} --mount --"
    refused = model1.run(f"{inside} touch {place}/by-hand")
    assert "Read-only file system" in refused.stderr or "Permission denied" in refused.stderr, refused


def test_the_kernel_holds_it_to_its_memory(model1):
    group_of = model1.check_output(f"grep -E '^[0-9]+:memory:|^0::' /proc/{main_process(model1)}/cgroup | head -n 1")
    limit = model1.run(f"cat /sys/fs/cgroup/memory{group_of.split(':', 2)[2]}/memory.limit_in_bytes")
    assert limit.stdout.strip() == str(3 * 2**30), (group_of, limit)


def test_it_comes_back_when_it_dies(model1, ask):
    before = invocation(model1)
    model1.check_output(f"kill -KILL {main_process(model1)}")
    until(lambda: invocation(model1) != before, seconds=30)
    until(lambda: ask("model1")[0] == 200, seconds=120, step=1)


def test_what_was_altered_by_hand_is_put_right(play, model1, model2, ask):
    manifest = f"{FILES}/manifest.json"
    digest = model1.file(manifest).sha256sum
    model1.check_output(f"echo >> {manifest}")
    model2.check_output(
        "sed -i '/hash:/s/sha256/sha257/' /etc/nioserve/keys.yml && rm /etc/systemd/system/nioserve.service"
    )

    run = play()

    assert run.code == 0, run.failed
    assert set(run.changed) == {"model1", "model2"}
    assert model1.file(manifest).sha256sum == digest
    for name in REPLICAS:
        assert ask(name)[0] == 200


def test_a_change_of_one_setting_restarts_those_that_it_is_for(play, model1, model2):
    before = invocation(model1), invocation(model2)
    model1.check_output("sed -i 's/max_num_queued_reqs: .*/max_num_queued_reqs: 7/' /etc/nioserve/config.yml")
    assert set(play().changed) == {"model1"}
    assert invocation(model1) != before[0]
    assert invocation(model2) == before[1]
    assert "max_num_queued_reqs: 256" in model1.file("/etc/nioserve/config.yml").content_string
