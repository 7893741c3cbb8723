"""`dashboard`: one run on one screen. Needs Textual, and so is imported when it is first used."""

import asyncio
import shlex
import shutil
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, ClassVar, TypeAlias

from rich.text import Text
from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widgets import DataTable, Footer, RichLog, Static

from flplatform.admin.console.dashboard_boxes import Question, Reply
from flplatform.admin.console.exchange import Refused, ask, data_of
from flplatform.admin.console.transport import GrpcTransport
from flplatform.admin.modules.dashboard import FEED
from flplatform.core.errors import (
    FailedPreconditionError,
    FLError,
    InvalidArgumentError,
    UnavailableError,
)
from flplatform.hci.connection import ExitCode, Item
from flplatform.hci.escape import escape
from flplatform.hci.plot import plot
from flplatform.hci.screen import Sheet, now
from flplatform.hci.shell import Shell
from flplatform.hci.units import number, seconds

RETRY_S = 2.0
"""Pause before the feed is asked for again after the connection broke."""

_NUMBERS = frozenset({"ROUND", "SINCE", "LAST SEEN", "METRIC"})
COLUMNS = ("SITE", "STATE", "ROUND", "PHASE", "SINCE", "LAST SEEN", "METRIC")

_STYLES = {
    "training": "cyan",
    "validating": "cyan",
    "deploying": "yellow",
    "live": "green",
    "finished": "green",
    "failed": "red",
    "aborted": "red",
    "away": "red",
    "stopped": "yellow",
    "expected": "yellow",
    "disabled": "dim",
}
_BAD = ("failed", "declined", "refused", "aborted", "is away", "error", "no connection")

_NAME = 24  # characters of a site's name
_FIXED = 50  # columns of the table but for name and phase
_LOW = 18  # lines of a screen that has no room for a curve
_BEFORE = " " * 8  # in place of the time of what happened before one looked

Feed: TypeAlias = Callable[[int], AsyncGenerator[Item, None]]
"""run -> reply items of `dashboard_feed`."""

Act: TypeAlias = Callable[[list[str], Callable[[str], Awaitable[bool]]], Awaitable[str]]
"""(words of a command, asks a question) -> its reply as text for a terminal."""


async def dashboard(transport: GrpcTransport, argv: list[str], shell: Shell) -> int:
    """Show the dashboard until it is left, and return the exit code.

    Raises:
        FailedPreconditionError: there is no terminal.
        FLError: the server refuses.
    """
    if shell.terminal is None or not sys.stdin.isatty():
        raise FailedPreconditionError(
            "the dashboard needs a terminal", hint="watch check_status all works in a pipe too"
        )
    given = shell.parse(argv)["run"] or shell.remembered.get("run")
    try:
        runs = data_of(await ask(transport, shell, ["list_runs"]), "runs") or []
    except Refused as refused:
        return refused.exit_code
    numbers = [run["run"] for run in runs]
    if not numbers:
        raise FailedPreconditionError("there is no run yet", hint="submit_job starts one")
    if given and given not in numbers:
        raise InvalidArgumentError(f"there is no run {given}", hint="list_runs shows the runs")
    active = [run["run"] for run in runs if not run.get("ended")]
    first = given or (active or numbers)[-1]

    async def act(words: list[str], confirm: Callable[[str], Awaitable[bool]]) -> str:
        return await _carry_out(shell, words, confirm)

    await DashboardApp(
        lambda run: transport.execute([FEED, str(run)], False), act, first
    ).run_async()
    return ExitCode.OK


async def _carry_out(
    shell: Shell, words: list[str], confirm: Callable[[str], Awaitable[bool]]
) -> str:
    """Run a command of the shell with its questions on this screen."""

    async def answer(question: str, _hidden: bool) -> str:
        return "y" if await confirm(question) else "n"

    sheet, before = Sheet(), shell.asker
    shell.asker = answer
    try:
        await shell.draw(shlex.join(words), sheet, width=min(_columns() * 9 // 10, 100) - 8)
    finally:
        shell.asker = before
    return sheet.getvalue()


def _columns() -> int:
    return shutil.get_terminal_size().columns


class DashboardApp(App[None]):
    """The screen.

    Args:
        feed: sends pictures of a run.
        act: carries out a command.
        run: the run to begin with.
    """

    CSS = """
    Screen { layout: vertical; }
    #head { height: 2; padding: 0 1; background: $panel; }
    #runs { height: 1; padding: 0 1; }
    #sites { height: auto; max-height: 40%; margin: 1 0 0 0; }
    #curve { height: 1fr; min-height: 6; padding: 0 1; margin: 1 0 0 0; }
    #events { height: 1fr; max-height: 40%; min-height: 4; padding: 0 1;
              border-top: solid $panel-lighten-2; border-title-color: $text-muted;
              scrollbar-size-vertical: 1; }
    Question, Reply { align: center middle; }
    #box { width: 90%; max-width: 100; height: auto; max-height: 80%; padding: 1 2;
           border: round $accent; background: $surface; scrollbar-size-vertical: 1; }
    #said { height: auto; }
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "quit"),
        Binding("ctrl+c", "quit", "quit", show=False, priority=True),
        Binding("left", "run(-1)", "earlier run", show=False, priority=True),
        Binding("right", "run(1)", "later run", show=False, priority=True),
        Binding("tab", "run(1)", "other run", key_display="tab ←→", priority=True),
        Binding("l", "logs", "log of the site ↑↓"),
        Binding("a", "abort", "abort the run"),
    ]
    ENABLE_COMMAND_PALETTE = False

    def __init__(self, feed: Feed, act: Act, run: int) -> None:
        super().__init__()
        self._feed = feed
        self._act = act
        self._run = run
        self._picture: dict[str, Any] = {}
        self._drawn_at = 0.0  # when the picture came, monotonic
        self._states: dict[str, str] = {}
        self._followed = False  # whether news are of now, or the story so far
        self._problem = ""

    def compose(self) -> ComposeResult:
        """Make the parts of the screen."""
        yield Static(f"run {self._run} …", id="head")
        yield Static(id="runs")
        yield DataTable(id="sites", cursor_type="row", zebra_stripes=False)
        yield Static(id="curve")
        log = RichLog(id="events", max_lines=500, min_width=0, wrap=True, markup=False)
        log.border_title = "events"
        log.can_focus = False
        yield log
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """Begin to listen."""
        for column in COLUMNS:
            right = column in _NUMBERS
            self.sites.add_column(Text(column, justify="right" if right else "left"))
        self.sites.focus()
        self.set_interval(1.0, self._draw_head)
        self.listen()

    @property
    def sites(self) -> DataTable[Text]:
        """The table of sites."""
        return self.query_one("#sites", DataTable)

    # ---- the feed ----

    @work(exclusive=True, group="feed")
    async def listen(self) -> None:
        """Follow the chosen run, through breaks of the connection."""
        run = self._run
        while True:
            try:
                async with aclosing(self._feed(run)) as items:
                    async for item in items:
                        self._take(run, item)
                self._problem = "the feed has ended"
            except UnavailableError as error:
                self._problem = f"no connection: {error.message}"
            except FLError as error:
                self._problem = str(error)
            self._draw_head()
            await asyncio.sleep(RETRY_S)

    def _take(self, run: int, item: Item) -> None:
        match item:
            case {"type": "data", "name": "picture", "value": dict(picture)} if run == self._run:
                self._problem = ""
                self._picture, self._drawn_at = picture, time.monotonic()
                self._draw()
            case {"type": "error", "message": str(message)}:
                self._tell(f"error: {message}")

    def _tell(self, line: str, when: str = "") -> None:
        bad = any(word in line for word in _BAD)
        log = self.query_one("#events", RichLog)
        log.write(Text(f"{when or now()}  ", "dim") + Text(escape(line, 400), "red" if bad else ""))

    # ---- drawing ----

    def _draw(self) -> None:
        self._draw_head()
        self._draw_sites()
        self._draw_curve()
        for line in self._picture["news"]:
            self._tell(str(line), "" if self._followed else _BEFORE)
        self._followed = True
        for site in self._picture["sites"]:
            name, state = str(site["name"]), str(site["state"])
            if self._states.get(name, state) != state:
                self._tell(f"{name} is {state}")
            self._states[name] = state

    def _draw_head(self) -> None:
        head = self.query_one("#head", Static)
        if not self._picture:
            head.update(Text(self._problem or f"run {self._run} …"))
            return
        run, server = self._picture["run"], self._picture["server"]
        status = str(run["status"])
        text = Text.assemble((f"fl:{escape(str(server['project']))}  ", "bold"))
        text.append(f"run {run['run']} {escape(str(run['name']))}  ")
        text.append(status, f"bold {_STYLES.get(status, '')}".strip())
        text.append(f"  round {run['round']}/{run['rounds']}  ")
        text.append_text(_bar(run["round"], run["rounds"], 20))
        second = [f"{len(run['accepted'])} of {len(run['accepted']) + len(run['waiting'])} in"]
        second.append(f"quorum {run['min_clients']}")
        left = time.monotonic() - self._drawn_at
        for name, after_s in sorted(run["timers"].items(), key=lambda timer: float(timer[1])):
            second.append(f"{escape(str(name)).split('/')[0]} in {_countdown(after_s - left)}")
        if run["waiting"]:
            second.append(f"waiting for {', '.join(escape(str(s)) for s in run['waiting'])}")
        if run["ended"]:
            second = [escape(str(run["reason"]))] if run["reason"] else []
            if run["best_round"] is not None:
                second.append(f"best model: round {run['best_round']}")
        text.append("\n" + " · ".join(second), "dim")
        if self._problem:
            text = Text.assemble(text.split("\n")[0], "\n", (escape(self._problem), "bold red"))
        text.no_wrap, text.overflow = True, "ellipsis"
        head.update(text)
        strip = Text("runs ", "dim")
        for each in reversed(self._picture["runs"]):
            style = "reverse" if each["run"] == self._run else "dim"
            strip.append(f" {each['run']} {escape(str(each['status']))} ", style)
        strip.no_wrap, strip.overflow = True, "ellipsis"
        self.query_one("#runs", Static).update(strip)

    def _draw_sites(self) -> None:
        table, cursor = self.sites, self.sites.cursor_row
        longest = max((len(str(site["name"])) for site in self._picture["sites"]), default=0)
        room = max(self.size.width - _FIXED - min(longest, _NAME), 8)
        rows = [_site_row(site, self._picture, room) for site in self._picture["sites"]]
        names = [str(site["name"]) for site in self._picture["sites"]]
        if names != [str(key.value) for key in table.rows]:
            table.clear()
            for name, row in zip(names, rows, strict=True):
                table.add_row(*row, key=name)
            table.move_cursor(row=min(cursor, max(len(rows) - 1, 0)))
            return
        for index, row in enumerate(rows):
            for column, cell in enumerate(row):
                if table.get_row_at(index)[column] != cell:
                    table.update_cell_at((index, column), cell, update_width=True)  # type: ignore[arg-type]

    def _draw_curve(self) -> None:
        curve = self.query_one("#curve", Static)
        run, rounds = self._picture["run"], self._picture["rounds"]
        rounds = [each for each in rounds if each["round"] > 0] or rounds
        scores = [each["score"] for each in rounds]
        if not any(isinstance(score, int | float) for score in scores):
            what = "no score yet" if run["metric"] else "this job watches no metric"
            curve.update(Text(what, "dim"))
            return
        values = [float("nan") if score is None else float(score) for score in scores]
        latest = next(value for value in reversed(values) if value == value)
        best = run["best_round"]
        heading = f"{run['metric']} {number(latest)}" + (f", best in round {best}" if best else "")
        height = max(curve.size.height - 2, 2)
        width = max(curve.size.width - 9, 10)
        ends = int(rounds[0]["round"]), int(rounds[-1]["round"])
        curve.update(plot(heading, "round", {"": values}, width=width, height=height, ends=ends))

    def on_resize(self) -> None:
        """Draw the curve to the new size, once it is known; a low screen has none."""
        self.query_one("#curve").display = self.size.height >= _LOW
        if self._picture:
            self.call_after_refresh(self._draw_curve)

    # ---- keys ----

    def action_run(self, step: int) -> None:
        """Choose the run that is shown beside this one."""
        if self.screen is not self.screen_stack[0] or not self._picture:
            return
        numbers = [each["run"] for each in reversed(self._picture["runs"])]
        at = numbers.index(self._run) if self._run in numbers else 0
        chosen = numbers[(at + step) % len(numbers)]
        if chosen != self._run:
            self._run, self._followed = chosen, False
            self.query_one("#events", RichLog).clear()
            self.listen()

    @work(exclusive=True, group="act")
    async def action_abort(self) -> None:
        """Abort the run after a question."""
        words = ["abort", "--run", str(self._run)]
        said = await self._act(words, self._confirm)
        await self.push_screen_wait(Reply(" ".join(words), said))

    @work(exclusive=True, group="act")
    async def action_logs(self) -> None:
        """Show the end of the chosen site's log."""
        sites = self._picture.get("sites", [])
        if not sites:
            return
        site = str(sites[min(self.sites.cursor_row, len(sites) - 1)]["name"])
        words = ["logs", str(self._run), site]
        said = await self._act(words, self._confirm)
        await self.push_screen_wait(Reply(" ".join(words), said))

    async def _confirm(self, question: str) -> bool:
        screen: Screen[bool] = Question(question)
        return await self.push_screen_wait(screen)


def _countdown(left_s: float) -> str:
    whole = max(round(left_s), 0)
    return f"{whole // 60}:{whole % 60:02}"


def _bar(done: float, of: float, width: int) -> Text:
    filled = round(width * min(done / of, 1.0)) if of else 0
    return Text("━" * filled, "cyan") + Text("━" * (width - filled), "grey37")


def _site_row(site: dict[str, Any], picture: dict[str, Any], room: int) -> tuple[Text, ...]:
    run = picture["run"]
    name, state = str(site["name"]), str(site["state"])
    at_work = next((each for each in site["runs"] if each[0] == run["run"]), None)
    answer = str(run["answers"].get(name, ""))
    if state != "live":
        phase, shown = "", state
    elif at_work is not None:
        phase, shown = escape(str(at_work[2])), "at work" if name in run["waiting"] else "live"
    else:
        phase = escape(answer) if answer not in ("", "ok", "…") else ""
        shown = "live"
    if name in run["accepted"]:
        phase = f"✓ {phase}".rstrip()
    score = picture["last_scores"].get(name)
    return (
        Text(escape(name, _NAME)),
        Text(shown, _STYLES.get(shown, "cyan")),
        Text(str(at_work[1]) if at_work else "–", justify="right"),
        Text(escape(phase, room) or "–"),
        Text(seconds(at_work[3]) if at_work else "–", justify="right"),
        Text("–" if site["last_seen_s"] is None else seconds(site["last_seen_s"]), justify="right"),
        Text("–" if score is None else number(score), justify="right"),
    )
