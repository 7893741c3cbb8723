import asyncio
from types import SimpleNamespace

import pytest
from round_timer import RoundTimer

from flplatform.admin.targets import RunArguments
from flplatform.core.errors import FailedPreconditionError
from flplatform.hci import AdminSession, CommandRegister, Connection


class Control:
    """A run whose log grows by one state each time somebody waits for it."""

    def __init__(self, *states):
        self.states = [SimpleNamespace(run=3, name="heart", ended="", **state) for state in states]

    def run(self, _):
        return self.states[0]

    async def wait_changed(self, _, seen):
        del self.states[0]
        return seen + 1


def state(number, status="training"):
    return {"round": number, "status": status}


def reply_of(control):
    module = RoundTimer(SimpleNamespace(control=control), clock=iter(range(100)).__next__)
    spec = CommandRegister([module]).find("round_times")
    connection = Connection(AdminSession("s", "amy", "lead", "a", "peer", "fp", 0.0, 0.0))

    async def main():
        await spec.handler(connection, RunArguments(run=3))
        await connection.done(0.0)
        items = []
        while not items or items[-1]["type"] != "done":
            items.append(await connection.next_item())
        return items

    return asyncio.run(main())


def test_each_round_gets_a_row():
    control = Control(state(1), state(1), state(2), state(3), state(3, "validating"))
    text, *rows, data, _ = reply_of(control)
    assert text["text"] == "timing run 3 (heart) from round 1 on"
    assert [(row["target"], row["cells"]["whole"]) for row in rows] == [
        ("round 1", False),
        ("round 2", True),
        ("round 3", True),
    ]
    assert data["value"] == {"1": 1, "2": 1, "3": 1}


def test_deploying_is_no_round():
    control = Control(state(0, "deploying"), state(1), state(1, "aborted"))
    assert [item["target"] for item in reply_of(control) if item["type"] == "row"] == ["round 1"]


def test_a_run_that_has_ended_is_refused():
    with pytest.raises(FailedPreconditionError, match="run 3 is finished; round_times is legal"):
        reply_of(Control(state(9, "finished")))
