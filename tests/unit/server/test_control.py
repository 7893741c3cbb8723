import asyncio
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flplatform.core import events as ev
from flplatform.core.control import SiteReply
from flplatform.core.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    FLError,
    InvalidArgumentError,
    ModelFormatError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from flplatform.core.messages import ModelRef
from flplatform.files.modelfile import save
from flplatform.rpc.v1 import federated_pb2 as pb
from flplatform.security.identity import TrustStore
from flplatform.security.package import pack
from flplatform.security.signing import StartOrder, sign_order
from flplatform.server.client_manager import RunReport
from flplatform.server.control import ServerControl, resolve_sites
from tests.support.federation import Federation, provision
from tests.unit.server.scene import Scene, play, refused, settle, until

JOB = """name: tiny
workflow: [scatter_gather]
executor: {module: job}
initial_model: {file: model.safetensors}
min_clients: 2
wait_after_min_s: 600
"""


class Trust:
    def __init__(self, store: TrustStore) -> None:
        self.store = store


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return provision(tmp_path_factory.mktemp("kits"), admins=("amy", "bob"))


@pytest.fixture
def ends() -> list[bool]:
    return []


@pytest.fixture
def make(
    scene: Scene, federation: Federation, ends: list[bool]
) -> Iterator[Callable[[], ServerControl]]:
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
            end=ends.append,
        )
        scene.runs.changed = control.note_change
        return control

    return made


# ---- submitting -------------------------------------------------------------------------------


class Submission:
    """A job on its way; `order` is signed anew each time."""

    def __init__(self, federation: Federation, scene: Scene, author: str = "amy") -> None:
        self._federation = federation
        self._scene = scene
        self.author = author
        self.model = scene.model()
        self.id = "1" * 32
        self.digest = self.upload(self.package())

    def package(self, **more: Any) -> bytes:
        fields: dict[str, Any] = {
            "project": "test",
            "author": self.author,
            "job": "tiny",
            "key": self._federation.key(self.author),
            "certificate": self._federation.open(self.author).chain,
        }
        model = more.pop("model", self.model)
        text = JOB + more.pop("comment", "")
        return pack({"job.yml": text.encode()}, model, **fields | more)

    def upload(self, data: bytes) -> str:
        ref = self._scene.blobs.create(lambda path: path.write_bytes(data) and None)
        return ref.digest.removeprefix("blake3:")

    def order(self, signer: str = "amy", **changes: Any) -> bytes:
        now = datetime.now(UTC)
        fields: dict[str, Any] = {
            "project": "test",
            "submission_id": self.id,
            "job_digest": self.digest,
            "sites": ("a", "b"),
            "issued_at": now,
            "not_after": now + timedelta(hours=24),
        }
        order = StartOrder(**fields | changes)
        kit = self._federation.open(signer)
        return sign_order(order, self._federation.key(signer), kit.chain).to_bytes()


@pytest.fixture
def submission(federation: Federation, scene: Scene) -> Submission:
    return Submission(federation, scene)


def test_a_signed_order_opens_a_run(
    scene: Scene, make: Callable[[], ServerControl], submission: Submission
) -> None:
    async def it() -> None:
        control = make()
        scene.live("a", "b")
        order = submission.order()
        assert await control.submit(order, "amy", None) == 1
        (request,) = await scene.relay.retrieve("a", [], 1.0)
        assert (request.topic, request.signed) == ("start", order)
        assert control.run(1).submitter == "amy"
        assert control.run(1).targets == ("a", "b")
        assert control.active_runs() == [1]
        await scene.close()

    play(it())


def test_min_clients_comes_from_the_job_or_the_command(
    scene: Scene, make: Callable[[], ServerControl], submission: Submission
) -> None:
    async def it() -> None:
        control = make()
        scene.live("a", "b")
        await control.submit(submission.order(), "amy", None)
        submission.id = "2" * 32
        await control.submit(submission.order(), "amy", 1)
        assert [control.run(n).min_clients for n in (1, 2)] == [2, 1]
        submission.id = "3" * 32
        for odd in (0, -1, 3):
            error = await refused(control.submit(submission.order(), "amy", odd))
            assert type(error) is InvalidArgumentError
        await scene.close()

    play(it())


def test_the_same_submission_again_is_the_same_run_whatever_has_changed_since(
    scene: Scene, make: Callable[[], ServerControl], submission: Submission
) -> None:
    """The answer was lost; meanwhile a site has gone, and the package, too."""

    async def it() -> None:
        control = make()
        scene.live("a", "b")
        order = submission.order()
        assert await control.submit(order, "amy", None) == 1
        scene.clients.remove("b")
        scene.blobs.delete(f"blake3:{submission.digest}")
        assert await control.submit(order, "amy", None) == 1
        submission.digest = submission.upload(submission.package(comment="# changed\n"))
        error = await refused(control.submit(submission.order(), "amy", None))
        assert type(error) is AlreadyExistsError
        assert control.active_runs() == [1]
        await scene.close()

    play(it())


def test_orders_that_do_not_hold_are_refused(
    scene: Scene, make: Callable[[], ServerControl], submission: Submission
) -> None:
    now = datetime.now(UTC)
    old = {"issued_at": now - timedelta(days=2), "not_after": now - timedelta(days=1)}
    future = {"issued_at": now + timedelta(hours=1), "not_after": now + timedelta(hours=2)}
    tampered = submission.order().replace(b"payload", b"payloaf")
    wrong: list[tuple[bytes, type[FLError]]] = [
        (b"", FLError),
        (b"{}", FLError),
        (tampered, FLError),
        (submission.order(signer="bob"), PermissionDeniedError),
        (submission.order(**old), PermissionDeniedError),
        (submission.order(**future), PermissionDeniedError),
        (submission.order(project="other"), PermissionDeniedError),
        (submission.order(job_digest="0" * 64), NotFoundError),
        (submission.order(sites=("a", "x")), InvalidArgumentError),
    ]

    async def it() -> None:
        control = make()
        scene.live("a", "b")
        for order, error in wrong:
            assert isinstance(await refused(control.submit(order, "amy", None)), error)
        assert control.runs() == []
        await scene.close()

    play(it())


def test_packages_that_do_not_hold_are_refused(
    scene: Scene, make: Callable[[], ServerControl], submission: Submission
) -> None:
    missing = ModelRef("blake3:" + "0" * 64, 5)
    odd = ModelRef("md5:0", 5)
    nan = scene.blobs.create(lambda path: save(path, {"w": np.array([np.nan])}) and None)
    wrong: list[tuple[bytes, type[FLError]]] = [
        (b"no zip", InvalidArgumentError),
        (submission.package(project="other"), InvalidArgumentError),
        (submission.package(author="bob"), InvalidArgumentError),
        (submission.package(model=missing), NotFoundError),
        (submission.package(model=odd), InvalidArgumentError),
        (submission.package(model=nan), ModelFormatError),
        (submission.package()[:-1] + b"x", InvalidArgumentError),
    ]

    async def it() -> None:
        control = make()
        scene.live("a", "b")
        for package, error in wrong:
            submission.digest = submission.upload(package)
            assert isinstance(await refused(control.submit(submission.order(), "amy", None)), error)
        assert control.runs() == []

    play(it())


def test_the_package_of_another_author_may_be_submitted(
    scene: Scene, make: Callable[[], ServerControl], federation: Federation
) -> None:
    """The sites look at both."""
    submission = Submission(federation, scene, author="bob")

    async def it() -> None:
        control = make()
        scene.live("a", "b")
        assert await control.submit(submission.order(signer="amy"), "amy", None) == 1
        await scene.close()

    play(it())


def test_a_disabled_target_is_named_as_such(
    scene: Scene, make: Callable[[], ServerControl], submission: Submission
) -> None:
    async def it() -> None:
        control = make()
        scene.live("a", "b")
        await scene.runs.set_enabled("b", False, "x")
        error = await refused(control.submit(submission.order(), "amy", None))
        assert str(error) == "sites: b is disabled; enable_client b"

    play(it())


def test_a_revoked_admin_submits_nothing(
    tmp_path: Path, scene: Scene, make: Callable[[], ServerControl]
) -> None:
    own = provision(tmp_path / "own", admins=("amy",))
    order = Submission(own, scene).order()
    own.revoke("amy")

    async def it() -> None:
        control = make()
        scene.live("a", "b")
        control._trust.store = own.open("server").trust
        error = await refused(control.submit(order, "amy", None))
        assert type(error) is UnauthenticatedError
        assert "revoked" in str(error)

    play(it())


# ---- seeing -------------------------------------------------------------------------------------


def test_a_run_as_it_goes_by(scene: Scene, make: Callable[[], ServerControl]) -> None:
    async def it() -> None:
        control = make()
        scene.obeying("a", "b")
        scene.live("c")
        await scene.submit(
            ("a", "b", "c"),
            min_clients=2,
            watch={"metric": "loss", "mode": "min"},
            workflow=["scatter_gather", "cross_site_validation"],
        )
        await until(lambda: len(scene.events()) == 3)
        view = control.run(1)
        assert (view.status, view.waiting, view.accepted) == ("deploying", ("c",), ("a", "b"))
        assert view.answers == {"a": "ok", "b": "ok", "c": "…"}
        assert set(view.timers) == {"deploy"}
        (request,) = await scene.relay.retrieve("c", [], 1.0)
        refusal = pb.SiteReply(
            request_id=request.id, status="refused", rule="byoc", message="no code"
        )
        scene.relay.reply("c", refusal)
        await scene.do("a")
        view = control.run(1)
        assert view.answers["c"] == "declined: byoc: no code"
        assert (view.status, view.round, view.waiting, view.accepted) == (
            "training",
            1,
            ("b",),
            ("a",),
        )
        assert (view.metric, view.mode, view.submitter_organisation) == ("loss", "min", "hub")
        assert set(view.timers) == {"deadline/1"}
        assert [run.status for run in control.runs()] == ["training"]
        await scene.do("b")
        await scene.do("a")  # scores the last model
        assert control.run(1).accepted == ("a",)
        assert control.run(1).waiting == ("b",)
        await scene.close()

    play(it())


def test_waiting_for_a_run(scene: Scene, make: Callable[[], ServerControl]) -> None:
    async def it() -> None:
        control = make()
        scene.obeying("a", "b")
        await scene.submit()
        ended = asyncio.create_task(control.wait_ended(1))
        seen = 0
        counts = []
        while not control.run(1).ended:
            seen = await control.wait_changed(1, seen)
            counts.append(seen)
            for site in "ab":
                for task in scene.runs.tasks.of(site):
                    await scene.training.submit_result(site, scene.result(task))
        assert counts == sorted(set(counts)), "each look brings something new"
        view = await ended
        assert (view.status, view.reason) == ("finished", "all steps done")
        assert view.ended
        assert await control.wait_changed(1, 10**6) == len(scene.events())
        assert (await control.wait_ended(1)).run == 1
        for waiting in (control.wait_ended(9), control.wait_changed(9, 0)):
            assert type(await refused(waiting)) is NotFoundError
        await scene.close()

    play(it())


def test_ended_runs_after_a_restart(scene: Scene, make: Callable[[], ServerControl]) -> None:
    async def it() -> None:
        control = make()
        await scene.submit()
        await control.abort(1, "amy")
        await scene.ended()
        before = control.run(1)
        assert (before.status, before.reason) == ("aborted", "aborted by amy")
        await scene.restart()
        control = make()
        (listed,) = control.runs()
        assert (listed.status, listed.reason, listed.name) == ("aborted", "aborted by amy", "test")
        assert control.run(1) == before
        assert control.active_runs() == []
        await scene.close()

    play(it())


def test_ending_and_changing_a_run(scene: Scene, make: Callable[[], ServerControl]) -> None:
    async def it() -> None:
        control = make()
        scene.obeying("a", "b")
        await scene.submit()
        await scene.do("a")
        await control.set_min_clients(1, 1, "amy")
        assert scene.events(kind=ev.QuorumSet) == [ev.QuorumSet(min_clients=1, by="amy")]
        assert control.run(1).min_clients == 1
        for odd in (0, 3):
            error = await refused(control.set_min_clients(1, odd, "amy"))
            assert type(error) is InvalidArgumentError
        await control.abort(1, "amy")
        for late in (control.abort(1, "amy"), control.set_min_clients(1, 1, "amy")):
            assert type(await refused(late)) is FailedPreconditionError
        for unknown in (control.abort(9, "amy"), control.set_min_clients(9, 1, "amy")):
            assert type(await refused(unknown)) is NotFoundError
        await scene.close()

    play(it())


def test_what_a_run_brought(scene: Scene, make: Callable[[], ServerControl]) -> None:
    async def it() -> None:
        control = make()
        scene.obeying("a", "b")
        await scene.submit(
            rounds=2,
            watch={"metric": "loss", "mode": "min"},
            workflow=["scatter_gather", "cross_site_validation"],
        )
        while not scene.runs.ended(1):
            for site, loss in (("a", 0.25), ("b", 0.75)):
                for task in scene.runs.tasks.of(site):
                    request = scene.result(task)
                    request.result.metrics["loss"] = loss * (1 + task.id.round)
                    request.result.received["loss"] = loss
                    request.result.received_examples = 10
                    await scene.training.submit_result(site, request)
            await asyncio.sleep(0)
        initial, first, last = control.metrics(1)
        assert (initial.round, initial.score, initial.closed) == (0, 0.5, "")
        assert initial.best
        assert first.score == 0.5
        assert first.training == {"a": {"loss": 0.5}, "b": {"loss": 1.5}}
        assert first.closed == "all participants answered"
        assert last.sites == {"a": {"loss": 0.75}, "b": {"loss": 2.25}}
        assert last.score == 1.5
        number, ref = control.model(1, "last")
        assert (number, ref.digest) == (2, last.digest)
        assert control.model(1, "best")[0] == control.model(1, 0)[0] == control.model(1, "0")[0]
        for odd in (3, -1, "first", "", "²"):
            with pytest.raises(NotFoundError, match="no global model of round"):
                control.model(1, odd)
        with pytest.raises(NotFoundError):
            control.model(9, "last")
        matrix = control.cross_validation(1)
        assert (matrix.owners, matrix.sites) == (("a", "b", "global"), ("a", "b"))
        assert (matrix.metric, matrix.mode, matrix.complete) == ("loss", "min", True)
        await scene.close()

    play(it())


# ---- sites --------------------------------------------------------------------------------------


def test_sites_as_the_server_sees_them(scene: Scene, make: Callable[[], ServerControl]) -> None:
    async def it() -> None:
        control = make()
        scene.live("b", "c")
        scene.clients.presume(["a"])
        scene.clients.heartbeat("b", [RunReport(1, 2, "training", scene.clock.now - 5)])
        await scene.runs.set_enabled("c", False, "x")
        await scene.runs.set_enabled("d", False, "x")
        scene.clock.now += 2
        a, b, c, d = control.sites()
        assert [(site.name, site.state) for site in (a, b, c, d)] == [
            ("a", "expected"),
            ("b", "live"),
            ("c", "disabled"),
            ("d", "disabled"),
        ]
        assert (a.last_seen_s, a.certificate_days) == (None, None)
        assert (b.last_seen_s, b.runs) == (2.0, ((1, 2, "training", 7.0),))
        assert b.certificate_days > 365
        control.remove("b")
        scene.clock.now += 3
        b = control.sites()[1]
        assert (b.name, b.state, b.organisation, b.last_seen_s) == ("b", "removed", "b", 3.0)
        assert (b.runs, b.certificate_days) == ((), None)
        with pytest.raises(NotFoundError):
            control.remove("b")

    play(it())


def test_asking_sites(scene: Scene, make: Callable[[], ServerControl]) -> None:
    async def it() -> None:
        control = make()
        scene.obeying("a")
        await settle()
        replies = await control.ask(["a", "b"], "check_status", timeout_s=1.0, signed=b"s")
        assert replies == {
            "a": SiteReply("ok"),
            "b": SiteReply("no_reply", {}, "no reply after 1.0 s"),
        }
        await scene.close()

    play(it())


def test_the_server_itself(
    scene: Scene, make: Callable[[], ServerControl], ends: list[bool]
) -> None:
    async def it() -> None:
        control = make()
        scene.live("a")
        view = control.server()
        assert (view.project, view.name, view.registered, view.max_clients) == (
            "test",
            "server",
            1,
            100,
        )
        assert 300 < view.certificate_days < 400
        assert view.uptime_s >= 0
        assert (view.state, view.trouble) == ("serving", "")
        scene.store.trouble = "PostgreSQL x is away"
        view = control.server()
        assert (view.state, view.trouble) == ("no database", "PostgreSQL x is away")
        assert control.system()["disk_free_bytes"] > 0
        control.stop(restart=True)
        control.stop(restart=False)
        assert ends == [True, False]

    play(it())


def test_targets_are_those_asked_for_or_every_enabled_site() -> None:
    disabled = frozenset({"c"})
    assert resolve_sites((), ("a", "b", "c"), disabled) == ("a", "b")
    assert resolve_sites(("b", "a"), ("a", "b", "c"), disabled) == ("b", "a")
    with pytest.raises(InvalidArgumentError, match="'x' is not registered; registered: a"):
        resolve_sites(("x",), ("a",), disabled)
    with pytest.raises(InvalidArgumentError, match="c is disabled; enable_client c"):
        resolve_sites(("c",), ("a", "c"), disabled)
    with pytest.raises(InvalidArgumentError, match="registered: none"):
        resolve_sites(("x",), (), disabled)
