"""Brings accepted runs back after a restart of their site; those that cannot yet go on wait."""

import asyncio
import base64
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from flplatform.client.policy import DatasetAbsentError, Plan
from flplatform.client.retrying import RETRIED, backoff_s, level_of
from flplatform.client.run_folders import RECORD
from flplatform.client.site_run import RunRecord
from flplatform.client.troubles import Troubles
from flplatform.client.verbs import Submitter
from flplatform.core.errors import (
    DataLossError,
    FLError,
    InternalError,
    NotFoundError,
    PermissionDeniedError,
    UnavailableError,
)
from flplatform.core.messages import ModelRef
from flplatform.core.strict import parse_json
from flplatform.files.digest import digest_of_file
from flplatform.files.shortage import explaining_shortage
from flplatform.files.threads import in_thread
from flplatform.security.identity import Identity, TrustStore
from flplatform.security.package import Package, open_package
from flplatform.security.signing import Signed, StartOrder, open_order

log = logging.getLogger(__name__)

PASSING = (*RETRIED, DatasetAbsentError, OSError)
"""What may pass by itself. A refusal by the policy is looked at again when somebody asks for the
run; all else, as a damaged record or a revoked signature, is final."""


class _NoPackageError(UnavailableError):
    """The package is not here, or not as it was signed: it is to be fetched."""


@dataclass(frozen=True, slots=True)
class Restored:
    """What was accepted, verified again."""

    record: RunRecord
    package: Package
    plan: Plan
    submitter: Identity


class WaitingRun:
    """An accepted run that is not back after a restart; `SiteRun` has what is named alike.

    Attributes:
        record: what was accepted, once it could be read.
        environment: which one the job needs, once its package could be opened.
        submitter: who submitted it, once the record was verified; else empty.
        refusal: why it is not tried by itself any more.
        done: it is back, has ended, or can never come back.
        asked: set to have it tried at once.
    """

    def __init__(self, run: int, folder: Path) -> None:
        self.run = run
        self.folder = folder
        self.record: RunRecord | None = None
        self.environment = ""
        self.submitter: Submitter = ("", "")
        self.turn = asyncio.Lock()
        self.troubles = Troubles()
        self.refusal: FLError | None = None
        self.done = False
        self.asked = asyncio.Event()
        self._settled = asyncio.Event()
        self._since = time.monotonic()

    @property
    def state(self) -> Path:
        """Where the committed state of the run lies."""
        return self.folder / "state"

    def report(self) -> tuple[int, int, str, float, str]:
        """Return run, round, phase, seconds in it, and isolation level; see `SiteRun.report`."""
        phase = "not resumed" if self.refusal else "waiting"
        if self.troubles.held_up:
            phase = f"{phase}, {self.troubles.held_up}"
        return self.run, 0, phase, time.monotonic() - self._since, ""

    def enter(self, phase: str) -> None:
        """Pass over what is done for the run meanwhile: it waits."""

    async def ask(self) -> None:
        """Have it tried at once; wait until it is back, has ended or is refused."""
        if not self.done:
            self._settled.clear()
            self.asked.set()
            await self._settled.wait()

    def settle(self, refusal: FLError | None = None, *, done: bool = True) -> None:
        """Tell those who wait that it is back or has ended, or why it is refused."""
        self.refusal = refusal
        self.done = self.done or done
        self._settled.set()

    def fail(self, error: Exception) -> None:
        """Note that a try has failed."""
        code = error.code if isinstance(error, FLError) else type(error).__name__
        self.troubles.held_up = f"retries: {code}" if isinstance(error, PASSING) else code
        self.troubles.note(str(error))


class Resumer:
    """Verifies again what was accepted, until it holds or never can.

    Args:
        fetch: downloads a package that is not here.
        trust: returns the trust store of now.
        check: asks the site's policy.
        longest_s: longest pause between two tries.
    """

    def __init__(
        self,
        fetch: Callable[[ModelRef], Awaitable[Path]],
        trust: Callable[[], TrustStore],
        check: Callable[[Identity, Package, StartOrder], Plan],
        longest_s: float,
    ) -> None:
        self._fetch = fetch
        self._trust = trust
        self._check = check
        self._longest_s = longest_s
        self.blob_path: Callable[[str], Path]

    def restore(self, run: WaitingRun) -> Restored:
        """Read and verify what was accepted, by what is on the disk.

        Raises:
            FLError, OSError: why not; of what kind, see `PASSING`.
        """
        with explaining_shortage():
            try:
                return self._restore(run)
            except ValueError as error:
                raise DataLossError(f"{run.folder / RECORD}: {error}") from None

    def _restore(self, run: WaitingRun) -> Restored:
        path = run.folder / RECORD
        record = parse_json(RunRecord, path.read_bytes(), str(path))
        if record.run != run.run:
            raise DataLossError(f"{path} is the record of run {record.run}")
        run.record = record
        submitter, order = open_order(
            StartOrder, Signed.from_bytes(signed_bytes(record)), self._trust(), record.accepted
        )
        run.submitter = submitter.name, submitter.organisation
        if record.digest != f"blake3:{order.job_digest}":
            raise DataLossError(f"{path} names another package than the one that was signed")
        try:
            package_path = self.blob_path(record.digest)
        except NotFoundError as error:
            raise _NoPackageError(str(error)) from None
        if digest_of_file(package_path)[0] != record.digest:
            raise _NoPackageError(f"{package_path} is not the package that was signed")
        package = open_package(package_path, self._trust(), record.accepted)
        run.environment = package.job.environment
        return Restored(record, package, self._check(submitter, package, order), submitter)

    async def until_restored(self, run: WaitingRun) -> Restored | None:
        """Try again, with growing pauses and whenever it is asked for; None if it never can be."""
        attempt = 1  # the first try was at the start
        while not run.done:
            await self._pause(run, attempt)
            run.asked.clear()
            try:
                found = await self._try(run)
            except Exception as error:  # noqa: BLE001 - told by `judge`, whatever it is
                attempt += 1
                self.judge(run, error, attempt)
            else:
                run.troubles.held_up = ""
                return found
        return None

    async def _pause(self, run: WaitingRun, attempt: int) -> None:
        """Wait a while, or for somebody who asks for a run that is refused."""
        pause = None if run.refusal else backoff_s(attempt, self._longest_s)
        try:
            async with asyncio.timeout(pause):
                await run.asked.wait()
        except TimeoutError:
            return

    async def _try(self, run: WaitingRun) -> Restored:
        try:
            return await in_thread(self.restore, run)
        except _NoPackageError as error:
            run.fail(error)
        assert run.record is not None
        try:
            await self._fetch(ModelRef(run.record.digest, run.record.size))
        except FLError as error:
            raise UnavailableError(f"its package cannot be fetched: {error}") from None
        try:
            return await in_thread(self.restore, run)
        except _NoPackageError as error:
            raise DataLossError(str(error)) from None

    def judge(self, run: WaitingRun, error: Exception, attempt: int) -> None:
        """Note that a try has failed, and decide whether there is another; tell it in the log."""
        if isinstance(error, PASSING):
            run.refusal = None
            run.fail(error)
            level = logging.WARNING if attempt == 1 else level_of(attempt)
            log.log(level, "run %d waits, try %d failed: %s", run.run, attempt, error)
            return
        if run.refusal is None or str(run.refusal) != str(error):
            defect = None if isinstance(error, FLError) else error
            log.error("run-%d is not resumed: %s", run.run, error, exc_info=defect)
        run.fail(error)
        refusal = error if isinstance(error, FLError) else InternalError(str(error))
        run.settle(refusal, done=not isinstance(error, PermissionDeniedError))


def signed_bytes(record: RunRecord) -> bytes:
    """Return the signed start that was accepted."""
    return base64.b64decode(record.order)
