"""Validation on demand: the same matrix again, one cell, kills in the middle, sites' policies."""

import json

from flplatform.core import events as ev


def matrix(answer) -> dict:
    return answer["data"]["cross_validation"]["owners"]


def cells(running, run: int) -> list[str]:
    """Return the ids of the tasks whose result was accepted."""
    return [event.task_id for event in running.events(run) if isinstance(event, ev.ResultAccepted)]


def test_models_are_validated_again_on_demand(federation):
    running = federation("site-1", "site-2")
    running.start_all()
    running.steps_job(rounds=2)
    assert running.console("submit_job steps --wait").returncode == 0

    # The whole matrix again, by a run of its own.
    before = running.ask("cross_val 1")
    again = running.ask("validate all")
    assert again["ok"], again
    assert again["data"]["validation"]["run"] == 2
    assert len(matrix(again)) == 3
    assert matrix(again) == matrix(before)
    opened = running.events(2)[0]
    assert (opened.source_run, opened.job_blob) == (1, running.events(1)[0].job_blob)
    done = running.console("list_runs", "cross_val 1", options=["--json"])
    listed, shown = map(json.loads, done.stdout.splitlines())
    names = [each["name"] for each in listed["data"]["runs"]]
    assert names == ["steps", "validate of run 1"]
    assert shown["data"]["cross_validation"]["validations"] == [2]

    # One cell; the latest run is a validation: its source is meant.
    (cell,) = matrix(running.ask("validate site-1 site-2")).items()
    assert cell == ("site-1", {"site-2": matrix(before)["site-1"]["site-2"]})

    # Server and site are killed in the middle: what was accepted counts, what was not is done.
    release = running.hold("site-2", 2, "validate")
    assert running.console("validate all --run 1 --no-wait").returncode == 0
    running.wait_for(lambda: len(cells(running, 4)) == 3, "the cells of site-1")
    running.kill("site-2")
    running.kill("server")
    # A site that obeys no training any more may still allow validation.
    running.local(
        "site-2",
        "policy.yml",
        "allow_foreign_code_unsandboxed: true\nsubmitters: []\n"
        'commands: {"*": [any], validate: [any]}\n',
    )
    running.start("server", "site-2")
    release()
    running.wait_event(4, ev.RunEnded, status="finished")
    assert matrix(running.ask("cross_val 4")) == matrix(before)
    assert len(set(cells(running, 4))) == len(cells(running, 4)) == 6

    trained = running.console("submit_job steps --sites site-2 --min 1")
    assert "policy submitters = none" in trained.stdout + trained.stderr
    assert running.ask("validate global site-2 --run 1")["ok"]

    # And one that allows none refuses by name.
    running.local("site-2", "policy.yml", 'commands: {"*": [any], validate: []}\n')
    running.terminate("site-2")
    running.start("site-2")
    partly = running.ask("validate all --run 1")
    assert partly["ok"], partly
    assert partly["data"]["cross_validation"]["sites"] == ["site-1"]
    (gap,) = partly["data"]["cross_validation"]["gaps"]
    assert gap["owner"] == "*"
    assert "policy commands: validate = none" in gap["reason"]
