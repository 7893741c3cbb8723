"""Sites that leave and join runs, given-up tasks, barred sites, deleted runs; on real rooms."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from flplatform.core import events as ev
from flplatform.core.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
)
from flplatform.core.job import JobSpec
from flplatform.core.model import Manifest
from flplatform.core.ports import Row
from flplatform.security.signing import StartOrder, sign_order
from flplatform.server import lifecycle as module
from flplatform.server.control import ServerControl
from flplatform.server.lifecycle import Lifecycle
from flplatform.server.metric_log import METRICS, metric_file
from tests.support.federation import Federation, provision
from tests.unit.server.scene import Scene, play, refused, settle, until


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return provision(tmp_path_factory.mktemp("kits"), admins=("amy", "bob"))


@pytest.fixture
def make(scene: Scene, federation: Federation) -> Callable[[], ServerControl]:
    def made() -> ServerControl:
        kit = federation.open("server")

        class Trust:
            store = kit.trust

        return ServerControl(
            identity=kit.identity,
            trust=Trust(),
            runs=scene.runs,
            clients=scene.clients,
            relay=scene.relay,
            blobs=scene.blobs,
            folder=scene.folder,
            end=lambda _: None,
        )

    return made


@pytest.fixture
def start(federation: Federation, scene: Scene) -> Callable[..., bytes]:
    """Sign a start order for run 1's job."""

    def signed(*sites: str, signer: str = "amy", **changes: object) -> bytes:
        now = datetime.now(UTC)
        job = scene.actor().state.opened.job_blob.digest
        fields = {
            "project": "test",
            "submission_id": "7" * 32,
            "job_digest": job.removeprefix("blake3:"),
            "sites": sites,
            "issued_at": now,
            "not_after": now + timedelta(hours=24),
        }
        kit = federation.open(signer)
        order = StartOrder.model_validate(fields | changes)
        return sign_order(order, federation.key(signer), kit.chain).to_bytes()

    return signed


def test_a_withdrawn_site_hears_that_its_run_has_ended(scene: Scene, make) -> None:
    async def it() -> None:
        lifecycle = make().lifecycle
        scene.obeying("a", "b", "c")
        await scene.submit("abc", min_clients=1)
        await scene.offered("c")
        held = [str(task.id) for task in scene.runs.tasks.of("c")]
        waiting = asyncio.create_task(scene.training.get_task("c", held, [1]))
        await settle()
        await lifecycle.withdraw(1, ["c"], "amy")
        assert await waiting == ([], {1: "withdrawn"})
        assert (scene.runs.ended(1), scene.runs.ended(1, "a")) == ("", "")
        assert not scene.runs.takes_part("c", 1)
        model = scene.actor().state.model.digest
        assert scene.runs.uploads.readable("a", model)
        assert not scene.runs.uploads.readable("c", model)
        # It holds over a restart, also for a site without a task that was away meanwhile.
        await scene.restart()
        assert await scene.training.get_task("c", [], [1]) == ([], {1: "withdrawn"})
        error = await refused(make().lifecycle.withdraw(1, ["c"], "amy"))
        assert (type(error), error.rule) == (FailedPreconditionError, "no_part")
        await scene.close()

    play(it())


def test_a_site_joins_with_an_order_of_its_own(scene: Scene, make, start) -> None:
    async def it() -> None:
        control = make()
        scene.obeying("a", "b")
        scene.live("c")
        await scene.submit("ab", min_clients=1, rounds=2)
        await scene.offered("b")
        order = start("c")
        await control.add_targets(1, order, "amy")
        (request,) = await scene.relay.retrieve("c", [], 1.0)
        assert (request.topic, request.signed) == ("start", order)
        assert control.run(1).targets == ("a", "b", "c")
        assert control.run(1).answers["c"] == "…"
        scene.obeying("c")
        await until(lambda: "c" in scene.actor().state.deployed)
        assert scene.runs.tasks.of("c") == []
        await scene.do("a")
        await scene.do("b")
        assert (await scene.offered("c")).id.round == 2
        await scene.close()

    play(it())


def test_orders_that_let_nobody_join(scene: Scene, make, start) -> None:
    async def it() -> None:
        control = make()
        scene.obeying("a", "b")
        scene.live("c", "d")
        await scene.submit("ab")
        await control.lifecycle.set_enabled("d", False, "amy")
        before = len(scene.events())
        for order, error in [
            (start("c", signer="bob"), PermissionDeniedError),
            (start("c", job_digest="5" * 64), PermissionDeniedError),
            (start("c", project="other"), PermissionDeniedError),
            (start("c").replace(b"payload", b"payloaf"), InvalidArgumentError),
            (start("stranger"), NotFoundError),
            (start("d"), InvalidArgumentError),
            (start("a", "c"), AlreadyExistsError),
        ]:
            assert isinstance(await refused(control.add_targets(1, order, "amy")), error)
        assert "d is disabled" in str(await refused(control.add_targets(1, start("d"), "amy")))
        assert not [e for e in scene.events()[before:] if isinstance(e, ev.TargetsAdded)]
        order = start("c")
        await control.abort(1, "amy")
        error = await refused(control.add_targets(1, order, "amy"))
        assert error.rule == "run_ended"
        await scene.close()

    play(it())


def test_a_task_is_given_up(scene: Scene, make) -> None:
    async def it() -> None:
        lifecycle: Lifecycle = make().lifecycle
        scene.obeying("a", "b")
        await scene.submit("ab", min_clients=1)
        await scene.offered("b")
        assert await lifecycle.abort_task(1, "b", "amy") == ("1/1/train/b",)
        assert scene.runs.tasks.of("b") == []
        (failed,) = scene.events(kind=ev.TaskFailed)
        assert failed.error == "aborted by amy"
        assert (await refused(lifecycle.abort_task(1, "b", "amy"))).rule == "no_open_task"
        await scene.close()

    play(it())


def test_the_quorum_is_held_against_the_aggregator(
    scene: Scene, make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(_job: JobSpec, manifest: Manifest, quorum: int) -> None:
        if quorum < 3:
            raise InvalidArgumentError(f"{quorum} updates of {len(manifest.tensors)} tensor")

    async def it() -> None:
        control = make()
        scene.obeying("a", "b", "c")
        await scene.submit("abc")
        await scene.offered("c")
        monkeypatch.setattr(module, "check_recipe", check)
        error = await refused(control.set_min_clients(1, 2, "amy"))
        assert (type(error), error.rule) == (FailedPreconditionError, "aggregator")
        assert error.message == (
            "aggregator weighted_mean of run 1 refuses min_clients 2: 2 updates of 1 tensor"
        )
        assert scene.events(kind=ev.QuorumSet) == []
        monkeypatch.undo()
        await control.set_min_clients(1, 2, "amy")
        assert scene.actor().state.min_clients == 2
        await scene.close()

    play(it())


def test_a_site_is_barred_and_let_in_again(scene: Scene, make) -> None:
    async def it() -> None:
        control = make()
        scene.obeying("a", "b")
        await scene.submit("ab", min_clients=1)
        await scene.offered("b")
        assert await control.lifecycle.set_enabled("b", False, "amy")
        assert not await control.lifecycle.set_enabled("b", False, "amy")
        assert scene.runs.tasks.of("b") == []
        assert [site.state for site in control.sites()] == ["live", "disabled"]
        await scene.do("a")  # b is excused: the round closes
        await scene.ended()
        assert await control.lifecycle.set_enabled("b", True, "amy")
        assert not await control.lifecycle.set_enabled("b", True, "amy")
        assert type(await refused(control.lifecycle.set_enabled("x", True, "amy"))) is NotFoundError
        kinds = [row.type for row in scene.store.read(ev.FEDERATION)]
        assert kinds.count("SiteDisabled") == kinds.count("SiteEnabled") == 1
        await scene.close()

    play(it())


# ---- deletion -----------------------------------------------------------------------------------


async def finished(scene: Scene, value: float) -> None:
    await scene.submit("a", min_clients=1)
    await scene.do("a", value)


def test_a_deleted_run_leaves_its_number_and_its_events(scene: Scene, make) -> None:
    async def it() -> None:
        control = make()
        scene.obeying("a")
        await finished(scene, 1.0)
        await scene.ended(1)
        events = scene.store.read(ev.run_stream(1))
        points: Path = metric_file(scene.folder / METRICS, 1)
        points.parent.mkdir()
        points.write_text("{}")
        await control.lifecycle.delete(1, "amy")
        assert scene.blobs.digests() == []
        assert not points.exists()
        assert scene.store.read(ev.run_stream(1)) == events
        for _ in range(2):
            control = make()
            assert (control.runs(), control.active_runs()) == ([], [])
            (view,) = control.lifecycle.deleted()
            assert (view.run, view.status, view.submitter) == (1, "deleted", "lead")
            assert view.reason.startswith("finished; deleted by amy on 2")
            for look in (control.run, control.metrics, scene.runs.view, scene.runs.actor):
                with pytest.raises(NotFoundError, match="run 1 was deleted by amy on 2"):
                    look(1)
            error = await refused(control.lifecycle.delete(1, "amy"))
            assert error.rule == "run_deleted"
            assert scene.runs.ended(1, "a") == "finished"
            await scene.restart()
        scene.obeying("a")
        await scene.submit("a", min_clients=1)
        assert make().active_runs() == [2]
        await scene.close()

    play(it())


def test_what_another_run_needs_is_kept(scene: Scene, make) -> None:
    async def it() -> None:
        control = make()
        scene.obeying("a")
        await finished(scene, 1.0)
        await scene.ended(1)
        await finished(scene, 2.0)  # the same job and initial model
        await scene.ended(2)
        mine = {model.digest for model in scene.runs.view(2).state.models.values()}
        await control.lifecycle.delete(1, "amy")
        kept = set(scene.blobs.digests())
        assert mine <= kept
        assert scene.runs.view(2).state.opened.job_blob.digest in kept
        await control.lifecycle.delete(2, "amy")
        assert scene.blobs.digests() == []
        await scene.close()

    play(it())


def test_a_run_at_work_and_one_that_never_was_are_not_deleted(scene: Scene, make) -> None:
    async def it() -> None:
        lifecycle = make().lifecycle
        scene.obeying("a")
        await scene.submit("a", min_clients=1)
        await scene.offered("a")
        error = await refused(lifecycle.delete(1, "amy"))
        assert (error.message, error.rule) == ("run 1 is training", "run_ended")
        assert type(await refused(lifecycle.delete(9, "amy"))) is NotFoundError
        assert len(scene.blobs.digests()) == 2
        await scene.close()

    play(it())


def test_two_deletions_at_once_are_one(scene: Scene, make) -> None:
    async def it() -> None:
        lifecycle = make().lifecycle
        scene.obeying("a")
        await finished(scene, 1.0)
        await scene.ended(1)
        both = (lifecycle.delete(1, "amy"), lifecycle.delete(1, "bob"))
        results = await asyncio.gather(*both, return_exceptions=True)
        assert [type(result) for result in results].count(NotFoundError) == 1
        rows: list[Row] = scene.store.read(ev.FEDERATION)
        assert [row.type for row in rows].count("RunDeleted") == 1
        await scene.close()

    play(it())


def test_what_a_crash_left_of_a_deleted_run_is_freed_at_the_next_start(scene: Scene, make) -> None:
    async def it() -> None:
        scene.obeying("a")
        await finished(scene, 1.0)
        await scene.ended(1)
        await scene.runs.step(lambda: ev.RunDeleted(run=1, by="amy"))  # and then it was killed
        assert scene.blobs.digests()
        stray = scene.model(np.pi)
        await scene.restart()
        await until(lambda: scene.blobs.digests() == [stray.digest])
        await scene.close()

    play(it())
