import asyncio
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from flplatform.admin.console import start as module
from flplatform.core.errors import (
    InvalidArgumentError,
    UnauthenticatedError,
    UnavailableError,
)
from flplatform.core.messages import ModelRef
from flplatform.files.digest import digest_of
from flplatform.hci.grammar import tokenise
from flplatform.security.package import pack
from flplatform.security.signing import Signed, StartOrder, open_order
from tests.unit.admin.console.conftest import Screen, data, done, error
from tests.unit.admin.console.test_submit import CODE, JOB, row

MODEL = ModelRef("blake3:" + "2" * 64, 56)
BEGUN = [{"type": "session", "key": "run", "value": 7}, data("run", 7), done(0)]
SUBMISSION = "5" * 32


@pytest.fixture
def package(credentials) -> bytes:
    kit = credentials.kit
    return pack(
        {"job.yml": JOB.encode(), "code/tiny.py": CODE.encode()},
        MODEL,
        project=kit.admin.project,
        author="amy",
        job="tiny",
        key=credentials.key,
        certificate=kit.chain,
    )


@pytest.fixture
def fetched(monkeypatch, package) -> list[str]:
    """Stands for `rpc.transfers.fetch_blob`: the digests that were fetched."""
    digests: list[str] = []

    async def fetch(channel: Any, blob: ModelRef, blobs: Any, *, token: str) -> Path:
        digests.append(blob.digest)
        return blobs.path(blobs.create(lambda path: path.write_bytes(package) and None).digest)

    monkeypatch.setattr(module, "fetch_blob", fetch)
    return digests


@pytest.fixture
def plan(package):
    """What the server says of run 7."""

    def made(*rows: dict, starting=("a", "b"), **changes: Any) -> list[dict]:
        found = {
            "run": 7,
            "status": "prepared",
            "job_name": "tiny",
            "package": {"digest": digest_of(package), "size": len(package)},
            "submission_id": SUBMISSION,
            "sites": ["a", "b"],
            "taking_part": [],
            "starting": list(starting),
        }
        return [*rows, data("plan", found | changes), done(1 if rows else 0)]

    return made


def run(transport, line: str, **options) -> tuple[int, Screen]:
    screen = Screen(transport, **({"assume_yes": True} | options))
    return asyncio.run(module.start(transport, tokenise(line), screen.shell)), screen


def order_in(signed: bytes, trust) -> StartOrder:
    signer, order = open_order(
        StartOrder, Signed.from_bytes(signed), trust.store, datetime.now(UTC)
    )
    assert signer.name == "amy"
    return order


def test_what_is_deployed_is_verified_shown_signed_and_started(
    transport, plan, fetched, package, trust
):
    transport.replies = [plan(row("server", detail="is starting")), BEGUN]
    code, screen = run(transport, "start all --run 7")
    assert code == 0
    assert screen.lines[:3] == [
        "plan      scatter_gather, cross_site_validation; 3 rounds, quorum 2 of 2, "
        "wait 10 s after quorum, deadline 600 s",
        "          job tiny packed by amy",
        "deployed  a · b",
    ]
    (asked, _), (begun, signed) = transport.sent
    assert asked == ["start_plan", "all", "--run", "7"]
    assert begun == ["begin", "--run", "7"]
    order = order_in(signed, trust)
    assert order.submission_id == SUBMISSION, "starting twice is starting once"
    assert (order.sites, order.gpus) == (("a", "b"), {})
    assert f"blake3:{order.job_digest}" == digest_of(package) == fetched[0]
    assert screen.shell.remembered == {"run": 7}


def test_rows_of_all_targets(transport, plan, fetched):
    missing = row("c", "error", "not deployed; deploy tiny client c")
    transport.replies = [plan(missing), BEGUN]
    code, screen = run(transport, "start client a b c", as_json=True)
    assert code == 1, "one target was not started"
    transport.replies = [plan(missing, starting=("a",)), BEGUN]
    code, screen = run(transport, "start client a c --min 1")
    assert "not       c not deployed; deploy tiny client c" in screen.lines
    assert transport.sent[-1][0] == ["begin", "--run", "7", "--min", "1"]


def test_start_server_waits(transport, plan, fetched):
    transport.replies = [plan(row("server", detail="waits for start client"), starting=())]
    code, _ = run(transport, "start server")
    assert code == 0
    assert [argv for argv, _ in transport.sent] == [["start_plan", "server"]]
    assert fetched == []


def test_processes_per_site_are_signed(transport, plan, fetched, trust):
    refused = row("b", "refused", "rule environments.yml: gpus")
    transport.replies = [plan(), [row("a"), refused, done(1)], BEGUN]
    code, screen = run(transport, "start_mgpu 2 a b --min 1")
    assert code == 1
    (asked, _), (preflight, _), (_, signed) = transport.sent
    assert asked == ["start_plan", "client", "a", "b"]
    assert (preflight[0], json.loads(preflight[1])["processes"]) == ("preflight", 2)
    order = order_in(signed, trust)
    assert (order.sites, order.gpus) == (("a",), {"a": 2})
    assert "gpus      a 2" in screen.lines
    assert "accepts   a ok · b refused: rule environments.yml: gpus" in screen.lines
    transport.replies = [plan()]
    with pytest.raises(InvalidArgumentError, match="1 to 1024"):
        run(transport, "start_mgpu 5000")


def test_too_few_sites_are_refused_before_anything_is_signed(transport, plan, fetched):
    transport.replies = [plan(starting=("a",))]
    with pytest.raises(InvalidArgumentError, match="only 1 target sites"):
        run(transport, "start client a")
    assert len(transport.sent) == 1


def test_sites_join_a_run_at_work_when_they_accept(transport, plan, fetched, trust):
    at_work = {"status": "training", "taking_part": ["a"], "starting": ["b", "c", "d"]}
    refused = row("c", "refused", "rule byoc = none")
    answers = [row("b"), refused, row("d", "no_reply", "after 5.0 s"), done(1)]
    transport.replies = [plan(**at_work), answers, BEGUN]
    code, screen = run(transport, "start client b c d")
    assert code == 1
    assert screen.lines[0] == "plan      join run 7, which is training with a"
    question = transport.sent[1][0]
    assert question[0] == "preflight"
    assert json.loads(question[1])["sites"] == ["b", "c", "d"]
    order = order_in(transport.sent[2][1], trust)
    assert order.sites == ("b", "d"), "who is silent may still come"
    assert order.submission_id != SUBMISSION, "a site that was in the run knows that id"
    transport.replies = [plan(**at_work | {"starting": ["c"]}), [refused, done(3)]]
    assert run(transport, "start client c")[0] == 3


def test_nothing_is_started_without_a_yes(transport, plan, fetched):
    transport.replies = [plan()]

    async def no(question: str, hidden: bool) -> str:
        assert question == "Start run 7 at a, b? [y/N] "
        return "n"

    screen = Screen(transport)
    screen.shell.asker = no
    code = asyncio.run(module.start(transport, ["start", "all"], screen.shell))
    assert code == 130
    assert screen.lines[-1] == "nothing was started"
    assert len(transport.sent) == 1


def test_a_package_that_does_not_verify_is_not_signed(transport, plan, fetched, monkeypatch):
    def refuse(*_: object) -> None:
        raise UnauthenticatedError("the job signature of amy does not fit its text")

    monkeypatch.setattr(module, "open_package", refuse)
    transport.replies = [plan()]
    with pytest.raises(UnauthenticatedError):
        run(transport, "start all")
    assert len(transport.sent) == 1


def test_a_broken_connection_is_survived_with_the_same_order(transport, plan, fetched):
    gone = [UnavailableError("gone")]
    transport.replies = [gone, plan(), gone, BEGUN]
    code, _ = run(transport, "start all")
    assert code == 0
    assert transport.sent[2] == transport.sent[3]


def test_a_refusal_is_the_result(transport, plan):
    transport.replies = [[error("nothing is deployed for run 7"), done(1)]]
    code, screen = run(transport, "start all")
    assert code == 1
    assert "nothing is deployed" in screen.err.getvalue()
