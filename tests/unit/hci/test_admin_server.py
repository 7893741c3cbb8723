import asyncio
import dataclasses
import errno
import json
import logging
from contextlib import aclosing
from dataclasses import dataclass

import pytest

from flplatform.core.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    PermissionDeniedError,
    UnavailableError,
)
from flplatform.hci.admin_server import AdminServer
from flplatform.hci.connection import Connection
from flplatform.hci.register import CommandRegister
from flplatform.hci.spec import CommandSpec, argument


@dataclass(frozen=True)
class Args:
    what: str = argument(help="what", default="rows")


class World:
    """A module, an authorizer and an audit that write down what happens in which order."""

    name = "things"
    summary = "for tests"

    def __init__(self, **changes) -> None:
        self.log: list[str] = []
        self.prepared: list[tuple] = []
        self.records: list[tuple] = []
        self.question = ""
        self.denied: Exception | None = None
        self.broken_audit: Exception | None = None
        self.seen: Connection | None = None
        self.release = asyncio.Event()
        self.spec = dataclasses.replace(
            CommandSpec(
                "drop", "drops", Args, self._handle, "operate", True, ("drop x",), self._ask, ("d",)
            ),
            **changes,
        )
        self.server = AdminServer(
            CommandRegister([self]), self, self, max_operations=2, max_pending=4, prepare=self._get
        )

    def commands(self):
        return [self.spec]

    async def _get(self, permission: str, args: object) -> None:
        self.prepared.append((permission, args, [*self.log]))

    async def _ask(self, args: Args) -> str:
        self.log.append(f"confirm {args.what}")
        return self.question

    def check(self, session, permission, command, args) -> None:
        self.log.append(f"check {session.user} {permission} {command}")
        if self.denied:
            raise self.denied

    def record(self, actor, action, decision, *, reason="", details, correlation_id) -> None:
        self.log.append(f"audit {decision}")
        if self.broken_audit:
            raise self.broken_audit
        self.records.append((actor, action, decision, reason, details, correlation_id))

    async def _handle(self, connection: Connection, args: Args) -> None:
        self.log.append("handle")
        self.seen = connection
        match args.what:
            case "rows":
                await connection.row("a")
            case "state":
                raise FailedPreconditionError("not now")
            case "bug":
                raise RuntimeError("secret detail")
            case "inner":
                task = asyncio.ensure_future(asyncio.sleep(100))
                task.cancel()
                await task
            case "five":
                connection.exit_code = 5
            case "wait":
                await connection.text("waiting")
                try:
                    await self.release.wait()
                except asyncio.CancelledError:
                    self.log.append("cancelled")
                    raise
                for number in range(20):
                    await connection.text(str(number))
                self.log.append("finished")

    async def run(self, session, line: str, **options) -> list[dict]:
        return [item async for item in self.server.execute(session, line.split(), **options)]


def run(session, line: str, prepare=lambda world: None, changes=None, **options):
    async def main():
        world = World(**(changes or {}))
        prepare(world)
        return world, await world.run(session, line, **options)

    return asyncio.run(main())


CHECK = "check amy@clinic-a.org operate drop"


def test_the_order_is_authorise_confirm_audit_handle(session):
    world, items = run(session, "drop")
    assert world.log == [CHECK, "confirm rows", "audit allowed", "handle"]
    assert [item["type"] for item in items] == ["row", "done"]
    assert items[-1]["exit_code"] == 0
    assert items[-1]["ok"] == 1


def test_what_a_command_needs_is_fetched_before_it_is_authorised(session):
    world, _ = run(session, "drop")
    assert world.prepared == [("operate", Args(what="rows"), [])]


def test_the_audit_has_who_what_and_the_handlers_correlation_id(session):
    world, _ = run(session, "d y", request="signed")
    ((actor, action, decision, _, details, correlation_id),) = world.records
    assert actor == {
        "name": "amy@clinic-a.org",
        "role": "lead",
        "organisation": "clinic-a",
        "fingerprint": "f0",
        "peer": "10.0.0.1:5000",
    }
    assert (action, decision) == ("drop", "allowed")
    assert details == {"session": "abc123", "arguments": '{"what": "y"}'}
    assert world.seen.correlation_id == correlation_id
    assert world.seen.request == "signed"
    assert world.seen.session is session


def test_a_question_ends_the_command_before_anything_is_audited(session):
    def ask(world):
        world.question = "drop all?"

    world, items = run(session, "drop", ask)
    assert world.log == [CHECK, "confirm rows"]
    assert items == [{"type": "confirm", "question": "drop all?"}]
    world, items = run(session, "drop", ask, confirmed=True)
    assert world.log == [CHECK, "audit allowed", "handle"]
    assert items[-1]["exit_code"] == 0


def test_a_refusal_is_audited_and_nothing_is_asked_or_done(session):
    def deny(world):
        world.denied = PermissionDeniedError("no", rule="role lead")

    world, items = run(session, "drop", deny, confirmed=True)
    assert world.log == [CHECK, "audit denied"]
    assert world.records[0][3] == "role lead"
    assert items[0]["rule"] == "role lead"
    assert items[-1]["exit_code"] == 3


def test_a_refusal_stands_when_the_audit_is_broken(session, caplog):
    def deny(world):
        world.denied = PermissionDeniedError("no", rule="r")
        world.broken_audit = OSError("disk full")

    world, items = run(session, "drop", deny)
    assert items[-1]["exit_code"] == 3
    assert "handle" not in world.log
    assert "not in the audit" in caplog.text


@pytest.mark.parametrize("error", [OSError("disk full"), UnavailableError("later")])
def test_a_broken_audit_stops_what_would_change_something(session, error, caplog):
    def broken(world):
        world.broken_audit = error

    world, items = run(session, "drop", broken)
    assert world.log[-1] == "audit allowed"
    assert "nothing was done" in items[0]["message"]
    assert "disk full" not in items[0]["message"]
    assert items[-1]["exit_code"] == 1
    assert "audit cannot be written" in caplog.text


def test_an_audit_that_finds_no_room_is_no_defect(session, caplog):
    def broken(world):
        text = "/secret/audit.jsonl: the disk took 331 of 614 bytes"
        world.broken_audit = OSError(errno.ENOSPC, text)

    world, items = run(session, "drop", broken)
    assert world.log[-1] == "audit allowed"
    assert "nothing was done: the audit cannot be written" in items[0]["message"]
    assert "the disk is full" in items[0]["message"]
    assert "free space on the disk of the server" in items[0]["hint"]
    assert "secret" not in str(items)
    assert "the disk took 331 of 614 bytes" in caplog.text
    assert "Traceback" not in caplog.text


def test_what_changes_nothing_needs_no_audit(session):
    def broken(world):
        world.broken_audit = OSError("disk full")

    world, items = run(session, "drop", broken, changes={"mutating": False, "confirm": None})
    assert world.log == [CHECK, "handle"]
    assert items[-1]["exit_code"] == 0


@pytest.mark.parametrize(
    ("line", "text", "code"),
    [
        ("", "no command", 2),
        ("dorp", "unknown command 'dorp'", 2),
        ("drop a b", "unexpected 'b'", 2),
        ("drop state", "not now", 1),
        ("drop inner", "cancelled", 130),
    ],
)
def test_errors_become_items_and_exit_codes(session, line, text, code):
    _, items = run(session, line)
    assert [item["type"] for item in items] == ["error", "done"]
    assert text in items[0]["message"]
    assert items[-1]["exit_code"] == code


def test_usage_errors_reach_neither_authorizer_nor_audit(session):
    world, items = run(session, "drop a b")
    assert world.log == []
    assert items[0]["hint"] == "usage: drop [WHAT]"


def test_a_handler_may_choose_its_exit_code(session):
    assert run(session, "drop five")[1][-1]["exit_code"] == 5


def test_a_defect_is_logged_and_shown_by_its_id_alone(session, caplog):
    with caplog.at_level(logging.ERROR):
        world, items = run(session, "drop bug")
    identifier = world.seen.correlation_id
    assert items[0]["message"] == f"internal error {identifier}; the server's log says more"
    assert "secret detail" not in json.dumps(items)
    assert identifier in caplog.text
    assert "secret detail" in caplog.text


def test_a_reader_that_goes_away_cancels_the_handler(session):
    async def main() -> None:
        world = World()
        async with aclosing(world.server.execute(session, ["drop", "wait"])) as items:
            assert (await anext(items))["text"] == "waiting"
            assert [o.command for o in world.server.operations.live()] == ["drop"]
        assert world.log[-1] == "cancelled"
        assert world.server.operations.live() == []

    asyncio.run(main())


def test_a_cancelled_reader_cancels_the_handler(session):
    async def main() -> None:
        world = World()
        reader = asyncio.create_task(world.run(session, "drop wait"))
        while "handle" not in world.log:
            await asyncio.sleep(0)
        reader.cancel()
        await asyncio.wait([reader])
        assert reader.cancelled()
        assert world.log[-1] == "cancelled"

    asyncio.run(main())


def test_a_command_that_survives_goes_on_without_a_reader(session):
    async def main() -> None:
        world = World(survives_disconnect=True)
        async with aclosing(world.server.execute(session, ["drop", "wait"])) as items:
            await anext(items)
        world.server.operations.end_session(session)
        (operation,) = world.server.operations.live()
        world.release.set()  # more items than may be pending: someone must read them
        await operation.task
        assert world.log[-1] == "finished"
        await world.server.close()

    asyncio.run(main())


def test_close_tells_readers_and_ends_survivors(session):
    async def main() -> None:
        world = World(survives_disconnect=True)
        async with aclosing(world.server.execute(session, ["drop", "wait"])) as items:
            await anext(items)
        reader = asyncio.create_task(world.run(session, "drop wait"))
        while world.log.count("handle") < 2:
            await asyncio.sleep(0)
        await world.server.close()
        items = await reader
        assert items[-2]["message"] == "cancelled: the server is stopping"
        assert items[-1]["exit_code"] == 4  # no connection: it may be tried again
        assert world.log.count("cancelled") == 2

    asyncio.run(main())


def test_a_session_has_a_bounded_number_of_commands_under_way(session):
    async def main() -> None:
        world = World()
        readers = [asyncio.create_task(world.run(session, "drop wait")) for _ in range(2)]
        while world.log.count("handle") < 2:
            await asyncio.sleep(0)
        items = await world.run(session, "drop")
        assert items[0]["code"] == "resource_exhausted"
        assert (await world.run(session, "ops"))[-1]["exit_code"] == 0
        other = dataclasses.replace(session, id="other")
        assert (await world.run(other, "drop"))[-1]["exit_code"] == 0
        world.server.operations.end_session(session)
        for reader in readers:
            assert (await reader)[-1]["exit_code"] == 130

    asyncio.run(main())


def test_items_stream_while_the_handler_works(session):
    async def main() -> None:
        world = World()
        async with aclosing(world.server.execute(session, ["drop", "wait"])) as items:
            assert (await anext(items))["text"] == "waiting"
            world.release.set()
            texts = [item["text"] async for item in items if item["type"] == "text"]
        assert texts == [str(number) for number in range(20)]

    asyncio.run(main())


def test_an_unexpected_error_of_the_authorizer_refuses(session):
    def broken(world):
        world.denied = RuntimeError("policy file")

    world, items = run(session, "drop", broken)
    assert world.log == [CHECK]
    assert items[0]["code"] == "internal"


def test_another_error_of_the_question_is_shown(session):
    async def ask(_args) -> str:
        raise InvalidArgumentError("no such thing")

    world, items = run(session, "drop", changes={"confirm": ask})
    assert items[-1]["exit_code"] == 2
    assert "handle" not in world.log


async def ops(server: AdminServer, session, *words: str) -> list[dict]:
    return [item async for item in server.execute(session, ["ops", *words])]


def test_a_command_that_lasts_tells_its_id_and_its_reply_is_kept(session, monkeypatch):
    monkeypatch.setattr("flplatform.hci.admin_server.LONG_S", 0.01)

    async def main() -> None:
        world = World()
        reply = world.server.execute(session, ["drop", "wait"])
        items = [await anext(reply), await anext(reply)]
        assert [item["type"] for item in items] == ["text", "operation"]
        monkeypatch.undo()  # what follows does not last
        op = items[1]["id"]
        world.release.set()
        items += [item async for item in reply]
        again = dataclasses.replace(session, id="after the reconnect")
        table, data, done = await ops(world.server, again)
        assert table["rows"] == [[op, "drop wait", "ended", table["rows"][0][3], 0, None]]
        assert data["value"][0]["op"] == op
        kept = await ops(world.server, again, op)
        assert [item["text"] for item in kept if item["type"] == "text"] == [
            *("waiting", *map(str, range(20))),
            "drop wait: ended with exit code 0",
        ]
        error, _ = await ops(world.server, dataclasses.replace(session, user="max"), "0" * 16)
        assert error["code"] == "not_found"
        error, done = [item async for item in world.server.execute(session, ["cancel", op])]
        assert error["message"] == "drop wait has ended"

    asyncio.run(main())


def test_the_result_of_a_command_without_a_reader_can_be_fetched(session):
    async def main() -> None:
        world = World(survives_disconnect=True)
        async with aclosing(world.server.execute(session, ["drop", "wait"])) as items:
            await anext(items)
        table, *_ = await ops(world.server, session)
        ((op, _, state, *_),) = table["rows"]
        assert state == "running"
        (operation,) = world.server.operations.live()
        world.release.set()
        await operation.task
        kept = await ops(world.server, session, op)
        assert kept[-3]["text"] == "drop wait: ended with exit code 0"
        assert kept[-1]["exit_code"] == 0
        await world.server.close()

    asyncio.run(main())


def test_the_operations_of_others_need_a_right(session):
    async def main() -> None:
        world = World(survives_disconnect=True)
        reader = asyncio.create_task(world.run(session, "drop wait"))
        while "handle" not in world.log:
            await asyncio.sleep(0)
        other = dataclasses.replace(session, user="max", id="other")
        text, *_ = await ops(world.server, other)
        assert text["text"] == "nothing is under way"
        table, *_ = await ops(world.server, other, "--all")
        ((op, *_, user),) = table["rows"]
        assert user == session.user
        world.denied = PermissionDeniedError("max may not ops", rule="role member")
        for words in (["ops", "--all"], ["ops", op], ["cancel", op]):
            error, done = [item async for item in world.server.execute(other, words)]
            assert (error["rule"], done["exit_code"]) == ("role member", 3)
        world.release.set()
        await reader

    asyncio.run(main())


def test_a_transient_reply_is_neither_announced_nor_kept(session, monkeypatch):
    monkeypatch.setattr("flplatform.hci.admin_server.LONG_S", 0.1)

    async def main() -> None:
        world = World(transient=True)
        reader = asyncio.create_task(world.run(session, "drop wait"))
        while "handle" not in world.log:
            await asyncio.sleep(0)
        await asyncio.sleep(0.2)
        (operation,) = world.server.operations.live()
        world.release.set()
        items = await reader
        assert {item["type"] for item in items} == {"text", "done"}
        assert not operation.items
        assert world.server.operations.listed() == []

    asyncio.run(main())


@pytest.mark.parametrize(("age_s", "wanted"), [(299, False), (301, True)])
def test_a_sensitive_command_wants_a_young_password_check(session, age_s, wanted):
    """After the question, and before anything is audited or done."""

    def prepare(world):
        register = CommandRegister([world])
        clock = lambda: session.proved + age_s  # noqa: E731
        world.server = AdminServer(register, world, world, reauthenticate_s=300, clock=clock)
        world.question = "sure?"

    changes = {"reauthenticate": True}
    world, items = run(session, "drop x", prepare, changes, confirmed=True)
    kinds = [item["type"] for item in items]
    assert kinds == (["reauthenticate"] if wanted else ["done"])
    assert ("handle" in world.log, bool(world.records)) == (not wanted, not wanted)
    _, items = run(session, "drop x", prepare, changes)
    assert items[-1]["type"] == "confirm"
    _, items = run(session, "drop x", prepare, confirmed=True)  # an ordinary command
    assert items[-1]["type"] == "done"


def test_the_audit_has_the_reference_under_which_others_know_the_command(session):
    world, _ = run(session, "drop x", reference="5" * 32)
    ((*_, details, _id),) = world.records
    assert details["order"] == "5" * 32
    assert world.seen.reference == "5" * 32
