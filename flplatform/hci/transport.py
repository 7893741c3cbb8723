"""What the shell needs of the way to the server."""

from collections.abc import AsyncGenerator
from typing import Protocol

from flplatform.hci.connection import Item
from flplatform.hci.view import SpecView


class Transport(Protocol):
    """The way to the server; it connects again by itself when a command needs it."""

    def specs(self) -> list[SpecView]:
        """The commands, as fetched at sign-in."""
        ...

    def execute(self, argv: list[str], confirmed: bool) -> AsyncGenerator[Item, None]:
        """Sends a command and yields its reply items, the last of which is `done` or `confirm`.

        Raises:
            UnavailableError: there is no connection.
            FLError: the server refused the call as such.
        """
        ...

    async def complete(self, kind: str, prefix: str) -> list[str]:
        """Values of a kind that exist now and begin with a prefix."""
        ...

    async def refresh(self) -> None:
        """Looks again at what prompt and toolbar show; never raises an FLError."""
        ...

    def prompt(self) -> str:
        """The prompt, with the state that a user wants in sight."""
        ...

    def toolbar(self) -> str:
        """The line at the bottom, such as the last event."""
        ...
