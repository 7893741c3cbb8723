"""Where models come from, and that it can be proved."""

import pytest

from flplatform.core import events as ev
from flplatform.core.errors import NotFoundError
from flplatform.server.lineage import Lineages
from tests.unit.server.scene import Scene, play, until


async def three_rounds(scene: Scene, **fields: object) -> None:
    scene.obeying("a", "b")
    await scene.submit(("a", "b"), rounds=3, **fields)
    for number in (1, 2, 3):
        for site, value in (("a", 1.0), ("b", 3.0)):
            await until(
                lambda site=site, number=number: any(
                    task.id.round == number for task in scene.runs.tasks.of(site)
                )
            )
            await scene.do(site, value * number, examples=10 if site == "a" else 30)
    await scene.ended()


async def verified(scene: Scene, *rounds: int) -> dict[int, str]:
    return {each.round: each.result async for each in Lineages(scene.runs).verify(1, rounds)}


def test_the_chain_of_a_model(scene: Scene) -> None:
    async def it() -> None:
        await three_rounds(scene)
        whole = Lineages(scene.runs).lineage(1)
        assert (whole.run, whole.job, whole.submitter) == (1, "test", "lead")
        assert [each.round for each in whole.rounds] == [1, 2, 3]
        assert [each.base_round for each in whole.rounds] == [0, 1, 2]
        assert whole.rounds[0].base == whole.initial_model
        for before, after in zip(whole.rounds, whole.rounds[1:], strict=False):
            assert after.base == before.model
        first = whole.rounds[0]
        assert [(share.site, share.share, share.examples) for share in first.shares] == [
            ("a", 0.25, 10),
            ("b", 0.75, 30),
        ]
        assert first.aggregator == "weighted_mean"
        assert first.reason == "all participants answered"
        part = Lineages(scene.runs).lineage(1, 2)
        assert part.rounds == whole.rounds[:2]
        assert Lineages(scene.runs).lineage(1, 0).rounds == ()
        with pytest.raises(NotFoundError, match="rounds 0 to 3|round 9"):
            Lineages(scene.runs).lineage(1, 9)
        await scene.close()

    play(it())


def test_rounds_are_aggregated_again(scene: Scene) -> None:
    async def it() -> None:
        await three_rounds(scene, keep_updates="all")
        before = set(scene.blobs.digests())
        assert await verified(scene, 1, 2, 3, 4) == {1: "same", 2: "same", 3: "same"}
        assert set(scene.blobs.digests()) == before
        await scene.close()

    play(it())


def test_what_is_freed_cannot_be_proved(scene: Scene) -> None:
    async def it() -> None:
        await three_rounds(scene, keep_updates="last 2")
        freed = next(share.digest for share in Lineages(scene.runs).lineage(1).rounds[0].shares)
        await until(lambda: not scene.blobs.has(freed))
        assert await verified(scene, 1, 3) == {1: "freed", 3: "same"}
        await scene.close()

    play(it())


def test_another_model_is_told_and_not_kept(scene: Scene) -> None:
    async def it() -> None:
        await three_rounds(scene, keep_updates="all")
        actor = scene.runs.view(1)
        index = next(i for i, e in enumerate(actor.events) if isinstance(e, ev.RoundClosed))
        closed = actor.events[index]
        swapped = [
            target.model_copy(update={"weight": weight})
            for target, weight in zip(closed.contributions, (30.0, 10.0), strict=True)
        ]
        actor.events[index] = closed.model_copy(update={"contributions": tuple(swapped)})
        before = set(scene.blobs.digests())
        assert await verified(scene, 1, 2) == {1: "differs", 2: "same"}
        assert set(scene.blobs.digests()) == before
        await scene.close()

    play(it())


def test_back_to_the_run_that_it_started_from(scene: Scene) -> None:
    async def it() -> None:
        await three_rounds(scene)
        start = Lineages(scene.runs).lineage(1).rounds[1]
        size = scene.runs.view(1).state.models[2].size
        opened = scene.runs.view(1).state.opened
        spec = opened.job.initial_model.model_copy(update={"file": "", "run": 1, "round": 2})
        job = opened.job.model_copy(update={"initial_model": spec})
        later = opened.model_copy(
            update={
                "run": 2,
                "job": job,
                "initial_model": ev.Blob(digest=start.model, size=size),
            }
        )
        (origin,) = Lineages(scene.runs)._origins(later)
        assert (origin.run, origin.round, origin.submitter) == (1, 2, "lead")
        await scene.close()

    play(it())
