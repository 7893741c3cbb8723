"""The prompt: history, completion, the toolbar, and questions, for a person at a terminal."""

import asyncio
import os
from collections.abc import AsyncGenerator, Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.output import Output

from flplatform.hci.completion import complete
from flplatform.hci.connection import ExitCode
from flplatform.hci.escape import escape
from flplatform.hci.layout import paragraph
from flplatform.hci.shell import Shell
from flplatform.hci.transport import Transport

_STATUS_S = 1.0  # the prompt must not wait long for a slow server
_ANSWER = 5  # columns for a yes or no, and for the blank before it
_COMPLETION_S = 2.0  # a slow server must not hold up typing


async def interact(
    shell: Shell,
    *,
    history: Path | None = None,
    input: Input | None = None,
    output: Output | None = None,
) -> int:
    """Prompts for commands until `bye` or Ctrl-D; Ctrl-C clears the line.

    Args:
        shell: carries the lines out; its questions are asked here meanwhile.
        history: file of what was typed, made private to the user; None keeps none.
        input: where keys come from; default the terminal.
        output: where the prompt is drawn; default the terminal.

    Raises:
        OSError: the history file cannot be opened.
    """
    session: PromptSession[str] = PromptSession(
        history=_history(history),
        auto_suggest=AutoSuggestFromHistory(),
        completer=ShellCompleter(shell.transport),
        complete_while_typing=False,
        bottom_toolbar=lambda: escape(shell.transport.toolbar()),
        refresh_interval=1.0,
        input=input,
        output=output,
    )

    async def ask(question: str, hidden: bool) -> str:
        asking: PromptSession[str] = PromptSession(input=input, output=output)
        columns = asking.output.get_size().columns
        return await asking.prompt_async(_wrapped(question, columns), is_password=hidden)

    shell.asker = ask
    shell.leaving = False
    try:
        while not shell.leaving:
            try:
                line = await session.prompt_async(lambda: escape(shell.transport.prompt()))
            except KeyboardInterrupt:
                continue
            await shell.run_command(line)
            if line.strip() and not shell.leaving:
                await _refresh(shell.transport)
    except EOFError:
        pass
    finally:
        shell.asker = None
    return ExitCode.OK


def _wrapped(question: str, columns: int) -> str:
    """A question, indented and wrapped at words; a short answer fits behind it."""
    text = question.rstrip(" ")
    lines = [paragraph(f"  {line}", columns - _ANSWER) for line in text.split("\n")]
    return "\n".join(lines) + question[len(text) :]


async def _refresh(transport: Transport) -> None:
    """Has the prompt show what the last command has changed, if that is known at once."""
    try:
        async with asyncio.timeout(_STATUS_S):
            await transport.refresh()
    except TimeoutError:
        pass


class ShellCompleter(Completer):
    """Completes commands for prompt_toolkit.

    Args:
        transport: knows the commands and asks for values that change.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def get_completions(self, _: Document, __: CompleteEvent) -> Iterable[Completion]:
        """Nothing: completion may ask the server and so is only asynchronous."""
        return ()

    async def get_completions_async(
        self, document: Document, _: CompleteEvent
    ) -> AsyncGenerator[Completion, None]:
        """The ways to go on from the cursor."""
        candidates = await complete(
            document.text_before_cursor, self._transport.specs(), self._dynamic
        )
        for candidate in candidates:
            ends = len(candidates) == 1 and not candidate.text.endswith(("/", "'/"))
            yield Completion(
                candidate.text + " " * ends,  # as in a shell: the only one is a whole word
                start_position=-candidate.replaces,
                display=escape(candidate.shown),
                display_meta=escape(candidate.about),
            )

    async def _dynamic(self, kind: str, prefix: str) -> list[str]:
        try:
            async with asyncio.timeout(_COMPLETION_S):
                return await self._transport.complete(kind, prefix)
        except TimeoutError:
            return []


def _history(path: Path | None) -> History:
    if path is None:
        return InMemoryHistory()
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o600)
    os.fchmod(descriptor, 0o600)
    os.close(descriptor)
    return FileHistory(str(path))
