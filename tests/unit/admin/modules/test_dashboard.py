import asyncio

import pytest

from flplatform.admin.console.dashboard import DashboardApp
from flplatform.admin.modules import dashboard
from flplatform.core.control import RoundMetrics
from tests.support.control import ENDED, run, site
from tests.unit.admin.conftest import USERS, session_of
from tests.unit.admin.modules.test_models import DIGEST


@pytest.fixture
def busy(control, monkeypatch):
    monkeypatch.setattr(dashboard, "SHORTEST_S", 0.0)
    control.run_views = {2: run(2, **ENDED), 3: run(3, timers={"deadline/7": 40.0})}
    control.site_views = [site("a", runs=((3, 7, "training", 2.0),)), site("b", state="stopped")]
    control.rounds[3] = [
        RoundMetrics(6, 0.7, True, {"a": {"accuracy": 0.7}}, {"b": {"accuracy": 0.6}}, DIGEST)
    ]
    return control


async def pictures(console, in_hand, user, line, count, between=lambda: None):
    in_hand(user, *line.split())
    found = []
    feed = console.server.execute(session_of(user), line.split())
    async for item in feed:
        found.append(item)
        if item["type"] == "done" or len(found) == count:
            break
        between()
    await feed.aclose()
    return found


def test_a_picture_holds_what_the_screen_shows(console, busy, in_hand):
    (item,) = asyncio.run(pictures(console, in_hand, "amy", "dashboard_feed 3", 1))
    picture = item["value"]
    assert picture["run"]["timers"] == {"deadline/7": 40.0}
    assert picture["runs"] == [
        {"run": 2, "name": "heart", "status": "finished"},
        {"run": 3, "name": "heart", "status": "training"},
    ]
    assert picture["sites"][0] == {
        "name": "a",
        "state": "live",
        "last_seen_s": 0.4,
        "runs": [[3, 7, "training", 2.0]],
    }
    assert picture["sites"][1]["state"] == "stopped"
    assert picture["last_scores"] == {"a": 0.7, "b": 0.6}
    assert picture["rounds"] == [{"round": 6, "score": 0.7, "best": True}]
    assert "model 6: accuracy .700, the best so far" in picture["news"]
    assert len(picture["run"]["model_digest"]) < 20


def test_a_change_brings_a_picture_with_what_is_new(console, busy, in_hand):
    def change() -> None:
        busy.update(3, answers={"a": "ok", "b": "declined: policy byoc"})

    first, second = asyncio.run(
        asyncio.wait_for(pictures(console, in_hand, "amy", "dashboard_feed 3", 2, change), 60)
    )
    assert "b declined: policy byoc" not in first["value"]["news"]
    assert second["value"]["news"] == ["b declined: policy byoc"]


def test_a_run_that_does_not_exist(console, busy, in_hand):
    error, done = asyncio.run(pictures(console, in_hand, "amy", "dashboard_feed 9", 2))
    assert (error["code"], done["exit_code"]) == ("not_found", 1)


def test_only_sites_that_one_may_see_are_in_it(console, busy, in_hand):
    console.policy.write_text("roles: {member: {view: [any], check_status: ['o:site']}}\n")
    console.rights.reload()
    (item,) = asyncio.run(pictures(console, in_hand, "max", "dashboard_feed 3", 1))
    assert [each["name"] for each in item["value"]["sites"]] == ["a"]
    assert USERS["max"].organisation == "a"


def test_the_screen_draws_what_the_server_sends(console, busy, in_hand):
    async def main() -> None:
        (item,) = await pictures(console, in_hand, "amy", "dashboard_feed 3", 1)

        async def feed(_run: int):
            yield item
            await asyncio.Event().wait()

        async def act(_words, _confirm) -> str:
            return ""

        app = DashboardApp(feed, act, 3)
        async with app.run_test(size=(100, 30)) as pilot:
            await pilot.pause()
            assert [str(cell) for cell in app.sites.get_row_at(1)][:2] == ["b", "stopped"]

    asyncio.run(main())


@pytest.mark.parametrize("count", [0, 1, 300, 301, 1000])
def test_a_long_run_is_thinned_to_a_curve(count):
    rounds = [RoundMetrics(n, None, False, {}, {}, DIGEST) for n in range(count)]
    thinned = dashboard._thinned(rounds)
    assert len(thinned) <= dashboard.MAX_ROUNDS
    assert [each.round for each in thinned[-1:]] == [count - 1][:count]
