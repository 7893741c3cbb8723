"""The console's shell: carries out one line after another, wherever the lines come from.

The prompt for a person is in `prompt`; what is here needs no terminal.
"""

import asyncio
import logging
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import (
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeAlias

from flplatform.core.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    FLError,
    InternalError,
    InvalidArgumentError,
    UnauthenticatedError,
    UnavailableError,
)
from flplatform.hci.connection import ExitCode, Item, error_item, exit_code_of
from flplatform.hci.escape import escape, escape_lines
from flplatform.hci.files import file_problem, private_file
from flplatform.hci.grammar import parse_words, redirection, tokenise, wants_json
from flplatform.hci.register import unknown_command
from flplatform.hci.render import JsonRenderer, Renderer, TextRenderer
from flplatform.hci.screen import Screen, Sheet, now
from flplatform.hci.transport import Transport
from flplatform.hci.view import SpecView, help_page, overview

logger = logging.getLogger(__name__)


Asker: TypeAlias = Callable[[str, bool], Awaitable[str]]
"""(question, whether the answer is hidden) -> answer."""

LocalAction: TypeAlias = Callable[[list[str], "Shell"], Awaitable[int]]
"""(words with the command's name, shell) -> exit code; it shows what it has by `Shell.show`."""


Prover: TypeAlias = Callable[["Shell"], Awaitable[None]]
"""Proves once more who is at the console; raises FLError if that fails."""


class Shell:
    """Carries out command lines and shows the replies.

    Args:
        transport: the way to the server.
        out: where replies go; default standard output.
        err: where errors go; default standard error.
        actions: the closed table of what this console does itself, by `SpecView.local`.
        as_json: one JSON object per command instead of text.
        assume_yes: answers every question of a command with yes.
        clock: monotonic seconds.
        env: for colour and width.

    Attributes:
        transport: as given.
        remembered: what commands told the console to remember.
        timeout_s: longest wait for the next part of a reply; None for no limit.
        asker: asks the user; None when there is no one to ask.
        prover: gives the server the password once more; None when that cannot be done.
        leaving: whether `bye` was said.
        interrupted: whether Ctrl-C ended the command in hand.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        out: TextIO | None = None,
        err: TextIO | None = None,
        actions: Mapping[str, LocalAction] | None = None,
        as_json: bool = False,
        assume_yes: bool = False,
        clock: Callable[[], float] = time.monotonic,
        env: Mapping[str, str] = os.environ,
    ) -> None:
        self.transport = transport
        self.remembered: dict[str, Any] = {}
        self.timeout_s: float | None = None
        self.asker: Asker | None = None
        self.prover: Prover | None = None
        self.leaving = False
        self.interrupted = False
        self._live = True  # whether progress may be drawn
        self._out = out or sys.stdout
        self._err = err or sys.stderr
        self._env = env
        self._actions = {**_BUILT_IN, **(actions or {})}
        self._as_json = as_json
        self._assume_yes = assume_yes
        self._clock = clock
        self._renderer = self._new_renderer("")
        self._asked_s = 0.0  # how long the command in hand has waited for answers
        self._task: asyncio.Task[int] | None = None  # the command that Ctrl-C interrupts

    async def run_script(self, lines: Iterable[str], *, keep_going: bool = False) -> int:
        """Runs lines; empty ones and those that begin with `#` are skipped.

        Args:
            lines: the script.
            keep_going: go on after a failure.

        Returns:
            The exit code of the first line that failed, or 0.
        """
        first = 0
        self.leaving = False
        for number, line in enumerate(lines, 1):
            if line.lstrip().startswith("#"):
                continue
            code = await self.run_command(line)
            if code and not first:
                first = code
            if code and (not keep_going or code == ExitCode.INTERRUPTED):
                if isinstance(lines, Sequence) and number == len(lines):
                    break  # nothing is left out
                print(f"stopped at line {number}: {escape(line.strip())}", file=self._err)
                break
            if self.leaving:
                break
        return first

    async def run_command(self, line: str) -> int:
        """Runs one line, shows its reply, and returns its exit code; Ctrl-C interrupts it."""
        if not line.strip():
            return ExitCode.OK
        try:
            command, path, append = redirection(line)
            command, as_json = wants_json(command)
            if not path:
                return await self._show_reply(command, as_json)
            file = private_file(Path(path).expanduser(), append)
            with file, self._drawing_on(file):
                code = await self._show_reply(command, as_json)
            if self.terminal is not None:
                print(f"  written to {escape(path)}", file=self._out)
            return code
        except FLError as error:
            return self._failed(error)
        except OSError as error:
            return self._failed(FailedPreconditionError(file_problem(error)))

    async def _show_reply(self, line: str, as_json: bool) -> int:
        before, self._renderer = self._renderer, self._new_renderer(line.strip(), as_json)
        started, before_s = self._clock(), self._asked_s
        self._asked_s = 0.0
        try:
            code = await self._until_interrupted(self._run(line))
            self._renderer.finish(code, self._clock() - started - self._asked_s)
        finally:
            self._renderer.flush()  # if interrupted, a progress bar gives the cursor back
            self._renderer, self._asked_s = before, self._asked_s + before_s
        return code

    def _failed(self, error: FLError) -> int:
        """Shows an error of a line that could not even begin."""
        renderer = self._new_renderer("")
        renderer.show(error_item(error))
        code = _exit_code(error)
        renderer.finish(code, 0.0)
        return code

    def parse(self, argv: list[str]) -> dict[str, Any]:
        """The arguments of a command line: {name: value}, defaults included.

        Raises:
            InvalidArgumentError: there is no such command, or the words do not fit it.
        """
        return parse_words(argv[1:], self.view(argv[0]))

    def view(self, name: str) -> SpecView:
        """The view of a command by name or alias.

        Raises:
            InvalidArgumentError: there is no such command.
        """
        views = {key: v for v in self.transport.specs() for key in (v.name, *v.aliases)}
        if name not in views:
            raise unknown_command(name, views)
        return views[name]

    async def remote(
        self, argv: list[str], *, confirmed: bool = False, proved: bool = False
    ) -> int:
        """Has the server carry out a command, shows the reply, and returns the exit code.

        Args:
            argv: the words.
            confirmed: whether the user has said yes to the command's question.
            proved: whether the password was given for this command already.

        Raises:
            DeadlineExceededError: the next part of the reply took longer than `timeout_s`.
            UnavailableError: the connection was lost.
            FLError: the server refused the call as such.
        """
        question: str | None = None
        wanted = False  # the password
        async with aclosing(self.transport.execute(argv, confirmed)) as reply:
            while question is None and not wanted:
                try:
                    async with asyncio.timeout(self.timeout_s):
                        item = await anext(reply, None)
                except TimeoutError as error:
                    raise DeadlineExceededError(f"no reply for {self.timeout_s:g} s") from error
                match item:
                    case None:
                        raise UnavailableError("the reply ended before it was complete")
                    case {"type": "done", "exit_code": int(code)}:
                        return code
                    case {"type": "confirm", "question": str(asked)}:
                        question = asked
                    case {"type": "reauthenticate"}:
                        wanted = True
                    case {"type": "session", "key": str(key), "value": value}:
                        self.remembered[key] = value
                    case _:
                        self.show(item)
        if wanted:
            if proved or self.prover is None:
                raise UnauthenticatedError("the server wants the password once more")
            await self.prover(self)
            return await self.remote(argv, confirmed=confirmed, proved=True)
        assert question is not None
        if not confirmed and await self.confirm(question):
            return await self.remote(argv, confirmed=True, proved=proved)
        self.show({"type": "text", "text": "nothing was done"})
        return ExitCode.INTERRUPTED

    def show(self, item: Item) -> None:
        """Shows a reply item; for local actions."""
        self._renderer.show(item)

    async def confirm(self, question: str) -> bool:
        """Asks a yes-or-no question; anything but `y` or `yes` is a no.

        Raises:
            InvalidArgumentError: there is no one to ask, and `assume_yes` is not set.
        """
        if self._assume_yes:
            return True
        if self.asker is None:
            raise InvalidArgumentError(
                f"not confirmed: {question}", hint="answer it in advance with --yes"
            )
        answer = await self.ask(f"{question} [y/N] ")
        return answer.strip().lower() in ("y", "yes")

    async def ask(self, question: str, *, hidden: bool = False) -> str:
        """Asks the user for a line; Ctrl-C and Ctrl-D there interrupt the command.

        Args:
            question: the prompt.
            hidden: whether the answer is a secret.

        Raises:
            InvalidArgumentError: there is no one to ask.
        """
        if self.asker is None:
            raise InvalidArgumentError("this needs an answer typed at a terminal")
        self._renderer.flush()
        asked = self._clock()
        try:
            return await self.asker(escape_lines(question), hidden)
        except (KeyboardInterrupt, EOFError):
            raise asyncio.CancelledError from None
        finally:
            self._asked_s += self._clock() - asked
            self._listen()  # the prompt took Ctrl-C for itself

    @property
    def terminal(self) -> TextIO | None:
        """Where replies go if that is a terminal that can be drawn on, else None."""
        dumb = self._env.get("TERM") in ("dumb", "unknown")
        return self._out if self._out.isatty() and not self._as_json and not dumb else None

    @property
    def out(self) -> TextIO | None:
        """Where replies go as text, None for JSON."""
        return None if self._as_json else self._out

    async def draw(self, line: str, sheet: Sheet, *, width: int | None = None) -> int:
        """As `run_command`, but the reply, errors too, goes to a sheet of this width."""
        before = self._env
        if width is not None:
            self._env = {**before, "COLUMNS": str(max(width, 20))}
        try:
            with self._drawing_on(sheet, sheet):
                return await self.run_command(line)
        finally:
            self._env = before

    @contextmanager
    def _drawing_on(self, out: TextIO, err: TextIO | None = None) -> Iterator[None]:
        before = self._out, self._err, self._live
        self._out, self._err, self._live = out, err or self._err, self._live and err is None
        try:
            yield
        finally:
            self._out, self._err, self._live = before

    async def _run(self, line: str) -> int:
        """Carries out a line; an error is shown and becomes the exit code."""
        try:
            return await self._dispatch(tokenise(line))
        except FLError as error:
            self.show(error_item(error))
            return _exit_code(error)
        except OSError as error:  # of a local action: a file, a disk
            self.show(error_item(FailedPreconditionError(file_problem(error))))
            return ExitCode.FAILED
        except Exception as error:
            logger.exception("the console failed in %r", line)
            self.show(error_item(InternalError(f"{type(error).__name__}: {error}")))
            return ExitCode.FAILED

    async def _dispatch(self, argv: list[str]) -> int:
        view = self.view(argv[0])
        parse_words(argv[1:], view)
        if not view.local:
            return await self.remote(argv)
        if view.local not in self._actions:
            raise FailedPreconditionError(
                f"this console does not know how to do {view.local!r}", hint="install a newer one"
            )
        return await self._actions[view.local](argv, self)

    async def _until_interrupted(self, work: Coroutine[Any, Any, int]) -> int:
        """Awaits work as a task of its own, which Ctrl-C cancels."""
        if self._task is not None:  # a command within a command
            return await work
        self.interrupted = False
        before = signal.getsignal(signal.SIGINT)
        self._task = task = asyncio.ensure_future(work)
        try:
            self._listen()
            return await task
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if caller is not None and caller.cancelling():
                raise
            self.show({"type": "text", "text": "interrupted"})
            return ExitCode.INTERRUPTED
        finally:
            self._task = None
            if _is_main_thread():
                asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)
                signal.signal(signal.SIGINT, before or signal.default_int_handler)

    def _listen(self) -> None:
        """Lets Ctrl-C cancel the command; only a main thread can."""
        if self._task is not None and _is_main_thread():
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGINT, self._interrupt)

    def _interrupt(self) -> None:
        if self._task is not None:
            self.interrupted = True
            self._task.cancel()

    def _new_renderer(self, line: str, as_json: bool = False) -> Renderer:
        if self._as_json or as_json:
            return JsonRenderer(self._out, line)
        return TextRenderer(self._out, self._err, self._env, live=self._live)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _exit_code(error: FLError) -> int:
    match error:
        case UnavailableError():
            return ExitCode.NO_CONNECTION
        case DeadlineExceededError():
            return ExitCode.TIMEOUT
        case UnauthenticatedError():
            return ExitCode.REFUSED
        case _:
            return exit_code_of(error)


async def _help(argv: list[str], shell: Shell) -> int:
    name = shell.parse(argv)["command"]
    if name:
        shell.show({"type": "text", "text": help_page(shell.view(name))})
        return ExitCode.OK
    views = shell.transport.specs()
    shell.show({"type": "text", "text": overview(views)})
    shell.show({"type": "data", "name": "commands", "value": [view.to_dict() for view in views]})
    return ExitCode.OK


async def _bye(_: list[str], shell: Shell) -> int:
    shell.leaving = True
    return ExitCode.OK


async def _timeout(argv: list[str], shell: Shell) -> int:
    shell.timeout_s = shell.parse(argv)["seconds"] or None
    return ExitCode.OK


async def _watch(argv: list[str], shell: Shell) -> int:
    """Repeats a command; Ctrl-C is how it is meant to end, and so no failure."""
    values = shell.parse(argv)
    view = shell.view(values["command"][0])
    if view.mutating or view.local in _NOT_WATCHED:
        raise InvalidArgumentError(f"{view.name} cannot be watched")
    line = shlex.join(values["command"])
    shell.parse(values["command"])  # a usage error is said once, and here
    try:
        if shell.terminal is None:
            return await _repeat(shell, line, values["every"], values["times"], None)
        with Screen(shell.terminal) as screen:
            return await _repeat(shell, line, values["every"], values["times"], screen)
    except asyncio.CancelledError:
        if shell.interrupted:
            return ExitCode.OK
        raise


async def _repeat(
    shell: Shell, line: str, every_s: float, times: int, screen: Screen | None
) -> int:
    looks = 0
    while True:
        if screen is not None:
            sheet = Sheet()
            code = await shell.draw(line, sheet)
            left = f"every {every_s:g} s: {escape(line)}   (Ctrl-C ends)"
            screen.draw(left, now(), sheet.getvalue())
        else:
            if shell.out is not None:
                print(f"── {now()}  {escape(line)}", file=shell.out, flush=True)
            code = await shell.run_command(line)
        looks += 1
        if looks == times or code == ExitCode.USAGE:
            return code
        await asyncio.sleep(every_s)


_NOT_WATCHED = frozenset({"help", "bye", "timeout", "watch", "wait", "dashboard"})
"""Local actions that are no single look."""

_BUILT_IN: Mapping[str, LocalAction] = {
    "help": _help,
    "bye": _bye,
    "timeout": _timeout,
    "watch": _watch,
}
