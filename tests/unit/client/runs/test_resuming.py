"""Runs that come back after a restart, at once or later."""

import asyncio
import errno
import json
import logging
import threading
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from flplatform.client import resuming
from flplatform.client import site_runs as module
from flplatform.client.policy import Policy
from flplatform.core.errors import InvalidArgumentError
from tests.unit.client.runs.world import (
    TASK,
    at_work,
    end,
    play,
    refused,
    settle,
    short,
    until_deleted,
)


def not_resumed(world, caplog, text: str) -> None:
    """A run is refused for good: the server hears of it until it says that the run has ended."""

    async def go():
        runs = world.runs()
        await runs.ready(1)
        assert (runs.numbers(), at_work(runs, 1), runs.over(1)) == ([1], None, False)
        assert await runs.ready(1) is None
        assert runs.reports()[0][2].startswith("not resumed, ")
        assert text in runs.troubles(1).lines[-1]["text"]
        await runs.close()

    caplog.clear()
    with caplog.at_level(logging.ERROR):
        play(go())
    assert caplog.text.count("run-1 is not resumed") == 1
    assert text in caplog.text


def resumed(world) -> list[int]:
    """Return the runs that can work right after a restart."""

    async def go():
        runs = world.runs()
        try:
            return [run.run for run in runs.all()]
        finally:
            await runs.close()

    return play(go())


def replace(path: Path, data: bytes) -> None:
    path.chmod(0o600)
    path.write_bytes(data)


def test_a_run_is_resumed(world, accepted, processes):
    async def go():
        (world.home / ".tmp-9").mkdir()
        runs = world.runs()
        await until_deleted(runs)
        assert not (world.home / ".tmp-9").exists()
        assert runs.numbers() == [1]
        await settle()
        assert processes.made == []  # it starts with its first task
        assert await at_work(runs, 1).execute(TASK, None, world.folder / "work") == "done"
        assert len(processes.made) == 1
        await runs.close()

    play(go())


def test_a_run_outlives_its_order(world, accepted, monkeypatch):
    """The start has expired since, but it was accepted in time."""

    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(days=2)

    monkeypatch.setattr(module, "datetime", Later)
    assert resumed(world) == [1]


def test_a_package_that_is_not_what_was_signed_is_not_resumed(world, accepted, caplog):
    path = world.blobs.path(accepted[3].digest)
    data = path.read_bytes()
    replace(path, world.packed(code="steal()"))  # well signed, but not what was started
    not_resumed(world, caplog, "is not the package that was signed")
    assert world.fetched[-1] == accepted[3].digest  # it would do if that brought another
    replace(path, data)
    assert resumed(world) == [1]


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: replace(path, b"rot")])
def test_a_package_that_is_gone_or_damaged_is_fetched_again(world, accepted, spoil):
    path = world.blobs.path(accepted[3].digest)
    data = path.read_bytes()
    spoil(path)

    async def fetch(blob):
        replace(path, data) if path.exists() else path.write_bytes(data)
        return path

    async def go():
        world.fetch = fetch
        runs = world.runs()
        assert (runs.numbers(), at_work(runs, 1)) == ([1], None)
        assert runs.needed_blobs() == {accepted[3].digest}
        run = await runs.ready(1)
        assert await run.execute(TASK, None, world.folder / "work") == "done"
        await runs.close()

    play(go())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"order": "AAAA"}, "is not JSON"),
        ({"order": "?"}, "is not JSON"),
        ({"more": 1}, "unknown key"),
        ({"accepted": "2001-01-01T00:00:00Z"}, "not yet valid"),
    ],
)
def test_a_changed_record_is_not_resumed(world, accepted, caplog, change, text):
    path = world.home / "run-1" / "start.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    not_resumed(world, caplog, text)


def test_a_narrowed_policy_is_not_resumed_until_it_is_widened(world, accepted, caplog):
    world.local(submitters=("o:site",))
    not_resumed(world, caplog, "policy submitters = o:site")

    async def go():
        runs = world.runs()
        assert await runs.ready(1) is None
        assert runs.busy() == {}  # nobody waits for its place
        world.local()
        runs._policy = Policy(world.kit, "sandbox")
        assert await runs.ready(1) is at_work(runs, 1) is not None
        await runs.close()

    play(go())


def test_a_revoked_submitter_is_not_resumed(world, caplog):
    async def go():
        runs = world.runs()
        await runs.accept(*world.offer(who="rex", data=world.packed("rex")))
        await runs.close()

    world.trust = world.people.before
    play(go())
    assert resumed(world) == [1]
    world.trust = world.people.kit.trust
    not_resumed(world, caplog, "it is revoked")


def test_a_run_that_is_refused_goes_when_the_server_says_that_it_has_ended(world, accepted):
    path = world.home / "run-1" / "start.json"
    path.write_text("{")

    async def go():
        runs = world.runs()
        with pytest.raises(InvalidArgumentError):  # the server asks again
            await runs.accept(*accepted)
        await end(runs, 1, "finished")
        assert (runs.numbers(), runs.over(1)) == ([], True)
        assert [path.name for path in world.home.iterdir()] == ["submissions.json"]
        await refused(runs.accept(*accepted), "single start")
        await runs.close()

    play(go())


def test_one_bad_run_does_not_keep_the_others(world, accepted):
    async def go():
        runs = world.runs()
        await runs.accept(*world.offer(2, 2, data=world.packed(code="x = 2")))
        await runs.close()

    play(go())
    world.blobs.delete(accepted[3].digest)
    assert resumed(world) == [2]


def test_a_run_waits_until_its_data_is_there(world, unmounted, patient, caplog):
    async def go():
        runs = world.runs()
        assert (runs.numbers(), at_work(runs, 1), runs.all()) == ([1], None, [])
        assert runs.held(1).run == 1
        assert runs.reports()[0][:3] == (1, 0, "waiting, retries: permission_denied")
        assert "does not exist" in runs.troubles(1).lines[0]["text"]
        assert "run 1 waits, try 1 failed: dataset 'mnist' is mapped" in caplog.text
        assert runs.busy() == {"default": 1}
        assert runs.submitter(1)[0] == "amy"
        state = runs.held(1).state
        task = asyncio.create_task(runs.ready(1))
        asked = asyncio.create_task(runs.accept(*unmounted.offer))  # the server asks again
        await settle()
        assert runs.recorded(unmounted.offer[0], unmounted.offer[3]) is None
        waited, turn = await asyncio.wait([task, asked], timeout=0), runs.held(1).turn
        assert not waited[0]
        unmounted.mount.mkdir()
        run = await runs.ready(1)
        assert (await task) is run is at_work(runs, 1)
        assert await asked == {"isolation": "sandbox"}
        assert (run.state, run.turn) == (state, turn)
        assert run.troubles.held_up == ""
        assert run.report()[2] == "deployed"
        assert world.fetched == [unmounted.offer[3].digest]
        await runs.close()

    play(go())


def test_a_run_that_waits_is_tried_again_by_itself(world, unmounted, monkeypatch):
    tries = []

    def pause(attempt, longest_s):
        tries.append((attempt, longest_s))
        if len(tries) == 3:
            unmounted.mount.mkdir()
        return 0.0

    monkeypatch.setattr(resuming, "backoff_s", pause)

    async def go():
        runs = world.runs()
        waiting = runs.held(1)
        await waiting._settled.wait()
        assert at_work(runs, 1) is not None
        assert tries == [(n, world.kit.site.backoff_max_s) for n in (1, 2, 3)]
        await runs.close()

    play(go())


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO])
@pytest.mark.parametrize("what", ["start.json", "package"])
def test_what_cannot_be_read_now_is_read_later(world, accepted, monkeypatch, patient, number, what):
    failing = True
    real = Path.read_bytes

    def read(path):
        if failing and path.name == what:
            raise short(number)
        return real(path)

    def digest(path):
        if failing and what == "package":
            raise short(number)
        return digest_of_file(path)

    digest_of_file = resuming.digest_of_file
    monkeypatch.setattr(Path, "read_bytes", read)
    monkeypatch.setattr(resuming, "digest_of_file", digest)

    async def go():
        nonlocal failing
        runs = world.runs()
        assert (runs.numbers(), at_work(runs, 1)) == ([1], None)
        asked = asyncio.create_task(runs.accept(*accepted))
        await settle()
        failing = False
        assert await runs.ready(1) is not None
        assert await asked == {"isolation": "sandbox"}
        await runs.close()

    play(go())


def test_a_run_that_waits_is_ended(world, unmounted, patient):
    async def go():
        runs = world.runs()
        task = asyncio.create_task(runs.ready(1))
        await settle()
        await end(runs, 1, "finished")
        assert await task is None
        assert (runs.numbers(), runs.over(1)) == ([], True)
        assert [path.name for path in world.home.iterdir()] == ["submissions.json"]
        unmounted.mount.mkdir()
        assert world.runs().numbers() == []

    play(go())


def test_a_run_that_waits_is_started_anew(world, unmounted, patient):
    async def go():
        runs = world.runs()
        task = asyncio.create_task(runs.ready(1))
        await settle()
        unmounted.mount.mkdir()
        data = world.blobs.path(unmounted.offer[3].digest).read_bytes()
        anew = world.offer(run=1, number=2, data=data)
        await runs.accept(*anew)
        assert await runs.ready(1) is at_work(runs, 1)
        assert runs.recorded(anew[0], anew[3])
        await task
        await runs.close()

    play(go())


def test_an_end_while_a_run_is_read_again(world, unmounted, patient, monkeypatch):
    """It is not brought back to where it has no part any more."""
    reading, go_on = asyncio.Event(), threading.Event()
    real = resuming.open_package

    async def go():
        loop = asyncio.get_running_loop()
        runs = world.runs()
        unmounted.mount.mkdir()

        def slowly(*args):
            loop.call_soon_threadsafe(reading.set)
            assert go_on.wait(60)
            return real(*args)

        monkeypatch.setattr(resuming, "open_package", slowly)
        task = asyncio.create_task(runs.ready(1))
        await reading.wait()
        runs.end(1, "finished")
        go_on.set()
        await runs.until_ended(1)
        assert await task is None
        assert (runs.numbers(), (world.home / "run-1").exists()) == ([], False)
        await runs.close()

    play(go())


def test_an_end_at_the_moment_when_a_run_is_back(world, unmounted, patient, monkeypatch):
    async def go():
        runs = world.runs()
        waiting = runs.held(1)
        runs._beside[1].cancel()
        await settle()
        found = asyncio.get_running_loop().create_future()

        async def until_restored(_run):
            return await found

        monkeypatch.setattr(runs._resumer, "until_restored", until_restored)
        back = asyncio.create_task(runs._bring_back(waiting))
        await settle()
        found.set_result("restored")
        runs.end(1, "finished")
        await back
        await runs.until_ended(1)
        assert (runs.numbers(), (world.home / "run-1").exists()) == ([], False)
        await runs.close()

    play(go())


def test_the_submitter_is_known_again_after_a_restart(world, processes):
    async def go():
        runs = world.runs()
        await runs.accept(*world.offer())
        await runs.close()
        restarted = world.runs()
        assert restarted.submitter(1)[0] == "amy"
        await restarted.close()

    play(go())
