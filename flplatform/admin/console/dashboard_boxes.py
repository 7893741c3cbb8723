"""What the dashboard shows over itself: a question, and the reply of a command."""

from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static


class Question(ModalScreen[bool]):
    """A question that is answered with a key; anything but `y` is a no.

    Args:
        question: the question.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "yes"),
        Binding("n,escape,enter,q", "answer(False)", "no"),
    ]

    def __init__(self, question: str) -> None:
        super().__init__()
        self._question = question

    def compose(self) -> ComposeResult:
        """Make the box."""
        text = Text(self._question.removesuffix("[y/N] ").rstrip())
        with Vertical(id="box"):
            yield Static(text + Text("\n\ny yes    n no", "bold"), id="said")

    def action_answer(self, yes: bool) -> None:
        """Give the answer."""
        self.dismiss(yes)


class Reply(ModalScreen[None]):
    """The reply of a command.

    Args:
        title: what was asked.
        said: the reply, with colour.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("q,escape,enter,l", "leave", "back")]

    def __init__(self, title: str, said: str) -> None:
        super().__init__()
        self._title = title
        self._said = said

    def compose(self) -> ComposeResult:
        """Make the box."""
        with VerticalScroll(id="box") as box:
            box.border_title = self._title
            box.border_subtitle = "q back"
            yield Static(Text.from_ansi(self._said), id="said")

    def on_mount(self) -> None:
        """Show the end first."""
        box = self.query_one("#box")
        self.call_after_refresh(lambda: box.scroll_end(animate=False))

    def action_leave(self) -> None:
        """Go back."""
        self.dismiss(None)
