import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flplatform.client import run_verbs
from flplatform.client.run_verbs import delete_verb
from flplatform.client.verbs import Asked
from flplatform.core.errors import FailedPreconditionError, InvalidArgumentError
from flplatform.security.signing import CommandOrder

NOW = datetime(2024, 5, 1, 12, tzinfo=UTC)


class FakeRuns:
    def __init__(self, *numbers: int) -> None:
        self.hand = list(numbers)

    def numbers(self) -> list[int]:
        return self.hand

    def submitter(self, run: int) -> tuple[str, str]:
        return ("lea", "a") if run == 3 else ("", "")


def asked(*argv: str) -> Asked:
    order = CommandOrder(
        project="heart",
        issued_at=NOW,
        not_after=NOW + timedelta(seconds=60),
        id="0" * 32,
        argv=argv,
    )
    return Asked("id", None, order, b"{}")  # type: ignore[arg-type]


def test_logs_and_leftovers_of_one_run_are_removed(tmp_path: Path) -> None:
    for name in ("run-3.log", "run-3.log.1", "run-33.log", "run-4.log"):
        (tmp_path / name).write_text("12345")
    (tmp_path / "runs" / "run-3" / "code").mkdir(parents=True)
    (tmp_path / "runs" / "run-4").mkdir()
    verb = delete_verb(FakeRuns(4), tmp_path, tmp_path / "runs")
    assert (verb.permission, verb.mutating) == ("train", True)
    assert asyncio.run(verb.act(asked("delete_run_number", "3"))) == {"files": 2, "bytes": 10}
    assert sorted(path.name for path in tmp_path.rglob("run-*")) == [
        *("run-33.log", "run-4", "run-4.log")
    ]
    assert asyncio.run(verb.act(asked("delete_run_number", "3"))) == {"files": 0, "bytes": 0}


def test_a_run_at_work_keeps_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_verbs, "ENDING_S", 0.05)
    (tmp_path / "run-3.log").write_text("12345")
    verb = delete_verb(FakeRuns(3), tmp_path, tmp_path / "runs")
    with pytest.raises(FailedPreconditionError, match="still at work here: its log stays"):
        asyncio.run(verb.act(asked("delete_run_number", "3")))
    assert (tmp_path / "run-3.log").exists()


def test_a_run_about_to_end_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "run-3.log").write_text("12345")
    runs = FakeRuns(3)
    verb = delete_verb(runs, tmp_path, tmp_path / "runs")

    async def scene() -> None:
        asyncio.get_running_loop().call_later(0.05, runs.hand.clear)
        assert (await verb.act(asked("delete_run_number", "3")))["files"] == 1

    asyncio.run(scene())


@pytest.mark.parametrize("words", [[], ["x"], ["3", "4"], ["../3"], ["٣"], ["--", "-3"]], ids=str)
def test_the_words_must_name_one_run(tmp_path: Path, words: list[str]) -> None:
    verb = delete_verb(FakeRuns(), tmp_path, tmp_path)
    with pytest.raises(InvalidArgumentError):
        asyncio.run(verb.act(asked("delete_run_number", *words)))


def test_whose_run_it_is(tmp_path: Path) -> None:
    verb = delete_verb(FakeRuns(), tmp_path, tmp_path)
    assert verb.submitter(None, ["delete_run_number", "3"]) == ("lea", "a")  # type: ignore[arg-type]
    assert verb.submitter(None, ["delete_run_number", "4"]) == ("", "")  # type: ignore[arg-type]
    assert verb.reaches(["delete_run_number", "3"], "anybody")
