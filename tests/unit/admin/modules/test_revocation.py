import pytest

from flplatform.core.access import DenialView
from flplatform.core.control import SiteReply
from flplatform.core.errors import PermissionDeniedError
from tests.support.control import run, site


def found(reply):
    return reply.data("revocation")


def test_what_a_site_s_revocation_would_end(console, control):
    control.run_views = {3: run(3)}
    control.site_views = [site("a", runs=((3, 7, "training", 1.0),)), site("b"), site("c")]
    assert found(console("revocation a")) == {
        "name": "a",
        "kind": "site",
        "organisation": "a",
        "ends": "it is live; a works on run 3 round 7; run 3 (heart) loses it, 1 sites are left",
        "revoked_by": None,
    }
    assert found(console("revocation c"))["ends"] == "it is live; no run loses it"


def test_a_name_never_seen_needs_its_kind(console, control):
    control.site_views = [site("hospital-a")]
    assert "did you mean hospital-a" in console("revocation hospital-b").error["message"]
    reply = console("revocation hospital-b --kind site")
    assert found(reply)["ends"] == "it has never registered"
    reply = console("revocation zoe --kind admin")
    assert found(reply)["ends"].startswith("0 sessions of theirs will end")
    control.access.views = [DenialView("zoe", "admin", "", "now", "amy", "")]
    assert found(console("revocation zoe"))["revoked_by"] == "amy"


def test_the_denial_is_carried_to_every_site_that_is_there(console, control):
    control.site_views = [site("a", state="revoked"), site("b"), site("c"), site("d", state="away")]
    control.access.replies = {
        "b": SiteReply("ok"),
        "c": SiteReply("refused", rule="signature", message="forged"),
    }
    reply = console("deny a", attachment=b"signed")
    assert control.access.orders == [(b"signed", "amy")]
    assert control.access.carried == [("b", "c")]
    assert list(reply.rows) == ["server", "b", "c", "d"]
    assert reply.rows["b"]["cells"] == {"state": "revoked"}
    assert reply.statuses["c"] == "refused rule signature: forged"
    assert "told when it registers" in reply.statuses["d"]
    assert "fl_provision revoke a" in reply.text
    assert ("amy", "deny", "allowed", "") in console.records


def test_an_undoing_says_so(console, control):
    control.access.outcome = ("site", "a", True)
    control.access.replies = {"a": SiteReply("ok"), "b": SiteReply("ok")}
    reply = console("deny a", attachment=b"signed")
    assert reply.rows["a"]["cells"] == {"state": "undone"}
    assert "fl_provision" not in reply.text


@pytest.mark.parametrize(
    ("user", "name", "text"),
    [
        ("oli", "b", "role org_admin"),
        ("lea", "a", "role lead: revoke = none"),
        ("max", "a", "role"),
    ],
)
def test_whose_it_is_not(console, control, user, name, text):
    reply = console(f"deny {name}", user, attachment=b"signed")
    assert text in reply.error["rule"]
    assert control.access.orders == []
    assert console(f"revoke {name}", user).error["rule"] == reply.error["rule"]


def test_what_the_server_refuses_is_carried_nowhere(console, control):
    control.access.refusal = PermissionDeniedError("forged", rule="signature")
    assert console("deny a", attachment=b"signed").code == 3
    assert control.access.carried == []
    assert console("deny a").error["message"] == "came without a denial"
