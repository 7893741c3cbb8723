import asyncio
import errno
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from flplatform.core import events as ev
from flplatform.core.errors import FLError, UnavailableError
from flplatform.core.messages import ModelRef, TaskId
from flplatform.files.digest import digest_of
from flplatform.server.retention import Retention, freed_rounds, kept_blobs, old_updates
from flplatform.store.blobs import FileBlobStore
from tests.support.workflows import job, run_opened
from tests.unit.server.scene import play, settle, until

TASK = TaskId(1, 1, "train", "a")


def name(text: str) -> ev.Blob:
    return ev.Blob(digest=text, size=1)


def opened(keep: str = "last 2") -> ev.RunOpened:
    event = run_opened("ab", job(keep_updates=keep))
    return event.model_copy(update={"job_blob": name("package"), "initial_model": name("initial")})


def round_(number: int, digest: str = "", published: bool = True) -> list[ev.Event]:
    found: list[ev.Event] = [
        ev.RoundOpened(round=number, participants=("a",), model=name("m")),
        ev.UpdateAccepted(
            task_id=f"1/{number}/train/a",
            site="a",
            round=number,
            digest=digest or f"update {number}",
            size=1,
            examples=1,
        ),
    ]
    if published:
        found.append(ev.ModelPublished(round=number, model=name(f"model {number}")))
    return found


def log(keep: str = "last 2", rounds: int = 3) -> list[ev.Event]:
    return [opened(keep), *(event for n in range(1, rounds + 1) for event in round_(n))]


END = ev.RunEnded(status="aborted", reason="")
SUBMITTED = ev.ResultAccepted(task_id="1/3/submit_model/a", site="a", digest="best of a")


@pytest.mark.parametrize(
    ("events", "freed"),
    [
        ([], None),
        (log("all"), None),
        (log("last 2"), 1),
        ([*log("last 2"), *round_(4, published=False)], 2),
        (log("none"), 3),
        ([*log("none"), *round_(4, published=False)], 3),
        ([*log("none"), *round_(4, published=False), END], 4),
        ([*log("last 2"), END], 1),
        (log("last 2", rounds=1), -1),
        ([opened("none")], 0),
    ],
)
def test_up_to_which_round_updates_are_free(events: list[ev.Event], freed: int | None) -> None:
    assert freed_rounds(events) == freed


def test_what_a_run_needs() -> None:
    events = [*log("none"), *round_(4, published=False), SUBMITTED]
    always = {"package", "initial", "model 1", "model 2", "model 3", "best of a"}
    assert kept_blobs(events, 3) == always | {"update 4"}
    assert kept_blobs(events, None) == always | {f"update {n}" for n in (1, 2, 3, 4)}
    assert old_updates(events) == {"update 1", "update 2", "update 3"}
    assert old_updates(log("all")) == set()


class Scene:
    """Blobs by name, and the logs that name them.

    Attributes:
        active, ended: run → events with names in the place of digests.
    """

    def __init__(self, folder: Path) -> None:
        self.blobs = FileBlobStore(folder)
        self._digests: dict[str, str] = {}
        self.active: dict[int, list[ev.Event]] = {}
        self.ended: dict[int, list[ev.Event]] = {}
        self.reads: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.trouble: FLError | None = None
        self.retention = Retention(
            self.blobs, lambda: self.active, lambda: list(self.ended), self._read
        )

    def _read(self, run: int) -> Sequence[ev.Event]:
        assert self.gate.wait(60)
        self.reads.append(run)
        if self.trouble:
            raise self.trouble
        return self.ended[run]

    def put(self, *names: str) -> None:
        for text in names:
            data = text.encode()
            ref = self.blobs.create(lambda path, data=data: path.write_bytes(data) and None)
            self._digests[text] = ref.digest

    def digest(self, text: str) -> str:
        return self._digests[text]

    def log(self, *numbers: int, keep: str = "last 2", prefix: str = "update") -> list[ev.Event]:
        found: list[ev.Event] = [opened(keep)]
        for number in numbers:
            found += round_(number, self._digests.get(f"{prefix} {number}", ""))
        return found

    async def free(self, *names: str) -> None:
        await self.retention.free({self.digest(text) for text in names})

    def here(self) -> set[str]:
        return {text for text, digest in self._digests.items() if self.blobs.has(digest)}


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_only_what_nothing_names_is_freed(scene: Scene) -> None:
    async def play_it() -> None:
        scene.put("update 1", "update 2", "update 3", "orphan", "other")
        scene.active[1] = scene.log(1, 2, 3)
        await scene.free("update 1", "update 2", "update 3", "orphan")
        assert scene.here() == {"update 2", "update 3", "other"}
        await scene.free("orphan")

    play(play_it())


def test_another_run_may_need_the_same_bytes(scene: Scene) -> None:
    async def play_it() -> None:
        scene.put("update 1", "update 2", "update 3")
        scene.active[1] = scene.log(1, 2, 3)
        scene.active[2] = [opened(), *round_(1, scene.digest("update 1"))]
        await scene.free("update 1")
        assert "update 1" in scene.here()
        scene.ended[2] = [*scene.active.pop(2), END]
        await scene.free("update 1")
        assert "update 1" in scene.here(), "its last two rounds are kept"
        assert scene.reads == [2]
        await scene.free("update 1")
        assert scene.reads == [2], "an ended log is read once"

    play(play_it())


def test_what_a_run_got_between_two_looks_counts(scene: Scene) -> None:
    async def play_it() -> None:
        scene.put("update 1", "x")
        scene.active[1] = scene.log(1)
        scene.active[2] = [opened()]
        await scene.free("x")
        scene.put("x")
        scene.active[2] += round_(1, scene.digest("x"))
        scene.ended[2] = [*scene.active.pop(2), END]
        await scene.free("x")
        assert "x" in scene.here()

    play(play_it())


def test_a_run_that_ends_while_logs_are_read_counts(scene: Scene) -> None:
    async def play_it() -> None:
        scene.put("x")
        scene.ended[1] = [opened(), END]
        scene.active[2] = [opened()]
        scene.gate.clear()
        freeing = asyncio.create_task(scene.free("x"))
        await settle()
        scene.active[2] += round_(1, scene.digest("x"))
        scene.ended[2] = [*scene.active.pop(2), END]
        scene.gate.set()
        await freeing
        assert scene.here() == {"x"}
        assert scene.reads == [1, 2]

    play(play_it())


def test_uploads_for_open_tasks_are_kept(scene: Scene) -> None:
    async def play_it() -> None:
        scene.put("x", "y")
        x, y = scene.digest("x"), scene.digest("y")
        assert scene.retention.uploaded(TASK, x) == set()
        assert scene.retention.uploaded(TASK, x) == set(), "the same again"
        assert scene.retention.has_upload(TASK, x)
        assert not scene.retention.has_upload(TASK, y)
        await scene.free("x", "y")
        assert scene.here() == {"x"}
        scene.put("y")
        assert scene.retention.uploaded(TASK, y) == {x}, "one upload for a task"
        await scene.free("x", "y")
        assert scene.here() == {"y"}
        assert scene.retention.settle(1, {str(TASK)}) == set()
        assert scene.retention.settle(2, ()) == set()
        assert scene.retention.settle(1, ()) == {y}
        assert not scene.retention.has_upload(TASK, y)
        await scene.free("y")
        assert scene.here() == set()

    play(play_it())


def test_an_upload_that_is_gone_is_none(scene: Scene) -> None:
    scene.put("x")
    scene.retention.uploaded(TASK, scene.digest("x"))
    scene.blobs.delete(scene.digest("x"))
    assert not scene.retention.has_upload(TASK, scene.digest("x"))


def test_what_is_held_is_kept(scene: Scene) -> None:
    async def play_it() -> None:
        scene.put("x")
        with scene.retention.hold(scene.digest("x")):
            with scene.retention.hold(scene.digest("x")):
                await scene.free("x")
            await scene.free("x")
            assert scene.here() == {"x"}
        await scene.free("x")
        assert scene.here() == set()

    play(play_it())


def test_nothing_is_freed_while_a_log_cannot_be_read(scene: Scene) -> None:
    async def play_it() -> None:
        scene.put("x")
        scene.ended[1] = [opened(), END]
        scene.trouble = UnavailableError("a newer release wrote it")
        await scene.free("x")
        assert scene.here() == {"x"}
        scene.trouble = None
        await scene.free("x")
        await until(lambda: scene.here() == set())

    play(play_it())


def test_many_who_free_at_once_read_a_log_once(scene: Scene) -> None:
    async def play_it() -> None:
        scene.put("x", "y")
        scene.ended |= {run: [opened(), END] for run in range(1, 4)}
        await asyncio.gather(scene.free("x"), scene.free("y"), scene.free())
        assert scene.reads == [1, 2, 3]
        assert scene.here() == set()

    play(play_it())


def test_what_a_deleted_run_needed_is_needed_no_more(scene: Scene) -> None:
    async def play_it() -> None:
        scene.put("update 1")
        scene.ended[1] = [*scene.log(1), END]
        await scene.free("update 1")
        assert scene.here() == {"update 1"}
        del scene.ended[1]
        await scene.free("update 1")
        assert scene.here() == set()
        assert not scene.retention._needed

    play(play_it())


def test_a_blob_that_cannot_be_deleted_keeps_no_other(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def play_it() -> None:
        texts = [f"{number}" for number in range(9)]
        scene.put(*texts)
        bad, delete = scene.digest("4"), scene.blobs.delete

        def failing(digest: str) -> None:
            if digest == bad:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            delete(digest)

        monkeypatch.setattr(scene.blobs, "delete", failing)
        await scene.free(*texts)
        assert scene.here() == {"4"}
        assert f"blob {bad} stays for now: [Errno 5]" in caplog.text

    play(play_it())


def test_models_that_are_being_measured_are_kept() -> None:
    gather = ev.GatherOpened(
        stage="validate", round=3, participants=("a",), models={"b": name("model of another run")}
    )
    assert "model of another run" in kept_blobs([opened(), gather], None)


def test_what_an_upload_has_left_goes_with_its_task(scene: Scene) -> None:
    data = b"never sent whole"
    blob = ModelRef(digest_of(data), len(data))
    tasks = [TaskId.parse(f"1/{number}/train/site-1") for number in (1, 2)]
    for task_id in tasks:
        scene.retention.begin(task_id)
        writer = scene.blobs.receive(str(task_id), blob)
        writer.write(data[:5])
        writer.suspend()
    assert scene.retention.settle(1, {str(tasks[1])}) == set()
    offsets = []
    for task_id in tasks:
        writer = scene.blobs.receive(str(task_id), blob)
        offsets.append(writer.offset)
        writer.suspend()
    assert offsets == [0, 5], "the settled task's part is gone, the open one's goes on"
