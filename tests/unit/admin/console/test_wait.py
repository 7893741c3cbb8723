import asyncio

from flplatform.admin.console.wait import follow
from flplatform.core.errors import UnavailableError
from tests.unit.admin.console.conftest import Screen, data, done, text


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
