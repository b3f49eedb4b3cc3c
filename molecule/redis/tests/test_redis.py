"""Redis answers those who have a certificate, a user and a password, and gives them their own keys."""

import json

import pytest
from labtools import secret, until

ADDRESS, PORT = "10.0.0.11", 6379

# Speaks Redis' protocol over TLS with nothing but Python's own library.
ASK = """
import json, socket, ssl, sys
commands, certificate = json.load(sys.stdin)
context = ssl.create_default_context(cafile="/etc/pki/chatnio/ca.pem")
if certificate:
    context.load_cert_chain("/etc/pki/chatnio/node.pem", "/etc/pki/chatnio/node.key")
answers = []
try:
    with socket.create_connection(("10.0.0.11", 6379), 5) as plain:
        with context.wrap_socket(plain, server_hostname="10.0.0.11") as tls:
            stream = tls.makefile("rwb")
            for command in commands:
                parts = b"".join(b"$%d\\r\\n%s\\r\\n" % (len(part), part) for part in map(str.encode, command))
                stream.write(b"*%d\\r\\n%s" % (len(command), parts))
                stream.flush()
                line = stream.readline().decode().rstrip()
                if line.startswith("$") and line != "$-1":
                    line = stream.read(int(line[1:]) + 2)[:-2].decode()
                answers.append(line)
except OSError as error:
    answers.append(f"{type(error).__name__}: {error}")
print(json.dumps(answers))
"""


@pytest.fixture(scope="session")
def ask(feed):
    """Sends commands to Redis from a model node, over one connection, and returns the answers."""

    def send(*commands, certificate=True, sign_in=True):
        user = [("AUTH", "nioserve", secret("redis_nioserve"))] if sign_in else []
        question = json.dumps([[*user, *commands], certificate])
        done = feed("model1", question, "python3", "-c", ASK)
        assert done.returncode == 0, done.stderr
        answers = json.loads(done.stdout)
        return answers[len(user) :] if sign_in and answers[0] == "+OK" else answers

    return send


def test_the_model_service_keeps_what_is_its_own(ask):
    assert ask(("SET", "nioserve:trial", "1", "EX", "60"), ("GET", "nioserve:trial"), ("DEL", "nioserve:trial")) == [
        "+OK",
        "1",
        ":1",
    ]


@pytest.mark.parametrize(
    "command",
    [
        ("GET", "others:key"),
        ("FLUSHALL",),
        ("KEYS", "*"),
        ("CONFIG", "GET", "dir"),
        ("ACL", "LIST"),
        ("MONITOR",),
        ("PUBLISH", "others", "x"),
    ],
)
def test_and_nothing_else(ask, command):
    (answer,) = ask(command)
    assert answer.startswith("-NOPERM"), answer


def test_the_default_user_is_off(ask):
    (answer,) = ask(("PING",), sign_in=False)
    assert answer.startswith("-NOAUTH")
    (answer,) = ask(("AUTH", "default", ""), sign_in=False)
    assert answer.startswith("-WRONGPASS")


def test_a_wrong_password_is_refused(ask):
    (answer,) = ask(("AUTH", "nioserve", "wrong"), sign_in=False)
    assert answer.startswith("-WRONGPASS")


def test_without_a_certificate_nobody_is_heard(ask):
    (answer,) = ask(("PING",), certificate=False, sign_in=False)
    assert "Error: " in answer, answer  # the handshake's, not an answer of Redis


def test_without_tls_nobody_is_heard(model1):
    bare = f"exec 3<>/dev/tcp/{ADDRESS}/{PORT}; echo PING >&3; timeout 3 cat <&3"
    assert "PONG" not in model1.run("bash -c %s", bare).stdout


def test_it_is_on_the_management_network_alone(desk, control, addresses):
    business = addresses["core1"]["business_address"]
    assert desk.knock(business, PORT)[PORT] in ("refused", "silent")
    with desk.route("10.0.0.0/24", business):
        assert desk.knock(ADDRESS, PORT) == {PORT: "silent"}
    # The control machine is on that network, and is none of those that use Redis.
    assert control.knock(ADDRESS, PORT) == {PORT: "silent"}


def test_memory_is_bound(ask):
    # 80 MB where 64 are allowed: keys nearest to their end make room, and Redis goes on.
    block = "x" * 4_000_000
    writes = [("SET", f"nioserve:fill:{number}", block, "EX", str(60 + number)) for number in range(20)]
    assert ask(*writes) == ["+OK"] * 20
    assert ask(("EXISTS", "nioserve:fill:0"), ("EXISTS", "nioserve:fill:19")) == [":0", ":1"]
    (info,) = ask(("INFO", "memory"))
    limits = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    assert (limits["maxmemory"], limits["maxmemory_policy"]) == (str(64 * 1024 * 1024), "volatile-ttl")


@pytest.mark.parametrize("name", ["core1", "model1", "model2"])
def test_the_password_is_on_no_machine(feed, name):
    # The model service's own configuration will need it; Redis keeps a hash.
    places = ("/etc/redis", "/home", "/root", "/var/lib/redis", "/var/log", "/var/tmp", "/tmp", "/run/chatnio")
    assert feed(name, secret("redis_nioserve"), "grep", "-rlFsf", "-", *places).stdout == ""


def test_it_comes_back_when_it_dies(core1, ask):
    core1.check_output("kill -KILL $(systemctl show redis-server --property=MainPID --value)")
    until(lambda: ask(("PING",)) == ["+PONG"])


def test_settings_altered_by_hand_are_put_right(play, core1, ask):
    core1.check_output("sed -i 's/^tls-auth-clients yes/tls-auth-clients no/' /etc/redis/redis.conf")
    core1.check_output("sed -i 's/-@dangerous/+@dangerous/' /etc/redis/users.acl && systemctl restart redis-server")
    (heard,) = ask(("PING",), certificate=False, sign_in=False)
    assert heard.startswith("-NOAUTH")
    assert ask(("KEYS", "none:*")) == ["*0"]

    assert set(play().changed) == {"core1"}

    (heard,) = ask(("PING",), certificate=False, sign_in=False)
    assert "Error: " in heard
    (allowed,) = ask(("KEYS", "none:*"))
    assert allowed.startswith("-NOPERM")


def test_a_renewed_certificate_is_taken_up(play, core1, ask):
    core1.check_output("touch /etc/pki/chatnio/node.pem")
    assert play().changed == {"core1": ["redis : Ensure Redis runs with its present configuration"]}
    assert ask(("PING",)) == ["+PONG"]
