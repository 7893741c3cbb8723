import asyncio
from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flplatform.core.errors import UnavailableError
from flplatform.hci.completion import complete
from flplatform.hci.grammar import tokenise
from flplatform.hci.spec import CommandSpec, NoArguments, argument
from flplatform.hci.view import view_of


@dataclass(frozen=True)
class CheckArguments:
    kind: Literal["server", "client", "all"] = argument(help="which")
    names: tuple[str, ...] = argument(help="names", rest=True, complete="target", default=())
    number: int | None = argument(help="number", option="--number -n", complete="n", default=None)
    only: tuple[str, ...] = argument(help="only", option="--only", complete="target", default=())
    wide: bool = argument(help="wide", option="--wide", default=False)


@dataclass(frozen=True)
class FileArguments:
    path: str = argument(help="path", complete="path")
    note: str = argument(help="note", default="")


@dataclass(frozen=True)
class WatchArguments:
    command: tuple[str, ...] = argument(help="command", complete="command", verbatim=True)
    every: float = argument(help="every", option="--every", default=2.0)


async def nothing(_connection, _args) -> None: ...


VIEWS = [
    view_of(CommandSpec(name, f"about {name}", arguments, nothing, "view", False, (name,), None, a))
    for name, arguments, a in (
        ("check_status", CheckArguments, ("cs",)),
        ("cat", FileArguments, ()),
        ("watch", WatchArguments, ()),
        ("bye", NoArguments, ()),
    )
]


async def dynamic(kind: str, prefix: str) -> list[str]:
    kind = kind.partition(":")[0]
    return {"target": ["cleveland", "hungary", "new york", "bad\x1b"], "n": ["1", "12"]}[kind]


def texts(line: str, ask=dynamic) -> list[str]:
    return [candidate.text for candidate in asyncio.run(complete(line, VIEWS, ask))]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", ["check_status", "cat", "watch", "bye"]),
        ("c", ["check_status", "cat"]),
        ("  ch", ["check_status"]),
        ("zz", []),
        ("zz ", []),
        ("check_status ", ["server", "client", "all"]),
        ("cs c", ["client"]),
        ("check_status client ", ["cleveland", "hungary", "'new york'"]),
        ("check_status client cleveland ", ["hungary", "'new york'"]),
        ("check_status client 'new", ["'new york'"]),
        ('check_status client "new y', ["'new york'"]),
        ("check_status client new\\ y", ["'new york'"]),
        ("check_status -", ["--number", "--only", "--wide"]),
        ("check_status --wide --n", ["--number"]),
        ("check_status --wide --w", []),
        ("check_status --number ", ["1", "12"]),
        ("check_status -n 12", ["12"]),
        ("check_status --number=1", ["--number=1", "--number=12"]),
        ("check_status --number 3 a", ["all"]),
        ("check_status --number=3 a", ["all"]),
        ("check_status --only ", ["cleveland", "hungary", "'new york'"]),
        ("check_status --only cleveland,", ["cleveland,hungary", "'cleveland,new york'"]),
        ("check_status --only=cleveland,h", ["--only=cleveland,hungary"]),
        ("check_status --only x --o", ["--only"]),
        ("check_status --wide=", []),
        ("check_status --zzz a", ["all"]),
        ("watch ch", ["check_status"]),
        ("watch --every 3 b", ["bye"]),
        ("watch --every ", []),
        ("watch check_status --n", ["--number"]),
        ("watch check_status client hu", ["hungary"]),
        ("cat x y", []),
        ("cat x y z", []),
        ("bye ", []),
        ("bye x ", []),
        ('watch "a\\', []),
    ],
)
def test_what_can_be_typed_next(line, expected):
    assert texts(line) == expected


def test_a_command_comes_with_its_summary():
    (candidate,) = asyncio.run(complete("watch by", VIEWS, dynamic))
    assert (candidate.text, candidate.replaces, candidate.about) == ("bye", 2, "about bye")


def test_a_server_that_does_not_answer_completes_nothing():
    async def gone(kind: str, prefix: str) -> list[str]:
        raise UnavailableError("gone")

    assert texts("check_status client ", gone) == []


def test_paths(tmp_path, monkeypatch):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "heart").mkdir()
    (tmp_path / "jobs" / "my notes.txt").touch()
    (tmp_path / ".hidden").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert texts("cat ") == ["jobs/"]
    assert texts("cat .h") == [".hidden"]
    assert texts("cat jobs/") == ["jobs/heart/", "'jobs/my notes.txt'"]
    assert texts("cat 'jobs/my n") == ["'jobs/my notes.txt'"]
    assert texts("cat ~/jobs/m") == ["~/'jobs/my notes.txt'"]
    assert texts(f"cat {tmp_path}/jobs/h") == [f"{tmp_path}/jobs/heart/"]
    assert texts("cat nowhere/") == []


@given(st.text())
def test_no_line_breaks_it_and_what_it_offers_is_one_word(line):
    for candidate in asyncio.run(complete("check_status client " + line, VIEWS, dynamic)):
        assert len(tokenise(candidate.text)) == 1
        assert 0 <= candidate.replaces <= len("check_status client " + line)


def test_one_more_word_is_asked_for_with_the_first():
    asked = []

    async def ask(kind: str, prefix: str) -> list[str]:
        asked.append((kind, prefix))
        return []

    texts("check_status client ", ask)
    texts("check_status client cleveland hu", ask)
    assert asked == [("target", ""), ("target:cleveland", "hu")]


def test_folders_that_hold_the_file_come_first(tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class JobArguments:
        job: str = argument(help="job", complete="path:job.yml")

    view = view_of(CommandSpec("submit", "s", JobArguments, nothing, "view", False, ("submit",)))
    for name in ("archive", "heart", "hearts"):
        (tmp_path / name).mkdir()
    (tmp_path / "heart" / "job.yml").touch()
    (tmp_path / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    found = asyncio.run(complete("submit ", [view], dynamic))
    assert [(c.text, c.about) for c in found] == [
        ("heart", "has job.yml"),
        ("archive/", ""),
        ("hearts/", ""),
    ]
    assert [c.text for c in asyncio.run(complete("submit he", [view], dynamic))][0] == "heart"
