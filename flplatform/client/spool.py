"""Results that wait for the server's answer, and the states that it makes current.

    entries/<id>/    a result: `result.json`, `result.safetensors` if it has a model, `state/`
    adopting/<id>/   settled; its state is on the way to the run
    trash/           on the way out

where `<id>` is the task id with `,` for `/`. States become those of `client.state`.

Every step is one rename: an entry appears whole or not at all, `settle` decides by moving it out
of `entries`, and a state becomes current by the rename that gives it its number. What a kill left
half done is finished when the spool is opened, or at the next call.
"""

import logging
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from flplatform.client.frames import RESULT_FILE, STATE_FOLDER
from flplatform.client.state import current_state
from flplatform.core.errors import (
    AlreadyExistsError,
    ConfigError,
    DataLossError,
    InvalidArgumentError,
    NotFoundError,
)
from flplatform.core.messages import ModelRef, TaskId
from flplatform.core.strict import Strict, parse_json
from flplatform.files.digest import digest_of_file
from flplatform.files.durable import fsync_dir, private_dir, sync, write_atomic
from flplatform.files.shortage import explaining_shortage

log = logging.getLogger(__name__)

RESULT = "result.json"
TARGET = "target.json"


@dataclass(frozen=True, slots=True)
class SpooledResult:
    """A result as it is sent until it is answered; see `messages.TaskResult`."""

    task_id: TaskId
    blob: ModelRef | None
    examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    received: Mapping[str, float] = field(default_factory=dict)
    received_examples: int = 0
    trained_from: str = ""


class _ResultFile(Strict):
    """`result.json`; no digest means that there is no model."""

    version: Literal[1] = 1
    task_id: str
    digest: str
    size: int
    examples: int
    metrics: dict[str, float]
    received: dict[str, float]
    received_examples: int
    trained_from: str


class _TargetFile(Strict):
    """`target.json`: where the state of an entry goes, seen from the spool's folder."""

    version: Literal[1] = 1
    state: str


class Spool:
    """Settled or complete, at any kill. Thread-safe.

    Whoever waits for the lock waits for renames and small files only: large folders are made
    durable before their rename into the spool, and deleted after that into the trash.

    Args:
        folder: the spool's own; on one file system with work folders and states.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._entries = private_dir(folder / "entries")
        self._adopting = private_dir(folder / "adopting")
        self._trash = private_dir(folder / "trash")
        self._lock = threading.RLock()
        self._deleting: set[Path] = set()
        self._adopt_all()
        self._empty_trash()
        for entry in self._entries.iterdir():
            try:
                _read(entry)
            except DataLossError as error:
                log.error("%s is dropped, its task will be done again: %s", entry.name, error)
                self._discard(entry)

    def commit(self, result: SpooledResult, work: Path) -> None:
        """Make a work folder an entry: durable on return, and `work` is gone.

        Args:
            result: what to send; its blob, if any, lies in `work/result.safetensors`.
            work: the caller's own folder, with `state/` if the task changed it.

        Raises:
            AlreadyExistsError: the task has an entry.
            OSError: the disk refused; the same call again goes on from there.
        """
        entry = self._entry(result.task_id)
        if not entry.exists():
            write_atomic(work / RESULT, _to_file(result).model_dump_json().encode())
            _fsync_tree(work)
        with self._lock:
            if not entry.exists():
                os.rename(work, entry)
            elif work.exists():
                raise AlreadyExistsError(f"task {result.task_id} has a result already")
        fsync_dir(self._entries)
        fsync_dir(work.parent)

    def entries(self) -> list[SpooledResult]:
        """Return all results that wait for an answer, in order of their task ids.

        A damaged one is passed over: `get` tells of it when its task is offered.
        """
        found = []
        with self._lock:
            for entry in self._entries.iterdir():
                try:
                    found.append(_read(entry))
                except DataLossError as error:
                    log.warning("%s is passed over: %s", entry.name, error)
        return sorted(found, key=lambda result: result.task_id)

    def get(self, task_id: TaskId) -> SpooledResult | None:
        """Return the result of a task, if it waits for an answer.

        What its run has settled before is current then: the task may begin from it.

        Raises:
            DataLossError: the entry is damaged.
            OSError: a settled state cannot be made current now.
        """
        with self._lock:
            self._adopt_all(task_id.run)
            entry = self._entry(task_id)
            return _read(entry) if entry.exists() else None

    def give_up(self, task_id: TaskId) -> None:
        """Delete what `get` cannot read: the result of a task, or what its run has settled before.

        Raises:
            OSError: the disk refused; the rest is deleted at the next call.
        """
        try:
            with self._lock:
                if self._entry(task_id).exists():
                    self._discard(self._entry(task_id))
                    fsync_dir(self._entries)
                self._discard_settled(task_id.run)
        finally:
            self._empty_trash()

    def is_whole(self, result: SpooledResult) -> bool:
        """Return whether the model of a result is here, byte for byte, if it has one.

        Raises:
            OSError: it cannot be read.
        """
        if result.blob is None:
            return True
        path = self.file(result.task_id)
        return path.exists() and digest_of_file(path)[0] == result.blob.digest

    def file(self, task_id: TaskId) -> Path:
        """Return the model file of a task's result."""
        return self._entry(task_id) / RESULT_FILE

    def settle(self, task_id: TaskId, state: Path | None) -> None:
        """Delete a result that has been answered, for good on return.

        Args:
            task_id: whose result.
            state: folder of the run's committed state if the result's state, should it have one,
                becomes current; None if it is dropped.

        Raises:
            NotFoundError: the task has no entry.
            OSError: the disk refused; the entry is whole, or what is left is finished later.
        """
        try:
            with self._lock:
                self._settle(task_id, state)
        finally:
            self._empty_trash()

    def drop_run(self, run: int) -> None:
        """Delete all results of a run, unanswered or not.

        Raises:
            OSError: the disk refused; the rest is deleted at the next call.
        """
        try:
            with self._lock:
                for entry in self._entries.iterdir():
                    if _is_of(entry, run):
                        self._discard(entry)
                fsync_dir(self._entries)
                self._discard_settled(run)
        finally:
            self._empty_trash()

    def _entry(self, task_id: TaskId) -> Path:
        return self._entries / str(task_id).replace("/", ",")

    def _settle(self, task_id: TaskId, state: Path | None) -> None:
        self._adopt_all(task_id.run)
        entry = self._entry(task_id)
        if not entry.exists():
            raise NotFoundError(f"task {task_id} has no result here")
        if state is not None and (entry / STATE_FOLDER).is_dir():
            target = _TargetFile(state=os.path.relpath(state, self._folder))
            write_atomic(entry / TARGET, target.model_dump_json().encode())
            os.rename(entry, self._adopting / entry.name)
            fsync_dir(self._adopting)
        else:
            self._discard(entry)
        fsync_dir(self._entries)
        self._adopt_all(task_id.run)

    def _adopt_all(self, run: int | None = None) -> None:
        """Make all settled states current; what the disk refuses one of another run waits.

        Raises:
            OSError: it refused one of `run`.
        """
        for settled in self._adopting.iterdir():
            try:
                try:
                    self._adopt(settled)
                except ConfigError as error:
                    log.error("the state of %s is lost: %s", settled.name, error)
                self._discard(settled)
            except OSError as error:
                if _is_of(settled, run):
                    raise
                log.warning("the state of %s waits: %s", settled.name, error)

    def _discard_settled(self, run: int) -> None:
        for settled in self._adopting.iterdir():
            if _is_of(settled, run):
                self._discard(settled)
        fsync_dir(self._adopting)

    def _empty_trash(self) -> None:
        """Delete what is in the trash and not being deleted already; what refuses stays there."""
        with self._lock:
            found = [path for path in _listed(self._trash) if path not in self._deleting]
            self._deleting.update(found)
        for path in found:
            try:
                shutil.rmtree(path)
            except OSError as error:
                log.warning("%s is deleted later: %s", path, error)
            finally:
                with self._lock:
                    self._deleting.discard(path)

    def _adopt(self, settled: Path) -> None:
        """Give a settled state the next number in its run's folder, then drop the older ones."""
        if not (settled / TARGET).exists():
            return  # adopted before a crash that undid its way to the trash, and not its emptying
        file = parse_json(_TargetFile, (settled / TARGET).read_bytes(), str(settled / TARGET))
        target = Path(os.path.normpath(self._folder / file.state))
        if not target.parent.is_dir():
            return  # the run has ended here
        if not target.is_dir():
            private_dir(target)
            fsync_dir(target.parent)
        current = current_state(target)
        if (settled / STATE_FOLDER).is_dir():
            newest = target / str(int(current.name) + 1 if current else 1)
            os.rename(settled / STATE_FOLDER, newest)
            current = newest
        fsync_dir(target)  # also where the try before could not: older ones go only after it
        fsync_dir(settled)
        for generation in target.iterdir():
            if generation != current:
                self._discard(generation)

    def _discard(self, folder: Path) -> None:
        os.rename(folder, self._trash / secrets.token_hex(8))


def _is_of(entry: Path, run: int | None) -> bool:
    return entry.name.split(",")[0] == str(run)


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:  # no descriptor is left, perhaps
        log.warning("%s is not emptied now: %s", folder, error)
        return []


def _to_file(result: SpooledResult) -> _ResultFile:
    return _ResultFile(
        task_id=str(result.task_id),
        digest=result.blob.digest if result.blob else "",
        size=result.blob.size if result.blob else 0,
        examples=result.examples,
        metrics=dict(result.metrics),
        received=dict(result.received),
        received_examples=result.received_examples,
        trained_from=result.trained_from,
    )


def _read(entry: Path) -> SpooledResult:
    """Read an entry.

    Raises:
        DataLossError: it is not what was written, or cannot be read.
        ResourceExhaustedError: this machine is short of what reading takes.
    """
    path = entry / RESULT
    try:
        with explaining_shortage():
            file = parse_json(_ResultFile, path.read_bytes(), str(path))
            task_id = TaskId.parse(file.task_id)
            size = (entry / RESULT_FILE).stat().st_size if file.digest else 0
    except (OSError, ConfigError, InvalidArgumentError) as error:
        raise DataLossError(f"{path}: {error}") from None
    if size != file.size:
        raise DataLossError(f"{entry / RESULT_FILE} has {size} bytes, written were {file.size}")
    return SpooledResult(
        task_id=task_id,
        blob=ModelRef(file.digest, file.size) if file.digest else None,
        examples=file.examples,
        metrics=file.metrics,
        received=file.received,
        received_examples=file.received_examples,
        trained_from=file.trained_from,
    )


def _fsync_tree(folder: Path) -> None:
    """Make files and folders durable, the innermost first; links are entries of their folder."""

    def refuse(error: OSError) -> None:
        raise error  # else a folder that cannot be listed is passed over

    for parent, _, names in os.walk(folder, topdown=False, onerror=refuse):
        for name in names:
            path = Path(parent, name)
            if stat.S_ISREG(path.lstat().st_mode):
                handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
                try:
                    sync(handle)
                finally:
                    os.close(handle)
        fsync_dir(Path(parent))
