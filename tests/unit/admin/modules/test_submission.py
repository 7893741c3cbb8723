import json

from flplatform.admin.modules.submission import HIDDEN, Question, encode
from flplatform.core.control import SiteReply
from flplatform.core.errors import InvalidArgumentError
from tests.support.control import site
from tests.unit.admin.conftest import SIGNED


def ask(*sites: str) -> list[str]:
    question = Question(
        job="heart", has_code=True, data=("heart",), environment="default", sites=sites
    )
    return ["preflight", encode(question)]


def test_preflight_asks_every_site_with_exactly_what_was_signed(console, control):
    control.replies = {
        "a": SiteReply("ok", {"isolation": "sandbox"}),
        "b": SiteReply("refused", message="amy may not byoc", rule="policy byoc = none"),
    }
    control.site_views.append(site("c"))
    reply = console(ask())
    assert control.asked == [(("a", "b", "c"), "preflight", SIGNED)]
    assert reply.statuses == {
        "a": "ok",
        "b": "refused rule policy byoc = none: amy may not byoc",
        "c": "no_reply after 5.0 s",
    }
    assert reply.rows["a"]["cells"] == {"isolation": "sandbox"}


def test_preflight_of_named_sites(console, control):
    control.site_views.append(site("off", state="disabled"))
    control.replies = {"a": SiteReply("ok")}
    reply = console(ask("a", "off", "bb"))
    assert reply.statuses == {
        "off": "refused disabled on the server",
        "bb": "unknown site (did you mean b?)",
        "a": "ok",
    }


def test_preflight_without_sites_or_sense(console, control):
    control.site_views = []
    assert console(ask()).error["message"] == "no site is registered"
    assert console(["preflight", "{}"]).code == 2


def test_submit_hands_the_attached_order_on(console, control):
    reply = console("submit --min 2", attachment=b"start order")
    assert control.orders == [(b"start order", "amy", 2)]
    assert reply.remembered == {"run": 1}
    assert reply.data("run") == 1
    assert console.records == [("amy", "submit", "allowed", "")]


def test_submit_without_an_order_or_with_a_bad_one(console, control):
    assert console("submit").error["code"] == "invalid_argument"
    control.refusal = InvalidArgumentError("names no site", field="sites")
    assert console("submit", attachment=b"x").error["field"] == "sites"


def test_who_may_submit(console):
    for user, code in {"amy": 0, "lea": 0, "oli": 3, "max": 3}.items():
        assert console("submit", user, attachment=b"x").code == code, user
    rules = {user: console(ask(), user).error["rule"] for user in ("oli", "max")}
    assert rules == {
        "oli": "role org_admin: submit_job = none",
        "max": "role member: train is not granted",
    }


def test_submit_job_belongs_to_the_console(console):
    assert console("submit_job x").error["code"] == "failed_precondition"
    assert console.register.view("submit_job").local == "submit_job"
    assert {"preflight", "submit"} <= HIDDEN


def test_the_question_is_what_sites_expect():
    asked = json.loads(ask("a")[1])
    assert asked == {
        "job": "heart",
        "has_code": True,
        "data": ["heart"],
        "environment": "default",
        "sites": ["a"],
    }
