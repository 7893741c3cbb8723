"""A look into the logs and run folders of server and sites; off unless each host allows it."""

import asyncio
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flplatform.admin.modules.hosts import ABSENT, Hosts, absence, write_row
from flplatform.admin.orders import ordered
from flplatform.admin.ports import Control
from flplatform.admin.rights import Rights
from flplatform.core.control import SiteReply
from flplatform.core.errors import FailedPreconditionError, FLError, InvalidArgumentError
from flplatform.files import shell, shell_words
from flplatform.files.tree import Mount, Tree
from flplatform.hci import CommandSpec, Connection, argument
from flplatform.security.kit import Kit

REPLY_S = shell.DEADLINE_S + 5.0
"""How long a site may take for a look."""

TARGET = "server, client [SITE…] or all"
_METRICS = re.compile(r"run-([0-9]{1,10})\.jsonl")


@dataclass(frozen=True)
class Words:
    """Of commands with nothing but targets."""

    words: tuple[str, ...] = argument(help=TARGET, complete="target", metavar="TARGET", rest=True)

    command = "pwd"

    def __post_init__(self) -> None:
        try:
            shell_words.split(self.command, self.words)
        except InvalidArgumentError as error:
            raise ValueError(str(error)) from None

    @property
    def targets(self) -> tuple[str, ...]:
        """The words that name hosts."""
        return shell_words.split(self.command, self.words)[0]


@dataclass(frozen=True)
class ListArguments(Words):
    """Of `ls`."""

    words: tuple[str, ...] = argument(
        help=f"{TARGET}; then a folder below logs/ or runs/",
        complete="target",
        metavar="TARGET [PATH]",
        rest=True,
    )
    hidden: bool = argument(help="also names that begin with a dot", option="-a", default=False)
    long: bool = argument(help="with mode, size in bytes and time", option="-l", default=False)
    recursive: bool = argument(help="folders within folders", option="-R", default=False)
    by_time: bool = argument(help="newest first", option="-t", default=False)
    by_size: bool = argument(help="largest first", option="-S", default=False)
    reverse: bool = argument(help="the other way round", option="-r", default=False)
    access: bool = argument(help="by the time of the last reading", option="-u", default=False)

    command = "ls"


_PATH = f"{TARGET}; then a file below logs/ or runs/"


@dataclass(frozen=True)
class CatArguments(Words):
    """Of `cat`."""

    words: tuple[str, ...] = argument(
        help=_PATH, complete="target", metavar="TARGET PATH", rest=True
    )
    number: bool = argument(help="number the lines", option="-n", default=False)
    number_filled: bool = argument(help="number lines with text", option="-b", default=False)
    squeeze: bool = argument(help="one empty line for several", option="-s", default=False)
    tabs: bool = argument(help="show tabs as ^I", option="-T", default=False)

    command = "cat"


@dataclass(frozen=True)
class EndArguments(Words):
    """Of `head` and `tail`."""

    words: tuple[str, ...] = argument(
        help=_PATH, complete="target", metavar="TARGET PATH", rest=True
    )
    lines: int = argument(help="how many lines", option="-n", metavar="N", minimum=0, default=10)
    bytes: int | None = argument(
        help="how many bytes, instead", option="-c", metavar="N", minimum=0, default=None
    )

    command = "head"


@dataclass(frozen=True)
class GrepArguments(Words):
    """Of `grep`."""

    words: tuple[str, ...] = argument(
        help=f"{TARGET}; then a text to look for, and a file below logs/ or runs/",
        complete="target",
        metavar="TARGET PATTERN PATH",
        rest=True,
    )
    number: bool = argument(help="with line numbers", option="-n", default=False)
    ignore_case: bool = argument(help="A matches a", option="-i", default=False)
    offset: bool = argument(help="with byte offsets", option="-b", default=False)
    count: bool = argument(help="only how many lines", option="-c", default=False)
    invert: bool = argument(help="lines that do not match", option="-v", default=False)
    expression: bool = argument(
        help="PATTERN is an expression: . [a-z] \\d \\w \\s ( | ) * + ? ^ $",
        option="-E",
        default=False,
    )

    command = "grep"


_COMMANDS: Sequence[tuple[str, str, type[Words], tuple[str, ...]]] = (
    ("pwd", "shows where paths begin", Words, ("pwd server",)),
    (
        "ls",
        "lists folders of logs and runs",
        ListArguments,
        ("ls server", "ls client hospital-a -lt logs", "ls all -R runs"),
    ),
    (
        "cat",
        "shows a file",
        CatArguments,
        ("cat server logs/server.log", "cat client hospital-a hospital-b -n logs/site.log"),
    ),
    ("head", "shows how a file begins", EndArguments, ("head server -n 20 logs/server.log",)),
    ("tail", "shows how a file ends", EndArguments, ("tail client -n 20 logs/site.log",)),
    (
        "grep",
        "shows the lines of a file with a text in them",
        GrepArguments,
        ("grep server -in error logs/server.log", "grep client -E 'run [0-9]+' logs/site.log"),
    ),
    ("env", "shows harmless variables of the environment, and settings", Words, ("env all",)),
)


class ShellModule:
    """Looks, carried out by the host that is looked at.

    Args:
        control: knows which sites are there.
        hosts: resolves targets and asks sites.
        rights: knows what the server's policy allows.
        kit: the server's verified kit.
    """

    name = "shell"
    summary = "a look into logs and run folders, where hosts allow it"

    def __init__(self, control: Control, hosts: Hosts, rights: Rights, kit: Kit) -> None:
        self._control = control
        self._hosts = hosts
        self._rights = rights
        self._kit = kit

    def commands(self) -> Sequence[CommandSpec[Any]]:
        """The commands; all of them are audited, though they change nothing."""
        return [
            CommandSpec(
                name=name,
                summary=summary,
                arguments=arguments,
                handler=self._look,
                permission="shell",
                mutating=True,
                examples=examples,
                states="always",
                needs=("allowed_shell_cmds in local/policy.yml of each host",),
                reauthenticate=True,
            )
            for name, summary, arguments, examples in _COMMANDS
        ]

    async def _look(self, connection: Connection, args: Words) -> None:
        look = shell_words.parse(ordered().order.argv)
        targets = await self._hosts.admit(connection, args.targets, "shell")
        texts: dict[str, shell.Shown] = {}
        if targets.server:
            try:
                shell_words.demand_allowed(look.command, self._rights.allowed_shell_cmds)
                shown = await asyncio.to_thread(self._here, look)
            except FLError as error:
                await connection.failed("server", error)
            except OSError as error:
                await connection.failed("server", FailedPreconditionError(str(error.strerror)))
            else:
                texts["server"] = shown
                await connection.row("server", _cells(shown))
        there = await self._present(connection, targets.sites)
        replies = await self._hosts.ask(there, timeout_s=REPLY_S)
        for site, reply in replies.items():
            answer = _shown(reply)
            if answer is not None:
                texts[site] = answer
            await write_row(connection, site, reply, _cells(answer) if answer else None)
        for host, shown in texts.items():
            if shown.text:
                heading = f"── {host} ──\n" if len(texts) > 1 else ""
                await connection.text(heading + shown.text)
        await connection.data("output", {host: shown.text for host, shown in texts.items()})

    async def _present(self, connection: Connection, sites: Iterable[str]) -> list[str]:
        """Write a row for each site that is not there; return the others."""
        known = {site.name: site for site in self._control.sites()}
        gone = {name: site for name, site in known.items() if site.state in ABSENT}
        for name in sites:
            if name in gone:
                detail = f"({absence(gone[name])})"
                await connection.row(name, status="no_reply", detail=detail)
        return [name for name in sites if name not in gone]

    def _here(self, look: shell_words.Look) -> shell.Shown:
        identity = self._kit.identity
        tree = server_tree(self._kit.folder, self._kit.state_folder())
        return shell.run(look, tree, shell.settings(identity.project, identity.name))


def server_tree(kit: Path, state: Path) -> Tree:
    """Return what a look at the server can see: logs, and the metrics that runs have logged."""
    mounts = {"logs": Mount(kit, ("logs",))}
    folder = state / "metrics"
    for file in folder.iterdir() if folder.is_dir() else ():
        if match := _METRICS.fullmatch(file.name):
            mounts[f"runs/{match[1]}/metrics.jsonl"] = Mount(state, ("metrics", file.name))
    return Tree(mounts)


def _shown(reply: SiteReply) -> shell.Shown | None:
    """Read a site's answer, whatever it may be; None if there is none."""
    if reply.status != "ok":
        return None
    text, cut = reply.body.get("text"), reply.body.get("cut")
    return shell.Shown(str(text or "")[: shell.MAX_OUTPUT], str(cut or "")[:200])


def _cells(shown: shell.Shown) -> Mapping[str, None | int | str]:
    return {"lines": shown.lines, "cut": shown.cut or None}
