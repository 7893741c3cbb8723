import asyncio
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from flplatform.admin.console import packing, submit
from flplatform.core.errors import (
    ConfigError,
    FailedPreconditionError,
    InvalidArgumentError,
    UnavailableError,
)
from flplatform.hci.grammar import tokenise
from flplatform.security.package import open_package
from flplatform.security.signing import Signed, StartOrder, open_order
from tests.unit.admin.console.conftest import Screen, data, done, error, text

JOB = """
name: tiny
rounds: 3
min_clients: 2
data: [heart]
executor: {module: tiny}
initial_model: {function: "tiny:first"}
"""
CODE = "import numpy as np\ndef first(args, seed): return {'w': np.zeros(14, 'f4')}\n"


def row(target: str, status: str = "ok", detail: str = "") -> dict:
    return {"type": "row", "target": target, "status": status, "detail": detail, "cells": {}}


ALL_OK = [row("a"), row("b"), done(0)]
STARTED = [{"type": "session", "key": "run", "value": 7}, data("run", 7), done(0)]


@pytest.fixture
def job(tmp_path) -> Path:
    folder = tmp_path / "tiny"
    (folder / "code").mkdir(parents=True)
    (folder / "job.yml").write_text(JOB)
    (folder / "code" / "tiny.py").write_text(CODE)
    return folder


class Uploads:
    """Stands for `rpc.transfers.send_blob`: keeps what was sent, after some broken tries."""

    def __init__(self, broken: int = 0) -> None:
        self.broken = broken
        self.sent: dict[str, bytes] = {}

    async def __call__(self, channel, path, blob, transfer_id, *, token, progress) -> None:
        assert (channel, token) == ("channel", "token")
        if self.broken:
            self.broken -= 1
            raise UnavailableError("gone")
        progress(blob.size)
        self.sent[transfer_id] = path.read_bytes()


@pytest.fixture
def uploads(monkeypatch) -> Uploads:
    uploads = Uploads()
    monkeypatch.setattr(packing, "send_blob", uploads)
    return uploads


def run(transport, line: str, **options) -> tuple[int, Screen]:
    screen = Screen(transport, **({"assume_yes": True} | options))
    return asyncio.run(submit.submit_job(transport, tokenise(line), screen.shell)), screen


def test_a_job_is_checked_planned_signed_uploaded_and_started(
    transport, job, uploads, trust, tmp_path
):
    refused = row("c", "refused", "rule policy byoc = none: amy may not byoc")
    transport.replies = [[row("a"), row("b"), refused, done(1)], STARTED]
    code, screen = run(transport, f"submit_job {job}")
    assert code == 0
    assert screen.lines[:3] == [
        "plan      scatter_gather, cross_site_validation; 3 rounds, quorum 2 of 3, "
        "wait 10 s after quorum, deadline 600 s",
        "          model 14 parameters in 1 tensor (56 B)     data heart at 3 sites",
        "accepts   a ok · b ok · c refused: rule policy byoc = none: amy may not byoc",
    ]
    assert screen.lines[-1].endswith("signed by amy · run 7 started")
    assert screen.shell.remembered == {"run": 7}
    (preflight, _), (started, signed) = transport.sent
    assert preflight[0] == "preflight"
    assert json.loads(preflight[1]) == {
        "job": "tiny",
        "has_code": True,
        "data": ["heart"],
        "environment": "default",
        "sites": [],
    }
    assert started == ["submit"]
    signer, order = open_order(
        StartOrder, Signed.from_bytes(signed), trust.store, datetime.now(UTC)
    )
    assert signer.name == "amy"
    assert order.sites == ("a", "b", "c")
    (package_id, model_id) = uploads.sent
    assert (package_id, model_id) == (f"{order.submission_id}/job", f"{order.submission_id}/model")
    (tmp_path / "p.zip").write_bytes(uploads.sent[package_id])
    package = open_package(tmp_path / "p.zip", trust.store, datetime.now(UTC))
    assert package.author.name == "amy"
    assert {file.path for file in package.manifest.files} == {"job.yml", "code/tiny.py"}
    assert package.model.size == len(uploads.sent[model_id])


def test_options_reach_server_and_sites(transport, job, uploads, trust):
    transport.replies = [ALL_OK, STARTED]
    run(transport, f"submit_job {job} --sites a,b --min 1 --submission {'5' * 32}")
    assert json.loads(transport.sent[0][0][1])["sites"] == ["a", "b"]
    assert transport.sent[1][0] == ["submit", "--min", "1"]
    assert list(uploads.sent) == [f"{'5' * 32}/job", f"{'5' * 32}/model"]


def test_processes_per_site_are_shown_and_signed(transport, job, uploads, trust):
    transport.replies = [ALL_OK, STARTED]
    _, screen = run(transport, f"submit_job {job} --gpus a=2,b=4")
    assert "gpus      a 2 · b 4" in screen.lines
    assert json.loads(transport.sent[0][0][1])["gpus"] == {"a": 2, "b": 4}
    signed = Signed.from_bytes(transport.sent[1][1])
    _, order = open_order(StartOrder, signed, trust.store, datetime.now(UTC))
    assert order.gpus == {"a": 2, "b": 4}
    transport.replies = [ALL_OK]
    with pytest.raises(InvalidArgumentError, match="'aa' is not a target site"):
        run(transport, f"submit_job {job} --gpus aa=2")
    with pytest.raises(InvalidArgumentError, match="is not a number"):
        run(transport, f"submit_job {job} --gpus many")
    assert len(transport.sent) == 3, "a slip is told before anybody is asked"


def test_wait_follows_the_run(transport, job, uploads):
    transport.replies = [ALL_OK, STARTED, [text("run 7 failed"), done(5)]]
    code, screen = run(transport, f"submit_job {job} --wait")
    assert code == 5
    assert screen.lines[-1] == "run 7 failed"
    assert transport.sent[2][0] == ["wait", "7"]


def test_nothing_is_sent_without_a_yes(transport, job, uploads):
    transport.replies = [ALL_OK]

    async def no(question: str, hidden: bool) -> str:
        assert question == "2 of 2 sites would take part, quorum 2. Submit? [y/N] "
        return "n"

    screen = Screen(transport)
    screen.shell.asker = no
    code = asyncio.run(submit.submit_job(transport, ["submit_job", str(job)], screen.shell))
    assert code == 130
    assert screen.lines[-1] == "nothing was submitted"
    transport.replies = [ALL_OK]
    with pytest.raises(InvalidArgumentError, match="not confirmed"):
        run(transport, f"submit_job {job}", assume_yes=False)
    assert uploads.sent == {}


def test_a_quorum_that_sites_refuse_is_not_even_asked_about(transport, job):
    transport.replies = [[row("a"), row("b", "refused", "rule r"), row("c", "refused"), done(1)]]
    with pytest.raises(FailedPreconditionError, match="quorum 2 of 3 .* b refused: rule r"):
        run(transport, f"submit_job {job}")
    transport.replies = [[row("a"), done(0)]]
    with pytest.raises(InvalidArgumentError, match="only 1 target sites"):
        run(transport, f"submit_job {job}")


def test_a_silent_site_may_still_come(transport, job, uploads):
    transport.replies = [[row("a"), row("b", "no_reply", "after 5.0 s"), done(1)], STARTED]
    code, screen = run(transport, f"submit_job {job}")
    assert code == 0
    assert "b no reply after 5.0 s" in screen.lines[2]


def test_an_unknown_site_is_an_error(transport, job):
    transport.replies = [[row("a"), row("bb", "unknown", "site (did you mean b?)"), done(1)]]
    with pytest.raises(InvalidArgumentError, match=r"bb is an unknown site \(did you mean b\?\)"):
        run(transport, f"submit_job {job} --sites a,bb")


def test_who_may_not_submit_learns_it_before_anything_is_sent(transport, job, uploads):
    transport.replies = [[error("max may not preflight"), done(3)]]
    code, screen = run(transport, f"submit_job {job}")
    assert code == 3
    assert "max may not" in screen.err.getvalue()
    assert uploads.sent == {}


def test_a_broken_connection_is_survived(transport, job, uploads):
    uploads.broken = 2
    transport.replies = [ALL_OK, [UnavailableError("gone")], STARTED]
    code, screen = run(transport, f"submit_job {job}")
    assert code == 0
    assert len(uploads.sent) == 2
    assert transport.sent[1] == transport.sent[2]  # the same submission: it runs once


def test_a_model_of_a_run_stays_on_the_server(transport, job, uploads):
    spec = JOB.replace('{function: "tiny:first"}', "{run: 3, round: 4}")
    (job / "job.yml").write_text(spec)
    model = {"run": 3, "round": 4, "digest": "blake3:" + "7" * 64, "size": 56}
    transport.replies = [[data("model", model), done(0)], ALL_OK, STARTED]
    code, screen = run(transport, f"submit_job {job}")
    assert code == 0
    assert transport.sent[0][0] == ["download_model", "3", "4"]
    assert "model of run 3 (56 B)" in screen.lines[1]
    assert len(uploads.sent) == 1


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [("name: tiny", "executor: is required"), ("rounds: many", "rounds: "), ("[", "not YAML")],
)
def test_a_wrong_job_lists_its_problems(transport, job, spec, complaint):
    (job / "job.yml").write_text(spec)
    with pytest.raises(ConfigError, match=complaint):
        run(transport, f"submit_job {job}")


def test_what_is_no_job_or_no_submission(transport, job, tmp_path):
    with pytest.raises(ConfigError, match=r"no job\.yml"):
        run(transport, f"submit_job {tmp_path}")
    with pytest.raises(InvalidArgumentError, match="32 hex digits"):
        run(transport, f"submit_job {job} --submission x")


@pytest.mark.parametrize(
    ("executor", "missing"),
    [
        ("{module: nope}", "code/nope.py"),
        ("{module: a.b}", "code/a/b.py"),
        ("{script: x.py}", "code/x.py"),
    ],
)
def test_code_that_is_not_there_is_missed_before_anybody_is_asked(
    transport, job, executor, missing
):
    lines = (job / "job.yml").read_text().splitlines()
    kept = [line for line in lines if not line.startswith("executor")]
    (job / "job.yml").write_text("\n".join([*kept, f"executor: {executor}"]))
    with pytest.raises(InvalidArgumentError, match=f"there is no {missing}"):
        run(transport, f"submit_job {job}")
    assert transport.sent == []
