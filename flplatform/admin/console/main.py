"""`fl_admin`: the console of one kit."""

import asyncio
import os
import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from flplatform.admin.console.actions import actions
from flplatform.admin.console.exchange import prove
from flplatform.admin.console.transport import Credentials, GrpcTransport
from flplatform.core.errors import (
    ConfigError,
    FLError,
    InvalidArgumentError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)
from flplatform.files.durable import check_private, private_dir
from flplatform.hci.connection import ExitCode
from flplatform.hci.escape import escape_lines
from flplatform.hci.files import file_problem
from flplatform.hci.shell import Shell
from flplatform.security.kit import Kit

PASSWORD_FILE = "FLP_PASSWORD_FILE"  # noqa: S105 - the name of a variable
HISTORY = "history"
ATTEMPTS = 3
"""How often a passphrase may be mistyped."""

app = typer.Typer(
    name="fl_admin",
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line."""

    kit: Path
    lines: tuple[str, ...]
    script: Path | None
    as_json: bool
    assume_yes: bool
    password_file: Path | None
    keep_going: bool

    @property
    def interactive(self) -> bool:
        """Whether a person types commands."""
        return not self.lines and self.script is None and sys.stdin.isatty()


@app.command()
def fl_admin(
    kit: Annotated[Path, typer.Argument(help="The folder of an admin's kit.")] = Path(),
    command: Annotated[
        list[str] | None, typer.Option("-c", metavar="LINE", help="Run this line; repeatable.")
    ] = None,
    script: Annotated[Path | None, typer.Option(help="Run the lines of this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per command.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Answer questions with yes.")] = False,
    password_file: Annotated[
        Path | None, typer.Option(envvar=PASSWORD_FILE, help="Holds the passphrase.")
    ] = None,
    keep_going: Annotated[bool, typer.Option(help="Go on after a line that failed.")] = False,
) -> None:
    """Operate a federation; without lines, at a prompt.

    Exit codes: 0 ok, 1 a target failed, 2 usage, 3 refused,
    4 no connection, 5 run failed or aborted, 124 timeout, 130 interrupted.
    """
    options = Options(kit, tuple(command or ()), script, as_json, yes, password_file, keep_going)
    try:
        code = asyncio.run(_run(options))
    except FLError as error:
        typer.echo(escape_lines(f"error: {error}"), err=True)
        code = _exit_code(error)
    except OSError as error:
        typer.echo(escape_lines(f"error: {file_problem(error)}"), err=True)
        code = ExitCode.FAILED
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED
    raise typer.Exit(int(code))


def _exit_code(error: FLError) -> ExitCode:
    match error:
        case InvalidArgumentError():
            return ExitCode.USAGE
        case PermissionDeniedError() | UnauthenticatedError():
            return ExitCode.REFUSED
        case UnavailableError():
            return ExitCode.NO_CONNECTION
        case _:
            return ExitCode.FAILED


async def _run(options: Options) -> int:
    os.umask(0o077)
    kit = Kit.open(options.kit)
    transport = GrpcTransport(await _credentials(kit, options))
    transport.unattended = options.password_file is not None
    try:
        await transport.connect()
        shell = Shell(
            transport,
            actions=actions(transport),
            as_json=options.as_json,
            assume_yes=options.assume_yes,
        )
        shell.prover = partial(prove, transport)
        transport.current_run = lambda: shell.remembered.get("run")
        if options.interactive:
            return await _interact(shell, transport)
        if sys.stdin.isatty():
            shell.asker = _ask
        return await shell.run_script(_lines(options), keep_going=options.keep_going)
    finally:
        await transport.close()


def _lines(options: Options) -> Iterable[str]:
    if options.lines:
        return options.lines
    if options.script is not None:
        try:
            return options.script.read_text().splitlines()
        except OSError as error:
            raise InvalidArgumentError(file_problem(error), field="--script") from None
    return sys.stdin


async def _credentials(kit: Kit, options: Options) -> Credentials:
    """Open the kit with a passphrase from a file or from the user.

    Raises:
        UnauthenticatedError: it is wrong.
        ConfigError: there is nobody to ask.
    """
    if options.password_file is not None:
        check_private(options.password_file)
        return Credentials.open(kit, options.password_file.read_text().strip())
    if not sys.stdin.isatty():
        raise ConfigError("nobody can be asked for the passphrase", hint="give --password-file")
    for attempt in range(1, ATTEMPTS + 1):
        passphrase = await _ask(f"passphrase of {kit.identity.name}: ", True)
        try:
            return Credentials.open(kit, passphrase)
        except UnauthenticatedError as error:
            if attempt == ATTEMPTS:
                raise
            typer.echo(str(error), err=True)
    raise AssertionError("unreachable")


async def _ask(question: str, hidden: bool) -> str:
    # Imported where a person is there: a script starts without a terminal library.
    from prompt_toolkit import PromptSession  # noqa: PLC0415

    asking: PromptSession[str] = PromptSession()
    return await asking.prompt_async(question, is_password=hidden)


async def _interact(shell: Shell, transport: GrpcTransport) -> int:
    from flplatform.hci.prompt import interact  # noqa: PLC0415 - as in _ask

    typer.echo(banner(transport))
    await transport.refresh()
    history = private_dir(transport.credentials.kit.state_folder()) / HISTORY
    fresh = asyncio.create_task(transport.keep_fresh(), name="prompt")
    try:
        return await interact(shell, history=history)
    finally:
        fresh.cancel()


def banner(transport: GrpcTransport) -> str:
    """Say where and as whom one is signed in."""
    server = transport.welcome
    days = f"certificate valid {server.server_days_left:.0f} days"
    lines = [
        f"flplatform {server.version}  project {server.project}  "
        f"server {transport.address} ({days})",
        f"signed in as {server.user}  {server.role} of {server.organisation}"
        "      type help, or Tab",
    ]
    width = shutil.get_terminal_size().columns
    return "\n".join(_fitted(escape_lines(line), width) for line in lines)


def _fitted(line: str, width: int) -> str:
    """Let what no longer fits begin a line of its own, at the double spaces."""
    lines = [""]
    for part in re.findall(r"\S+(?: \S+)*(?: {2,}|$)", line):
        if lines[-1] and len(lines[-1] + part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(each.rstrip() for each in lines)
