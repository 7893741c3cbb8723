"""The server's own parts explained: a real run, real timers, real refusals."""

from datetime import UTC, datetime

import pytest

from flplatform.core.control import SiteView
from flplatform.core.diagnosis import run_lost
from flplatform.core.errors import (
    FLError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    UnauthenticatedError,
)
from flplatform.core.messages import ModelRef
from flplatform.core.workflow import Abort, AnswerArrived, Withdraw
from flplatform.rpc.v1 import federated_pb2 as pb
from flplatform.server import hands
from flplatform.server.client_manager import RunReport
from flplatform.server.diagnosis import Diagnostics
from flplatform.server.refusals import Refusals
from flplatform.server.training import TrainingService
from tests.unit.server.scene import Scene, play, refused, until


def explained(scene: Scene, refusals: Refusals | None = None) -> Diagnostics:
    def sites() -> list[SiteView]:
        now = scene.clock()
        found = []
        for name in sorted(scene.clients.known.keys() | scene.clients.disabled):
            client = scene.clients.get(name)
            state = "live" if client else scene.clients.parted.get(name, "away")
            gone = scene.clients.gone.get(name)
            found.append(
                SiteView(
                    name=name,
                    organisation=name,
                    state="disabled" if name in scene.clients.disabled else state,
                    runs=tuple(
                        (report.run, report.round, report.phase, now - report.since)
                        for report in (client.reports if client else ())
                    ),
                    last_seen_s=now - client.last_seen if client else gone and now - gone,
                    certificate_days=20.4 if client else None,
                )
            )
        return found

    return Diagnostics(scene.runs, scene.clients, sites, refusals or Refusals(), 5.0)


async def training(scene: Scene, **fields: object) -> None:
    scene.obeying("a", "b")
    await scene.submit(("a", "b"), **fields)
    await until(lambda: scene.runs.tasks.of("a"))


def test_timers_of_a_real_run(scene: Scene) -> None:
    async def it() -> None:
        await training(scene, min_clients=1, wait_after_min_s=30.0, round_deadline_s=200.0)
        await scene.do("a")
        why = explained(scene).run(1)
        assert why.cause == "wait_after_min"
        assert [round(item.in_s) for item in why.next] == [30, 200]
        assert [item.site for item in why.waits_for] == ["b"]
        part = explained(scene).round(1, 1).parts[0]
        assert (part.site, part.outcome) == ("a", "accepted")
        await scene.close()

    play(it())


def test_a_log_without_space(scene: Scene) -> None:
    async def it() -> None:
        await training(scene)
        scene.store.full = True
        task = await scene.offered("a")
        assert isinstance(
            await refused(scene.training.submit_result("a", scene.result(task))),
            ResourceExhaustedError,
        )
        why = explained(scene).run(1)
        assert why.cause == "disk_full"
        assert "its log cannot be written" in why.headline
        scene.store.full = False
        await scene.do("a")
        assert explained(scene).run(1).cause == "training"
        await scene.close()

    play(it())


def test_an_aggregation_without_space(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    async def it() -> None:
        def full(*_: object) -> ModelRef:
            raise ResourceExhaustedError("the disk is full", rule="disk")

        await training(scene)
        monkeypatch.setattr(hands, "aggregate_closed", full)
        await scene.do("a")
        await scene.do("b")
        await until(lambda: scene.actor().troubles)
        why = explained(scene).run(1)
        assert why.cause == "disk_full"
        assert "aggregate/1 cannot be stored: the disk is full" in why.headline
        await scene.close()

    play(it())


def test_refused_results_are_remembered_by_task(scene: Scene) -> None:
    async def it() -> None:
        refusals = Refusals()
        scene.training = TrainingService(
            scene.runs, scene.blobs, scene.training._processors, 5.0, refusals.note
        )
        await training(scene)
        request = pb.SubmitResultRequest(task_id="1/1/train/a", result=pb.TaskOutcome())
        assert isinstance(
            await refused(scene.training.submit_result("a", request)), InvalidArgumentError
        )
        refusal = refusals.last("a", 1)
        assert refusal is not None
        assert (refusal.what, refusal.code) == ("1/1/train/a", "invalid_argument")
        why = explained(scene, refusals).run(1)
        assert {item.site: item.cause for item in why.waits_for}["a"] == "refused"
        assert "result.blob: 1/1/train/a needs a model" in why.waits_for[0].text
        await scene.close()

    play(it())


def test_a_run_that_has_ended(scene: Scene) -> None:
    async def it() -> None:
        await training(scene)
        await scene.actor().tell(Abort("amy", "wrong data"))
        await scene.ended()
        assert explained(scene).run(1).headline == "run 1 aborted by amy: wrong data"
        with pytest.raises(NotFoundError):
            explained(scene).run(2)
        await scene.close()

    play(it())


# ---- sites --------------------------------------------------------------------------------------


def test_a_site_at_work(scene: Scene) -> None:
    async def it() -> None:
        await training(scene)
        scene.clients.heartbeat("a", [RunReport(1, 1, "train", scene.clock() - 12.0)])
        why = explained(scene).site("a")
        assert why.cause == "working"
        assert "run 1 waits for a: train since 12.0 s" in why.headline
        assert (why.can, why.ask, why.run) == (("why 1",), ("a",), 1)
        assert "its certificate is valid for 20 days: renew it" in [x.text for x in why.lines]
        assert "run 1: a accepted" in [line.text for line in why.lines]
        await scene.do("a")
        why = explained(scene).site("a")
        assert why.cause == "idle"
        assert "owes nothing now; it is a target of run 1" in why.headline
        await scene.close()

    play(it())


def test_a_site_that_has_lost_its_run_and_one_that_was_withdrawn(scene: Scene) -> None:
    async def it() -> None:
        scene.obeying("a", "b", "c")
        await scene.submit(("a", "b", "c"), min_clients=1)
        task = await scene.offered("c")
        failure = pb.TaskFailure(error=run_lost(1))
        request = pb.SubmitResultRequest(task_id=str(task.id), failure=failure)
        await scene.training.submit_result("c", request)
        back = ("abort client c --run 1", "start client c --run 1")
        why = explained(scene).site("c")
        assert (why.cause, why.run, why.can) == ("run_lost", 1, back)
        assert why.headline == "c is connected; it has lost run 1 and fails each task of it"
        assert explained(scene).run(1).can[:2] == back

        await scene.actor().tell(Withdraw(("c",), "amy", "withdrawn by amy"))
        why = explained(scene).site("c")
        assert (why.cause, why.can) == ("idle", back[1:])
        assert why.headline == (
            "c is connected and owes nothing now; it was withdrawn from run 1 by amy"
        )
        assert "run 1: c withdrawn by amy" in [line.text for line in why.lines]
        await scene.close()

    play(it())


def test_a_site_that_is_to_answer_and_declines(scene: Scene) -> None:
    async def it() -> None:
        scene.obeying("a")
        scene.live("b")
        await scene.submit(("a", "b"), min_clients=1)
        why = explained(scene).site("b")
        assert why.headline == (
            "b is connected; run 1 waits for b: it has not answered the start yet"
        )
        order = scene.actor().state.order_of("b")
        await scene.actor().tell(AnswerArrived("b", False, "", "no such data", order=order))
        why = explained(scene).site("b")
        assert why.headline.endswith("; it declined run 1: no such data")
        assert why.can == ("start client b --run 1",)
        await scene.close()

    play(it())


def test_sites_without_a_run(scene: Scene) -> None:
    async def it() -> None:
        scene.live("a", "b", "c")
        scene.clients.disabled.add("b")
        scene.clients.remove("c")
        refusals = Refusals()
        diagnostics = explained(scene, refusals)
        assert diagnostics.site("a").cause == "idle"
        disabled = diagnostics.site("b")
        assert (disabled.cause, disabled.can) == ("disabled", ("enable_client b",))
        assert "c has stopped" in diagnostics.site("c").headline
        unknown = diagnostics.site("nobody")
        assert unknown.headline == "nobody has never registered with this server"
        assert (unknown.cause, unknown.ask) == ("never_registered", ())
        revoked = UnauthenticatedError("the certificate of d is revoked")
        refusals.note("d", "certificate", revoked)
        refusals.note("d", "certificate", revoked)
        why = diagnostics.site("d")
        assert why.cause == "certificate"
        assert "the certificate of d is revoked (2 times)" in why.headline
        with pytest.raises(InvalidArgumentError):
            diagnostics.site("No Site!")
        await scene.close()

    play(it())


# ---- the memory of refusals ---------------------------------------------------------------------


def error(text: str) -> FLError:
    return InvalidArgumentError(text)


def test_refusals_count_what_repeats() -> None:
    times = iter(f"2024-05-01T12:00:{second:02}Z" for second in range(60))
    refusals = Refusals(lambda: next(times))
    refusals.note("a", "/flplatform.v1.FederatedTraining/Register", error("x"))
    refusals.note("a", "/flplatform.v1.FederatedTraining/Register", error("x"))
    last = refusals.last("a")
    assert last is not None
    assert (last.what, last.times, last.first[-3:], last.time[-3:]) == (
        "Register",
        2,
        "00Z",
        "01Z",
    )
    refusals.note("a", "7/1/train/a", error("y" * 2000))
    assert refusals.last("a") == refusals.last("a", 7)
    assert refusals.last("a", 8) is None
    found = refusals.last("a", 7)
    assert found is not None
    assert (found.times, len(found.error)) == (1, 500)


def test_refusals_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flplatform.server.refusals.MAX_KEPT", 10)
    refusals = Refusals()
    for number in range(100):
        refusals.note("a", f"{number}/1/train/a", error("x"))
    assert refusals.last("a", 99) is not None
    assert refusals.last("a", 80) is None
    assert datetime.now(UTC).isoformat()[:4] in refusals.last("a").time
