"""site.yml: what it says before, does once and leaves alone after."""

from .conftest import Lab, Run

TASKS_A_HOST = 100


def test_check_mode_works_on_fresh_machines(rehearsal: Run, machines: Lab) -> None:
    assert rehearsal.code == 0, rehearsal.output[-4000:]
    assert all(row["changed"] > 0 for row in rehearsal.recap.values())


def test_a_site_with_findings_is_refused_and_left_alone(machines: Lab) -> None:
    run = machines.playbook("site.yml", "-e", "business_network=10.0.0.0/16", "-e", "model_service_modle=x")
    assert run.code != 0
    assert "model_service_modle" in run.output
    assert "did you mean model_service_model" in run.output
    assert "business_network" in run.output
    assert run.changes == []


def test_first_run_installs(platform: Lab) -> None:
    assert all(row["failed"] == row["unreachable"] == 0 for row in platform.runs["first"].recap.values())


def test_second_run_changes_nothing(platform: Lab) -> None:
    second = platform.playbook("site.yml")
    assert second.code == 0, second.output[-4000:]
    print(second.output[second.output.index("PLAY RECAP") :])
    assert second.changes == []
    assert all(row["ok"] <= TASKS_A_HOST for row in second.recap.values())


def test_check_mode_on_installed_machines_reports_nothing(platform: Lab) -> None:
    run = platform.playbook("site.yml", "--check", "--diff")
    assert run.code == 0, run.output[-4000:]
    assert run.changes == []


def test_accelerated_run_changes_nothing(platform: Lab, monkeypatch) -> None:
    monkeypatch.setenv("ANSIBLE_STRATEGY", "mitogen_linear")
    run = platform.playbook("site.yml")
    assert run.code == 0, run.output[-4000:]
    print(run.output[run.output.index("ROLE SUMMARY") :])
    assert run.changes == []


def test_tags_select_a_layer_and_a_role(platform: Lab) -> None:
    run = platform.playbook("site.yml", "--tags", "redis")
    assert run.code == 0, run.output[-4000:]
    assert "TASK [redis :" in run.output
    assert "TASK [gateway : Ensure" not in run.output
