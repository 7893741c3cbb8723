"""`lineage`: the table, one model with its contributions, and the proof."""

import json

import pytest

from flplatform.core.lineage import Lineage, Origin, RoundLineage, Share, Verified
from tests.support.control import run

DIGEST = "blake3:" + "7" * 64
SHORT = "blake3:777777777777"


def made(number: int) -> RoundLineage:
    return RoundLineage(
        round=number,
        base=DIGEST,
        base_round=number - 1,
        shares=(
            Share("a", 0.25, 10.0, DIGEST, 10, {"loss": 0.5}),
            Share("b", 0.75, 30.0, DIGEST, 30),
        ),
        stragglers={"c": "no update before the round closed"},
        aggregator="trimmed_mean",
        aggregator_args={"trim": 1},
        reason="deadline",
        model=DIGEST,
        score=0.75,
        best=number == 2,
        published="2024-05-01T12:00:00.000Z",
    )


@pytest.fixture
def lineage(control):
    control.run_views = {3: run(3)}
    control.lineage.answers[3] = Lineage(
        run=3,
        job="heart",
        job_digest=DIGEST,
        submitter="amy",
        submitter_organisation="hub",
        signer="amy",
        submitted="2024-05-01T12:04:10.123Z",
        metric="accuracy",
        initial_model=DIGEST,
        initial_from="model best of run 1",
        origins=(Origin(1, 12, DIGEST, "bob"),),
        rounds=(made(1), made(2)),
    )
    control.lineage.verified = [
        Verified(1, "freed", detail="there is no blob"),
        Verified(2, "same", DIGEST),
    ]
    return control.lineage


def test_all_models_of_a_run(console, lineage):
    reply = console("lineage 3")
    assert reply.text.splitlines() == [
        "run 3 (heart) by amy of hub, signed by amy, 2024-05-01 12:04:10 UTC",
        f"  job      {SHORT}",
        f"  model 0  {SHORT}  from model best of run 1",
        "           = model 12 of run 1 by bob",
        "  rounds   by trimmed_mean(trim=1) · closed: deadline"
        " · without c (no update before the round closed)",
    ]
    assert reply.table["rows"][1] == [
        2,
        SHORT,
        "model 1",
        2,
        0.75,
        "*",
    ]
    assert reply.code == 0
    assert console("lineage").text == reply.text  # the latest run


def test_no_whole_digest_leaves(console, lineage):
    reply = console("lineage 3 2 --verify", "max")
    everything = json.dumps(reply.items)
    assert SHORT in everything
    assert SHORT + "7" not in everything
    assert reply.data("lineage")["rounds"][0]["shares"][0]["share"] == 0.25


def test_one_model_has_its_contributions(console, lineage):
    reply = console("lineage 3 2")
    tables = {item["name"]: item for item in reply.items if item["type"] == "table"}
    assert len(tables["rounds"]["rows"]) == 2
    assert tables["contributions"]["columns"] == [
        "site",
        "share_percent",
        "examples",
        "digest",
        "loss",
    ]
    assert tables["contributions"]["rows"][1] == ["b", 75.0, 30, SHORT, None]
    assert "contributions" not in {
        item.get("name") for item in console("lineage 3").items if item["type"] == "table"
    }


def test_verify(console, lineage):
    reply = console("lineage 3 --verify")
    assert {target: row["cells"]["result"] for target, row in reply.rows.items()} == {
        "round 1": "not verified: its updates were freed",
        "round 2": "same",
    }
    assert reply.data("verified")[1] == {
        "round": 2,
        "result": "same",
        "digest": SHORT,
        "detail": "",
    }
    progress = [item["done"] for item in reply.items if item["type"] == "progress"]
    assert progress == [0, 1, 2]
    assert reply.code == 0
    lineage.verified = [Verified(2, "differs", DIGEST)]
    reply = console("lineage 3 --verify")
    assert reply.statuses == {"round 2": "error another model comes of the same updates"}
    assert reply.code == 1
