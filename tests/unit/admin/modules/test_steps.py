import pytest

from flplatform.admin import surroundings
from flplatform.admin.modules.submission import HIDDEN
from flplatform.core.control import SiteReply
from flplatform.core.errors import FailedPreconditionError, ResourceExhaustedError
from tests.support.control import ENDED, run, site
from tests.support.staging import plan, staged
from tests.unit.admin.conftest import SIGNED

DIGEST = "blake3:" + "1" * 64
PREPARED = {"status": "prepared", "name": "", "round": 0, "rounds": 0, "targets": ()}


@pytest.fixture
def prepared(control):
    """Run 7 is prepared, run 3 at work; heart is staged; a accepts, b refuses."""
    control.run_views = {3: run(3), 7: run(7, **PREPARED)}
    control.staging.staged = {"heart": staged()}
    control.replies = {
        "a": SiteReply("ok", {"isolation": "sandbox"}),
        "b": SiteReply("refused", message="amy may not byoc", rule="policy byoc = none"),
    }
    return control


# ---- jobs -------------------------------------------------------------------------------------


def test_stage_keeps_what_was_uploaded(console, control):
    reply = console(f"stage heart {DIGEST}")
    assert control.staging.calls == [("stage", "heart", DIGEST, "amy", "hub")]
    assert reply.data("job")["parameters"] == 14
    assert reply.data("job")["bytes"] == 1056
    assert console(f"stage ../x {DIGEST}").code == 2


def test_nobody_replaces_or_deletes_the_job_of_somebody_else(console, control):
    control.staging.staged = {"heart": staged(), "own": staged("own", by="lea")}
    rule = "role lead: train = n:submitter"
    assert console(f"stage heart {DIGEST}", "lea").error["rule"] == rule
    assert console("delete_job heart", "lea").error["rule"] == rule
    assert control.staging.calls == []
    assert console("delete_job own", "lea").code == 0
    assert console("delete_job heart").text == "heart is not staged any more"
    assert control.staging.calls == [("unstage", "own", "lea"), ("unstage", "heart", "amy")]


def test_list_jobs(console, control):
    assert "upload_folder" in console("list_jobs", "max").text
    control.staging.staged = {"heart": staged()}
    reply = console("list_jobs", "max")
    assert reply.table["columns"] == ["name", "by", "size", "parameters", "staged"]
    assert reply.table["rows"] == [["heart", "amy", "1.06 kB", 14, "2024-05-01 12:04:10"]]
    assert reply.data("jobs")[0]["staged"] == "2024-05-01T12:04:10.123Z"


def test_a_job_that_is_not_staged(console, prepared):
    error = console("delete_job haert").error
    assert (error["message"], error["hint"]) == (
        "no job 'haert' is staged",
        "did you mean heart?",
    )
    assert console("deploy haert all --run 7").error["hint"] == "did you mean heart?"
    assert "upload_folder" in console("deploy xyz all --run 7").error["hint"]


# ---- numbers ----------------------------------------------------------------------------------


def test_an_existing_run_becomes_the_current_one(console, prepared):
    reply = console("set_run_number 3", "max")
    assert (reply.text, reply.remembered) == ("run 3: heart, training", {"run": 3})
    assert console("set_run_number 7", "max").text == "run 7: prepared"
    assert prepared.staging.calls == []


def test_a_new_number_is_reserved_by_who_may_submit(console, prepared):
    reply = console("set_run_number 8", "lea")
    assert (reply.text, reply.remembered) == ("created run 8", {"run": 8})
    assert prepared.staging.calls == [("reserve", 8, "lea", "a")]
    for user in ("oli", "max"):
        assert console("set_run_number 9", user).code == 3
    prepared.staging.refusal = FailedPreconditionError("there is no run 2", rule="run number")
    reply = console("set_run_number 2")
    assert reply.error["rule"] == "run number"
    assert reply.remembered == {}


def test_a_run_that_is_not_ones_to_see_is_not_chosen(console, prepared):
    console.policy.write_text("roles: {member: {view: ['n:submitter']}}")
    console.rights.reload()
    # Nobody's policy lets members see only their own runs and still choose another's.
    assert console("set_run_number 3", "max").error["rule"] == "role member: view = n:submitter"


# ---- deploying --------------------------------------------------------------------------------


def test_deploy_asks_every_target_and_notes_those_that_accept(console, prepared):
    prepared.site_views += [site("c"), site("d", state="away"), site("e", state="disabled")]
    reply = console("deploy heart all --run 7")
    assert prepared.asked == [(("a", "b", "c"), "deploy", SIGNED)]
    assert prepared.staging.calls == [("deploy", 7, "heart", ("a",), "amy")]
    assert list(reply.rows) == ["server", "a", "b", "c", "d", "e"]
    assert reply.rows["a"]["cells"] == {"answer": "accepts", "isolation": "sandbox"}
    statuses = reply.statuses
    assert statuses["server"] == "ok"
    assert statuses["b"] == "refused rule policy byoc = none: amy may not byoc"
    assert statuses["c"] == "no_reply after 5.0 s"
    assert statuses["d"].startswith("no_reply (")
    assert statuses["e"] == "refused disabled on the server"
    assert reply.data("deployed") == {"run": 7, "sites": ["a"]}


def test_sites_that_have_an_older_package_are_named(console, prepared):
    prepared.run_views[7] = run(7, **PREPARED | {"targets": ("a", "b")})
    reply = console("deploy heart client a", run=7)
    assert reply.text == "another package was deployed before: deploy heart client b"


def test_deploy_of_named_sites_and_of_the_server_alone(console, prepared):
    reply = console("deploy heart client a aa", run=7)
    assert reply.statuses == {"a": "ok", "aa": "unknown site (did you mean a?)"}
    assert console("deploy heart server", run=7).statuses == {"server": "ok"}
    assert prepared.staging.calls == [
        ("deploy", 7, "heart", ("a",), "amy"),
        ("deploy", 7, "heart", (), "amy"),
    ]


def test_where_nobody_accepts_nothing_is_deployed(console, prepared):
    assert console("deploy heart client b", run=7).code == 3
    assert prepared.staging.calls == []


def test_a_deployment_that_cannot_be_stored_has_no_rows(console, prepared):
    prepared.staging.refusal = ResourceExhaustedError("no space left")
    reply = console("deploy heart all", run=7)
    assert reply.error["message"] == "no space left"
    assert reply.rows == {}


def test_deploy_says_what_is_legal_instead(console, prepared):
    prepared.run_views[4] = run(4, **ENDED)
    assert console("deploy heart all").error["hint"].startswith("set_run_number N first")
    del prepared.run_views[3]
    assert "set_run_number N first" in console("deploy heart all").error["hint"]
    prepared.run_views[3] = run(3)
    error = console("deploy heart all --run 3").error
    assert error["message"] == "run 3 is training"
    assert error["hint"] == "legal now: abort, set_min_clients, start client SITE"
    error = console("deploy heart all --run 4").error
    assert (error["message"], error["hint"]) == (
        "run 4 has finished",
        "set_run_number N takes a new number",
    )
    assert console("deploy heart nowhere --run 7").code == 2
    assert prepared.asked == []


def test_a_run_is_prepared_by_whose_it_is(console, prepared):
    prepared.run_views[8] = run(8, submitter="lea", submitter_organisation="a", **PREPARED)
    assert console("deploy heart client a --run 7", "lea").error["rule"] == (
        "role lead: train = n:submitter"
    )
    assert console("deploy heart client a --run 8", "lea").code == 0
    # An org admin may act on a run of the organisation's, but not submit one.
    assert console("deploy heart client a --run 8", "oli").error["rule"] == (
        "role org_admin: submit_job = none"
    )


# ---- starting ---------------------------------------------------------------------------------


@pytest.fixture
def ready(prepared):
    prepared.site_views.append(site("c"))
    prepared.staging.plans = {
        7: plan(7),
        3: plan(3, status="training", sites=("a", "b"), taking_part=("a",)),
    }
    return prepared


def test_the_plan_of_a_prepared_run(console, ready):
    reply = console("start_plan all", run=7)
    found = reply.data("plan")
    assert (found["run"], found["starting"], found["submission_id"]) == (7, ["a", "b"], "5" * 32)
    assert reply.statuses == {"server": "ok is starting"}
    assert console("start_plan client", run=7).data("plan")["starting"] == ["a", "b"]
    reply = console("start_plan client b c x", run=7)
    assert reply.data("plan")["starting"] == ["b"]
    assert reply.statuses == {
        "c": "error not deployed; deploy heart client c",
        "x": "unknown site",
    }


def test_a_site_that_is_barred_is_not_started(console, ready):
    ready.site_views[0] = site("a", state="disabled")
    reply = console("start_plan client", run=7)
    assert reply.statuses == {"a": "refused disabled on the server: enable_client a"}
    assert reply.data("plan")["starting"] == ["b"]


def test_start_server_begins_nothing(console, ready):
    reply = console("start_plan server", run=7)
    assert reply.statuses == {"server": "ok waits for start client"}
    assert reply.data("plan")["starting"] == []
    assert console("start_plan server", run=3).statuses == {"server": "ok run 3 is training"}


def test_a_run_at_work_is_joined_by_named_sites_only(console, ready):
    reply = console("start_plan all", run=3)
    assert reply.data("plan")["starting"] == []
    assert reply.code == 0
    assert reply.statuses == {
        "server": "ok run 3 is training",
        "a": "ok takes part already",
        "b": "ok takes no part; start client b asks again",
    }
    reply = console("start_plan client a b c", run=3)
    assert reply.data("plan")["starting"] == ["b", "c"]
    lost = "if it has lost the run: abort client a --run 3 first"
    assert reply.statuses == {"a": f"ok takes part already; {lost}"}


def test_only_what_is_started_can_be_fetched(console, ready):
    console("start_plan server", run=7)
    assert console.transfers._granted == {}
    console("start_plan client a", run=7)
    assert console.transfers._granted == {"s-amy": {plan().package.digest}}


def test_a_run_that_is_deployed_nowhere(console, ready):
    ready.staging.plans[7] = plan(7, sites=())
    assert console("start_plan all", run=7).error["hint"] == "deploy heart client"
    assert console("start_plan all --run 8").error["code"] == "not_found"


def test_begin_hands_the_attached_order_on(console, ready):
    reply = console("begin --run 7 --min 2", attachment=b"start order")
    assert ready.staging.calls == [("begin", 7, b"start order", "amy", 2)]
    assert reply.remembered == {"run": 7}
    assert reply.data("run") == 7
    assert console("begin --run 7").error["code"] == "invalid_argument"
    assert console("begin --run 7", "oli", attachment=b"x").code == 3


def test_start_belongs_to_the_console(console, ready):
    for line in ("start all --run 7", "start_mgpu 2 --run 7", "upload_folder x"):
        assert "belongs to the console" in console(line).error["message"]
    assert {"stage", "start_plan", "begin"} <= HIDDEN
    assert {name: console.register.view(name).local for name in ("start", "start_mgpu")} == {
        "start": "start",
        "start_mgpu": "start",
    }


# ---- where prepared runs are seen -------------------------------------------------------------


def test_a_prepared_run_is_seen_in_lists_status_and_prompt(console, prepared):
    del prepared.run_views[3]
    assert console("list_runs").table["rows"][0][:3] == [7, "", "prepared"]
    for chosen in (None, 7):
        cells = console("check_status server", run=chosen).rows["server"]["cells"]
        assert "prepared" in cells["phase"]
    assert console("check_status server").rows["server"]["cells"]["phase"] == "run 7 prepared"
    assert surroundings.prompt(prepared, 7) == "fl:heart  run 7 prepared  2/2 sites > "
    assert surroundings.prompt(prepared, None) == "fl:heart  2/2 sites > "


def test_staged_jobs_complete(prepared):
    assert surroundings.values(prepared, "job", "he") == ["heart"]
    assert surroundings.values(prepared, "job", "x") == []
