"""Runs that validate models of an earlier run: which models, who may, what is kept."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from flplatform.core import events as ev
from flplatform.core.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
)
from flplatform.core.messages import TaskFailure, TaskId, TaskResult
from flplatform.core.validation import Wanted
from flplatform.core.workflow import Abort, FailureArrived, ResultArrived
from flplatform.security.package import pack
from flplatform.security.signing import StartOrder, sign_order
from flplatform.server.control import ServerControl
from tests.support.federation import Federation, provision
from tests.unit.server.scene import Scene, play, refused, settle, until

JOB = """name: tiny
workflow: [scatter_gather, cross_site_validation]
executor: {module: job}
initial_model: {file: model.safetensors}
min_clients: 2
rounds: 2
keep_updates: last 2
"""


class Trust:
    def __init__(self, store: Any) -> None:
        self.store = store


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return provision(tmp_path_factory.mktemp("kits"), admins=("amy", "bob"))


class Stage:
    """A server with one run of sites a and b, and a console that signs."""

    def __init__(self, scene: Scene, federation: Federation) -> None:
        self.scene, self._federation = scene, federation
        data = pack(
            {"job.yml": JOB.encode()},
            scene.model(),
            project="test",
            author="amy",
            job="tiny",
            key=federation.key("amy"),
            certificate=federation.open("amy").chain,
        )
        self.package = scene.blobs.create(lambda path: path.write_bytes(data) and None)
        self.boot()

    def boot(self) -> None:
        kit = self._federation.open("server")
        self.control = ServerControl(
            identity=kit.identity,
            trust=Trust(kit.trust),
            runs=self.scene.runs,
            clients=self.scene.clients,
            relay=self.scene.relay,
            blobs=self.scene.blobs,
            folder=self.scene.folder,
            end=lambda _: None,
        )

    def order(self, purpose: str = "validate", signer: str = "bob", **changes: Any) -> bytes:
        now = datetime.now(UTC)
        fields: dict[str, Any] = {
            "project": "test",
            "submission_id": "9" * 32,
            "job_digest": self.package.digest.removeprefix("blake3:"),
            "sites": ("a", "b"),
            "issued_at": now,
            "not_after": now + timedelta(hours=24),
            "purpose": purpose,
        }
        kit = self._federation.open(signer)
        order = StartOrder(**fields | changes)
        return sign_order(order, self._federation.key(signer), kit.chain).to_bytes()

    async def begin(self) -> None:
        """Open run 1 and let both sites accept it."""
        self.scene.obeying("a", "b")
        order = self.order("train", "amy", submission_id="1" * 32)
        assert await self.control.submit(order, "amy", None) == 1
        await until(lambda: self.scene.events(1, ev.RoundOpened))

    async def update(self, number: int) -> None:
        """Let both sites train a round."""
        for at, site in enumerate("ab"):
            key = f"1/{number}/train/{site}"
            await until(lambda key=key, site=site: key in self.scene.actor(1).tasks.get(site, {}))
            task = self.scene.actor(1).tasks[site][key]
            assert task.model is not None
            blob = self.scene.update(key, number + at / 10)
            result = TaskResult(blob, 10, trained_from=task.model.digest)
            await self.scene.runs.tasks.tell(task.id, ResultArrived(task.id, result))

    async def train(self) -> None:
        """Play run 1 to its validation."""
        await self.begin()
        await self.update(1)
        await self.update(2)
        await until(lambda: self.scene.actor(1).state.gathers)

    async def finish(self, number: int = 1) -> None:
        """Let the sites fail whatever is left of a run."""
        while number in self.control.active_runs():
            await settle()
            for site, tasks in list(self.scene.actor(number).tasks.items()):
                for task in list(tasks.values()):
                    assert site == task.id.site
                    given = FailureArrived(task.id, TaskFailure("no"))
                    await self.scene.runs.tasks.tell(task.id, given)

    async def measure(self, number: int, site: str) -> None:
        """Let a site do all its cells."""
        await until(lambda: self.scene.actor(number).tasks.get(site))
        for task in list(self.scene.actor(number).tasks[site].values()):
            result = TaskResult(None, 5, {"accuracy": 0.5})
            await self.scene.runs.tasks.tell(task.id, ResultArrived(task.id, result))


@pytest.fixture
def stage(scene: Scene, federation: Federation) -> Stage:
    return Stage(scene, federation)


def on_stage(act: Callable[[Stage], Any]) -> Callable[[Stage], None]:
    """Play an act to its end."""

    def test(stage: Stage) -> None:
        async def it() -> None:
            try:
                await act(stage)
            finally:
                await stage.scene.close()

        play(it())

    test.__name__ = act.__name__
    return test


@on_stage
async def test_models_of_a_run_are_validated_by_another(stage: Stage) -> None:
    await stage.train()
    best = TaskId(1, 2, "submit_model", "a")
    blob = stage.scene.update(best, 9.0)
    await stage.scene.runs.tasks.tell(best, ResultArrived(best, TaskResult(blob, 0)))
    await stage.finish()
    plan = await stage.control.validations.plan(1, Wanted())
    assert {owner: (model.kind, model.round) for owner, model in plan.models.items()} == {
        "a": ("local", 2),
        "b": ("update", 2),
        "global": ("best", 2),
    }
    assert (plan.sites, plan.left_out, plan.author) == (("a", "b"), {}, "amy")
    order = stage.order()
    opened = [await stage.control.validations.open(1, order, "bob", Wanted()) for _ in range(2)]
    assert opened == [2, 2], "the same submission again is the same run"
    first = stage.scene.events(2)[0]
    assert (first.job.workflow, first.job_blob.digest) == (
        ("cross_site_validation",),
        stage.package.digest,
    )
    assert first.source_models["a"].digest == blob.digest
    view = stage.control.run(2)
    assert (view.name, view.source_run, view.submitter) == ("validate of run 1", 1, "bob")

    # The server ends in the middle: what was accepted counts, the rest is done.
    await stage.measure(2, "a")
    assert (stage.control.run(2).settled, stage.control.run(2).tasks) == (3, 6)
    await stage.scene.restart()
    stage.boot()
    stage.scene.live("a", "b")
    assert "a" not in stage.scene.actor(2).tasks
    error = await refused(stage.control.lifecycle.delete(1, "amy"))
    assert error.rule == "being_validated"
    assert "run 1 is being validated by run 2" in str(error)
    await stage.measure(2, "b")
    matrix = stage.control.cross_validation(2)
    assert matrix.complete
    assert matrix.owners == ("a", "b", "global")
    assert len(matrix.cells) == 6
    assert matrix.source_run == 1
    assert stage.control.run(2).round == 2
    await until(lambda: stage.control.run(2).ended)

    # What the validation alone needed is freed with its source.
    await settle()
    update = first.source_models["b"].digest
    assert stage.scene.blobs.has(update)
    await stage.control.lifecycle.delete(1, "amy")
    assert not stage.scene.blobs.has(update)
    assert stage.control.cross_validation(2).complete
    again = await refused(stage.control.validations.plan(1, Wanted()))
    assert (type(again), again.rule) == (NotFoundError, "run_deleted")


@on_stage
async def test_models_that_a_validation_names_outlive_their_rounds(stage: Stage) -> None:
    await stage.begin()
    await stage.update(1)
    await until(lambda: stage.scene.events(1, ev.ModelPublished))
    run = await stage.control.validations.open(1, stage.order(), "bob", Wanted())
    first = stage.scene.events(run)[0]
    kinds = {owner: model.kind for owner, model in first.source_models.items()}
    assert kinds == {"a": "update", "b": "update", "global": "latest"}
    assert first.source_models["global"].round == 1
    await stage.scene.actor(1).tell(Abort("amy"))
    await stage.finish(1)
    await stage.scene.runs.retention.free({m.digest for m in first.source_models.values()})
    assert all(stage.scene.blobs.has(model.digest) for model in first.source_models.values())


@on_stage
async def test_which_models_can_be_named(stage: Stage) -> None:
    await stage.train()

    async def chosen(*owners: str) -> dict[str, tuple[str, int]]:
        plan = await stage.control.validations.plan(1, Wanted(owners, ("a",)))
        assert plan.sites == ("a",)
        return {owner: (model.kind, model.round) for owner, model in plan.models.items()}

    assert await chosen("last", "r1", "best", "b") == {
        "last": ("latest", 2),
        "r1": ("round", 1),
        "best": ("best", 2),
        "b": ("update", 2),
    }
    for odd in ("r3", "c", "all", "r-1"):
        error = await refused(chosen(odd))
        assert type(error) is InvalidArgumentError
        assert "owns no model of run 1" in str(error)
        assert "r0 to r2" in str(error)
    for site, why in (("x", "not registered"), ("b", "b is disabled")):
        await stage.scene.runs.set_enabled("b", False, "amy")
        error = await refused(stage.control.validations.plan(1, Wanted((), (site,))))
        assert why in str(error)
    plan = await stage.control.validations.plan(1, Wanted())
    assert (plan.sites, plan.left_out) == (("a",), {"b": "barred on the server"})


@on_stage
async def test_states_in_which_there_is_nothing_to_validate(stage: Stage) -> None:
    plan = stage.control.validations.plan
    assert type(await refused(plan(1, Wanted()))) is NotFoundError
    stage.scene.live("a", "b")
    order = stage.order("train", "amy", submission_id="1" * 32)
    await stage.control.submit(order, "amy", None)
    error = await refused(plan(1, Wanted()))
    assert (type(error), error.rule) == (FailedPreconditionError, "no_model")
    assert "run 1 is deploying: it has no model but the initial one" in str(error)
    assert (await plan(1, Wanted(("r0",), ("a",)))).models["r0"].kind == "round"
    await stage.scene.actor(1).tell(Abort("amy"))
    assert "aborted while deploying" in str(await refused(plan(1, Wanted())))
    run = await stage.control.validations.open(1, stage.order(), "bob", Wanted(("r0",)))
    error = await refused(plan(run, Wanted()))
    assert "run 2 is itself a validation of run 1" in str(error)
    await stage.control.staging.reserve(9, "amy", "hub")
    assert "run 9 is prepared" in str(await refused(plan(9, Wanted())))


@on_stage
async def test_orders_that_open_nothing(stage: Stage) -> None:
    await stage.train()

    async def opening(order: bytes, by: str = "bob") -> Any:
        return await refused(stage.control.validations.open(1, order, by, Wanted()))

    assert (await opening(stage.order(), "amy")).rule == "own_order"
    assert (await opening(stage.order("train"))).rule == "signed purpose"
    other = stage.scene.model(5.0).digest.removeprefix("blake3:")
    assert (await opening(stage.order(job_digest=other))).rule == "signed job digest"
    assert type(await opening(stage.order(sites=("a", "x")))) is InvalidArgumentError
    trains = await refused(stage.control.submit(stage.order(submission_id="2" * 32), "bob", None))
    assert (type(trains), trains.rule) == (PermissionDeniedError, "signed purpose")
    assert stage.control.active_runs() == [1]
    run = await stage.control.validations.open(1, stage.order(sites=("a",)), "bob", Wanted())
    await until(lambda: stage.scene.actor(run).state.gathers)
    joins = stage.order("train", sites=("b",), submission_id="3" * 32)
    error = await refused(stage.control.add_targets(run, joins, "bob"))
    assert (error.rule, "its sites are fixed" in str(error)) == ("source_run", True)


@on_stage
async def test_several_at_once_have_numbers_of_their_own(stage: Stage) -> None:
    await stage.train()
    orders = [stage.order(submission_id=f"{each:032x}") for each in range(3)]
    opened = await asyncio.gather(
        *(stage.control.validations.open(1, order, "bob", Wanted()) for order in orders)
    )
    assert sorted(opened) == [2, 3, 4]
