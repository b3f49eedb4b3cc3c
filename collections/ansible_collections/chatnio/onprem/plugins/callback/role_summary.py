# Copyright: the chatnio on-prem authors
# Apache License 2.0 (see LICENSE)
"""Shows where a run's time went."""

from __future__ import annotations

DOCUMENTATION = r"""
name: role_summary
type: aggregate
short_description: Time and number of tasks of each role
description:
  - At the end of a run, prints for each role, in the order they ran, the seconds it took and how many tasks it executed
    (on the host that executed most; skipped tasks don't count). Then the same for the whole run, and for each host.
  - Prints nothing where no role ran.
requirements:
  - Enable it with C(callbacks_enabled = chatnio.onprem.role_summary) in the section C([defaults]) of ansible.cfg.
author: chatnio on-prem authors
"""

import time
from collections import Counter

from ansible.executor.stats import AggregateStats
from ansible.executor.task_result import CallbackTaskResult
from ansible.playbook.task import Task
from ansible.plugins.callback import CallbackBase

# Where plays have tasks of their own, beside their roles.
OUTSIDE = "(outside of roles)"


class Summary:
    """Seconds, and tasks by host, of each role. Time runs for the role whose task started last."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.tasks: dict[str, Counter[str]] = {}
        self._current: str | None = None
        self._since = 0.0

    def start_task(self, role: str, now: float) -> None:
        """Take note that a task of `role` starts."""
        self.stop(now)
        self.seconds.setdefault(role, 0.0)
        self._current, self._since = role, now

    def stop(self, now: float) -> None:
        """Take note that the task in progress has ended."""
        if self._current is not None:
            self.seconds[self._current] += now - self._since
        self._current = None

    def count(self, role: str, host: str) -> None:
        """Take note that `host` executed a task of `role`."""
        self.tasks.setdefault(role, Counter())[host] += 1

    def lines(self) -> list[str]:
        """Return the summary as aligned lines; none where no role ran."""
        if not set(self.seconds) - {OUTSIDE}:
            return []
        rows = [(role, f"{seconds:.1f}", str(self._most(role))) for role, seconds in self.seconds.items()]
        hosts: Counter[str] = sum(self.tasks.values(), Counter())
        rows.append(("total", f"{sum(self.seconds.values()):.1f}", str(max(hosts.values(), default=0))))
        rows.insert(0, ("ROLE", "SECONDS", "TASKS"))
        width = max(len(role) for role, _seconds, _tasks in rows)
        table = [f"{role.ljust(width)}  {seconds:>8}  {tasks:>6}" for role, seconds, tasks in rows]
        return [*table, "tasks by host: " + ", ".join(f"{host} {number}" for host, number in sorted(hosts.items()))]

    def _most(self, role: str) -> int:
        return max(self.tasks.get(role, {}).values(), default=0)


class CallbackModule(CallbackBase):  # type: ignore[misc]  # Ansible ships no types
    """Feeds a `Summary` with the run's events and prints it at the end."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "chatnio.onprem.role_summary"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self) -> None:
        super().__init__()
        self._summary = Summary()

    # The names and signatures of the v2_* methods are Ansible's.

    def v2_playbook_on_task_start(self, task: Task, is_conditional: bool) -> None:
        """Start the clock of the task's role."""
        self._summary.start_task(role_of(task), time.monotonic())

    def v2_playbook_on_handler_task_start(self, task: Task) -> None:
        """Start the clock of the handler's role."""
        self._summary.start_task(role_of(task), time.monotonic())

    def v2_runner_on_ok(self, result: CallbackTaskResult) -> None:
        """Count the task."""
        self._count(result)

    def v2_runner_on_failed(self, result: CallbackTaskResult, ignore_errors: bool = False) -> None:
        """Count the task."""
        self._count(result)

    def v2_runner_on_unreachable(self, result: CallbackTaskResult) -> None:
        """Count the task: waiting for the host was most of its cost."""
        self._count(result)

    def v2_playbook_on_stats(self, stats: AggregateStats) -> None:
        """Print the summary."""
        self._summary.stop(time.monotonic())
        if lines := self._summary.lines():
            self._display.banner("ROLE SUMMARY")
            self._display.display("\n".join(lines))

    def _count(self, result: CallbackTaskResult) -> None:
        self._summary.count(role_of(result.task), result.host.get_name())


def role_of(task: Task) -> str:
    """Return the name of the role that a task is from."""
    return task._role.get_name() if task._role else OUTSIDE
