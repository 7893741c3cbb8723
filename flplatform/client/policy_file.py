"""This site's `local/policy.yml`: read whole or not at all, and again when it changes.

Only its owner changes it, by that file. A new text that is wrong, or a file that others could have
written, leaves the old policy in force and is an error in the log until it is mended.
"""

import logging
import os
import stat
from collections.abc import Collection
from pathlib import Path

from flplatform.core.config import SitePolicy
from flplatform.core.errors import ConfigError, FLError
from flplatform.security.authz import parse_site_policy

log = logging.getLogger(__name__)

MAX_BYTES = 1 << 20


class PolicyFile:
    """The policy in force.

    Args:
        path: the file, which need not exist.
        policy: as it was when the kit was opened.
    """

    def __init__(self, path: Path, policy: SitePolicy) -> None:
        self.path = path
        self.policy = policy
        self._commands: Collection[str] = ()
        self._text: str | None = None
        self._problem = ""

    def load(self, commands: Collection[str]) -> None:
        """Read the policy at start; `commands` are the verbs that it may name.

        Raises:
            ConfigError: it is wrong, or others may write it.
            OSError: it cannot be read.
        """
        self._commands = commands
        self._text = self._read()
        self.policy = parse_site_policy(self._text, str(self.path), commands)

    def reload(self) -> bool:
        """Take in a changed policy, whole or not at all; return whether it was."""
        try:
            text = self._read()
            if text == self._text:
                if self._problem:
                    log.info("%s is again as it was read before", self.path)
                self._problem = ""
                return False
            policy = parse_site_policy(text, str(self.path), self._commands)
        except (FLError, OSError, UnicodeDecodeError) as error:
            if str(error) != self._problem:  # once for each new problem, not every few seconds
                log.error("%s was not read again, the old policy stays: %s", self.path, error)
            self._problem = str(error)
            return False
        self._text, self.policy, self._problem = text, policy, ""
        log.warning("%s has changed and is in force", self.path)
        return True

    def _read(self) -> str:
        """Return the text; a policy that is not there grants what the roles do.

        Raises:
            ConfigError: it is no plain file of its owner alone to write.
        """
        try:
            handle = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            if self._text:
                raise ConfigError(
                    f"{self.path} has gone", hint="an empty file takes every rule back"
                ) from None
            return ""
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(file.fileno())
            mode = stat.S_IMODE(status.st_mode)
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
                raise ConfigError(f"{self.path} is not a file of at most {MAX_BYTES} bytes")
            if status.st_uid not in (os.geteuid(), 0):
                raise ConfigError(f"{self.path} belongs to user id {status.st_uid}")
            if mode & 0o022:
                raise ConfigError(
                    f"{self.path} has mode {mode:04o}: others may write it",
                    hint=f"run: chmod 600 {self.path}",
                )
            return file.read(MAX_BYTES).decode()
