"""A look into this site's logs and run folders, for who may and only as far as the site allows."""

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from flplatform.client.verbs import Asked, Body, SiteVerb
from flplatform.core.config import SitePolicy
from flplatform.core.errors import FailedPreconditionError, InvalidArgumentError
from flplatform.core.job import CODE_FOLDER
from flplatform.core.ports import AuditSink
from flplatform.files import shell, shell_words
from flplatform.files.tree import Mount, Tree
from flplatform.security.kit import Kit


class SiteShell:
    """Carries out signed looks.

    Args:
        kit: the site's verified kit.
        policy: returns the site's policy of now; it lists the commands that are allowed.
        audit: hears of every look before it happens.
        isolation: level of this host.
    """

    def __init__(
        self, kit: Kit, policy: Callable[[], SitePolicy], audit: AuditSink, isolation: str
    ) -> None:
        self._kit = kit
        self._policy = policy
        self._audit = audit
        self._isolation = isolation

    def verbs(self) -> list[SiteVerb]:
        """Return a verb for each command; what the policy does not list is refused by name."""
        # They change nothing; `_act` audits each of them itself, with its words.
        return [
            SiteVerb(name, "shell", self._act, reaches=reaches) for name in shell_words.COMMANDS
        ]

    async def _act(self, asked: Asked) -> Body:
        look = shell_words.parse(asked.order.argv)
        shell_words.demand_allowed(look.command, self._policy().allowed_shell_cmds)
        words = json.dumps(asked.order.argv)
        await asyncio.to_thread(
            lambda: self._audit.record(
                asked.signer.as_actor(),
                look.command,
                "allowed",
                details={"arguments": words},
                correlation_id=asked.request_id,
            )
        )
        try:
            shown = await asyncio.to_thread(self._run, look)
        except OSError as error:
            raise FailedPreconditionError(f"cannot be read: {error.strerror}") from None
        return {"text": shown.text, "cut": shown.cut}

    def _run(self, look: shell_words.Look) -> shell.Shown:
        identity = self._kit.identity
        settings = shell.settings(identity.project, identity.name)
        tree = site_tree(self._kit.folder, self._kit.state_folder())
        return shell.run(look, tree, {**settings, "FLP_ISOLATION": self._isolation})


def reaches(argv: Sequence[str], site: str) -> bool:
    """Return whether the signed words of a look mean this site."""
    try:
        return shell_words.parse(tuple(argv)).reaches(site)
    except InvalidArgumentError:
        return True  # `_act` says what is wrong with them


def site_tree(kit: Path, state: Path) -> Tree:
    """Return what a look can see: logs, and of each run its code and what it has in its box."""
    mounts = {"logs": Mount(kit, ("logs",))}
    runs = state / "runs"
    for folder in runs.iterdir() if runs.is_dir() else ():
        word, _, number = folder.name.partition("-")
        if word == "run" and number.isdecimal():
            here = ("runs", folder.name)
            mounts[f"runs/{number}/{CODE_FOLDER}"] = Mount(state, (*here, CODE_FOLDER))
            mounts[f"runs/{number}/box"] = Mount(state, (*here, "process", "box"))
    return Tree(mounts)
