"""Every machine has a certificate that the platform's authority vouches for, and a key that nobody else reads."""

import pytest
from labtools import hosts, secret

MACHINES = sorted(hosts())
FOLDER = "/etc/pki/chatnio"


def serial(machine, name="node"):
    """Return a certificate's serial number."""
    return machine.check_output(f"openssl x509 -in {FOLDER}/{name}.pem -noout -serial")


def public(machine, name="node"):
    """Return the public key that a certificate is for."""
    return machine.check_output(f"openssl x509 -in {FOLDER}/{name}.pem -noout -pubkey")


@pytest.mark.parametrize("name", MACHINES)
def test_the_chain_holds_for_every_address_of_the_machine(machines, addresses, name):
    verify = f"openssl verify -x509_strict -CAfile {FOLDER}/ca.pem"
    at = addresses[name]
    for claim in (f"-verify_hostname {name}", *(f"-verify_ip {address}" for address in at.values())):
        for purpose in ("sslserver", "sslclient"):
            machines[name].check_output(f"{verify} -purpose {purpose} {claim} {FOLDER}/node.pem")
    stranger = machines[name].run(f"{verify} -verify_ip 10.0.0.99 {FOLDER}/node.pem")
    assert "IP address mismatch" in stranger.stderr


def test_the_gateways_certificate_is_for_the_names_that_users_type(core1, addresses):
    for claim in ("-verify_hostname chat.lab.internal", f"-verify_ip {addresses['core1']['business_address']}"):
        core1.check_output(f"openssl verify -x509_strict -CAfile {FOLDER}/ca.pem {claim} {FOLDER}/gateway.pem")


@pytest.mark.parametrize("name", MACHINES)
def test_programs_trust_the_authority(machines, name):
    machines[name].check_output(f"openssl verify -CApath /etc/ssl/certs {FOLDER}/node.pem")


@pytest.mark.parametrize("name", MACHINES)
def test_the_key_fits_and_is_roots_alone(machines, name):
    machine = machines[name]
    assert machine.check_output(f"openssl pkey -in {FOLDER}/node.key -pubout") == public(machine)
    assert machine.run(f"runuser -u nobody -- cat {FOLDER}/node.key").rc != 0
    assert machine.file(f"{FOLDER}/node.key").mode == 0o600


def test_no_two_machines_share_a_key(machines):
    assert len({public(machine) for machine in machines.values()}) == len(machines)


def test_the_authoritys_key_opens_with_the_passphrase_alone(core1, feed):
    read = ("openssl", "pkey", "-in", "/etc/pki/chatnio-ca/ca.key", "-noout", "-passin", "stdin")
    assert feed("core1", "wrong\n", *read).returncode != 0
    assert feed("core1", secret("ca_passphrase"), *read).returncode == 0
    assert core1.run("runuser -u nobody -- ls /etc/pki/chatnio-ca").rc != 0


@pytest.mark.parametrize("name", MACHINES)
def test_authority_and_passphrase_are_nowhere_else(machines, feed, name):
    assert machines[name].file("/etc/pki/chatnio-ca").exists == (name == "core1")
    places = ("/etc", "/home", "/root", "/var/lib", "/var/log", "/var/tmp", "/tmp", "/usr/local", "/run/chatnio")
    assert feed(name, secret("ca_passphrase"), "grep", "-rlFsf", "-", *places).stdout == ""
    kept = feed(
        name, "BEGIN ENCRYPTED PRIVATE KEY\nProc-Type: 4,ENCRYPTED", "grep", "-rlFsf", "-", *places
    ).stdout.split()
    assert kept == (["/etc/pki/chatnio-ca/ca.key"] if name == "core1" else [])


def test_a_certificate_near_its_end_is_made_again_with_the_same_key(play, machines):
    before = {name: (serial(machine), public(machine)) for name, machine in machines.items()}
    assert set(play(pki_renew_days=400).changed) == set(MACHINES)
    for name, machine in machines.items():
        assert serial(machine) != before[name][0]
        assert public(machine) == before[name][1]
    assert not play().changed


def test_what_was_altered_by_hand_is_put_right(play, machines, core1, model1, model2):
    core1.check_output(f"rm {FOLDER}/gateway.pem")
    # A certificate that its maker vouches for.
    model1.check_output(
        f"openssl req -x509 -key {FOLDER}/node.key -subj /CN=model1 -days 300 -out {FOLDER}/node.pem 2>/dev/null"
    )
    model2.check_output(f"chmod 0644 {FOLDER}/node.key")
    assert model1.run(f"openssl verify -CAfile {FOLDER}/ca.pem {FOLDER}/node.pem").rc != 0

    run = play()

    assert set(run.changed) == set(MACHINES), run.changed
    core1.check_output(f"openssl verify -CAfile {FOLDER}/ca.pem {FOLDER}/gateway.pem")
    model1.check_output(f"openssl verify -CAfile {FOLDER}/ca.pem {FOLDER}/node.pem")
    assert model2.file(f"{FOLDER}/node.key").mode == 0o600
