"""Users come in over TLS that holds, get answers as they are made, and don't notice a replica that is gone."""

import json
import re
import subprocess
import sys
import time
from itertools import pairwise

import pytest
from labtools import ROOT, secret, until

NAME, ADDRESS = "chat.lab.internal", "192.168.1.11"
MODEL = "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def authority(core1, tmp_path_factory):
    """The platform's authority, as a user was given it."""
    path = tmp_path_factory.mktemp("pki") / "ca.pem"
    path.write_text(core1.check_output("cat /etc/pki/chatnio/ca.pem") + "\n")
    return path


@pytest.fixture(scope="session")
def curl(desk, authority):
    """A user's curl: by name, with the platform's authority and a key."""

    def command(path, *options):
        return [
            "curl",
            "--silent",
            "--show-error",
            "--max-time",
            "120",
            "--cacert",
            str(authority),
            "--resolve",
            f"{NAME}:443:{ADDRESS}",
            "--header",
            f"Authorization: Bearer nio_alice_{secret('alice')}",
            *options,
            f"https://{NAME}{path}",
        ]

    return command


def question(**more):
    """Return a request's body."""
    return json.dumps(
        {"model": MODEL, "messages": [{"role": "user", "content": "Tell me about the sea."}], "temperature": 0, **more}
    )


def test_tls_is_as_mozilla_recommends(desk, authority):
    scan = desk.run(
        sys.executable,
        "-m",
        "sslyze",
        "--mozilla_config=intermediate",
        f"--certinfo_ca_file={authority}",
        f"{NAME}:443{{{ADDRESS}}}",
        timeout=180,
    )
    assert scan.returncode == 0, scan.stdout[-3000:] + scan.stderr


def test_http_2_and_a_promise_to_stay_with_https(desk, curl):
    done = desk.run(*curl("/v1/models", "--include", "--write-out", "%{http_version} %{http_code}"))
    assert done.stdout.endswith("2 200"), done
    assert "strict-transport-security: max-age=63072000" in done.stdout


def test_http_leads_to_https_and_nowhere_else(desk):
    done = desk.run(
        "curl",
        "--silent",
        "--output",
        "/dev/null",
        "--write-out",
        "%{http_code} %{redirect_url}",
        "--header",
        "Host: elsewhere.example",
        f"http://{ADDRESS}/v1/models?a=1",
    )
    assert done.stdout == f"308 https://{NAME}/v1/models?a=1"


def test_it_is_on_the_business_network_alone(control, core1):
    assert control.knock("10.0.0.11", 443) == {443: "silent"}
    listening = core1.check_output("ss -Hltn 'sport = :443' | awk '{print $4}'").split()
    assert set(listening) == {f"{ADDRESS}:443"}


def test_an_answer_comes_as_it_is_made(desk, curl):
    command = desk.command(*curl("/v1/chat/completions", "--no-buffer", "--json", question(stream=True, max_tokens=64)))
    with subprocess.Popen(command, stdout=subprocess.PIPE) as stream:
        arrivals = [time.monotonic() for line in stream.stdout if line.startswith(b"data: ")]
    assert len(arrivals) > 30
    # Held back, all would arrive with the last; as it is, no quarter of the time goes by without a piece.
    whole = arrivals[-1] - arrivals[0]
    assert whole > 0.1
    assert max(after - before for before, after in pairwise(arrivals)) < whole / 4


def test_a_body_too_large_is_turned_away(desk, curl, tmp_path):
    large = tmp_path / "large"
    large.write_text(question(user="x" * 2_000_000))
    done = desk.run(
        *curl("/v1/chat/completions", "--json", f"@{large}", "--output", "/dev/null", "--write-out", "%{http_code}")
    )
    assert done.stdout == "413"


def test_who_asked_is_logged_as_the_network_says(desk, curl, core1):
    answer = desk.run(*curl("/v1/models", "--include", "--header", "X-Forwarded-For: 203.0.113.9")).stdout
    request = re.search(r"^x-request-id: (\S+)", answer, re.MULTILINE).group(1)
    line = json.loads(core1.check_output(f"grep -F {request} /var/log/nginx/gateway.log"))
    assert (line["client"], line["status"]) == ("192.168.1.250", 200)
    assert re.fullmatch(r"192\.168\.1\.2[12]:8000", line["replica"])


@pytest.mark.parametrize("gone", ["model1", "model2"])
def test_a_replica_that_is_gone_costs_no_answer(desk, curl, machines, gone):
    machines[gone].check_output("systemctl stop nioserve")
    try:
        for _ in range(6):
            done = desk.run(
                *curl(
                    "/v1/chat/completions",
                    "--json",
                    question(max_tokens=4),
                    "--output",
                    "/dev/null",
                    "--write-out",
                    "%{http_code}",
                )
            )
            assert done.stdout == "200"
    finally:
        machines[gone].check_output("systemctl start nioserve")


def test_settings_altered_by_hand_are_put_right(play, core1, desk, curl):
    core1.check_output("sed -i '/Strict-Transport-Security/d' /etc/nginx/conf.d/gateway.conf && systemctl reload nginx")

    def promised():
        return "strict-transport-security" in desk.run(*curl("/v1/models", "--include")).stdout

    until(lambda: not promised())
    assert set(play().changed) == {"core1"}
    until(promised)


def test_a_renewed_certificate_is_taken_up(play, core1, desk, authority):
    def serial():
        shown = desk.run("openssl", "s_client", "-connect", f"{ADDRESS}:443", "-CAfile", str(authority)).stdout
        assert "Verify return code: 0" in shown
        return desk.run("openssl", "x509", "-noout", "-serial", text=shown).stdout

    before = serial()
    core1.check_output("rm /etc/pki/chatnio/gateway.pem")
    assert "core1" in play(playbook=ROOT / "molecule/pki/converge.yml").changed
    assert play().changed == {"core1": ["nginx : Ensure nginx runs with its present configuration"]}
    until(lambda: serial() != before)
