"""Blobs that no log names yet, and what may be freed around them."""

import asyncio
import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flplatform.core import events as ev
from flplatform.core.errors import ResourceExhaustedError
from flplatform.core.workflow import Abort
from flplatform.server import hands as hands_module
from flplatform.server import run_actor
from flplatform.server.lifecycle import Lifecycle
from flplatform.server.retention import kept_blobs
from flplatform.server.staging import Staging
from tests.unit.server.scene import GatedStore, Scene, caller, play, settle, until

NOBODY: set[str] = set()


@pytest.fixture
def gated(scene: Scene) -> tuple[Scene, GatedStore]:
    scene.store = store = GatedStore()
    scene.boot()
    return scene, store


def test_an_update_that_is_replaced_while_it_is_accepted(gated: tuple[Scene, GatedStore]) -> None:
    """A site sends two uploads for one task, and hands the first one in."""
    scene, store = gated

    async def go() -> None:
        scene.obeying("a", "b")
        await scene.submit(rounds=1)
        task = await scene.offered("a")
        first = scene.result(task, 1.0)
        await scene.do("b", 3.0)
        store.gated = True
        sending = asyncio.create_task(scene.training.submit_result("a", first))
        await until(lambda: store.waiting)
        await scene.training.note_upload(caller("a"), str(task.id), scene.model(2.0))
        await settle()
        assert scene.blobs.has(first.result.blob.digest)
        store.gated = False
        store.let_go()
        assert await sending == "accepted"
        await scene.ended()
        assert scene.events()[-1].status == "finished"
        await scene.close()

    play(go())


def test_a_model_that_took_the_last_space_outlasts_the_weekend(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_actor, "RETRY_S", 0.01)

    async def go() -> None:
        scene.obeying("a", "b")
        await scene.submit(rounds=2)
        staging = Staging(None, scene.runs, scene.blobs, None, None)  # type: ignore[arg-type]
        await scene.do("a", 1.0)
        aggregate = hands_module.aggregate_closed

        def aggregate_closed(*given):  # type: ignore[no-untyped-def]
            made = aggregate(*given)
            scene.store.full = True
            return made

        monkeypatch.setattr(hands_module, "aggregate_closed", aggregate_closed)
        await scene.do("b", 3.0)
        await until(lambda: "append" in scene.actor().troubles)
        for digest in scene.blobs.digests():
            os.utime(scene.blobs.path(digest), (1, 1))
        await staging.collect()
        scene.store.full = False
        task = await scene.offered("a")
        assert task.model is not None
        assert scene.blobs.has(task.model.digest)
        await scene.close()

    play(go())


def test_a_model_that_was_freed_when_it_was_made_is_made_again(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another run's that made the same bytes, deleted in just this moment."""
    made = []

    def aggregate_closed(*given):  # type: ignore[no-untyped-def]
        model, state = aggregate(*given)
        made.append(model)
        if len(made) == 1:
            scene.blobs.delete(model.digest)
        return model, state

    aggregate = hands_module.aggregate_closed
    monkeypatch.setattr(hands_module, "aggregate_closed", aggregate_closed)

    async def go() -> None:
        scene.obeying("a", "b")
        await scene.submit(rounds=1)
        await scene.do("a", 1.0)
        await scene.do("b", 3.0)
        await scene.ended()
        assert made[0] == made[1]
        (published,) = scene.events(kind=ev.ModelPublished)
        assert scene.blobs.has(published.model.digest)
        await scene.close()

    play(go())


@pytest.mark.parametrize("step", ["aggregate_closed", "make_wire"])
@pytest.mark.parametrize("when", ["while it is made", "when it is made"])
def test_what_is_made_for_a_run_that_was_aborted_is_freed(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, step: str, when: str
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    work = getattr(hands_module, step)

    def slowly(*given):  # type: ignore[no-untyped-def]
        if when == "when it is made":
            made = work(*given)
        begun.set()
        assert go_on.wait(60)
        return work(*given) if when == "while it is made" else made

    async def go() -> None:
        scene.obeying("a", "b")
        adam = {"name": "fedadam"}
        await scene.submit(rounds=1, keep_updates="all", codec_down="bf16", optimizer=adam)
        await scene.do("a", 1.0)
        monkeypatch.setattr(hands_module, step, slowly)
        await scene.do("b", 3.0)
        await until(begun.is_set)
        await scene.actor().tell(Abort("lead"))
        go_on.set()
        await scene.ended()
        named = kept_blobs(scene.events(), None)
        await until(lambda: set(scene.blobs.digests()) <= named)
        assert not scene.runs.retention._held
        await scene.close()

    play(go())


def test_what_is_made_for_a_run_that_does_not_begin_is_freed(scene: Scene) -> None:
    async def go() -> None:
        scene.store.full = True
        with pytest.raises(ResourceExhaustedError):
            await scene.submit(codec_down="bf16")
        await until(lambda: len(scene.blobs.digests()) == len(("package", "model")))
        scene.store.full = False
        await scene.submit(codec_down="bf16")
        await settle()
        wire = scene.actor().state.opened.wire
        assert wire is not None
        assert scene.blobs.has(wire.digest)
        await scene.close()

    play(go())


def test_a_run_that_shares_blobs_is_deleted_while_another_is_submitted(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, deleted = threading.Event(), threading.Event()

    def make_wire(*given):  # type: ignore[no-untyped-def]
        wire = make(*given)
        if not made.is_set():
            made.set()
            assert deleted.wait(60)
        return wire

    make = hands_module.make_wire

    async def go() -> None:
        scene.obeying("a", "b")
        lifecycle = Lifecycle(None, scene.runs, scene.clients, lambda: NOBODY, lambda _: None)  # type: ignore[arg-type]
        await scene.submit(rounds=1, codec_down="zstd")
        await scene.do("a", 1.0)
        await scene.do("b", 3.0)
        await scene.ended()
        monkeypatch.setattr(hands_module, "make_wire", make_wire)
        submitting = asyncio.create_task(scene.submit(rounds=1, codec_down="zstd"))
        await asyncio.to_thread(made.wait, 10)
        await lifecycle.delete(1, "lead")
        await settle()
        deleted.set()
        opened = scene.actor(await submitting).state.opened
        for blob in (opened.job_blob, opened.initial_model, opened.wire):
            assert scene.blobs.has(blob.digest)
        await scene.close()

    play(go())


def test_a_run_ends_although_nothing_can_be_tidied(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def forget(_transfer_id: str) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    async def go() -> None:
        scene.obeying("a", "b")
        changes: list[str] = []
        await scene.submit(rounds=1)
        task = await scene.offered("a")
        scene.runs.retention.begin(task.id)
        monkeypatch.setattr(scene.blobs, "forget", forget)
        scene.runs.changed = lambda: changes.append(scene.runs.last_event)
        await scene.actor().tell(Abort("lead"))
        await scene.ended()
        assert any("aborted" in change for change in changes)
        assert f"what came of task {task.id} stays for now" in caplog.text
        assert "a decision failed" not in caplog.text
        await scene.close()

    play(go())


def test_threads_are_left_for_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many runs are aggregated at once."""
    go_on = threading.Event()
    lock, at_work, most = threading.Lock(), 0, 0

    def aggregate_closed(*given):  # type: ignore[no-untyped-def]
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        assert go_on.wait(60)
        with lock:
            at_work -= 1
        return aggregate(*given)

    aggregate = hands_module.aggregate_closed
    monkeypatch.setattr(hands_module, "aggregate_closed", aggregate_closed)

    async def go(scene: Scene) -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(hands_module.MAKERS + 1))
        scene.obeying("a")
        count = hands_module.MAKERS + 3
        for run in range(1, count + 1):
            await scene.submit(("a",), rounds=1)
            await until(
                lambda run=run: any(task.id.run == run for task in scene.runs.tasks.of("a"))
            )
        for task in scene.runs.tasks.of("a"):
            await scene.training.submit_result("a", scene.result(task))
        await until(lambda: at_work == hands_module.MAKERS)
        assert await asyncio.to_thread(lambda: "a command") == "a command"
        go_on.set()
        for run in range(1, count + 1):
            await until(lambda run=run: scene.events(run, ev.ModelPublished))
        assert most == hands_module.MAKERS
        await scene.close()

    with ThreadPoolExecutor(2) as workers:
        play(go(Scene(tmp_path, workers)))
