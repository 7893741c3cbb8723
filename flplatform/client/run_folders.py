"""The folders of accepted runs, and which submissions were ever accepted.

    run-<N>/            an accepted run: `start.json`, the files of its package, its states
    .tmp-…              on the way in, or out
    submissions.json    submission id → run

A run comes and goes by one rename each: after a kill at any instant its folder is that of an
accepted run, or a leftover that is deleted.
"""

import json
import logging
import re
import secrets
import threading
from contextlib import suppress
from pathlib import Path

from flplatform.client.site_run import RunRecord
from flplatform.core.errors import DataLossError, FLError
from flplatform.core.job import CODE_FOLDER
from flplatform.files.durable import (
    fsync_dir,
    private_dir,
    replace_durably,
    temporary_beside,
    write_atomic,
)
from flplatform.files.removal import remove
from flplatform.security.package import Package

log = logging.getLogger(__name__)

RECORD = "start.json"
SUBMISSIONS = "submissions.json"
_TEMPORARY = ".tmp-"
_RUN = re.compile(r"run-([1-9][0-9]{0,9})")


class RunFolders:
    """Everything below one folder of the site's. Thread-safe.

    Attributes:
        submissions: submission id → run of all that was ever accepted.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = private_dir(folder)
        self._noting = threading.Lock()
        self.submissions: dict[str, int] = {}

    def open(self) -> tuple[dict[int, Path], list[Path]]:
        """Return the folders of accepted runs by number, and leftovers that nobody needs.

        Raises:
            DataLossError: which submissions were accepted cannot be read.
            OSError: the folder cannot be read.
        """
        path = self._folder / SUBMISSIONS
        if path.exists():
            self.submissions = _read_submissions(path)
        accepted, leftovers = {}, []
        for entry in sorted(self._folder.iterdir()):
            if entry.name.startswith(_TEMPORARY):
                leftovers.append(entry)
            elif match := _RUN.fullmatch(entry.name):
                if _may_have_record(entry):
                    accepted[int(match[1])] = entry
                else:  # under another name, so that the run may be started anew meanwhile
                    leftovers.append(entry.rename(self.leftover()))
        return accepted, leftovers

    def leftover(self) -> Path:
        """Return an unused name for what nobody needs any more."""
        return self._folder / f"{_TEMPORARY}gone-{secrets.token_hex(8)}"

    def retire(self, run: int, leftover: Path) -> None:
        """Make the folder of a run a leftover: durable on return; nothing happens without one.

        Raises:
            OSError: the disk refused; the same call again goes on from there.
        """
        folder = self._path(run)
        if folder.exists():
            replace_durably(folder, leftover)
        else:
            fsync_dir(self._folder)  # the sync after its rename may have failed

    def unpack(self, record: RunRecord, package: Package) -> Path:
        """Make the folder of an accepted run, and note its submission: durable on return.

        Raises:
            OSError: the disk refused; nothing is left, or it is deleted at the next start.
        """
        folder = self._path(record.run)
        temporary = temporary_beside(folder)
        try:
            private_dir(temporary)
            package.extract(temporary)
            private_dir(temporary / CODE_FOLDER)
            write_atomic(temporary / RECORD, record.model_dump_json().encode())
            if folder.exists():
                folder.rename(self.leftover())
            temporary.rename(folder)
            try:
                fsync_dir(self._folder)
                self.note(record)
            except OSError:
                folder.rename(temporary)
                raise
        except (FLError, OSError):
            with suppress(OSError):
                remove(temporary)
            raise
        return folder

    def note(self, *records: RunRecord) -> None:
        """Note for good that the submissions of these were accepted.

        Raises:
            OSError: the disk refused; nothing is noted.
        """
        with self._noting:
            noted = self.submissions | {each.submission_id: each.run for each in records}
            if noted != self.submissions:
                write_atomic(self._folder / SUBMISSIONS, json.dumps(noted).encode())
                self.submissions = noted

    def _path(self, run: int) -> Path:
        return self._folder / f"run-{run}"


def _may_have_record(folder: Path) -> bool:
    try:
        return (folder / RECORD).exists()
    except OSError:
        return True  # that nobody can look does not mean that the run is over


def _read_submissions(path: Path) -> dict[str, int]:
    """Return submission id → run of what was accepted here.

    Raises:
        DataLossError: the file is damaged.
    """
    try:
        return {str(key): int(run) for key, run in json.loads(path.read_bytes()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise DataLossError(
            f"{path} is damaged: {error}",
            hint="restore it; without it, submissions of before could be started again",
        ) from None
