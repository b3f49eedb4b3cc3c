"""Redis answers those who have a certificate, a user and a password, and gives them their own keys."""

import json

import pytest
from labtools import knock_from, secret, until

ADDRESS, PORT = "10.0.0.11", 6379
TLS = "ssl.create_default_context(cafile='/etc/pki/chatnio/ca.pem')"
CERTIFICATE = "context.load_cert_chain('/etc/pki/chatnio/node.pem', '/etc/pki/chatnio/node.key')"

# Speaks Redis' inline protocol over TLS, with nothing but Python's own library. The last line is not read: a command
# that asks for nothing more tells that all before it was answered.
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
def ask(model1):
    """Sends commands to Redis from a model node, over one connection, and returns the answers."""

    def send(*commands, certificate=True, sign_in=True):
        user = [("AUTH", "nioserve", secret("redis_nioserve"))] if sign_in else []
        question = json.dumps([[*user, *commands], certificate])
        answers = json.loads(model1.check_output("echo %s | python3 -c %s", question, ASK))
        return answers[len(user) :] if sign_in and answers[0] == "+OK" else answers

    return send


def test_the_model_service_keeps_what_is_its_own(ask):
    assert ask(("SET", "nioserve:trial", "1", "EX", "60"), ("GET", "nioserve:trial"), ("DEL", "nioserve:trial")) == [
        "+OK", "1", ":1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [("GET", "others:key"), ("FLUSHALL",), ("KEYS", "*"), ("CONFIG", "GET", "dir"), ("ACL", "LIST"), ("DEBUG", "SLEEP", "0"),
     ("PUBLISH", "others", "x")],
)  # fmt: skip
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
    assert "certificate required" in answer or answer.startswith("ConnectionReset"), answer


def test_without_tls_nobody_is_heard(model1):
    answer = model1.check_output(
        "python3 -c %s",
        f"import socket; s = socket.create_connection(('{ADDRESS}', {PORT}), 5); s.send(b'PING\\r\\n'); print(s.recv(99))",
    )
    assert "PONG" not in answer


def test_it_is_on_the_management_network_alone(desk, control, addresses):
    business = addresses["core1"]["business_address"]
    assert desk.knock(business, PORT)[PORT] in ("refused", "silent")
    with desk.route("10.0.0.0/24", business):
        assert desk.knock(ADDRESS, PORT) == {PORT: "silent"}
    # The control machine is on that network, and is none of those that use Redis.
    assert control.knock(ADDRESS, PORT) == {PORT: "silent"}


def test_memory_is_bound(ask):
    # 96 MB of keys that may go, where 64 MB are allowed: the oldest make room, and Redis goes on.
    block = "x" * 1_000_000
    writes = [("SET", f"nioserve:fill:{number}", block, "EX", "60") for number in range(3)]
    assert ask(*writes) == ["+OK"] * 3
    (info,) = ask(("INFO", "memory"))
    limits = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    assert (limits["maxmemory"], limits["maxmemory_policy"]) == (str(64 * 1024 * 1024), "volatile-ttl")


def test_the_password_is_on_no_machine(machines):
    for machine in machines.values():
        assert machine.run("grep -rlFs %s /etc /home /root /var /run/chatnio", secret("redis_nioserve")).stdout == ""


def test_it_comes_back_when_it_dies(core1, ask):
    core1.check_output("kill -KILL $(systemctl show redis-server --property=MainPID --value)")
    until(lambda: ask(("PING",)) == ["+PONG"])


def test_settings_altered_by_hand_are_put_right(play, core1, ask):
    core1.check_output("sed -i 's/^tls-auth-clients yes/tls-auth-clients no/' /etc/redis/redis.conf")
    core1.check_output("echo 'user default on nopass ~* +@all' >> /etc/redis/users.acl && systemctl restart redis-server")
    assert ask(("PING",), certificate=False, sign_in=False) == ["+PONG"]

    assert set(play().changed) == {"core1"}

    (answer,) = ask(("PING",), certificate=False, sign_in=False)
    assert answer != "+PONG"
    assert ask(("PING",)) == ["+PONG"]


def test_a_renewed_certificate_is_taken_up(play, core1, ask):
    core1.check_output("touch /etc/pki/chatnio/node.pem")
    assert play().changed == {"core1": ["Ensure Redis runs with its present configuration"]}
    assert ask(("PING",)) == ["+PONG"]
