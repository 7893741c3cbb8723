import asyncio
import io
import stat

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from flplatform.core.errors import UnavailableError
from flplatform.hci import prompt
from flplatform.hci.operations import Operations
from flplatform.hci.prompt import ShellCompleter, interact
from flplatform.hci.register import CommandRegister
from flplatform.hci.session_commands import SessionCommands
from flplatform.hci.shell import Shell

DONE = {"type": "done", "exit_code": 0, "ok": 0, "failed": 0, "seconds": 0.0}


class FakeTransport:
    def __init__(self) -> None:
        register = CommandRegister()
        register.add(SessionCommands(register, Operations()))
        self.views = register.views()
        self.calls: list[tuple[list[str], bool]] = []
        self.down = False
        self.question = ""
        self.slow = False
        self.refreshed = 0

    def specs(self):
        return self.views

    async def execute(self, argv, confirmed):
        self.calls.append((argv, confirmed))
        if self.down:
            self.down = False
            raise UnavailableError("the connection was lost")
        if self.question and not confirmed:
            yield {"type": "confirm", "question": self.question}
        else:
            yield DONE

    async def complete(self, kind, prefix):
        if self.slow:
            await asyncio.sleep(10)
        return ["6f1d", "77aa"]

    async def refresh(self) -> None:
        self.refreshed += 1

    def prompt(self) -> str:
        return "fl\x1b > "

    def toolbar(self) -> str:
        return "last\nevent"


class World:
    def __init__(self) -> None:
        self.transport = FakeTransport()
        self.out = io.StringIO()
        self.err = io.StringIO()
        self.shell = Shell(self.transport, out=self.out, err=self.err, env={})

    def type(self, *keys: str, **options) -> int:
        """Types keys; each further piece after a pause, for what the prompt does by and by."""

        async def main() -> int:
            with create_pipe_input() as pipe:
                pipe.send_text(keys[0])
                loop = asyncio.get_running_loop()
                for number, more in enumerate(keys[1:], 1):
                    loop.call_later(0.25 * number, pipe.send_text, more)
                return await interact(self.shell, input=pipe, output=DummyOutput(), **options)

        return asyncio.run(main())

    @property
    def commands(self) -> list[str]:
        return [" ".join(argv) for argv, _ in self.transport.calls]


@pytest.fixture
def world() -> World:
    return World()


def test_lines_are_commands_until_bye(world):
    assert world.type("whoami\rops\rbye\rwhoami\r") == 0
    assert world.commands == ["whoami", "ops"]
    assert world.transport.refreshed == 2, "the prompt shows what a command has changed"
    assert world.shell.asker is None


def test_ctrl_d_leaves_and_ctrl_c_clears_the_line(world):
    assert world.type("whoa\x03ops\r\x04") == 0
    assert world.commands == ["ops"]


def test_a_lost_connection_is_said_and_the_next_command_is_sent(world):
    world.transport.down = True
    world.type("whoami\rwhoami\r\x04")
    assert world.commands == ["whoami", "whoami"]
    assert world.err.getvalue() == "error: the connection was lost\n"


@pytest.mark.parametrize(("answer", "sent"), [("y\r", 2), ("\r", 1), ("\x03", 1), ("\x04", 1)])
def test_a_question_is_asked(world, answer, sent):
    world.transport.question = "sure?"
    world.type(f"whoami\r{answer}bye\r")
    assert world.commands == ["whoami"] * sent


def test_a_long_question_is_wrapped_at_words():
    assert prompt._wrapped("sure? [y/N] ", 80) == "  sure? [y/N] "
    drawn = prompt._wrapped("delete run 3: its number is not used again. Continue? [y/N] ", 40)
    assert drawn.split("\n") == [
        "  delete run 3: its number is not",
        "  used again. Continue? [y/N] ",
    ]


def test_tab_completes(world):
    world.type("who\t", "\r\x04")
    assert world.commands == ["whoami"]


def test_history_is_private_and_found_again(world, tmp_path):
    path = tmp_path / "history"
    path.write_text("\n# 2026-01-01 00:00:00\n+whoami\n")
    path.chmod(0o644)
    world.type("ops\r\x04", history=path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    world.type("\x1b[A\r", "\x12who\r\r\x04", history=path)  # up; Ctrl-R
    assert world.commands == ["ops", "ops", "whoami"]


def test_history_is_created_private_and_never_through_a_link(world, tmp_path):
    path = tmp_path / "history"
    world.type("\x04", history=path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(OSError, match="link"):
        world.type("\x04", history=link)


def completions(transport: FakeTransport, line: str) -> list:
    async def main() -> list:
        completer = ShellCompleter(transport)
        found = completer.get_completions_async(Document(line), CompleteEvent())
        return [completion async for completion in found]

    return asyncio.run(main())


def test_the_completer_offers_commands_and_values():
    transport = FakeTransport()
    (completion,) = completions(transport, "can")
    assert (completion.text, completion.start_position) == ("cancel ", -3)
    assert "cancels a command" in completion.display_meta_text
    assert [c.text for c in completions(transport, "cancel ")] == ["6f1d", "77aa"]
    assert list(ShellCompleter(transport).get_completions(Document(""), CompleteEvent())) == []


def test_a_slow_server_does_not_hold_up_typing(monkeypatch):
    monkeypatch.setattr(prompt, "_COMPLETION_S", 0.01)
    transport = FakeTransport()
    transport.slow = True
    assert completions(transport, "cancel ") == []
