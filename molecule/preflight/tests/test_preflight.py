"""A site that can't become the platform is refused with everything that stands in the way, and nothing is changed."""

PORT_OF_NOBODY = 2222


def test_all_findings_come_at_once(play):
    run = play(model_servce_workers=4, preflight_profile="minimum", business_network="10.0.0.0/24")
    assert run.code != 0
    assert not run.changed
    (messages,) = run.failed.values()
    report = messages[-1]
    assert "did you mean model_service_workers?" in report
    assert "profile minimum" in report
    assert "business_network" in report


def test_a_machine_that_is_down_is_a_finding_and_not_the_end(play):
    run = play(ansible_port=PORT_OF_NOBODY)
    assert run.code != 0
    assert not run.changed
    assert any("connection" in message for messages in run.failed.values() for message in messages)


def test_it_leaves_nothing_on_the_machines(play, machines):
    stamp = "/run/before-preflight"
    for machine in machines.values():
        machine.check_output(f"touch {stamp}")
    assert play().code == 0
    for machine in machines.values():
        assert machine.check_output(f"find /etc /usr /opt /srv /root -xdev -newer {stamp}") == ""
        machine.check_output(f"rm {stamp}")
