import asyncio
import io
import json
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from flplatform.admin.console import validate as module
from flplatform.core.errors import InvalidArgumentError, UnauthenticatedError, UnavailableError
from flplatform.core.messages import ModelRef
from flplatform.files.digest import digest_of
from flplatform.hci.grammar import tokenise
from flplatform.hci.shell import Shell
from flplatform.security.package import pack
from flplatform.security.signing import Signed, StartOrder, open_order
from tests.unit.admin.console.conftest import Screen, data, done, error, text
from tests.unit.admin.console.test_submit import CODE, JOB, row

MODELS = {
    "a": {"kind": "local", "round": 15},
    "b": {"kind": "update", "round": 12},
    "global": {"kind": "best", "round": 9},
}
BEGUN = [data("run", 9), done(0)]
WAITED = [
    text("run 9 validating"),
    {"type": "progress", "label": "run 9", "done": 2, "total": 6, "unit": "cells"},
    text("run 9 finished: all steps done"),
    done(0),
]
MATRIX = [text("the matrix"), data("cross_validation", {"metric": "accuracy"}), done(0)]


@pytest.fixture
def package(credentials) -> bytes:
    return pack(
        {"job.yml": JOB.encode(), "code/tiny.py": CODE.encode()},
        ModelRef("blake3:" + "2" * 64, 56),
        project=credentials.kit.admin.project,
        author="amy",
        job="tiny",
        key=credentials.key,
        certificate=credentials.kit.chain,
    )


@pytest.fixture(autouse=True)
def fetched(monkeypatch, package) -> list[str]:
    digests: list[str] = []

    async def fetch(channel: Any, blob: ModelRef, blobs: Any, *, token: str) -> Path:
        digests.append(blob.digest)
        return blobs.path(blobs.create(lambda path: path.write_bytes(package) and None).digest)

    monkeypatch.setattr(module, "fetch_blob", fetch)
    return digests


@pytest.fixture
def plan(package):
    def made(*rows: dict, **changes: Any) -> list[dict]:
        found = {
            "run": 3,
            "status": "finished",
            "round": 15,
            "rounds": 15,
            "package": {"digest": digest_of(package), "size": len(package)},
            "models": MODELS,
            "gaps": {"c": "it handed none in, and no update of it is kept"},
            "left_out": {"d": "barred on the server"},
            "deadline_s": 600.0,
        }
        return [*(rows or (row("a"), row("b"))), data("plan", found | changes), done(0)]

    return made


def run(transport, line: str, **options) -> tuple[int, Screen]:
    screen = Screen(transport, **({"assume_yes": True} | options))
    return asyncio.run(module.validate(transport, tokenise(line), screen.shell)), screen


def test_a_validation_is_planned_signed_followed_and_shown(
    transport, plan, fetched, package, trust
):
    transport.replies = [plan(), BEGUN, WAITED, MATRIX]
    code, screen = run(transport, "validate all --run 3")
    assert code == 0
    assert screen.lines[:6] == [
        "plan      validate 3 models of run 3 (finished, round 15/15) at 2 sites: 6 cells, "
        "deadline 600 s",
        "          job tiny packed by amy",
        "models    a · b (update of r12) · global (best, r9)",
        "without   c: it handed none in, and no update of it is kept",
        "accepts   a ok · b ok",
        "not       d barred on the server",
    ]
    assert screen.lines[-3:] == [
        "run 9 validating", "run 9 finished: all steps done", "the matrix",
    ]  # fmt: skip
    assert [argv for argv, _ in transport.sent] == [
        ["validate_plan", "--run", "3"],
        ["validate_begin", "--run", "3"],
        ["wait", "9"],
        ["cross_val", "9"],
    ]
    signer, order = open_order(
        StartOrder, Signed.from_bytes(transport.sent[1][1]), trust.store, datetime.now(UTC)
    )
    assert (signer.name, order.purpose, order.sites) == ("amy", "validate", ("a", "b"))
    assert f"blake3:{order.job_digest}" == digest_of(package) == fetched[0]
    assert "run" not in screen.shell.remembered, "the source stays the current run"


def test_words_reach_the_server(transport, plan):
    transport.replies = [plan(), BEGUN]
    code, screen = run(
        transport,
        f"validate all --owners global,r5 --sites a --no-wait --submission {'5' * 32}",
    )
    assert code == 0
    assert [argv for argv, _ in transport.sent] == [
        ["validate_plan", "--owners", "global,r5", "--sites", "a"],
        ["validate_begin", "--run", "3", "--owners", "global,r5", "--sites", "a"],
    ]
    assert screen.lines[-1] == "run 9 validates run 3 · signed by amy"
    transport.sent, transport.replies = [], [plan(), BEGUN]
    run(transport, "validate a b --run 3 --no-wait")
    assert transport.sent[0][0] == ["validate_plan", "--run", "3", "--owners", "a", "--sites", "b"]
    with pytest.raises(InvalidArgumentError, match="32 hex"):
        run(transport, "validate all --submission x")


def test_a_broken_connection_is_mended_with_the_same_submission(transport, plan):
    lost = [UnavailableError("gone")]
    transport.replies = [lost, plan(), lost, BEGUN, WAITED, lost, MATRIX]
    code, screen = run(transport, "validate all")
    assert code == 0
    begins = [signed for argv, signed in transport.sent if argv[0] == "validate_begin"]
    assert begins[0] == begins[1]
    assert screen.lines[-1] == "the matrix"


def test_a_validation_that_failed_has_code_5_and_shows_what_there_is(transport, plan):
    failed = [text("run 9 failed: nobody"), done(5)]
    transport.replies = [plan(), BEGUN, failed, [error("there are no results"), done(1)]]
    code, screen = run(transport, "validate all")
    assert code == 5
    assert screen.lines[-1] == "run 9 failed: nobody"
    assert screen.err.getvalue() == ""


def test_if_every_site_refuses_nothing_is_opened(transport, plan):
    refused = row("a", "refused", "rule policy commands: validate = none")
    transport.replies = [plan(refused)]
    code, screen = run(transport, "validate all")
    assert code == 3
    assert len(transport.sent) == 1
    assert "validate = none" in screen.out.getvalue()


def test_some_refusals_are_part_of_the_matrix(transport, plan, trust):
    transport.replies = [plan(row("a"), row("b", "refused", "rule x")), BEGUN]
    code, _ = run(transport, "validate all --no-wait")
    assert code == 0
    order = StartOrder.model_validate_json(Signed.from_bytes(transport.sent[1][1]).payload)
    assert order.sites == ("a", "b")


def test_no_is_no(transport, plan):
    transport.replies = [plan()]

    async def no(question: str, hidden: bool) -> str:
        assert question == "3 models of run 3 would be measured at 2 sites. Go on? [y/N] "
        return "n"

    screen = Screen(transport)
    screen.shell.asker = no
    code = asyncio.run(module.validate(transport, ["validate", "all"], screen.shell))
    assert code == 130
    assert screen.lines[-1] == "nothing was validated"


def test_csv_is_nothing_but_the_matrix(transport, plan):
    transport.replies = [plan(), BEGUN, WAITED, [text("owner,a\na,0.5"), done(0)]]
    code, screen = run(transport, "validate all --csv")
    assert (code, screen.lines) == (0, ["owner,a", "a,0.5"])
    assert transport.sent[-1][0] == ["cross_val", "9", "--csv"]


def test_json_is_one_object_with_plan_and_matrix(transport, plan):
    transport.replies = [plan(), BEGUN, WAITED, MATRIX]
    out = io.StringIO()
    actions = {"validate": partial(module.validate, transport)}
    shell = Shell(
        transport,
        out=out,
        err=io.StringIO(),
        env={},
        actions=actions,
        assume_yes=True,
        as_json=True,
    )
    assert asyncio.run(shell.run_command("validate all")) == 0
    found = json.loads(out.getvalue())["data"]
    assert found["validation"]["run"] == 9
    assert found["validation"]["models"] == MODELS
    assert found["cross_validation"] == {"metric": "accuracy"}


def test_a_package_that_is_not_what_was_named_is_not_signed(transport, plan, package, monkeypatch):
    async def fetch(channel: Any, blob: ModelRef, blobs: Any, *, token: str) -> Path:
        bad = package.replace(b"META/manifest.sig", b"META/manifest.sog")
        return blobs.path(blobs.create(lambda path: path.write_bytes(bad) and None).digest)

    monkeypatch.setattr(module, "fetch_blob", fetch)
    transport.replies = [plan()]
    with pytest.raises((InvalidArgumentError, UnauthenticatedError)):
        run(transport, "validate all")
    assert len(transport.sent) == 1


def test_who_stops_looking_is_told_that_it_goes_on(transport, plan, monkeypatch):
    async def interrupted(*_: Any) -> int:
        raise asyncio.CancelledError

    monkeypatch.setattr(module, "follow", interrupted)
    transport.replies = [plan(), BEGUN]
    screen = Screen(transport, assume_yes=True)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(module.validate(transport, tokenise("validate all"), screen.shell))
    assert screen.lines[-1] == "run 9 goes on; cross_val 9 shows it"
