"""The module restarts or reloads a unit when, and only when, what it runs with isn't what its files say."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
from ansible.module_utils.testing import patch_module_args
from ansible_collections.chatnio.onprem.plugins.modules import service
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

# A systemd of one unit. What the unit has read is kept beside its properties, which is what the tests ask for.
SYSTEMCTL = """#!{python}
import json, sys, time
from pathlib import Path

file = Path("{state}")
state = json.loads(file.read_text())
verb, *arguments = sys.argv[1:]
if verb == "show":
    for name in arguments[1].removeprefix("--property=").split(","):
        print(f"{{name}}={{state[name]}}")
    sys.exit()
state["acts"].append(verb)
if state.get("fails") == verb:
    file.write_text(json.dumps(state | {{"fails": None}}))
    sys.exit("Job for it failed.")
if verb == "daemon-reload":
    state["NeedDaemonReload"] = "no"
    state["LoadState"] = "loaded" if Path(state["FragmentPath"]).is_file() else "not-found"
elif verb == "enable":
    state["UnitFileState"] = "enabled"
elif verb in ("restart", "reload"):
    folder = Path("{files}")
    state["read"] = {{path.name: path.read_text() for path in folder.iterdir()}}
    state["ActiveState"] = "active"
    if verb == "restart":
        state["InvocationID"] += "1"
        state["ActiveEnterTimestampMonotonic"] = int(time.clock_gettime(time.CLOCK_MONOTONIC) * 1e6)
file.write_text(json.dumps(state))
"""


class Machine:
    """A machine with a unit, its files and its systemctl."""

    def __init__(self, folder: Path, reload: bool = False) -> None:
        self.reload = reload
        self.stamps, self.conf, self.bin = (folder / name for name in ("stamps", "conf", "bin"))
        self.fragment = folder / "web.service"
        self.file = folder / "systemd.json"
        for path in (self.conf, self.bin):
            path.mkdir()
        self.fragment.write_text("[Service]\n")
        self.write("a.conf", "first")
        self.file.write_text(
            json.dumps(
                {
                    "LoadState": "loaded",
                    "ActiveState": "inactive",
                    "UnitFileState": "disabled",
                    "InvocationID": "",
                    "NeedDaemonReload": "no",
                    "FragmentPath": str(self.fragment),
                    "DropInPaths": "",
                    "ActiveEnterTimestampMonotonic": 0,
                    "acts": [],
                    "read": None,
                }
            )
        )
        systemctl = self.bin / "systemctl"
        systemctl.write_text(SYSTEMCTL.format(python=sys.executable + " -IS", state=self.file, files=self.conf))
        systemctl.chmod(0o755)
        (self.bin / "journalctl").write_text("#!/bin/sh\necho the end of the log\n")
        (self.bin / "journalctl").chmod(0o755)

    @property
    def state(self):
        return json.loads(self.file.read_text())

    def set(self, **properties):
        self.file.write_text(json.dumps(self.state | properties))

    def write(self, name, content):
        """Write a file as Ansible does: whole, under a new inode."""
        time.sleep(0.01)  # the kernel's clock for files ticks every few milliseconds
        part = self.conf.parent / "part"
        part.write_text(content)
        part.replace(self.conf / name)
        time.sleep(0.01)

    def by_hand(self, verb):
        """What an operator does without Ansible."""
        os.spawnl(os.P_WAIT, self.bin / "systemctl", "systemctl", verb, "web")
        self.set(acts=[])

    def run(self, check=False, **arguments):
        """Run the module and return its answer; what it did with systemctl is in `acts`."""
        self.set(acts=[])
        arguments = {"name": "web", "files": [f"{self.conf}/*.conf"], "reload": self.reload, **arguments}
        answers = []
        with pytest.MonkeyPatch.context() as patch, patch_module_args({**arguments, "_ansible_check_mode": check}):
            patch.setattr(service, "STAMPS", self.stamps)
            patch.setattr(service.AnsibleModule, "_record_module_result", lambda _, answer: answers.append(answer))
            patch.setenv("PATH", f"{self.bin}:{os.environ['PATH']}")
            with pytest.raises(SystemExit):
                service.main()
        return answers[0]

    @property
    def reads_the_present(self):
        """Whether the unit runs with its files as they are."""
        return self.state["read"] == {path.name: path.read_text() for path in self.conf.iterdir()}


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.fixture
def running(machine):
    """The unit runs, and the module has seen it."""
    machine.run()
    return machine


def test_starts_and_enables(machine):
    assert machine.run()["did"] == ["daemon-reload", "enable", "restart"]
    assert machine.state["acts"] == ["daemon-reload", "enable", "restart"]
    answer = machine.run()
    assert (answer["changed"], answer["did"], machine.state["acts"]) == (False, [], [])


@pytest.mark.parametrize("reload", [False, True])
def test_takes_up_what_changed(running, reload):
    running.write("a.conf", "second")
    verb = "reload" if reload else "restart"
    assert running.run(reload=reload)["did"] == ["daemon-reload", verb]
    assert running.reads_the_present
    assert running.run(reload=reload)["changed"] is False


@pytest.mark.parametrize("reload", [False, True])
def test_takes_up_a_file_that_came_or_went(running, reload):
    running.write("b.conf", "more")
    running.run(reload=reload)
    assert running.reads_the_present
    (running.conf / "b.conf").unlink()
    assert running.run(reload=reload)["changed"] is True
    assert running.reads_the_present


def test_takes_up_what_an_interrupted_run_left(running):
    """The run that wrote the file ended before the restart; no later run changes the file."""
    running.write("a.conf", "second")
    assert running.run(check=True)["did"] == ["daemon-reload", "restart"]
    assert running.state["acts"] == []
    assert running.run()["did"] == ["daemon-reload", "restart"]


def test_restart_by_hand_is_good_enough(running):
    running.write("a.conf", "second")
    running.by_hand("restart")
    assert running.run()["changed"] is False


def test_puts_right_what_was_altered_and_reloaded_by_hand(running):
    """The file is again what the module saw last, but not what the unit runs with."""
    running.write("a.conf", "tampered with")
    running.by_hand("reload")
    running.write("a.conf", "first")
    assert running.run(reload=True)["did"] == ["daemon-reload", "reload"]
    assert running.reads_the_present


def test_after_a_boot_nothing_is_to_be_done(running):
    """The stamps are gone, and the unit has read its files when it started."""
    running.by_hand("restart")
    (running.stamps / "web.service").unlink()
    assert running.run()["changed"] is False


def test_caller_knows_better(running):
    assert running.run(stale=True)["did"] == ["daemon-reload", "restart"]


def test_changed_unit_is_loaded_first(running):
    running.fragment.write_text("[Service]\nType=notify\n")
    running.set(NeedDaemonReload="yes")
    assert running.run()["did"] == ["daemon-reload", "restart"]


def test_new_unit_is_loaded_first(machine):
    machine.set(LoadState="not-found", UnitFileState="")
    assert machine.run()["did"] == ["daemon-reload", "enable", "restart"]


def test_no_unit(machine):
    machine.fragment.unlink()
    machine.set(LoadState="not-found", UnitFileState="", FragmentPath="")
    answer = machine.run(check=True)
    assert (answer["did"], machine.state["acts"]) == (["daemon-reload", "enable", "restart"], [])
    assert "There is no unit web.service" in machine.run()["msg"]


def test_failure_tells_the_log_and_is_tried_again(machine):
    machine.set(fails="restart")
    answer = machine.run()
    assert answer["failed"] is True
    assert "Job for it failed." in answer["msg"]
    assert "the end of the log" in answer["msg"]
    assert machine.run()["did"] == ["daemon-reload", "restart"]
    assert machine.reads_the_present


class Life(RuleBasedStateMachine):
    """Whatever happened before: after a run the unit runs with its files, and the next run changes nothing."""

    folders = None

    @initialize(reload=st.booleans())
    def begin(self, reload):
        self.machine = Machine(self.folders.mktemp("machine"), reload)
        self.machine.run()
        self.ran = True

    @rule(content=st.sampled_from(["first", "second", "third"]))
    def write(self, content):
        if (self.machine.conf / "a.conf").read_text() != content:
            self.machine.write("a.conf", content)
            self.ran = False

    @rule(verb=st.sampled_from(["restart", "reload"]))
    def act_by_hand(self, verb):
        self.machine.by_hand(verb)
        self.ran = False

    @rule()
    def boot(self):
        (self.machine.stamps / "web.service").unlink(missing_ok=True)
        self.machine.by_hand("restart")
        self.ran = False

    @rule()
    def stop(self):
        self.machine.set(ActiveState="inactive")
        self.ran = False

    @rule()
    def run(self):
        changed = self.machine.run()["changed"]
        assert not (self.ran and changed)
        self.ran = True

    @precondition(lambda self: getattr(self, "ran", False))
    @invariant()
    def runs_with_its_files(self):
        assert self.machine.reads_the_present


def test_life(tmp_path_factory):
    Life.folders = tmp_path_factory
    quick = settings(max_examples=10, stateful_step_count=8, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Life, settings=quick)
