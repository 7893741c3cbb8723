import asyncio

from flplatform.admin.console.wait import follow
from flplatform.core.errors import UnavailableError
from tests.unit.admin.console.conftest import Screen, data, done, error, text


def test_the_story_goes_on_after_a_break_without_being_told_twice(transport):
    screen = Screen(transport)
    transport.replies = [
        [text("run 3 training"), text("round 1/2 closed"), UnavailableError("gone")],
        [UnavailableError("still gone")],
        [text("run 3 training"), text("round 1/2 closed")],
        [
            text("run 3 training"),
            text("round 1/2 closed"),
            text("run 3 failed"),
            data("run", {}),
            done(5),
        ],
    ]
    assert asyncio.run(follow(transport, ["wait", "3"], screen.shell)) == 5
    assert [line for line in screen.lines if "again" not in line] == [
        "run 3 training",
        "round 1/2 closed",
        "run 3 failed",
    ]
    assert {tuple(words) for words, _ in transport.sent} == {("wait", "3")}


def test_a_server_that_stops_in_order_is_waited_for_too(transport):
    screen = Screen(transport)
    transport.replies = [
        [text("run 3 training"), error("the server is stopping", "unavailable"), done(4)],
        [text("run 3 finished"), done(0)],
    ]
    assert asyncio.run(follow(transport, ["wait", "3"], screen.shell)) == 0
    assert screen.lines[0] == "run 3 training"
    assert screen.lines[-1] == "run 3 finished"
