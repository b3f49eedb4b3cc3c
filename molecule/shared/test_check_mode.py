"""What holds for every role."""


def test_check_mode_promises_no_change_on_a_machine_that_is_done(play):
    run = play("--check", "--diff")
    assert run.code == 0, run.output
    assert not run.changed
