import asyncio
import io
import subprocess
import sys
from contextlib import asynccontextmanager
from typing import Any

import pytest
from textual.widgets import RichLog, Static

from flplatform.admin.console.actions import actions
from flplatform.admin.console.dashboard import DashboardApp, _carry_out
from flplatform.core.errors import UnavailableError
from flplatform.hci.shell import Shell
from tests.support.pictures import picture
from tests.unit.admin.console.conftest import DONE, data, text
from tests.unit.admin.console.conftest import Screen as Shown


class Server:
    """Feeds the screen with what a test says, and notes what it is asked."""

    def __init__(self) -> None:
        self.pictures: asyncio.Queue[Any] = asyncio.Queue()
        self.asked: list[int] = []
        self.acts: list[list[str]] = []
        self.confirmed: list[bool] = []

    async def feed(self, run: int):
        self.asked.append(run)
        while True:
            item = await self.pictures.get()
            if isinstance(item, Exception):
                raise item
            yield item if "type" in item else {"type": "data", "name": "picture", "value": item}

    async def act(self, words, confirm) -> str:
        self.acts.append(words)
        if words[0] == "abort":
            self.confirmed.append(await confirm("abort run 7: 3 sites training. Continue? [y/N] "))
        return "\x1b[32m12:00:01 epoch 1\x1b[0m\n"


@asynccontextmanager
async def screen(size=(80, 24), run=7):
    server = Server()
    app = DashboardApp(server.feed, server.act, run)
    async with app.run_test(size=size) as pilot:
        await server.pictures.put(picture())
        await pilot.pause()
        yield server, app, pilot


def shown_in(app: DashboardApp, widget: str) -> str:
    return str(app.query_one(widget, Static).content)


def events(app: DashboardApp) -> str:
    return "\n".join(line.text for line in app.query_one("#events", RichLog).lines)


def run(main) -> None:
    asyncio.run(main())


def test_a_picture_is_drawn():
    async def main() -> None:
        async with screen((100, 30)) as (server, app, _):
            head = shown_in(app, "#head")
            assert "run 7 heart" in head
            assert "round 9/15" in head
            assert "2 of 3 in · quorum 3" in head
            assert "deadline in 1:4" in head
            assert "waiting for switzerland" in head
            rows = [[str(cell) for cell in app.sites.get_row_at(i)] for i in range(4)]
            assert rows[0] == ["cleveland", "live", "9", "✓ uploaded", "0.3 s", "0.1 s", ".746"]
            assert rows[2][1:4] == ["at work", "9", "epoch 1/1 60 %"]
            assert rows[3][1:4] == ["live", "–", "declined: policy byoc = none"]
            assert "accuracy .756" in shown_in(app, "#curve")
            assert "va declined" in events(app)
            assert server.asked == [7]

    run(main)


def test_a_change_of_a_site_is_an_event_and_the_cursor_stays():
    async def main() -> None:
        async with screen() as (server, app, pilot):
            await pilot.press("down", "down")
            changed = picture(news=["round 9/15 closed: quorum"])
            changed["sites"][1]["state"] = "away"
            await server.pictures.put(changed)
            await pilot.pause()
            assert "hungary is away" in events(app)
            assert "round 9/15 closed" in events(app)
            assert app.sites.cursor_row == 2

    run(main)


def test_keys_choose_a_run():
    async def main() -> None:
        async with screen() as (server, app, pilot):
            await pilot.press("right")
            await pilot.pause()
            assert server.asked == [7, 6]
            await server.pictures.put(picture(run=6))
            await pilot.pause()
            await pilot.press("left", "tab")
            await pilot.pause()
            assert server.asked == [7, 6, 7, 6]

    run(main)


@pytest.mark.parametrize(("key", "answer"), [("y", True), ("n", False), ("enter", False)])
def test_abort_asks_first(key, answer):
    async def main() -> None:
        async with screen() as (server, app, pilot):
            await pilot.press("a")
            await pilot.pause()
            assert "3 sites training. Continue?\n" in shown_in(app.screen, "#said")
            await pilot.press(key)
            await pilot.pause()
            assert server.acts == [["abort", "--run", "7"]]
            assert server.confirmed == [answer]
            assert "epoch 1" in shown_in(app.screen, "#said"), "the reply is not lost among events"

    run(main)


def test_l_shows_the_log_of_the_chosen_site():
    async def main() -> None:
        async with screen() as (server, app, pilot):
            await pilot.press("down", "l")
            await pilot.pause()
            assert server.acts == [["logs", "7", "hungary"]]
            assert "12:00:01 epoch 1" in shown_in(app.screen, "#said")
            await pilot.press("q")
            await pilot.pause()
            assert len(app.screen_stack) == 1, "q leaves the log, not the dashboard"

    run(main)


def test_a_broken_connection_is_said_and_tried_again(monkeypatch):
    monkeypatch.setattr("flplatform.admin.console.dashboard.RETRY_S", 0.01)

    async def main() -> None:
        async with screen() as (server, app, pilot):
            await server.pictures.put(UnavailableError("gone"))
            await pilot.pause()
            assert "no connection: gone" in shown_in(app, "#head")
            while len(server.asked) < 2:
                await asyncio.sleep(0.01)
            await server.pictures.put(picture())
            await pilot.pause()
            assert "no connection" not in shown_in(app, "#head")

    run(main)


def test_text_from_a_site_steers_nothing():
    async def main() -> None:
        async with screen() as (server, app, pilot):
            evil = picture(news=["\x1b]0;title\x07[red]x[/red]"])
            evil["sites"][2]["runs"] = [[7, 9, "[bold]\x1b[2J", 1.0]]
            await server.pictures.put(evil)
            await pilot.pause()
            assert "[red]x[/red]" in events(app)
            assert "\x1b" not in events(app)
            assert str(app.sites.get_row_at(2)[3]) == "[bold]\\x1b[2J"

    run(main)


@pytest.mark.parametrize("size", [(40, 12), (80, 24), (140, 40)])
def test_it_fits_every_screen(size):
    async def main() -> None:
        async with screen(size) as (_, app, pilot):
            await pilot.pause()
            assert app.query_one("#curve").display == (size[1] > 12)
            for widget in ("#head", "#sites", "#events", *["#curve"] * (size[1] > 12)):
                region = app.query_one(widget).region
                assert region.height >= 2
                assert region.bottom <= size[1]

    run(main)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def at_terminal(transport, monkeypatch):
    """A shell at a terminal, and the runs with which the screen would open."""
    opened: list[int] = []

    async def instead(self) -> None:
        opened.append(self._run)

    monkeypatch.setattr(DashboardApp, "run_async", instead)
    monkeypatch.setattr("sys.stdin", Terminal())
    table = actions(transport)
    shell = Shell(transport, out=Terminal(), err=io.StringIO(), env={}, actions=table)
    return shell, opened


RUNS = [{"run": 3, "ended": ""}, {"run": 4, "ended": "now"}]


@pytest.mark.parametrize(
    ("line", "current", "run"),
    [("dashboard", None, 3), ("dashboard", 4, 4), ("dashboard 4", 3, 4)],
)
def test_it_opens_with_the_run_that_is_meant(at_terminal, transport, line, current, run):
    shell, opened = at_terminal
    shell.remembered["run"] = current
    transport.replies = [[data("runs", RUNS), DONE]]
    assert asyncio.run(shell.run_command(line)) == 0
    assert opened == [run]


@pytest.mark.parametrize(
    ("line", "runs", "code", "said"),
    [
        ("dashboard 9", RUNS, 2, "there is no run 9"),
        ("dashboard", [], 1, "there is no run yet"),
    ],
)
def test_a_run_that_is_not_there(at_terminal, transport, line, runs, code, said):
    shell, opened = at_terminal
    transport.replies = [[data("runs", runs), DONE]]
    assert asyncio.run(shell.run_command(line)) == code
    assert said in shell._err.getvalue()
    assert opened == []


def test_a_command_asks_on_the_screen_and_its_reply_comes_back(at_terminal, transport):
    shell, _ = at_terminal
    transport.replies = [
        [{"type": "confirm", "question": "abort run 3. Continue?"}],
        [text("aborted"), DONE],
    ]
    asked = []

    async def confirm(question: str) -> bool:
        asked.append(question)
        return True

    said = asyncio.run(_carry_out(shell, ["abort", "--run", "3"], confirm))
    assert asked == ["abort run 3. Continue? [y/N] "]
    assert said == "  aborted\n"
    assert shell.asker is None


def test_without_a_terminal_it_says_so(transport):
    shown = Shown(transport, actions=actions(transport))
    assert asyncio.run(shown.shell.run_command("dashboard")) == 1
    assert "needs a terminal" in shown.err.getvalue()


def test_without_textual_it_says_how_to_get_it(transport, monkeypatch):
    monkeypatch.delitem(sys.modules, "flplatform.admin.console.dashboard")
    monkeypatch.setitem(sys.modules, "textual", None)
    shown = Shown(transport, actions=actions(transport))
    assert asyncio.run(shown.shell.run_command("dashboard")) == 1
    assert "pip install 'flplatform[dashboard]'" in shown.err.getvalue()


def test_neither_the_server_nor_a_start_of_the_console_imports_textual():
    code = (
        "import sys, flplatform.entrypoints.server, flplatform.entrypoints.admin;"
        "sys.exit('textual' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
