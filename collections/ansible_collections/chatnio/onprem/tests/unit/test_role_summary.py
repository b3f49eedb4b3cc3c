"""The summary counts what ran, where, and for how long."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from ansible_collections.chatnio.onprem.plugins.callback.role_summary import OUTSIDE, CallbackModule, Summary


def test_roles_in_run_order_with_totals():
    summary = Summary()
    summary.start_task("preflight", 100.0)
    summary.count("preflight", "m1")
    summary.start_task("base", 101.5)
    summary.count("base", "m1")
    summary.count("base", "gw1")
    summary.start_task(OUTSIDE, 104.0)
    summary.count(OUTSIDE, "m1")
    # A role's handlers run after other roles; their time is its own.
    summary.start_task("base", 105.0)
    summary.count("base", "m1")
    summary.stop(115.0)
    assert summary.lines() == [
        "ROLE                 SECONDS   TASKS",
        "preflight                1.5       1",
        "base                    12.5       2",
        "(outside of roles)       1.0       1",
        "total                   15.0       4",
        "tasks by host: gw1 1, m1 4",
    ]


def test_role_whose_tasks_were_all_skipped():
    summary = Summary()
    summary.start_task("base", 1.0)
    summary.stop(2.0)
    assert summary.lines()[1] == "base        1.0       0"


def test_quiet_without_roles():
    summary = Summary()
    summary.start_task(OUTSIDE, 1.0)
    summary.count(OUTSIDE, "m1")
    summary.stop(2.0)
    assert summary.lines() == []
    assert Summary().lines() == []


@pytest.fixture
def callback(monkeypatch):
    """The callback, whose clock moves one second at each look, and what it prints."""
    seconds = iter(range(100))
    monkeypatch.setattr("time.monotonic", lambda: next(seconds))
    plugin = CallbackModule()
    plugin.printed = []
    monkeypatch.setattr(plugin._display, "banner", plugin.printed.append)
    monkeypatch.setattr(plugin._display, "display", plugin.printed.append)
    return plugin


def task_of(role: str | None) -> SimpleNamespace:
    return SimpleNamespace(_role=SimpleNamespace(get_name=lambda: role) if role else None)


def result_of(role: str | None) -> SimpleNamespace:
    return SimpleNamespace(task=task_of(role), host=SimpleNamespace(get_name=lambda: "m1"))


def test_events_are_counted(callback):
    callback.v2_playbook_on_task_start(task_of("base"), is_conditional=False)
    callback.v2_runner_on_ok(result_of("base"))
    callback.v2_runner_on_skipped(result_of("base"))
    callback.v2_runner_on_failed(result_of("base"), ignore_errors=True)
    callback.v2_playbook_on_handler_task_start(task_of("network"))
    callback.v2_runner_on_unreachable(result_of("network"))
    callback.v2_playbook_on_stats(None)
    banner, table = callback.printed
    assert banner == "ROLE SUMMARY"
    assert table.splitlines()[1:] == [
        "base          1.0       2",
        "network       1.0       1",
        "total         2.0       3",
        "tasks by host: m1 3",
    ]


def test_run_without_roles_prints_nothing(callback):
    callback.v2_playbook_on_task_start(task_of(None), is_conditional=False)
    callback.v2_runner_on_ok(result_of(None))
    callback.v2_playbook_on_stats(None)
    assert callback.printed == []
