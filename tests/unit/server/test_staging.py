import asyncio
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flplatform.core import events as ev
from flplatform.core.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    FLError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
)
from flplatform.core.messages import ModelRef
from flplatform.files.digest import digest_of
from flplatform.server import staging as module
from flplatform.server.control import ServerControl
from tests.support.federation import Federation, provision
from tests.unit.server.scene import Scene, play, refused, settle, until
from tests.unit.server.test_control import Submission, Trust

OLD_S = 100_000.0


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return provision(tmp_path_factory.mktemp("kits"), admins=("amy", "bob"))


@pytest.fixture
def make(scene: Scene, federation: Federation) -> Callable[[], ServerControl]:
    """Make the control of the scene's current process."""

    def made() -> ServerControl:
        kit = federation.open("server")
        control = ServerControl(
            identity=kit.identity,
            trust=Trust(kit.trust),
            runs=scene.runs,
            clients=scene.clients,
            relay=scene.relay,
            blobs=scene.blobs,
            folder=scene.folder,
            end=lambda _: None,
        )
        scene.runs.changed = control.note_change
        return control

    return made


@pytest.fixture
def submission(federation: Federation, scene: Scene) -> Submission:
    return Submission(federation, scene)


Make = Callable[[], ServerControl]


def package(submission: Submission) -> str:
    return f"blake3:{submission.digest}"


async def deployed(control: ServerControl, submission: Submission, *sites: str, run: int = 1):
    """Stage, reserve and deploy; return the plan, and make the submission carry its id."""
    await control.staging.stage("heart", package(submission), "amy", "hub")
    await control.staging.reserve(run, "amy", "hub")
    plan = await control.staging.deploy(run, "heart", sites, "amy")
    submission.id = plan.submission_id
    return plan


def federation_log(scene: Scene) -> list[str]:
    return [row.type for row in scene.store.read(ev.FEDERATION)]


# ---- jobs -------------------------------------------------------------------------------------


def test_a_staged_job_is_there_after_a_restart(
    scene: Scene, make: Make, submission: Submission
) -> None:
    async def it() -> None:
        staging = make().staging
        job = await staging.stage("heart", package(submission), "amy", "hub")
        assert (job.name, job.job.name, job.by, job.parameters) == ("heart", "tiny", "amy", 3)
        await staging.stage("heart", package(submission), "amy", "hub")
        assert federation_log(scene) == ["JobStaged"], "the same again changes nothing"
        await scene.restart()
        staging = make().staging
        assert staging.jobs() == {"heart": job}
        await staging.unstage("heart", "amy")
        assert staging.jobs() == {}
        assert type(await refused(staging.unstage("heart", "amy"))) is NotFoundError
        await scene.restart()
        assert make().staging.jobs() == {}
        await scene.close()

    play(it())


def test_what_is_staged_anew_takes_the_place_of_the_old(
    scene: Scene, make: Make, submission: Submission
) -> None:
    async def it() -> None:
        staging = make().staging
        first = package(submission)
        await staging.stage("heart", first, "amy", "hub")
        submission.model = scene.model(2.0)
        submission.digest = submission.upload(submission.package())
        await staging.stage("heart", package(submission), "amy", "hub")
        assert staging.jobs()["heart"].package.digest == package(submission)
        await until(lambda: not scene.blobs.has(first))
        assert scene.blobs.has(package(submission))
        assert scene.blobs.has(submission.model.digest)
        await staging.unstage("heart", "amy")
        await until(lambda: not scene.blobs.has(submission.model.digest))
        await scene.close()

    play(it())


def test_what_cannot_be_staged(scene: Scene, make: Make, submission: Submission) -> None:
    async def it() -> None:
        staging = make().staging
        gone = ModelRef(digest_of(b"no model"), 10)
        without_model = submission.upload(submission.package(model=gone))
        short = ModelRef(submission.model.digest, submission.model.size + 1)
        wrong_size = submission.upload(submission.package(model=short))
        cases: list[tuple[str, str, type[FLError]]] = [
            (digest_of(b"nothing"), "amy", NotFoundError),
            ("../../etc/passwd", "amy", FLError),
            (submission.model.digest, "amy", InvalidArgumentError),
            (f"blake3:{without_model}", "amy", NotFoundError),
            (f"blake3:{wrong_size}", "amy", InvalidArgumentError),
            (package(submission), "bob", PermissionDeniedError),
        ]
        for digest, by, kind in cases:
            error = await refused(staging.stage("heart", digest, by, "hub"))
            assert isinstance(error, kind), (digest, error)
        scene.store.full = True
        error = await refused(staging.stage("heart", package(submission), "amy", "hub"))
        assert type(error) is ResourceExhaustedError
        assert staging.jobs() == {}
        await scene.close()

    play(it())


# ---- numbers ----------------------------------------------------------------------------------


def test_a_reserved_number_is_a_prepared_run_over_restarts(scene: Scene, make: Make) -> None:
    async def it() -> None:
        control = make()
        await control.staging.reserve(7, "amy", "hub")
        await control.staging.reserve(7, "amy", "hub")
        assert federation_log(scene) == ["RunReserved"]
        await scene.restart()
        control = make()
        (view,) = control.runs()
        assert (view.run, view.status, view.submitter) == (7, "prepared", "amy")
        assert view.submitter_organisation == "hub"
        assert control.run(7) == view
        assert control.active_runs() == []
        error = await refused(control.abort(7, "amy"))
        assert error.message == "run 7 is prepared"
        assert error.hint == "legal now: deploy, start or delete_run_number 7"
        assert type(await refused(asyncio.to_thread(control.metrics, 7))) is FailedPreconditionError
        await scene.submit()
        assert [view.run for view in control.runs()] == [7, 8], "numbers go on above"
        await scene.close()

    play(it())


def test_numbers_that_are_not_given(scene: Scene, make: Make) -> None:
    async def it() -> None:
        staging = make().staging
        await staging.reserve(7, "amy", "hub")
        await scene.submit()
        for number, said in {
            3: "there is no run 3, and numbers below 8",
            8: "run 8 is deploying",
            1009: "at most 1008 now",
            2**40: "too far ahead",
        }.items():
            error = await refused(staging.reserve(number, "amy", "hub"))
            assert said in error.message, error
            assert error.hint == "the next number is 9; list_runs shows the runs"
        await staging.reserve(1008, "amy", "hub")
        await make().lifecycle.delete(1008, "amy")
        error = await refused(staging.reserve(1008, "amy", "hub"))
        assert error.message == "run 1008 was deleted by amy"
        await scene.close()

    play(it())


# ---- deploying --------------------------------------------------------------------------------


def test_sites_add_up_and_another_package_begins_anew(
    scene: Scene, make: Make, submission: Submission
) -> None:
    async def it() -> None:
        control = make()
        plan = await deployed(control, submission)
        assert (plan.sites, plan.status, plan.job_name) == ((), "prepared", "heart")
        await control.staging.deploy(1, "heart", ["b"], "amy")
        await control.staging.deploy(1, "heart", ["a", "b"], "amy")
        again = await control.staging.deploy(1, "heart", ["b"], "amy")
        assert again.sites == ("a", "b")
        assert federation_log(scene).count("RunPrepared") == 3, "the last one changed nothing"
        view = control.run(1)
        assert (view.name, view.targets) == ("heart", ("a", "b"))
        await control.staging.unstage("heart", "amy")
        await scene.restart()
        control = make()
        assert control.staging.plan(1) == again, "what is deployed stays without the staged job"
        await settle()
        assert scene.blobs.has(package(submission))
        submission.model = scene.model(2.0)
        submission.digest = submission.upload(submission.package())
        await control.staging.stage("heart", package(submission), "amy", "hub")
        newer = await control.staging.deploy(1, "heart", ["c"], "amy")
        assert newer.sites == ("c",)
        assert newer.package.digest == package(submission)
        assert newer.submission_id == again.submission_id
        await scene.close()

    play(it())


def test_what_cannot_be_deployed(scene: Scene, make: Make, submission: Submission) -> None:
    async def it() -> None:
        staging = make().staging
        await staging.reserve(1, "amy", "hub")
        assert type(await refused(staging.deploy(1, "heart", [], "amy"))) is NotFoundError
        await staging.stage("heart", package(submission), "amy", "hub")
        error = await refused(staging.deploy(2, "heart", [], "amy"))
        assert error.message == "run 2 does not exist"
        await scene.submit()
        error = await refused(staging.deploy(2, "heart", [], "amy"))
        assert error.message == "run 2 has begun"
        with pytest.raises(FailedPreconditionError, match="nothing is deployed for run 1"):
            staging.plan(1)
        with pytest.raises(NotFoundError):
            staging.plan(3)
        await scene.close()

    play(it())


def test_a_start_that_is_faster_than_a_deletion_wins(
    scene: Scene, make: Make, submission: Submission
) -> None:
    async def it() -> None:
        control = make()
        scene.live("a", "b")
        await deployed(control, submission, "a", "b")
        turn = scene.runs._ledger._turn
        async with turn:  # both have looked, and wait for their turn to append
            begin = control.staging.begin(1, submission.order(), "amy", None)
            starting = asyncio.create_task(begin)
            await until(lambda: len(turn._waiters or ()) == 1)
            deleting = asyncio.create_task(refused(control.lifecycle.delete(1, "bob")))
            await until(lambda: len(turn._waiters or ()) == 2)
        error, _ = await asyncio.gather(deleting, starting)
        assert type(error) is FailedPreconditionError
        assert control.active_runs() == [1]
        await scene.close()

    play(it())


def test_a_prepared_run_can_be_deleted(scene: Scene, make: Make, submission: Submission) -> None:
    async def it() -> None:
        control = make()
        await deployed(control, submission, "a", "b")
        await control.lifecycle.delete(1, "amy")
        assert control.runs() == []
        await control.staging.unstage("heart", "amy")
        await until(lambda: not scene.blobs.has(package(submission)))
        await scene.restart()
        assert make().runs() == []
        await scene.close()

    play(it())


# ---- starting ---------------------------------------------------------------------------------


def test_a_prepared_run_begins_under_its_number_once(
    scene: Scene, make: Make, submission: Submission
) -> None:
    async def it() -> None:
        control = make()
        scene.live("a", "b")
        await deployed(control, submission, "a", "b", run=7)
        await scene.restart()
        control = make()
        scene.live("a", "b")
        order = submission.order()
        await asyncio.gather(*(control.staging.begin(7, order, "amy", None) for _ in range(3)))
        await control.staging.begin(7, order, "amy", None)
        assert federation_log(scene).count("RunNumbered") == 1
        (request,) = await scene.relay.retrieve("a", [], 1.0)
        assert (request.topic, request.signed) == ("start", order)
        assert control.active_runs() == [7]
        view = control.run(7)
        assert (view.name, view.targets, view.min_clients) == ("tiny", ("a", "b"), 2)
        plan = control.staging.plan(7)
        assert (plan.status, plan.taking_part) == ("deploying", ("a", "b"))
        await control.abort(7, "amy")
        await until(lambda: "RunSummarised" in federation_log(scene))
        await control.staging.begin(7, order, "amy", None)
        assert [view.run for view in control.runs()] == [7], "the answer was lost, not the start"
        with pytest.raises(FailedPreconditionError, match="run 7 has aborted"):
            control.staging.plan(7)
        await scene.restart()
        assert make().run(7).status == "aborted"
        await scene.close()

    play(it())


def test_a_start_of_something_else_is_refused(
    scene: Scene, make: Make, submission: Submission
) -> None:
    async def it() -> None:
        control = make()
        scene.live("a", "b", "c")
        plan = await deployed(control, submission, "a", "b")
        other = submission.upload(submission.package(comment="# changed\n"))
        cases = {
            "another id": submission.order(submission_id="9" * 32),
            "another package": submission.order(job_digest=other),
            "not deployed": submission.order(sites=("a", "c")),
            "another's order": submission.order(signer="bob"),
            "too few": submission.order(sites=("a",)),
        }
        for what, order in cases.items():
            error = await refused(control.staging.begin(1, order, "amy", None))
            assert isinstance(error, FLError), what
            assert control.run(1).status == "prepared", what
        # Neither can the submission's own way around the plan be taken.
        error = await refused(control.submit(cases["not deployed"], "amy", None))
        assert error.message == "c: not deployed for run 1"
        await control.staging.begin(1, submission.order(sites=("a",)), "amy", 1)
        assert control.run(1).targets == ("a",)
        assert control.staging.plan(1).submission_id == plan.submission_id
        await scene.close()

    play(it())


def test_sites_join_a_run_at_work(scene: Scene, make: Make, submission: Submission) -> None:
    async def it() -> None:
        control = make()
        scene.obeying("a", "b", "c")
        await deployed(control, submission, "a", "b")
        await control.staging.begin(1, submission.order(), "amy", None)
        joining = submission.order(sites=("c",), submission_id="9" * 32, gpus={"c": 4})
        await control.staging.begin(1, joining, "amy", None)
        await control.staging.begin(1, joining, "amy", None)
        assert control.run(1).targets == ("a", "b", "c")
        assert control.run(1).gpus == {"c": 4}
        assert len(scene.events(1, ev.TargetsAdded)) == 1
        twice = submission.order(sites=("c",), submission_id="8" * 32)
        assert type(await refused(control.staging.begin(1, twice, "amy", None))) is (
            AlreadyExistsError
        )
        await scene.close()

    play(it())


# ---- uploads that nobody uses -----------------------------------------------------------------


def age(path: Path) -> None:
    os.utime(path, (time.time() - OLD_S, time.time() - OLD_S))


def test_uploads_that_nobody_used_are_collected_after_a_day(
    scene: Scene, make: Make, submission: Submission, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, module.__name__)

    async def it() -> None:
        control = make()
        await deployed(control, submission, "a", "b")
        run = await scene.submit(sites=("a", "b"))
        old, young = scene.model(8.0), scene.model(9.0)
        for digest in scene.blobs.digests():
            age(scene.blobs.path(digest))
        foreign = scene.blobs.path(young.digest).with_name("README")
        foreign.write_text("about this folder")
        age(foreign)
        scene.blobs.path(young.digest).touch()
        kept = set(scene.blobs.digests()) - {old.digest}
        assert control.run(run).status == "deploying"
        await control.staging.collect()
        assert set(scene.blobs.digests()) == kept
        assert foreign.exists()
        assert f"unused blobs collected: 1 with {old.size} bytes" in caplog.text
        caplog.clear()
        await control.staging.collect()
        assert "collected" not in caplog.text
        await scene.close()

    play(it())


@pytest.mark.parametrize(
    ("stream", "seqs"),
    [("federation", ()), ("run/1", ()), ("run/1", (1,)), ("run/1", (2,))],
)
def test_no_model_is_removed_because_events_were_lost(
    scene: Scene,
    make: Make,
    caplog: pytest.LogCaptureFixture,
    stream: str,
    seqs: tuple[int, ...],
) -> None:
    async def it() -> None:
        scene.obeying("a", "b")
        for value in (1.0, 2.0):
            run = await scene.submit(rounds=1)
            for site in ("a", "b"):
                await until(lambda: scene.runs.tasks.of(site))  # noqa: B023 - at once
                await scene.do(site, value)
            await scene.ended(run)
        await until(lambda: len(scene.store.read(ev.FEDERATION)) == 4)
        before = set(scene.blobs.digests())
        for digest in before:
            age(scene.blobs.path(digest))
        scene.store.lose(stream, *seqs)
        await scene.restart()
        control = make()
        for _ in range(2):
            await control.staging.collect()
        assert set(scene.blobs.digests()) == before
        assert caplog.text.count("what no run needs is kept, it may be a model") == 1
        assert control.server().trouble.startswith("the event log has lost events: ")
        await scene.close()

    play(it())


def test_a_number_whose_run_lost_it_is_not_given(scene: Scene, make: Make) -> None:
    async def it() -> None:
        await scene.submit()
        await scene.submit()
        scene.store.lose(ev.FEDERATION, 2)
        await scene.restart()
        error = await refused(make().staging.reserve(2, "amy", "hub"))
        assert "numbers below 2 are not given any more" in error.message
        await make().staging.reserve(3, "amy", "hub")
        await scene.close()

    play(it())


def test_an_upload_that_is_repeated_is_as_new(scene: Scene) -> None:
    model = scene.model(8.0)
    age(scene.blobs.path(model.digest))
    scene.blobs.receive("again", model).commit()
    assert scene.blobs.path(model.digest).stat().st_mtime > time.time() - 60


def test_collecting_goes_on_after_an_error(
    scene: Scene, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SWEEP_S", 0.001)

    async def it() -> None:
        staging, tries = make().staging, 0

        async def collect() -> None:
            nonlocal tries
            tries += 1
            raise OSError("the disk is gone") if tries == 1 else RuntimeError("no new thread")

        monkeypatch.setattr(staging, "collect", collect)
        keeping = asyncio.create_task(staging.keep_clean())
        await until(lambda: tries == 3)
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        await scene.close()

    play(it())
