import asyncio
import time

import pytest

from flplatform.core import events as ev
from flplatform.core.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    FLError,
    InvalidArgumentError,
    ModelFormatError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnavailableError,
)
from flplatform.core.messages import MAX_METRICS, ModelRef, TaskId
from flplatform.core.model import PartOf
from flplatform.core.workflow import Abort
from flplatform.files.digest import digest_of_file
from flplatform.files.zstd import compress
from flplatform.rpc.v1 import federated_pb2 as pb
from flplatform.server.training import (
    MAX_TRACEBACK_CHARS,
    ModelResultProcessor,
    ResultProcessors,
    TrainingService,
)
from flplatform.server.validation import ValidateResultProcessor
from tests.support.workflows import job
from tests.unit.server.scene import (
    OTHER_DIGEST,
    Scene,
    caller,
    identity,
    play,
    refused,
    settle,
    until,
)

TRAIN = TaskId(1, 1, "train", "a")


async def training(scene: Scene, *sites: str, **fields: object) -> None:
    """Open run 1 at sites that accept it, up to its first round."""
    scene.obeying(*sites or ("a", "b"))
    await scene.submit(sites or ("a", "b"), **fields)
    await until(lambda: scene.runs.tasks.of("a"))


def ids(tasks: object) -> list[str]:
    return [str(task.id) for task in tasks]


# ---- waiting for tasks --------------------------------------------------------------------------


def test_tasks_come_at_once_and_until_they_are_in_hand(scene: Scene) -> None:
    async def it() -> None:
        await training(scene)
        for _ in range(3):
            tasks, ended = await scene.training.get_task("a", [], [1])
            assert (ids(tasks), ended) == ([str(TRAIN)], {})
        assert tasks[0].model.digest == scene.actor().state.model.digest
        waiting = asyncio.create_task(scene.training.get_task("a", [str(TRAIN)], [1]))
        await settle()
        assert not waiting.done()
        waiting.cancel()
        await scene.close()

    play(it())


def test_a_waiting_call_wakes_when_a_task_comes(scene: Scene) -> None:
    async def it() -> None:
        waiting = [asyncio.create_task(scene.training.get_task("a", [], [])) for _ in range(2)]
        await settle()
        await training(scene)
        for each in waiting:
            assert ids((await each)[0]) == [str(TRAIN)]
        await scene.close()

    play(it())


def test_a_waiting_call_wakes_when_a_task_is_withdrawn(scene: Scene) -> None:
    async def it() -> None:
        await training(scene, "a", "b", min_clients=1, wait_after_min_s=0.05)
        waiting = asyncio.create_task(scene.training.get_task("a", [str(TRAIN)], [1]))
        await scene.do("b")
        tasks, ended = await waiting
        assert str(TRAIN) not in ids(tasks)
        assert ended in ({}, {1: "finished"})
        await scene.close()

    play(it())


def test_a_waiting_call_wakes_when_a_run_ends(scene: Scene) -> None:
    async def it() -> None:
        await training(scene)
        held = [str(TRAIN)]
        waiting = asyncio.create_task(scene.training.get_task("a", held, [1]))
        await settle()
        await scene.actor().tell(Abort("me"))
        assert await waiting == ([], {1: "aborted"})
        assert await scene.training.get_task("a", [], [1, 9]) == ([], {1: "aborted", 9: "unknown"})
        await scene.close()

    play(it())


def test_a_waiting_call_ends_empty_after_its_time(scene: Scene) -> None:
    async def it() -> None:
        service = TrainingService(scene.runs, scene.blobs, ResultProcessors([]), 0.02)
        before = time.monotonic()
        assert await service.get_task("a", [], []) == ([], {})
        assert time.monotonic() - before >= 0.02

    play(it())


def test_news_of_others_do_not_end_a_waiting_call(scene: Scene) -> None:
    async def it() -> None:
        await training(scene)
        waiting = asyncio.create_task(scene.training.get_task("a", [str(TRAIN)], [1]))
        for _ in range(3):
            await settle()
            scene.training.notify({"a", "b", "never heard of"})
        assert not waiting.done()
        waiting.cancel()
        await scene.close()

    play(it())


def test_closing_ends_all_waiting_calls(scene: Scene) -> None:
    async def it() -> None:
        waiting = [asyncio.create_task(scene.training.get_task(site, [], [])) for site in "ab"]
        await settle()
        scene.training.close()
        assert await asyncio.gather(*waiting) == [([], {})] * 2
        assert await scene.training.get_task("c", [], []) == ([], {})

    play(it())


# ---- results ------------------------------------------------------------------------------------


def test_a_result_counts_once(scene: Scene) -> None:
    async def it() -> None:
        await training(scene)
        task = await scene.offered("a")
        request = scene.result(task)
        assert await scene.training.submit_result("a", request) == "accepted"
        assert await scene.training.submit_result("a", request) == "duplicate"
        other = scene.result(task, 2.0)
        error = await refused(scene.training.submit_result("a", other))
        assert type(error) is AlreadyExistsError
        (update,) = scene.events(kind=ev.UpdateAccepted)
        assert (update.site, update.examples, update.metrics) == ("a", 10, {"loss": 0.5})
        await scene.close()

    play(it())


def test_what_comes_after_the_end_is_judged_by_the_log(scene: Scene) -> None:
    """Its acknowledgement was lost, or it was not wanted any more."""

    async def play_it() -> None:
        scene.obeying("a", "b")
        await scene.submit()
        results = {site: scene.result(await scene.offered(site)) for site in ("a", "b")}
        assert await scene.training.submit_result("a", results["a"]) == "accepted"
        await scene.actor().tell(Abort("lead"))
        await scene.ended()
        assert await scene.training.submit_result("a", results["a"]) == "duplicate"
        late = await refused(scene.training.submit_result("b", results["b"]))
        assert type(late) is FailedPreconditionError
        await scene.close()

    play(play_it())


def test_the_same_result_many_times_at_once(scene: Scene) -> None:
    async def it() -> None:
        await training(scene)
        request = scene.result(await scene.offered("a"))
        service = scene.training
        outcomes = await asyncio.gather(*(service.submit_result("a", request) for _ in range(20)))
        assert sorted(outcomes) == ["accepted"] + ["duplicate"] * 19
        await scene.close()

    play(it())


def test_a_failure_settles_a_task(scene: Scene) -> None:
    async def it() -> None:
        await training(scene, "a", "b", min_clients=1)
        failure = pb.TaskFailure(error="  two\nlines ", traceback="x" * 99_999 + "end")
        request = pb.SubmitResultRequest(task_id=str(TRAIN), failure=failure)
        assert await scene.training.submit_result("a", request) == "accepted"
        assert await scene.training.submit_result("a", request) == "duplicate"
        (event,) = scene.events(kind=ev.TaskFailed)
        assert event.error == "two lines"
        assert len(event.traceback) == MAX_TRACEBACK_CHARS
        assert event.traceback.endswith("xend"), "the end of a traceback says most"
        await scene.close()

    play(it())


def test_a_failure_without_a_word(scene: Scene) -> None:
    async def it() -> None:
        await training(scene, "a", "b", min_clients=1)
        request = pb.SubmitResultRequest(task_id=str(TRAIN), failure=pb.TaskFailure())
        await scene.training.submit_result("a", request)
        assert scene.events(kind=ev.TaskFailed)[0].error == "no reason given"
        await scene.close()

    play(it())


def _malformed() -> dict[str, tuple[pb.SubmitResultRequest, type[FLError]]]:
    def request(task_id: str = str(TRAIN), **fields: object) -> pb.SubmitResultRequest:
        blob = pb.Blob(digest=OTHER_DIGEST, size=100)
        outcome = pb.TaskOutcome(**{"blob": blob, "examples": 1} | fields)
        return pb.SubmitResultRequest(task_id=task_id, result=outcome)

    many = {f"m{n}": 0.0 for n in range(MAX_METRICS + 1)}
    return {
        "no task": (request(""), InvalidArgumentError),
        "no task id": (request("1/1/train"), InvalidArgumentError),
        "an odd kind": (request("1/1/steal/a"), InvalidArgumentError),
        "another site's": (request("1/1/train/b"), PermissionDeniedError),
        "no such run": (request("9/1/train/a"), NotFoundError),
        "nothing": (pb.SubmitResultRequest(task_id=str(TRAIN)), InvalidArgumentError),
        "no model": (request(blob=None), InvalidArgumentError),
        "an odd digest": (request(blob=pb.Blob(digest="../x")), ModelFormatError),
        "an odd base": (request(trained_from="x"), ModelFormatError),
        "NaN": (request(metrics={"loss": float("nan")}), InvalidArgumentError),
        "infinity": (request(received={"loss": float("inf")}), InvalidArgumentError),
        "too many metrics": (request(metrics=many), InvalidArgumentError),
        "a metric with no name": (request(metrics={"": 1.0}), InvalidArgumentError),
        "too many examples": (request(examples=1 << 50), InvalidArgumentError),
        "too many received": (request(received_examples=1 << 50), InvalidArgumentError),
        "not uploaded": (request(), FailedPreconditionError),
        "a model to validate": (request("1/1/validate.b/a"), InvalidArgumentError),
    }


@pytest.mark.parametrize("what", _malformed())
def test_a_refused_result_changes_nothing(scene: Scene, what: str) -> None:
    async def it() -> None:
        await training(scene)
        events = list(scene.actor().events)
        request, error = _malformed()[what]
        assert type(await refused(scene.training.submit_result("a", request))) is error
        assert scene.actor().events == events
        assert ids(scene.runs.tasks.of("a")) == [str(TRAIN)]
        await scene.close()

    play(it())


def test_only_what_was_uploaded_for_the_task_can_be_its_result(scene: Scene) -> None:
    """A digest alone proves nothing: any blob of the server could be named."""

    async def it() -> None:
        await training(scene)
        task = await scene.offered("a")
        opened = scene.actor().state.opened
        theirs = scene.update("1/1/train/b", 5.0)
        for digest in (opened.job_blob.digest, opened.initial_model.digest, theirs.digest):
            request = scene.result(task)
            request.result.blob.digest = digest
            error = await refused(scene.training.submit_result("a", request))
            assert (type(error), error.rule) == (FailedPreconditionError, "upload_first")
        request = scene.result(task, 6.0)
        scene.blobs.delete(request.result.blob.digest)
        error = await refused(scene.training.submit_result("a", request))
        assert error.rule == "upload_first"
        await scene.close()

    play(it())


def test_after_a_restart_the_bytes_are_asked_for_again(scene: Scene) -> None:
    async def it() -> None:
        await training(scene)
        task = await scene.offered("a")
        request = scene.result(task)
        await scene.restart()
        error = await refused(scene.training.submit_result("a", request))
        assert error.rule == "upload_first"
        scene.update(task.id)
        assert await scene.training.submit_result("a", request) == "accepted"
        await scene.close()

    play(it())


def test_what_a_kill_has_left_of_an_upload_goes_with_its_task(scene: Scene) -> None:
    async def it() -> None:
        await training(scene)
        task = await scene.offered("a")
        scene.runs.retention.begin(task.id)
        writer = scene.blobs.receive(str(task.id), ModelRef(OTHER_DIGEST, 100))
        writer.write(b"first")
        writer.suspend()
        await scene.restart()
        incoming = scene.folder / "blobs" / "incoming"
        assert len(list(incoming.iterdir())) == 1, "the site goes on with it"
        await scene.actor().tell(Abort("amy"))
        await until(lambda: not any(incoming.iterdir()))
        await scene.close()

    play(it())


def test_updates_of_another_base_or_of_nothing_are_refused(scene: Scene) -> None:
    async def it() -> None:
        await training(scene)
        task = await scene.offered("a")
        request = scene.result(task)
        request.result.trained_from = OTHER_DIGEST
        error = await refused(scene.training.submit_result("a", request))
        assert (type(error), error.rule) == (FailedPreconditionError, "wrong_base")
        error = await refused(scene.training.submit_result("a", scene.result(task, examples=0)))
        assert (type(error), error.field) == (InvalidArgumentError, "examples")
        await scene.close()

    play(it())


def test_stale_results_are_refused(scene: Scene) -> None:
    async def it() -> None:
        await training(scene, "a", "b", min_clients=1, wait_after_min_s=0.001, rounds=2)
        task = await scene.offered("a")
        request = scene.result(task, 7.0)
        await scene.do("b")
        await until(lambda: scene.actor().state.round == 2)
        error = await refused(scene.training.submit_result("a", request))
        assert (type(error), error.rule) == (FailedPreconditionError, "stale_round")
        await scene.close()

    play(it())


def test_without_space_a_result_is_not_acknowledged(scene: Scene) -> None:
    async def it() -> None:
        await training(scene)
        request = scene.result(await scene.offered("a"))
        scene.store.full = True
        error = await refused(scene.training.submit_result("a", request))
        assert type(error) is ResourceExhaustedError
        scene.store.full = False
        assert await scene.training.submit_result("a", request) == "accepted"
        await scene.close()

    play(it())


def test_validation_results(scene: Scene) -> None:
    async def it() -> None:
        await training(scene, workflow=["cross_site_validation"])
        await scene.do("a")
        await scene.do("b")
        await until(lambda: len(scene.runs.tasks.of("a")) == 3)
        for task in scene.runs.tasks.of("a"):
            request = scene.result(task)
            assert await scene.training.submit_result("a", request) == "accepted"
            assert await scene.training.submit_result("a", request) == "duplicate"
        await scene.close()

    play(it())


# ---- transfers ----------------------------------------------------------------------------------


def test_an_upload_is_admitted_for_an_open_task(scene: Scene) -> None:
    async def it() -> None:
        await training(scene)
        size = scene.actor().manifest.file_bytes()
        manifest = scene.training.admit_upload(
            caller("a"), str(TRAIN), ModelRef(OTHER_DIGEST, size)
        )
        assert [spec.name for spec in manifest.tensors] == ["w"]
        await scene.close()

    play(it())


@pytest.mark.parametrize(
    ("transfer_id", "larger", "error"),
    [
        ("", 0, InvalidArgumentError),
        ("0" * 32 + "/job", 0, InvalidArgumentError),
        ("1/1/train/b", 0, PermissionDeniedError),
        ("1/2/train/a", 0, FailedPreconditionError),
        ("1/01/train/a", 0, InvalidArgumentError),
        ("1/1/submit_model/a", 0, FailedPreconditionError),
        ("1/1/validate.b/a", 0, InvalidArgumentError),
        ("7/1/train/a", 0, NotFoundError),
        (str(TRAIN), 1, InvalidArgumentError),
        (str(TRAIN), -1, InvalidArgumentError),
        (str(TRAIN), 1 << 40, InvalidArgumentError),
    ],
)
def test_other_uploads_are_refused_at_once(
    scene: Scene, transfer_id: str, larger: int, error: type[FLError]
) -> None:
    async def it() -> None:
        await training(scene)
        blob = ModelRef(OTHER_DIGEST, scene.actor().manifest.file_bytes() + larger)
        with pytest.raises(error):
            scene.training.admit_upload(caller("a"), transfer_id, blob)
        await scene.close()

    play(it())


def test_no_upload_for_a_task_that_is_done_or_a_run_that_is_over(scene: Scene) -> None:
    async def it() -> None:
        await training(scene)
        blob = ModelRef(OTHER_DIGEST, scene.actor().manifest.file_bytes())
        await scene.do("a")
        with pytest.raises(FailedPreconditionError) as caught:
            scene.training.admit_upload(caller("a"), str(TRAIN), blob)
        assert caught.value.rule == "task_closed"
        await scene.actor().tell(Abort("me"))
        with pytest.raises(FailedPreconditionError) as caught:
            scene.training.admit_upload(caller("b"), "1/1/train/b", blob)
        assert caught.value.rule == "run_ended"
        await scene.close()

    play(it())


def test_a_finished_upload_is_taken_in(scene: Scene) -> None:
    async def it() -> None:
        await training(scene)
        ref = scene.model(3.0)
        assert not scene.runs.uploads.has(TRAIN, ref.digest)
        await scene.training.note_upload(caller("a"), str(TRAIN), ref)
        assert scene.runs.uploads.has(TRAIN, ref.digest)
        await scene.close()

    play(it())


def test_what_comes_of_an_upload_after_its_task_goes_when_it_breaks_off(scene: Scene) -> None:
    """It waited for a thread while its task was settled."""
    incoming = scene.folder / "blobs" / "incoming"

    async def it() -> None:
        await training(scene)
        blob = ModelRef(OTHER_DIGEST, scene.actor().manifest.file_bytes())
        for over in (False, True):
            manifest = scene.training.admit_upload(caller("a"), str(TRAIN), blob)
            if over:
                await scene.actor().tell(Abort("amy"))
            scene.blobs.receive(str(TRAIN), blob, manifest).suspend()
            scene.training.note_broken_off(str(TRAIN))
            await settle()
            assert bool(list(incoming.iterdir())) == (not over)
        await scene.close()

    play(it())


def test_downloads_are_for_a_sites_own_runs(scene: Scene) -> None:
    async def it() -> None:
        await training(scene)
        package = scene.actor().state.opened.job_blob.digest
        scene.training.release_download(caller("a"), package)
        for name, digest in (("c", package), ("a", OTHER_DIGEST), ("a", scene.model(9.0).digest)):
            with pytest.raises(NotFoundError, match="has no task with blob"):
                scene.training.release_download(caller(name), digest)
        scene.blobs.delete(package)
        with pytest.raises(NotFoundError):
            scene.training.release_download(caller("a"), package)
        await scene.close()

    play(it())


def test_a_disabled_site_transfers_nothing(scene: Scene) -> None:
    async def it() -> None:
        await training(scene)
        blob = ModelRef(OTHER_DIGEST, scene.actor().manifest.file_bytes())
        package = scene.actor().state.opened.job_blob.digest
        await scene.runs.set_enabled("a", False, "x")
        with pytest.raises(PermissionDeniedError, match="disabled"):
            scene.training.admit_upload(caller("a"), str(TRAIN), blob)
        with pytest.raises(PermissionDeniedError, match="disabled"):
            scene.training.release_download(caller("a"), package)
        await scene.close()

    play(it())


# ---- processors ---------------------------------------------------------------------------------


def test_a_topic_has_one_processor() -> None:
    with pytest.raises(AlreadyExistsError, match="'train' has two"):
        ResultProcessors([ModelResultProcessor(), ModelResultProcessor()])


def test_a_kind_without_a_processor_is_refused() -> None:
    processors = ResultProcessors([ValidateResultProcessor()])
    with pytest.raises(InvalidArgumentError, match="nobody processes 'train'"):
        processors.process(TRAIN, pb.TaskOutcome())


def test_a_result_arrives_as_it_was_sent() -> None:
    outcome = pb.TaskOutcome(
        blob=pb.Blob(digest=OTHER_DIGEST, size=7),
        examples=5,
        metrics={"loss": 1.0},
        received={"loss": 2.0},
        received_examples=6,
        trained_from=OTHER_DIGEST,
    )
    result = ModelResultProcessor().process(TRAIN, outcome)
    assert (result.blob, result.examples, result.metrics) == (
        ModelRef(OTHER_DIGEST, 7),
        5,
        {"loss": 1.0},
    )
    assert (result.received, result.received_examples, result.trained_from) == (
        {"loss": 2.0},
        6,
        OTHER_DIGEST,
    )


# ---- codecs -------------------------------------------------------------------------------------


def encoded(scene: Scene, value: float) -> tuple[ModelRef, bytes]:
    """What a site sends whose model of three values has become `value`, by codec zstd."""
    path = scene.folder / "wire"
    path.unlink(missing_ok=True)
    compress(scene.blobs.path(scene.model(value).digest), path)
    return ModelRef(*digest_of_file(path)), path.read_bytes()


def outcome(scene: Scene, wire: ModelRef) -> pb.SubmitResultRequest:
    """The result that names what was sent."""
    (task,) = scene.runs.tasks.of("a")
    return pb.SubmitResultRequest(
        task_id=str(TRAIN),
        result=pb.TaskOutcome(
            blob=pb.Blob(digest=wire.digest, size=wire.size),
            examples=3,
            trained_from=task.model.digest,
        ),
    )


def test_an_encoded_update_counts_as_what_it_comes_to(scene: Scene) -> None:
    async def it() -> None:
        await training(scene, codec="zstd")
        wire, data = encoded(scene, 2.0)
        assert scene.runs.tasks.of("a")[0].codec == "zstd"
        assert scene.training.admit_upload(caller("a"), str(TRAIN), wire) is None
        scene.blobs.create(lambda path: path.write_bytes(data) and None)
        await scene.training.note_upload(caller("a"), str(TRAIN), wire)
        assert not scene.blobs.has(wire.digest), "freed: the model is here"
        request = outcome(scene, wire)
        assert await scene.training.submit_result("a", request) == "accepted"
        assert await scene.training.submit_result("a", request) == "duplicate"
        (event,) = scene.events(kind=ev.UpdateAccepted)
        model = scene.model(2.0)
        assert (event.digest, event.size, event.wire) == (model.digest, model.size, wire.digest)
        assert await scene.runs.tasks.settled_by(TRAIN, model.digest)
        with pytest.raises(AlreadyExistsError):
            await scene.runs.tasks.settled_by(TRAIN, OTHER_DIGEST)
        await scene.restart()
        assert await scene.training.submit_result("a", request) == "duplicate"
        await scene.close()

    play(it())


def test_nothing_counts_of_an_encoded_update_that_a_crash_undid(scene: Scene) -> None:
    async def it() -> None:
        await training(scene, codec="zstd")
        wire, data = encoded(scene, 2.0)
        for restart in (True, False):
            scene.blobs.create(lambda path: path.write_bytes(data) and None)
            await scene.training.note_upload(caller("a"), str(TRAIN), wire)
            request = outcome(scene, wire)
            if restart:
                await scene.restart()
                error = await refused(scene.training.submit_result("a", request))
                assert error.rule == "upload_first"
        assert await scene.training.submit_result("a", request) == "accepted"
        await scene.close()

    play(it())


def test_an_encoded_update_that_lies_is_refused_and_freed(scene: Scene) -> None:
    async def it() -> None:
        await training(scene, codec="zstd")
        junk = scene.blobs.create(lambda path: path.write_bytes(b"no frame") and None)
        error = await refused(scene.training.note_upload(caller("a"), str(TRAIN), junk))
        assert str(error) == "zstd: is no zstd frame"
        assert not scene.blobs.has(junk.digest)
        assert not scene.runs.uploads.has(TRAIN, junk.digest)
        gone = await refused(scene.training.note_upload(caller("a"), str(TRAIN), junk))
        assert isinstance(gone, UnavailableError)
        await scene.close()

    play(it())


def test_models_go_down_as_the_job_says_and_are_freed_behind(scene: Scene) -> None:
    async def it() -> None:
        await training(scene, codec_down="bf16", rounds=2)
        first = scene.runs.tasks.of("a")[0]
        assert first.wire_codec == "bf16"
        assert first.wire == ModelRef(**scene.actor().state.opened.wire.model_dump())
        assert scene.blobs.has(first.wire.digest)
        scene.training.release_download(caller("a"), first.wire.digest)
        await scene.restart()
        assert scene.runs.tasks.of("a") == [first]
        await scene.do("a")
        await scene.do("b")
        await until(lambda: scene.runs.tasks.of("a"))
        second = scene.runs.tasks.of("a")[0]
        assert second.wire not in (None, first.wire)
        await until(lambda: not scene.blobs.has(first.wire.digest))
        assert scene.blobs.has(second.wire.digest)
        await scene.do("a")
        await scene.do("b")
        await scene.ended()
        await until(lambda: not scene.blobs.has(second.wire.digest))
        await scene.close()

    play(it())


def test_a_model_that_cannot_go_down_is_refused_at_submission(scene: Scene) -> None:
    async def it() -> None:
        scene.obeying("a")
        package = scene.package(job(codec_down="fp16", min_clients=1), scene.model(1e6))
        code = scene.blobs.create(lambda path: path.write_bytes(b"the package") and None)
        error = await refused(
            scene.runs.submit(
                package,
                identity("lead", "hub"),
                order=b"signed start",
                submission_id="0" * 32,
                blob=code,
                sites=("a",),
                min_clients=None,
            )
        )
        assert "model['w']: codec fp16: a value is beyond float16" in str(error)
        await scene.close()

    play(it())


def test_a_partial_update_is_admitted_as_a_part(scene: Scene) -> None:
    async def it() -> None:
        await training(scene, partial_updates=True)
        blob = ModelRef(OTHER_DIGEST, scene.actor().manifest.file_bytes() - 1)
        found = scene.training.admit_upload(caller("a"), str(TRAIN), blob)
        assert found == PartOf(scene.actor().manifest)
        await scene.close()

    play(it())
