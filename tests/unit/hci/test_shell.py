import asyncio
import dataclasses
import io
import json
import os
import signal
import threading
from dataclasses import dataclass

import pytest

from flplatform.core.errors import (
    FailedPreconditionError,
    NotFoundError,
    UnauthenticatedError,
    UnavailableError,
)
from flplatform.hci.operations import Operations
from flplatform.hci.register import CommandRegister
from flplatform.hci.session_commands import SessionCommands
from flplatform.hci.shell import Shell
from flplatform.hci.spec import CommandSpec, argument
from tests.support.replies import VALIDATOR


@dataclass(frozen=True)
class Args:
    what: str = argument(help="what", default="")


async def nothing(_connection, _args) -> None: ...


class Things:
    name = "things"
    summary = "for tests"

    def commands(self):
        look = CommandSpec("look", "looks", Args, nothing, "view", False, ("look",), aliases=("l",))
        return [
            look,
            dataclasses.replace(look, name="drop", mutating=True, examples=("drop",), aliases=()),
            dataclasses.replace(
                look, name="submit", local="submit", examples=("submit x",), aliases=()
            ),
        ]


DONE = {"type": "done", "exit_code": 0, "ok": 0, "failed": 0, "seconds": 0.0}


class FakeTransport:
    def __init__(self) -> None:
        register = CommandRegister([Things()])
        register.add(SessionCommands(register, Operations()))
        self.views = register.views()
        self.calls: list[tuple[list[str], bool]] = []
        self.replies: dict[str, list] = {}
        self.closed = 0

    def specs(self):
        return self.views

    async def execute(self, argv, confirmed):
        self.calls.append((argv, confirmed))
        try:
            for item in self.replies.get(" ".join(argv), [DONE]):
                if isinstance(item, Exception):
                    raise item
                if item == "hang":
                    await asyncio.Event().wait()
                elif item == "interrupt":
                    os.kill(os.getpid(), signal.SIGINT)
                    await asyncio.sleep(5)
                elif item["type"] != "confirm" or not confirmed:
                    yield item
        finally:
            self.closed += 1

    async def complete(self, kind, prefix):
        return ["one", "two"]

    async def refresh(self) -> None: ...

    def prompt(self) -> str:
        return "fl > "

    def toolbar(self) -> str:
        return "fine"


class World:
    def __init__(self, **options) -> None:
        self.transport = FakeTransport()
        self.out = io.StringIO()
        self.err = io.StringIO()
        options.setdefault("clock", lambda: 0.0)
        self.shell = Shell(self.transport, out=self.out, err=self.err, env={}, **options)

    def run(self, line: str) -> int:
        return asyncio.run(self.shell.run_command(line))

    def script(self, *lines: str, **options) -> int:
        return asyncio.run(self.shell.run_script(lines, **options))


def done(code: int) -> dict:
    return {**DONE, "exit_code": code}


def error(code: str, message: str) -> dict:
    return {"type": "error", "code": code, "message": message, "field": "", "hint": "", "rule": ""}


def test_a_command_goes_to_the_server_and_its_reply_is_shown():
    world = World()
    world.transport.replies["look 'a b'"] = []
    world.transport.replies["look a b"] = [
        {"type": "row", "target": "a", "status": "ok", "detail": "", "cells": {"x": 1}},
        DONE,
    ]
    assert world.run("look 'a b'") == 0
    assert world.transport.calls == [(["look", "a b"], False)]
    assert world.out.getvalue() == "TARGET  X\na       1\n1 ok    0.00 s\n"
    assert world.transport.closed == 1


def test_an_empty_line_does_nothing():
    world = World()
    assert world.run("  ") == 0
    assert world.transport.calls == []
    assert world.out.getvalue() == ""


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("loko", "unknown command 'loko'\n  did you mean look?"),
        ("look a b", "unexpected 'b'\n  usage: look [WHAT]"),
        ("look 'a", "does not end"),
        ("''", "unknown command ''"),
    ],
)
def test_usage_is_checked_without_the_server(line, text):
    world = World()
    assert world.run(line) == 2
    assert text in world.err.getvalue()
    assert world.transport.calls == []


@pytest.mark.parametrize("code", [0, 1, 3, 5])
def test_the_exit_code_is_the_servers(code):
    world = World()
    world.transport.replies["look"] = [done(code)]
    assert world.run("look") == code


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (UnavailableError("no connection"), 4),
        (UnauthenticatedError("signed out"), 3),
        (NotFoundError("gone"), 1),
        (OSError("disk full"), 1),
        (RuntimeError("a defect"), 1),
    ],
)
def test_what_goes_wrong_is_said_and_the_shell_goes_on(raised, code):
    world = World()
    world.transport.replies["look"] = [raised]
    assert world.run("look") == code
    assert str(raised) in world.err.getvalue()
    assert world.run("l") == 0


def test_a_reply_that_stops_short_is_a_lost_connection():
    world = World()
    world.transport.replies["look"] = [{"type": "text", "text": "x"}]
    assert world.run("look") == 4
    assert "before it was complete" in world.err.getvalue()


def test_timeout_ends_a_reply_that_stalls():
    world = World()
    world.transport.replies["look"] = ["hang"]
    assert world.script("timeout 0.02", "look") == 124
    assert "no reply for 0.02 s" in world.err.getvalue()
    assert world.transport.closed == 1
    assert world.run("timeout 0") == 0
    assert world.shell.timeout_s is None


def test_a_question_needs_yes_without_a_terminal():
    world = World()
    world.transport.replies["drop"] = [{"type": "confirm", "question": "drop all?"}, DONE]
    assert world.run("drop") == 2
    assert "not confirmed: drop all?\n  answer it in advance with --yes" in world.err.getvalue()
    assert world.transport.calls == [(["drop"], False)]


def test_yes_is_sent_with_the_command():
    world = World(assume_yes=True)
    world.transport.replies["drop"] = [{"type": "confirm", "question": "drop all?"}, DONE]
    assert world.run("drop") == 0
    assert world.transport.calls == [(["drop"], False), (["drop"], True)]


def asked(world: World, answer: object, line: str = "drop") -> tuple[int, list[str]]:
    questions = []

    async def asker(question: str, hidden: bool) -> str:
        questions.append(question)
        if isinstance(answer, type):
            raise answer
        return answer

    world.shell.asker = asker
    world.transport.replies["drop"] = [{"type": "confirm", "question": "drop\x1b all?"}, DONE]
    return world.run(line), questions


@pytest.mark.parametrize(
    ("answer", "code", "sent"), [("y", 0, 2), ("YES ", 0, 2), ("", 130, 1), ("no", 130, 1)]
)
def test_a_question_is_asked_at_a_terminal(answer, code, sent):
    world = World()
    assert asked(world, answer) == (code, ["drop\\x1b all? [y/N] "])
    assert len(world.transport.calls) == sent
    assert ("nothing was done" in world.out.getvalue()) == (sent == 1)


@pytest.mark.parametrize("key", [KeyboardInterrupt, EOFError])
def test_leaving_a_question_interrupts_the_command(key):
    world = World()
    assert asked(world, key)[0] == 130
    assert world.out.getvalue() == "interrupted\n"


def test_a_server_that_asks_for_ever_is_not_answered_for_ever():
    world = World(assume_yes=True)

    async def execute(argv, confirmed):
        world.transport.calls.append(confirmed)
        yield {"type": "confirm", "question": "again?"}

    world.transport.execute = execute
    assert world.run("drop") == 130
    assert world.transport.calls == [False, True]


def test_the_console_remembers_what_it_is_told():
    world = World()
    world.transport.replies["look"] = [{"type": "session", "key": "current", "value": 7}, DONE]
    world.run("look")
    assert world.shell.remembered == {"current": 7}
    assert world.out.getvalue() == ""


def test_ctrl_c_ends_the_command_and_not_the_shell():
    before = signal.getsignal(signal.SIGINT)
    world = World()
    world.transport.replies["look"] = ["interrupt"]
    assert world.run("look") == 130
    assert world.out.getvalue() == "interrupted\n"
    assert world.transport.closed == 1
    assert world.run("l") == 0
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_still_works_after_a_question():
    world = World()

    async def submit(argv, shell) -> int:
        assert await shell.ask("name?", hidden=True) == "amy"
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(5)
        return 0

    async def asker(question: str, hidden: bool) -> str:
        assert hidden
        asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)
        return "amy"

    world.shell._actions["submit"] = submit
    world.shell.asker = asker
    assert world.run("submit x") == 130


def test_a_cancelled_shell_is_not_an_interrupted_command():
    world = World()
    world.transport.replies["look"] = ["hang"]

    async def main() -> None:
        task = asyncio.create_task(world.shell.run_command("look"))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert world.transport.closed == 1

    asyncio.run(main())


def test_commands_run_in_any_thread():
    world = World()
    codes = []
    thread = threading.Thread(target=lambda: codes.append(world.run("look")))
    thread.start()
    thread.join()
    assert codes == [0]


def test_a_local_action_does_its_part_here_and_shows_items():
    async def submit(argv, shell) -> int:
        assert shell.parse(argv) == {"what": "x"}
        shell.show({"type": "text", "text": "plan"})
        if not await shell.confirm("sure?"):
            return 1
        return await shell.remote(["look"])

    world = World(actions={"submit": submit}, assume_yes=True)
    world.transport.replies["look"] = [{"type": "text", "text": "done"}, done(5)]
    assert world.run("submit x") == 5
    assert world.out.getvalue() == "plan\ndone\n"


def test_errors_of_a_local_action_are_shown():
    async def submit(argv, shell) -> int:
        raise FailedPreconditionError("no such folder")

    world = World(actions={"submit": submit})
    assert world.run("submit x") == 1
    assert "no such folder" in world.err.getvalue()
    assert world.run("submit a b") == 2


def test_an_action_that_this_console_does_not_have():
    world = World()
    assert world.run("submit x") == 1
    assert "does not know how to do 'submit'" in world.err.getvalue()


def test_ask_without_a_terminal():
    async def submit(argv, shell) -> int:
        await shell.ask("name?")
        return 0

    world = World(actions={"submit": submit})
    assert world.run("submit x") == 2


def test_help_needs_no_server():
    world = World()
    assert world.run("help") == 0
    assert world.out.getvalue().startswith("things\n  look, l          looks\n")
    assert world.run("? l") == 0
    assert "look [WHAT]" in world.out.getvalue()
    assert world.run("help loko") == 2
    assert world.transport.calls == []


def test_watch_repeats():
    world = World()
    world.transport.replies["look a"] = [{"type": "text", "text": "seen"}, done(1)]
    assert world.run("watch --every 0.1 --times 2 look a") == 1
    heading, seen, *again = world.out.getvalue().splitlines()
    assert heading.startswith("── ")
    assert heading.endswith("  look a")
    assert (seen, again[1]) == ("seen", "seen")


def test_watch_ends_with_ctrl_c():
    world = World()
    world.transport.replies["look"] = ["interrupt"]
    assert world.run("watch look") == 0
    assert len(world.transport.calls) == 1


@pytest.mark.parametrize("command", ["drop", "bye", "watch look", "loko"])
def test_watch_refuses(command):
    world = World()
    assert world.run(f"watch {command}") == 2
    assert world.transport.calls == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_an_interrupted_progress_bar_gives_the_cursor_back():
    out = Terminal()
    transport = FakeTransport()
    progress = {"type": "progress", "label": "up", "done": 1, "total": 2, "unit": "B"}
    transport.replies["look"] = [progress, "interrupt"]
    shell = Shell(transport, out=out, err=io.StringIO(), env={"COLUMNS": "80"})
    assert asyncio.run(shell.run_command("look")) == 130
    assert out.getvalue().rfind("\x1b[?25h") > out.getvalue().rfind("\x1b[?25l") >= 0


def test_watch_draws_in_place_and_leaves_the_last_look():
    transport, out = FakeTransport(), Terminal()
    transport.replies["look a"] = [{"type": "text", "text": "seen"}, error("internal", "bad"), DONE]
    shell = Shell(transport, out=out, err=io.StringIO(), env={"COLUMNS": "80"})
    asyncio.run(shell.run_command("watch --times 2 --every 0.1 look a"))
    drawn = out.getvalue()
    assert drawn.count("\x1b[?1049h") == drawn.count("\x1b[?1049l") == 1
    assert drawn.count("\x1b[H") == 2
    assert "\x1b[2J" not in drawn, "clearing first is what flickers"
    assert "every 0.1 s: look a" in drawn
    after = drawn.partition("\x1b[?1049l")[2]
    assert after.startswith("  seen\n")
    assert "error: bad" in after


def test_a_reply_goes_into_a_private_file(tmp_path):
    world = World()
    path = tmp_path / "reply"
    world.transport.replies["look a"] = [{"type": "text", "text": "seen"}, DONE]
    assert world.run(f"look a > {path}") == 0
    assert world.run(f"look a >>{path}") == 0
    assert path.read_text() == "seen\nseen\n"
    assert path.stat().st_mode & 0o777 == 0o600
    assert world.run(f"look a >{path}") == 0
    assert path.read_text() == "seen\n"
    assert world.out.getvalue() == ""
    assert world.run(f"look '>' {path}") == 2, "a quoted > is a word"


@pytest.mark.parametrize(
    ("line", "code", "text"),
    [
        ("look >", 2, "error: one file follows >\n"),
        ("look > a b", 2, "error: one file follows >\n"),
        ("look > /no/where", 1, "error: /no/where: no such file or directory\n"),
    ],
)
def test_a_file_that_cannot_be_written(line, code, text):
    world = World()
    assert world.run(line) == code
    assert world.err.getvalue().startswith(text)
    assert world.transport.calls == []


def test_a_script_stops_at_the_first_failure():
    world = World()
    world.transport.replies["drop"] = [done(3)]
    assert world.script("# comment\n", "\n", "look\n", "drop\n", "look x\n") == 3
    assert [argv for argv, _ in world.transport.calls] == [["look"], ["drop"]]
    assert world.err.getvalue() == "stopped at line 4: drop\n"


def test_a_line_alone_is_not_said_to_stop():
    world = World()
    assert world.script("loko") == 2
    assert "stopped" not in world.err.getvalue()


def test_a_script_may_keep_going():
    world = World()
    world.transport.replies["drop"] = [done(3)]
    world.transport.replies["look"] = [done(1)]
    assert world.script("drop", "look", "look x", keep_going=True) == 3
    assert len(world.transport.calls) == 3


def test_an_interrupt_ends_a_script_that_keeps_going():
    world = World()
    world.transport.replies["look"] = ["interrupt"]
    assert world.script("look", "drop", keep_going=True) == 130
    assert len(world.transport.calls) == 1


def test_bye_ends_a_script():
    world = World()
    assert world.script("look", "bye", "drop") == 0
    assert len(world.transport.calls) == 1


def test_json_for_one_command():
    world = World()
    assert world.script("look --json", "look") == 0
    line, rest = world.out.getvalue().split("\n", 1)
    assert (json.loads(line)["command"], rest) == ("look", "")
    assert world.transport.calls == [(["look"], False)] * 2


def test_json_mode_is_one_object_per_command():
    world = World(as_json=True)
    world.transport.replies["look"] = [{"type": "data", "name": "n", "value": 3}, DONE]
    world.transport.replies["drop"] = [error("internal", "bad"), done(1)]
    assert world.script("look", "drop", "loko", "help look", keep_going=True) == 1
    objects = [json.loads(line) for line in world.out.getvalue().splitlines()]
    assert [o["command"] for o in objects] == ["look", "drop", "loko", "help look"]
    assert [o["exit_code"] for o in objects] == [0, 1, 2, 0]
    for each in objects:
        VALIDATOR.validate(each)
    assert objects[0]["data"] == {"n": 3}
    assert objects[1]["errors"][0]["message"] == "bad"
    assert objects[2]["errors"][0]["hint"] == "did you mean look?"
    assert world.err.getvalue() == ""


def test_the_password_is_given_once_and_the_command_repeated():
    world = World()
    wanted = {"type": "reauthenticate"}
    replies = iter([[wanted], [wanted], [DONE]])
    proofs: list[str] = []

    async def execute(argv, confirmed):
        world.transport.calls.append((argv, confirmed))
        for item in next(replies):
            yield item

    async def prover(shell):
        proofs.append("given")

    world.transport.execute = execute
    world.shell.prover = prover
    assert world.run("drop x") == 3  # it was given, and is asked for again
    assert proofs == ["given"]
    assert world.transport.calls == [(["drop", "x"], False)] * 2


def test_a_console_that_cannot_prove_anything_is_refused():
    world = World()
    world.transport.replies["drop x"] = [{"type": "reauthenticate"}]
    assert world.run("drop x") == 3
    assert "wants the password" in world.err.getvalue()


def test_after_the_password_the_command_is_carried_out():
    world = World()
    replies = iter([[{"type": "reauthenticate"}], [DONE]])

    async def execute(argv, confirmed):
        for item in next(replies):
            yield item

    async def prover(shell):
        shell.show({"type": "text", "text": "proved"})

    world.transport.execute = execute
    world.shell.prover = prover
    assert world.run("drop x") == 0
    assert "proved" in world.out.getvalue()


def test_the_time_of_a_command_is_without_that_of_its_answers():
    now = 0.0
    world = World(clock=lambda: now)
    row = {"type": "row", "target": "a", "status": "ok", "cells": {}}

    async def asker(question: str, hidden: bool) -> str:
        nonlocal now
        now += 30.0
        return "y"

    async def drop(argv, shell) -> int:
        nonlocal now
        assert await shell.confirm("drop all?")
        now += 2.0
        shell.show(row)
        return 0

    world.shell.asker = asker
    world.shell._actions["submit"] = drop
    for _ in range(2):
        assert world.run("submit x") == 0
    assert world.out.getvalue().count("2.00 s") == 2
