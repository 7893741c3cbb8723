"""`logs` at the console: merged, honest about who is missing, and followed to the end."""

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import pytest

from flplatform.admin.fed_admin_server import modules
from flplatform.admin.modules import log_reading as module
from flplatform.admin.modules.log_reading import AGAIN, LOST, Times
from flplatform.admin.modules.logs import LogsModule
from flplatform.core.control import SiteReply
from flplatform.core.logs import Failure, LogLine, LogNews
from flplatform.hci import AdminServer, CommandRegister, tokenise
from flplatform.security.signing import CommandOrder
from tests.support.control import ENDED, FakeControl, run, site
from tests.support.logs import FakeFeed
from tests.unit.admin.conftest import SIGNED, Console, session_of

DAY = "2026-05-01T12:00:"


def at(seconds: float) -> str:
    return f"{DAY}{seconds:06.3f}Z"


def line(seconds, source, text, who="job"):
    return LogLine(at(seconds), source, who, text)


def reply(*entries, following=False, cut=False):
    lines = [[at(seconds), "job", text] for seconds, text in entries]
    return SiteReply("ok", {"lines": lines, "following": following, "cut": cut})


@dataclass
class Sites(FakeControl):
    """Remembers what the server adds to a request; answers come one after another.

    Attributes:
        bodies: (sites, body) of every request.
        later: site -> answers after the first.
    """

    bodies: list = field(default_factory=list)
    later: dict = field(default_factory=dict)

    async def ask(self, sites, topic, *, timeout_s, signed=b"", body=None):
        self.bodies.append((tuple(sites), body))
        answer = await super().ask(sites, topic, timeout_s=timeout_s, signed=signed)
        for name in sites:
            if self.later.get(name):
                self.replies[name] = self.later[name].pop(0)
        return answer


@pytest.fixture
def control():
    control = Sites(site_views=[site("a"), site("b")])
    control.run_views[3] = run(3)
    control.logs.lines = [line(1, "server", "run opened", "event")]
    control.replies = {"a": reply((2, "from a")), "b": reply((1.5, "from b"), (3, "more of b"))}
    return control


@pytest.fixture
def console(control, tmp_path):
    return Console(control, tmp_path / "policy.yml")


def shown(answer):
    return [found.split(" ", 1)[1] for found in answer.text.splitlines()]


# ---- once


def test_merged_over_server_and_sites(console, control):
    answer = console("logs 3")
    assert answer.text.splitlines() == [
        f"{at(1)} server event | run opened",
        f"{at(1.5)} b job | from b",
        f"{at(2)} a job | from a",
        f"{at(3)} b job | more of b",
    ]
    assert answer.data("logs")[0] == {
        "time": at(1), "source": "server", "who": "event", "text": "run opened",
    }  # fmt: skip
    assert answer.rows == {}
    assert answer.code == 0
    assert control.asked == [(("a", "b"), "logs", SIGNED)]
    assert control.bodies == [(("a", "b"), {"subscription": "", "after": ""})]


def test_only_these_sites(console, control):
    assert shown(console("logs 3 a")) == ["a job | from a"]
    assert shown(console("logs 3 a --server")) == ["server event | run opened", "a job | from a"]
    control.asked.clear()
    assert shown(console("logs 3 --server")) == ["server event | run opened"]
    assert control.asked == []


def test_the_server_picks_its_own_lines(console, control):
    control.logs.lines = [line(n, "server", f"event {n}", "event") for n in range(9)]
    assert shown(console("logs 3 --server --lines 2")) == [
        "server event | event 7",
        "server event | event 8",
    ]
    assert shown(console("logs 3 --server --grep 4")) == ["server event | event 4"]
    assert shown(console(f"logs 3 --server --since {at(8)}")) == ["server event | event 8"]
    assert shown(console("logs 3 --server --lines 0")) == []


def test_clocks_that_differ_do_not_reorder_a_source(console, control):
    control.replies["a"] = reply((9, "first"), (2, "second"), (10, "third"))
    texts = [found.partition(" | ")[2] for found in console("logs 3 a b").text.splitlines()]
    assert [text for text in texts if text in ("first", "second", "third")] == [
        "first",
        "second",
        "third",
    ]


def test_a_traceback_stays_together(console, control):
    trace = ["Traceback (most recent call last):", "  File x", "ValueError: no"]
    control.replies["a"] = reply(*((1.4 + n / 10, text) for n, text in enumerate(trace)))
    texts = [found.partition(" | ")[2] for found in console("logs 3").text.splitlines()]
    start = texts.index(trace[0])
    assert texts[start : start + 3] == trace
    assert texts[start + 3] == "from b"


def test_whoever_cannot_answer_has_a_row(console, control):
    targets = ("a", "b", "c", "d", "e", "f")
    control.run_views[3] = run(
        3, targets=targets, answers={"f": "declined: policy byoc: no foreign code"}
    )
    control.site_views = [site("a"), site("b"), site("c"), site("e"), site("f")]
    control.site_views.append(site("d", state="away", certificate_days=None, last_seen_s=9.0))
    control.replies["b"] = SiteReply("refused", message="amy may not", rule="policy commands: view")
    control.replies["c"] = SiteReply("error", message="no log of run 3 here")
    answer = console("logs 3")
    assert shown(answer)[-1] == "a job | from a"
    assert answer.statuses == {
        "b": "refused rule policy commands: view: amy may not",
        "c": "error no log of run 3 here",
        "d": "error not connected: lost: last heard of 9.0 s ago",
        "e": "no_reply after 2.0 s",
        "f": "ok declined run 3, so it has no log",
    }
    assert answer.code == 1


def test_all_refuse(console, control):
    refused = SiteReply("refused", message="no", rule="policy commands: view")
    control.replies = {"a": refused, "b": refused}
    assert console("logs 3 a b").code == 3
    assert console("logs 3").code == 1  # the server has answered


def test_a_site_without_part_in_the_run(console, control):
    answer = console("logs 3 bb a")
    assert answer.statuses == {"bb": "unknown site of run 3 (did you mean b?)"}
    assert shown(answer) == ["a job | from a"]
    assert answer.code == 1


def test_there_is_no_such_run(console):
    assert console("logs 9").error["message"] == "there is no run 9"


@pytest.mark.parametrize(
    "words", ["logs", "logs 0", "logs x", "logs 3 --since soon", "logs 3 -n -1"]
)
def test_words_that_do_not_fit(console, words):
    answer = console(words)
    assert answer.code == 2
    assert answer.error["hint"].startswith("usage: logs")


def test_what_was_left_out_is_said(console, control):
    control.replies["a"] = reply((2, "from a"), cut=True)
    assert shown(console("logs 3 a")) == [
        "a log | earlier lines are left out: too much for one answer",
        "a job | from a",
    ]


def test_a_failed_run_ends_with_what_failed_it(console, control):
    control.run_views[3] = run(3, **ENDED | {"status": "failed", "reason": "too few sites"})
    control.logs.cause = Failure("a", "3/7/train/a", "ValueError: no", "Trace\nValueError: no")
    answer = console("logs 3 b")
    assert answer.text.splitlines()[-4:] == [
        "run 3 failed: too few sites",
        "at a, in task 3/7/train/a: ValueError: no",
        "Trace",
        "ValueError: no",
    ]
    assert answer.data("failure")["site"] == "a"


def test_who_may_not_view_sees_nothing(console, control):
    console.policy.write_text("roles: {member: {view: none}}")
    console.rights.reload()
    answer = console("logs 3", "max")
    assert answer.code == 3
    assert control.asked == []


# ---- a hostile site


def test_what_a_hostile_site_answers_is_bounded_and_harmless(console, control):
    forged = f"x\n{at(9)} server event | finished\x1b[2J"
    lines = [[at(2), "job", forged], [at(2), "job", "y" * 10_000_000], 5, ["x"], [None] * 3]
    control.replies["a"] = SiteReply("ok", {"lines": lines, "following": True, "cut": 7})
    control.replies["b"] = SiteReply("ok", {"lines": {"x": 1}})
    answer = console("logs 3")
    first, second, third = answer.text.splitlines()
    assert first.endswith("run opened")
    assert second == f"{at(2)} a job | x?{at(9)} server event | finished?[2J"
    assert len(third) < 9000
    assert answer.code == 0


def test_the_json_answer_is_bounded(console, control):
    control.replies["a"] = reply(*((2, "x" * 1000) for _ in range(5000)))
    answer = console("logs 3 a")
    kept = answer.data("logs")
    assert len(kept) <= module.MAX_DATA_LINES
    assert sum(len(entry["text"]) for entry in kept) <= module.MAX_DATA_CHARS
    items = [item["text"] for item in answer.items if item["type"] == "text"]
    assert max(map(len, items)) < 2 * module.ITEM_CHARS
    assert len(answer.text.splitlines()) == 5000


# ---- following


@pytest.fixture
def follow(control, tmp_path, monkeypatch):
    """Follow run 3; news are given one by one."""

    def begin(*script, words="logs -f 3", order_s=60.0, **times):
        control.logs.feed = FakeFeed()
        control.logs.feed.script.extend(script)
        for name in ("a", "b"):
            control.replies.setdefault(name, reply(following=True))
        console = Console(control, tmp_path / "policy.yml")
        every = [m for m in modules(console.parts()) if not isinstance(m, LogsModule)]
        fast = {"drain_s": 0.0, "doubt_s": 0.0, "look_s": 0.0} | times
        every.append(LogsModule(control, console.parts().hosts, Times(**fast)))
        console.server = AdminServer(CommandRegister(every), console.rights, console)

        async def scene():
            now = datetime.now(UTC)
            order = CommandOrder(
                project="heart",
                issued_at=now - timedelta(seconds=100),
                not_after=now + timedelta(seconds=order_s),
                id="0" * 32,
                argv=tuple(tokenise(words)),
            )
            monkeypatch.setattr("tests.unit.admin.conftest.CommandOrder", lambda **_: order)
            async with asyncio.timeout(60):
                return await console.run(words)

        answer = asyncio.run(scene())
        assert control.logs.feed.closed or not control.logs.followed
        return answer

    return begin


@pytest.fixture
def live(control):
    control.replies = {
        "a": reply((2, "from a"), following=True),
        "b": reply((1.5, "from b"), following=True),
    }
    return control


OVER = LogNews(ended=frozenset({"a", "b"}), run_over=True)


def gone(control, name):
    def step():
        control.site_views = [
            site(each.name, certificate_days=None if each.name == name else 300.0)
            for each in control.site_views
        ]

    return step


def back(control, name):
    def step():
        control.site_views = [site(each.name) for each in control.site_views]
        return LogNews(returned=frozenset({name}))

    return step


def test_live_until_the_run_has_ended(follow, live):
    answer = follow(
        LogNews((line(4, "a", "new"), line(3.5, "b", "late"))),
        LogNews((line(5, "server", "finished", "event"),), run_over=True),
        LogNews((line(4.5, "b", "last"),), ended=frozenset({"a", "b"}), run_over=True),
        drain_s=10.0,
    )
    assert shown(answer) == [
        "server event | run opened",
        "b job | from b",
        "a job | from a",
        "a job | new",
        "b job | late",
        "server event | finished",
        "b job | last",
    ]
    assert answer.code == 0
    assert answer.rows == {}
    assert live.logs.followed == [(3, ("a", "b"))]
    assert live.bodies == [(("a", "b"), {"subscription": live.logs.feed.id, "after": ""})]


def test_a_run_that_has_ended_is_not_followed(follow, live):
    live.run_views[3] = run(3, **ENDED)
    live.replies["a"] = reply((2, "from a"))
    assert follow().code == 0
    assert live.logs.followed == []


def test_the_last_lines_are_not_waited_for_for_ever(follow, live):
    over = LogNews(run_over=True)
    answer = follow(over, over, over, LogNews((line(9, "a", "too late"),)), drain_s=-1.0)
    assert "too late" not in answer.text
    assert answer.code == 0


def test_grep_and_sites_hold_for_what_comes_too(follow, live):
    news = LogNews((line(3, "server", "noise", "event"), line(4, "server", "loss 3", "event")))
    assert "server event | loss 3" in shown(follow(news, OVER, words="logs -f 3 --grep loss"))
    assert not [x for x in shown(follow(news, OVER, words="logs -f 3 a")) if "server" in x]


def test_a_site_that_is_killed_is_named(follow, live):
    answer = follow(gone(live, "b"), LogNews(run_over=True, ended=frozenset({"a"})))
    assert f"b log | {LOST}" in shown(answer)
    assert shown(answer).count(f"b log | {LOST}") == 1
    assert answer.statuses["b"].startswith("error not connected")
    assert answer.code == 1


def test_a_site_that_was_restarted_is_asked_again_while_the_order_is_fresh(follow, live):
    live.later["b"] = [reply((1.5, "from b"), (1.5, "same time"), (3, "after"), following=True)]
    answer = follow(gone(live, "b"), back(live, "b"), LogNews(), OVER)
    assert live.bodies[1] == (("b",), {"subscription": live.logs.feed.id, "after": at(1.5)})
    assert shown(answer)[-3:] == [f"b log | {LOST}", "b job | same time", "b job | after"]
    assert live.asked[1] == (("b",), "logs", SIGNED)
    assert answer.rows == {}
    assert answer.code == 0


def test_a_restart_that_nobody_noticed_in_between(follow, live):
    live.later["b"] = [reply((3, "after"), following=True)]
    answer = follow(LogNews(returned=frozenset({"b"})), OVER)
    assert shown(answer)[-1] == "b job | after"
    assert answer.code == 0


def test_a_stale_order_asks_nobody_and_says_so(follow, live):
    answer = follow(
        LogNews(returned=frozenset({"b"})), LogNews(), LogNews(), OVER, order_s=-1.0, doubt_s=-1.0
    )
    assert shown(answer)[-1] == f"b log | {AGAIN}"
    assert len(live.bodies) == 1
    assert answer.statuses == {"b": f"error {AGAIN}"}
    assert answer.code == 1


def test_a_site_that_only_reconnected_goes_on_after_the_order_is_stale(follow, live):
    answer = follow(
        LogNews(returned=frozenset({"b"})),
        LogNews((line(4, "b", "still here"),), heard=frozenset({"b"})),
        LogNews(),
        OVER,
        order_s=-1.0,
        doubt_s=10.0,
    )
    assert shown(answer)[-1] == "b job | still here"
    assert answer.rows == {}


def test_a_site_that_refuses_after_its_restart(follow, live):
    live.later["b"] = [SiteReply("refused", message="no", rule="policy commands: view")]
    answer = follow(LogNews(returned=frozenset({"b"})), OVER)
    assert shown(answer)[-1] == f"b log | {AGAIN}"
    assert answer.statuses["b"] == "refused rule policy commands: view: no"


def test_a_site_whose_time_is_over(follow, live):
    answer = follow(LogNews(ended=frozenset({"b"})), OVER)
    assert f"b log | {AGAIN}" in shown(answer)
    assert answer.statuses == {"b": f"error {AGAIN}"}


def test_a_site_that_comes_for_the_first_time(follow, live):
    live.site_views = [site("a"), site("b", certificate_days=None)]
    answer = follow(back(live, "b"), OVER)
    assert shown(answer)[-1] == "b job | from b"
    assert answer.rows == {}


def test_following_has_an_end(follow, live):
    answer = follow(LogNews(), follow_s=-1.0)
    assert shown(answer)[-1] == f"server log | {AGAIN}"


def test_only_the_server_is_followed(follow, live):
    over = LogNews((line(5, "server", "finished", "event"),), run_over=True)
    answer = follow(over, words="logs -f 3 --server")
    assert shown(answer)[-1] == "server event | finished"
    assert live.bodies == []
    assert answer.code == 0


def test_nothing_is_taken_any_more_once_the_reader_has_gone(console, live, in_hand):
    async def scene():
        in_hand("amy", "logs", "-f", "3")
        answer = console.server.execute(session_of("amy"), ["logs", "-f", "3"])
        async with asyncio.timeout(60), aclosing(answer):
            assert "from a" in (await anext(answer))["text"]
            assert not live.logs.feed.closed
        assert live.logs.feed.closed

    asyncio.run(scene())
