import math

import pytest

from flplatform.core.control import RoundMetrics
from flplatform.core.errors import PermissionDeniedError
from flplatform.core.messages import ModelRef
from tests.support.control import ENDED, run

DIGEST = "blake3:" + "7" * 64


@pytest.fixture
def rounds(control):
    control.run_views = {3: run(3, **ENDED)}
    control.rounds[3] = [
        RoundMetrics(0, 0.5, False, {"a": {"accuracy": 0.4}}, {}, DIGEST),
        RoundMetrics(
            1,
            0.75,
            True,
            {"a": {"accuracy": 0.7}, "b": {"accuracy": 0.8}},
            {"a": {"loss": 0.3}},
            DIGEST,
            closed="all participants answered",
        ),
        RoundMetrics(2, None, False, {}, {"b": {"loss": 0.1}}, DIGEST, "deadline", ("a",)),
    ]
    return control


def test_show_metrics(console, rounds):
    reply = console("show_metrics 3", "max")
    assert reply.text == "run 3 (heart): accuracy"
    assert reply.table["columns"] == ["round", "score", "a", "b", "closed", "without"]
    assert reply.table["rows"] == [
        [0, 0.5, 0.4, None, None, None],
        [1, 0.75, 0.7, 0.8, "all participants answered", None],
        [2, None, None, None, "deadline", "a"],
    ]
    assert reply.table["marks"] == [[1, 1, "best"]]
    (plot,) = (item for item in reply.items if item["type"] == "plot")
    assert plot["series"]["all sites"][0] == 0.75
    assert math.isnan(plot["series"]["all sites"][1])
    assert reply.data("rounds")[1]["digest"] == "blake3:777777777777"


def test_another_metric_has_no_score_and_a_curve_per_site(console, rounds):
    reply = console("show_metrics --metric loss", run=3)
    assert "score" not in reply.table["columns"]
    assert [row[1:3] for row in reply.table["rows"]] == [[None, None], [0.3, None], [None, 0.1]]
    (plot,) = (item for item in reply.items if item["type"] == "plot")
    assert list(plot["series"]) == ["a", "b"]


def test_per_site_curves(console, rounds):
    (plot,) = (i for i in console("show_metrics 3 --per-site").items if i["type"] == "plot")
    assert list(plot["series"]) == ["all sites", "a", "b"]


def test_a_run_that_watches_nothing(console, rounds):
    rounds.run_views = {3: run(3, metric="")}
    assert console("show_metrics 3").text == "run 3 (heart): accuracy"
    rounds.rounds[3] = [RoundMetrics(0, None, False, {}, {}, DIGEST)]
    reply = console("show_metrics 3")
    assert reply.text == "run 3 (heart): no metric was reported"
    assert not any(item["type"] == "plot" for item in reply.items)


def test_download_model_grants_the_blob_to_the_session(console, rounds):
    rounds.models = {(3, "best"): ModelRef(DIGEST, 56), (3, 2): ModelRef(DIGEST, 56)}
    with pytest.raises(PermissionDeniedError, match="not granted"):
        console.transfers.release(None, DIGEST)
    reply = console("download_model 3")
    assert reply.data("model") == {"run": 3, "round": 12, "digest": DIGEST, "size": 56}
    console.transfers.release(None, DIGEST)
    assert console("download_model 3 2").data("model")["round"] == 2


def test_download_model_needs_the_right_on_the_runs_files(console, rounds):
    rounds.models = {(3, "best"): ModelRef(DIGEST, 56)}
    assert console("download_model 3", "lea").error["rule"] == "role lead: files = n:submitter"
    assert console("download_model 3", "max").error["rule"] == "role member: files is not granted"
    rounds.run_views = {3: run(3, submitter="zoe", submitter_organisation="a")}
    assert console("download_model 3", "oli").code == 0


def test_download_model_of_nonsense(console, rounds):
    assert console("download_model 3 second").code == 2
    assert console("download_model 3 last").error["code"] == "not_found"
    assert console("download_model 4").error["code"] == "not_found"
