"""The spool: whole entries, settled for good, at any kill."""

import errno
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest

from flplatform.client import spool as module
from flplatform.client.spool import Spool, SpooledResult
from flplatform.client.state import current_state
from flplatform.core.errors import (
    AlreadyExistsError,
    DataLossError,
    NotFoundError,
    ResourceExhaustedError,
)
from flplatform.core.messages import ModelRef, TaskId

TASK = TaskId(7, 1, "train", "site-1")
NEXT = TaskId(7, 2, "train", "site-1")
MODEL = b"weights"


@pytest.fixture
def run(tmp_path):
    """A run's folder, with a committed state."""
    folder = tmp_path / "runs" / "run-7"
    (folder / "state" / "4").mkdir(parents=True)
    (folder / "state" / "4" / "counter").write_text("old")
    return folder


def make_work(tmp_path, state="new"):
    work = tmp_path / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    (work / "result.safetensors").write_bytes(MODEL)
    if state:
        (work / "state" / "user").mkdir(parents=True)
        (work / "state" / "counter").write_text(state)
        (work / "state" / "user" / "link").symlink_to("/nowhere")
    return work


def result(task_id=TASK):
    blob = ModelRef("blake3:" + "0" * 64, len(MODEL))
    return SpooledResult(task_id, blob, 3, {"loss": 0.5}, {"acc": 1.0}, 2, "blake3:" + "1" * 64)


def counter(run):
    return (current_state(run / "state") / "counter").read_text()


def assert_clean(tmp_path):
    for name in ("adopting", "trash"):
        assert list((tmp_path / "spool" / name).iterdir()) == []


def test_an_entry_survives_and_settles(tmp_path, run):
    spool = Spool(tmp_path / "spool")
    spool.commit(result(NEXT), make_work(tmp_path))
    spool.commit(result(), make_work(tmp_path))
    assert not (tmp_path / "work").exists()
    spool = Spool(tmp_path / "spool")
    assert spool.entries() == [result(), result(NEXT)]
    assert spool.get(TASK) == result()
    assert spool.file(TASK).read_bytes() == MODEL
    spool.settle(TASK, run / "state")
    assert spool.entries() == [result(NEXT)]
    assert counter(run) == "new"
    assert [path.name for path in (run / "state").iterdir()] == ["5"]
    spool.settle(NEXT, None)
    assert spool.get(NEXT) is None
    assert counter(run) == "new"
    assert_clean(tmp_path)
    with pytest.raises(NotFoundError):
        spool.settle(NEXT, None)


def test_an_adopted_entry_that_was_half_deleted_when_the_power_failed(tmp_path, run):
    """Its way to the trash was undone, its emptying was not: the site must still start."""
    Spool(tmp_path / "spool")
    left = tmp_path / "spool" / "adopting" / "7,1,train,site-1"
    left.mkdir()
    (left / "result.safetensors").write_bytes(MODEL)
    assert Spool(tmp_path / "spool").entries() == []
    assert counter(run) == "old"
    assert_clean(tmp_path)


def test_a_result_may_have_no_model_and_no_state(tmp_path, run):
    spool = Spool(tmp_path / "spool")
    work = make_work(tmp_path, state="")
    (work / "result.safetensors").unlink()
    plain = SpooledResult(TASK, None, 3)
    spool.commit(plain, work)
    assert Spool(tmp_path / "spool").get(TASK) == plain
    spool.settle(TASK, run / "state")
    assert counter(run) == "old"


def test_the_first_state_of_a_run(tmp_path, run):
    shutil.rmtree(run / "state")
    spool = Spool(tmp_path / "spool")
    spool.commit(result(), make_work(tmp_path))
    spool.settle(TASK, run / "state")
    assert [path.name for path in (run / "state").iterdir()] == ["1"]
    assert counter(run) == "new"


def test_a_task_has_one_entry(tmp_path):
    spool = Spool(tmp_path / "spool")
    spool.commit(result(), make_work(tmp_path))
    with pytest.raises(AlreadyExistsError):
        spool.commit(result(), make_work(tmp_path))


def test_drop_run_leaves_other_runs(tmp_path):
    other = TaskId(77, 1, "train", "site-1")
    spool = Spool(tmp_path / "spool")
    for task_id in (TASK, NEXT, other):
        spool.commit(result(task_id), make_work(tmp_path))
    spool.drop_run(7)
    assert spool.entries() == [result(other)]
    assert_clean(tmp_path)


def test_the_state_of_a_run_that_has_ended_is_dropped(tmp_path, run):
    spool = Spool(tmp_path / "spool")
    spool.commit(result(), make_work(tmp_path))
    shutil.rmtree(run)
    spool.settle(TASK, run / "state")
    assert not run.exists()
    assert_clean(tmp_path)


@pytest.mark.parametrize("damage", ["json", "size", "missing"])
def test_a_damaged_entry_is_told_and_dropped_at_opening(tmp_path, damage, caplog):
    spool = Spool(tmp_path / "spool")
    spool.commit(result(), make_work(tmp_path))
    file = spool.file(TASK)
    if damage == "json":
        (file.parent / "result.json").write_text("{}")
    elif damage == "size":
        file.write_bytes(b"")
    else:
        file.unlink()
    with pytest.raises(DataLossError):
        spool.get(TASK)
    assert Spool(tmp_path / "spool").entries() == []
    assert "its task will be done again" in caplog.text


def test_a_spool_may_be_moved_with_its_runs(tmp_path, run, monkeypatch):
    spool = Spool(tmp_path / "spool")
    spool.commit(result(), make_work(tmp_path))
    monkeypatch.setattr(spool, "_adopt", None)  # a kill right after the decision
    with pytest.raises(TypeError):
        spool.settle(TASK, run / "state")
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("spool", "runs"):
        (tmp_path / name).rename(moved / name)
    assert Spool(moved / "spool").entries() == []
    assert counter(moved / "runs" / "run-7") == "new"


class Kill(BaseException):
    """Instead of the k-th system call, and of all later ones."""


@pytest.fixture
def kill_at(monkeypatch):
    """Makes the process 'die' before the k-th call that changes the disk."""
    names = ("rename", "replace", "fsync", "unlink", "rmdir", "mkdir", "open")
    left = [10**9]

    def dying(call):
        def wrapper(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Kill
            return call(*args, **kwargs)

        return wrapper

    for name in names:
        monkeypatch.setattr(os, name, dying(getattr(os, name)))

    def arm(calls):
        left[0] = calls

    return arm


OPERATIONS = {
    "commit": lambda spool, tmp_path, run: spool.commit(result(NEXT), tmp_path / "work"),
    "adopt": lambda spool, tmp_path, run: spool.settle(TASK, run / "state"),
    "drop": lambda spool, tmp_path, run: spool.settle(TASK, None),
    "drop_run": lambda spool, tmp_path, run: spool.drop_run(7),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_kill_anywhere_leaves_it_whole_or_done(tmp_path, kill_at, operation):
    seen = set()
    for calls in range(1000):
        folder = tmp_path / str(calls)
        run = folder / "runs" / "run-7"
        (run / "state" / "4").mkdir(parents=True)
        (run / "state" / "4" / "counter").write_text("old")
        spool = Spool(folder / "spool")
        spool.commit(result(), make_work(folder))
        make_work(folder)
        kill_at(calls)
        try:
            OPERATIONS[operation](spool, folder, run)
            killed = False
        except Kill:
            killed = True
        kill_at(10**9)
        spool = Spool(folder / "spool")
        assert_clean(folder)
        seen.add((*map(str, (entry.task_id for entry in spool.entries())), counter(run)))
        for entry in spool.entries():
            assert spool.file(entry.task_id).read_bytes() == MODEL
            assert (spool.file(entry.task_id).parent / "state" / "counter").read_text() == "new"
        if operation == "adopt" and killed and spool.get(TASK):
            spool.settle(TASK, run / "state")
            assert counter(run) == "new"
        if not killed:
            break
    task, following = str(TASK), str(NEXT)
    assert calls > 5
    assert (
        seen
        == {
            "commit": {(task, "old"), (task, following, "old")},
            "adopt": {(task, "old"), ("new",)},
            "drop": {(task, "old"), ("old",)},
            "drop_run": {(task, "old"), ("old",)},
        }[operation]
    )


@pytest.mark.parametrize("fails", ["write_atomic", "_fsync_tree", "fsync_dir"])
def test_committing_goes_on_where_the_disk_refused(tmp_path, monkeypatch, fails):
    spool, work = Spool(tmp_path / "spool"), make_work(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, fails, Mock(side_effect=OSError(errno.ENOSPC, "full")))
        with pytest.raises(OSError, match="full"):
            spool.commit(result(), work)
    spool.commit(result(), work)
    assert not work.exists()
    assert spool.entries() == [result()]


class Slow:
    """A call that takes until it is released, the first time."""

    def __init__(self, real):
        self._real, self._first = real, threading.Lock()
        self.begun, self.may_go_on = threading.Event(), threading.Event()

    def __call__(self, *args, **kwargs):
        if self._first.acquire(blocking=False):
            self.begun.set()
            assert self.may_go_on.wait(60)
        return self._real(*args, **kwargs)


@pytest.mark.parametrize(
    ("where", "name", "work"),
    [
        (module, "_fsync_tree", lambda spool, run, left: spool.commit(result(NEXT), left)),
        (shutil, "rmtree", lambda spool, run, left: spool.settle(TASK, None)),
        (shutil, "rmtree", lambda spool, run, left: spool.settle(TASK, run / "state")),
        (shutil, "rmtree", lambda spool, run, left: spool.drop_run(7)),
    ],
    ids=["commit", "drop", "adopt", "drop_run"],
)
def test_nobody_waits_for_what_takes_its_time(tmp_path, run, monkeypatch, where, name, work):
    """Large results are synced and deleted while other runs' results come and go."""
    other = TaskId(8, 1, "train", "site-1")
    spool = Spool(tmp_path / "spool")
    spool.commit(result(), make_work(tmp_path))
    left, mine = make_work(tmp_path), tmp_path / "mine"
    shutil.copytree(left, mine, symlinks=True)
    slow = Slow(getattr(where, name))
    monkeypatch.setattr(where, name, slow)
    with ThreadPoolExecutor(2) as threads:
        try:
            taking = threads.submit(work, spool, run, left)
            assert slow.begun.wait(60)
            threads.submit(spool.commit, result(other), mine).result(10)
            assert threads.submit(spool.get, other).result(10) == result(other)
            assert result(other) in threads.submit(spool.entries).result(10)
            threads.submit(spool.settle, other, None).result(10)
        finally:
            slow.may_go_on.set()
        taking.result(10)
    assert_clean(tmp_path)
    assert Spool(tmp_path / "spool").get(other) is None


def test_a_settled_state_is_current_though_what_it_leaves_cannot_be_deleted(
    tmp_path, run, monkeypatch, caplog
):
    """Else no result of any run would be settled any more."""
    spool = Spool(tmp_path / "spool")
    spool.commit(result(), make_work(tmp_path))
    spool.commit(result(NEXT), make_work(tmp_path, state="newer"))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", Mock(side_effect=OSError(errno.EIO, "broken")))
        spool.settle(TASK, run / "state")
        spool = Spool(tmp_path / "spool")
        spool.settle(NEXT, run / "state")
    assert counter(run) == "newer"
    assert "is deleted later" in caplog.text
    spool.drop_run(9)
    assert_clean(tmp_path)


def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path, monkeypatch):
    """What lies in it would count as durable, and nobody has synced it."""
    spool, work, real = Spool(tmp_path / "spool"), make_work(tmp_path), os.scandir

    def scandir(path):
        if Path(path).name == "user":
            raise OSError(errno.EMFILE, "too many open files")
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        with pytest.raises(OSError, match="too many"):
            spool.commit(result(), work)
    assert spool.entries() == []
    spool.commit(result(), work)
    assert spool.entries() == [result()]


OTHER = TaskId(8, 1, "train", "site-1")


@pytest.fixture
def on_its_way(tmp_path, run, monkeypatch):
    """The target file of a result of run 7 that was settled, and killed before it was current."""
    spool = Spool(tmp_path / "spool")
    spool.commit(result(), make_work(tmp_path))
    spool.commit(result(OTHER), make_work(tmp_path))
    (tmp_path / "runs" / "run-8").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(spool, "_adopt", None)
        with pytest.raises(TypeError):
            spool.settle(TASK, run / "state")
    return tmp_path / "spool" / "adopting" / "7,1,train,site-1" / "target.json"


def test_a_settled_state_that_is_damaged_is_told_and_dropped(tmp_path, run, on_its_way, caplog):
    """Else no result of any run would be settled any more, and the site not start."""
    on_its_way.write_bytes(bytes(40))
    spool = Spool(tmp_path / "spool")
    assert "the state of 7,1,train,site-1 is lost" in caplog.text
    assert counter(run) == "old"
    spool.settle(OTHER, tmp_path / "runs" / "run-8" / "state")
    assert counter(tmp_path / "runs" / "run-8") == "new"
    assert_clean(tmp_path)


def test_a_settled_state_that_cannot_be_read_now_holds_up_its_own_run(
    tmp_path, run, on_its_way, monkeypatch
):
    real = Path.read_bytes

    def read_bytes(self):
        if self == on_its_way:
            raise OSError(errno.EIO, "broken")
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read_bytes)
        spool = Spool(tmp_path / "spool")
        spool.settle(OTHER, tmp_path / "runs" / "run-8" / "state")
        assert counter(tmp_path / "runs" / "run-8") == "new"
        spool.drop_run(9)
        with pytest.raises(OSError, match="broken"):
            spool.get(NEXT)  # it would begin from the state before
    assert spool.get(NEXT) is None
    assert counter(run) == "new"
    spool.drop_run(9)  # empties the trash
    assert_clean(tmp_path)


@pytest.mark.parametrize(
    "drop", [lambda spool: spool.give_up(NEXT), lambda spool: spool.drop_run(7)]
)
def test_a_settled_state_that_can_never_be_read_can_be_given_up(
    tmp_path, run, on_its_way, monkeypatch, drop
):
    monkeypatch.setattr(Path, "read_bytes", Mock(side_effect=OSError(errno.EIO, "broken")))
    spool = Spool(tmp_path / "spool")
    drop(spool)
    assert spool.get(NEXT) is None
    assert counter(run) == "old"
    assert_clean(tmp_path)


def test_a_result_that_cannot_be_read_for_a_shortage_is_kept(tmp_path, monkeypatch):
    spool = Spool(tmp_path / "spool")
    spool.commit(result(), make_work(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", Mock(side_effect=OSError(errno.EMFILE, "too many")))
        with pytest.raises(ResourceExhaustedError):
            Spool(tmp_path / "spool")
    assert spool.entries() == [result()]


def test_one_damaged_entry_hides_no_other(tmp_path):
    spool = Spool(tmp_path / "spool")
    spool.commit(result(), make_work(tmp_path))
    spool.commit(result(OTHER), make_work(tmp_path))
    spool.file(TASK).unlink()
    assert spool.entries() == [result(OTHER)]
    spool.give_up(TASK)
    assert spool.get(TASK) is None
    assert_clean(tmp_path)
