"""Folders of runs: after a kill at any instant a run, or a leftover."""

import asyncio
import errno
import os
from pathlib import Path

from flplatform.client import ending
from flplatform.client.site_runs import SiteRuns
from tests.unit.client.runs.world import end, play, refused, short, until_deleted


class Killed(BaseException):
    """A kill -9."""


CALLS = ["replace", "rename", "unlink", "rmdir", "open", "fsync"]


def test_a_kill_at_any_instant_of_an_end_leaves_a_run_or_a_leftover(world, monkeypatch):
    """It is over, or it is whole; and what is left is deleted at the next start."""

    async def begin(number: int) -> SiteRuns:
        runs = world.runs()
        await runs.accept(*world.offer(1, number, data=data))
        state = world.home / "run-1" / "state" / "1"
        state.mkdir(parents=True)
        (state / "best").write_bytes(b"state")
        cache = world.home / "run-1" / "process" / "box" / "cache"
        cache.mkdir(parents=True)
        (cache / "file").write_text("cached")
        cache.chmod(0o500)
        return runs

    def whole() -> bool:
        return (world.home / "run-1" / "state" / "1" / "best").exists()

    def killed_at(count: int, change) -> bool:
        """Make one change; return whether the kill came before its end."""
        calls = 0

        def dying(real):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls >= count:
                    raise Killed
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, dying(getattr(os, name)))
            try:
                change()
            except Killed:
                return True
        return False

    async def go():
        outcomes = set()
        for count in range(1, 100):
            runs = await begin(count)
            leftover = runs._folders.leftover()

            def change(runs=runs, leftover=leftover):
                runs._folders.retire(1, leftover)
                ending.remove(leftover)

            killed = killed_at(count, change)
            await runs.close()
            again = world.runs()
            assert whole() == (again.numbers() == [1])
            outcomes.add(tuple(again.numbers()))
            await end(again, 1, "finished")
            assert [path.name for path in world.home.iterdir()] == ["submissions.json"]
            await again.close()
            if not killed:
                assert outcomes == {(1,), ()}
                return
        raise AssertionError("it never came to its end")

    data = world.packed()
    play(go())


def test_folders_without_a_record_are_deleted_at_the_start(world):
    """As the removal of releases before has left them."""
    for name in ("run-7/state", ".tmp-gone-1/code", "other"):
        (world.home / name).mkdir(parents=True)
    (world.home / "run-7" / "state").chmod(0o500)
    (world.home / ".tmp-file").write_text("cut off")

    async def go():
        runs = world.runs()
        assert not (world.home / "run-7").exists()
        await until_deleted(runs)
        assert [path.name for path in world.home.iterdir()] == ["other"]
        assert runs.numbers() == []
        await runs.close()

    play(go())


def test_a_record_that_nobody_can_look_for_is_not_missing(world, accepted, monkeypatch, patient):
    real = Path.exists

    def exists(path):
        if path.name == "start.json":
            raise short(errno.EIO)
        return real(path)

    async def go():
        with monkeypatch.context() as patch:
            patch.setattr(Path, "exists", exists)
            runs = world.runs()
        assert await runs.ready(1) is not None
        await runs.close()

    play(go())


def test_submissions_of_starts_beside_each_other_are_all_noted(world):
    async def go():
        runs = world.runs()
        await asyncio.gather(*(runs.accept(*world.offer(n, n)) for n in range(1, 5)))
        for number in range(1, 5):
            await end(runs, number, "finished")
        await runs.close()
        again = world.runs()
        for number in range(1, 5):
            await refused(again.accept(*world.offer(number, number)), "single start")

    world.local(max_runs=4)
    play(go())
