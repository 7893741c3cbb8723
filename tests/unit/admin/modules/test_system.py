from flplatform.core.control import SiteReply
from tests.support.control import run, site
from tests.unit.admin.conftest import SIGNED


def test_sys_info_shows_server_and_sites(console, control):
    facts = {
        "host": "h1",
        "cpus": 8,
        "load": 0.25,
        "memory_available_bytes": 12_000_000_000,
        "memory_total_bytes": 16_000_000_000,
        "disk_free_bytes": 500,
        "disk_total_bytes": 1000,
        "uptime_s": 7500.0,
        "isolation": "none",
    }
    control.replies = {"a": SiteReply("ok", facts)}
    reply = console("sys_info all")
    assert reply.rows["a"]["cells"] == {
        "host": "h1",
        "cpus": 8,
        "load": 0.25,
        "memory_free_bytes": 12_000_000_000,
        "memory_free_bytes_of": 16_000_000_000,
        "disk_free_bytes": 500,
        "disk_free_bytes_of": 1000,
        "up_s": 7500.0,
        "python": None,
        "version": None,
        "isolation": "none",
    }
    assert reply.statuses["b"] == "no_reply after 2.0 s"
    assert reply.rows["server"]["cells"]["host"] == "hub"
    assert reply.data("system")["a"] == facts


def test_odd_facts_do_no_harm(console, control):
    control.replies = {"a": SiteReply("ok", {"cpus": "many", "load": [], "host": {"x": 1}})}
    cells = console("sys_info client a").rows["a"]["cells"]
    assert (cells["cpus"], cells["load"], cells["host"]) == (None, None, "{'x': 1}")


def test_shutdown_asks_with_its_blast_radius(console, control):
    control.run_views = {3: run(3), 4: run(4, name="lung", status="deploying", round=0)}
    control.site_views = [site("a", runs=((3, 7, "training", 1.0),)), site("b")]
    assert console("shutdown all", confirmed=False).question == (
        "shut down the server and a, b: run 3 (heart) is training, round 7/20; "
        "run 4 (lung) is deploying, round 0/20; a works on run 3 round 7. Continue?"
    )
    assert console("restart client b", confirmed=False).question == (
        "restart b: no site among them is training. Continue?"
    )
    assert control.calls == []


def test_many_sites_are_counted_in_the_question(console, control):
    control.site_views = [site(f"s{number}") for number in range(6)]
    assert console("shutdown client", confirmed=False).question.startswith("shut down 6 sites:")


def test_shutdown_ends_sites_first_then_the_server(console, control):
    control.replies = {"a": SiteReply("ok"), "b": SiteReply("error", message="internal error")}
    reply = console("shutdown all")
    assert control.asked == [(("a", "b"), "shutdown", SIGNED)]
    assert control.calls == [("stop", False)]
    assert list(reply.statuses.items()) == [
        ("server", "ok"),
        ("a", "ok"),
        ("b", "error internal error"),
    ]
    assert reply.rows["a"]["cells"] == {"state": "shuts down"}
    assert reply.rows["b"]["cells"] == {}


def test_restart_tells_the_server_so(console, control):
    console("restart server")
    assert control.calls == [("stop", True)]
    assert control.asked == [((), "restart", SIGNED)]


def test_an_unknown_site_needs_no_question(console):
    assert console("shutdown client x", confirmed=False).statuses == {"x": "unknown site"}


def test_a_lead_reaches_only_the_sites_of_the_own_organisation(console, control):
    control.replies = {"a": SiteReply("ok"), "b": SiteReply("ok")}
    reply = console("restart all", "lea")
    assert reply.statuses == {
        "server": "refused rule role lead: operate = o:site",
        "a": "ok",
        "b": "refused rule role lead: operate = o:site",
    }
    assert control.asked[0][0] == ("a",)
    assert control.calls == []


def test_remove_client(console, control):
    control.site_views = [
        site("a", runs=((3, 7, "training", 1.0),)),
        site("b"),
        site("c", state="expected"),
    ]
    question = console("remove_client a b", confirmed=False).question
    assert question == "remove a, b: a works on run 3 round 7. Continue?"
    reply = console("remove_client a c aa")
    assert reply.statuses == {
        "aa": "unknown site (did you mean a?)",
        "a": "ok",
        "c": "error c is not registered",
    }
    assert control.calls == [("remove", "a")]
