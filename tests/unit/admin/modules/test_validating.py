from dataclasses import replace

import pytest

from flplatform.core.control import SiteReply
from flplatform.core.errors import PermissionDeniedError
from flplatform.core.validation import Wanted
from tests.support.control import ENDED, run, site
from tests.support.validation import PLAN
from tests.unit.admin.conftest import SIGNED


@pytest.fixture
def finished(control):
    """Run 3 has finished; a accepts, b refuses."""
    control.run_views = {3: run(3, **ENDED)}
    control.site_views = [site("a"), site("b")]
    control.validations.plans = {3: PLAN}
    control.replies = {
        "a": SiteReply("ok", {"isolation": "sandbox"}),
        "b": SiteReply("refused", message="no", rule="policy commands: validate = none"),
    }
    return control


def test_the_plan_asks_the_sites_and_tells_no_digest_of_a_model(console, finished):
    reply = console("validate_plan --run 3 --owners a,global --sites a,b", "lea")
    assert finished.validations.asked == [(3, Wanted(("a", "global"), ("a", "b")))]
    assert reply.statuses["a"].startswith("ok")
    assert "validate = none" in reply.statuses["b"]
    ((asked, topic, signed),) = finished.asked
    assert (asked, topic, signed) == (("a", "b"), "validate_plan", SIGNED)
    plan = reply.data("plan")
    assert plan["models"]["b"] == {"kind": "update", "round": 12}
    assert plan["package"]["digest"] == PLAN.package.digest


def test_if_the_latest_run_is_a_validation_its_source_is_meant(console, finished):
    finished.run_views[4] = run(4, **ENDED, source_run=3)
    console("validate_plan")
    assert finished.validations.asked == [(3, Wanted())]
    finished.validations.plans[4] = replace(PLAN, run=4)
    console("validate_plan --run 4")
    assert finished.validations.asked[-1][0] == 4, "what is named is meant; the server refuses it"


def test_begin_hands_the_signed_start_over(console, finished):
    reply = console("validate_begin --run 3 --owners r5", "lea", attachment=b"signed")
    assert finished.validations.opened == [(3, b"signed", "lea", Wanted(("r5",)))]
    assert reply.data("run") == 9
    assert not [item for item in reply.items if item["type"] == "session"], (
        "the source stays the current run"
    )
    assert console("validate_begin --run 3").code == 2


def test_who_may_not(console, finished):
    assert console("validate_plan --run 3", "max").error["rule"] == (
        "role member: validate is not granted"
    )
    finished.validations.open = _refuse
    assert console("validate_begin --run 3", attachment=b"x").error["rule"] == "own_order"


async def _refuse(*_):
    raise PermissionDeniedError("no", rule="own_order")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("validate", "MODEL_OWNER"),
        ("validate all a", "nothing can follow all"),
        ("validate a", "DATA_SITE is missing; or validate all --owners a"),
        ("validate a b --sites c", "go with all only"),
    ],
)
def test_words_that_do_not_fit(console, finished, line, said):
    reply = console(line)
    assert reply.code == 2
    assert said in str(reply.error)


def test_following_a_validation_tells_how_many_cells_are_done(console, control):
    control.run_views = {9: run(9, **ENDED, source_run=3, tasks=6, settled=5)}
    reply = console("wait 9", "lea")
    (progress,) = [item for item in reply.items if item["type"] == "progress"]
    assert (progress["label"], progress["done"], progress["total"]) == ("run 9", 5, 6)
    control.run_views = {9: run(9, **ENDED, tasks=6, settled=5)}
    assert not [item for item in console("wait 9").items if item["type"] == "progress"]
