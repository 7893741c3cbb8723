"""The site's own filters, and the form in which a model is sent."""

import numpy as np
import pytest

from flplatform.client import answering
from flplatform.core.config import Component, SitePolicy
from flplatform.files.modelfile import load_copy
from flplatform.rpc.v1 import federated_pb2 as pb
from flplatform.server.wire import make_wire
from flplatform.store.blobs import FileBlobStore
from tests.unit.client.tasks.world import (
    NEXT,
    SUBMIT,
    TRAIN,
    VALIDATE,
    FakeRun,
    FakeSession,
    fails,
    play,
)

CLIP = Component(name="clip_norm", args={"max_norm": 1.0})


def sent(world, *tasks: pb.Task) -> list[pb.TaskOutcome]:
    """Return what is sent for tasks, one after the other."""

    async def go():
        async with world.loop() as session:
            for number, task in enumerate(tasks, start=1):
                session.offer(task)
                await session.until(lambda n=number: len(session.submitted) == n)
                await world.idle()
                if task is not tasks[-1]:
                    session.offer()
            return [request.result for request in session.submitted]

    return play(go())


def test_filters_and_the_cap_on_examples(world, keep):
    world.policy = SitePolicy(filters=(CLIP,), max_examples=10)
    train = pb.Task(id=TRAIN, model=world.model(1.0))
    results = sent(world, train, pb.Task(id=SUBMIT), pb.Task(id=VALIDATE, model=world.model(9.0)))
    assert [result.examples for result in results] == [10, 10, 100]
    assert [result.received_examples for result in results] == [90, 90, 90]
    # Trained is 3, received was 1: a change of norm 4, of which 1 may leave.
    for arrays in keep:
        np.testing.assert_allclose(arrays, 1.5, rtol=1e-6)
    assert len(keep) == 2
    assert results[0].blob == results[1].blob


def wired(world, value: float, name: str) -> tuple[pb.Blob, pb.Blob]:
    """Return a model and what sites download of it instead."""
    model = world.model(value)
    blobs = FileBlobStore(world.folder / "server")
    ref = blobs.create(lambda path: path.write_bytes(world.source[model.digest]))
    wire = make_wire(blobs, ref, name)
    world.source[wire.digest] = blobs.path(wire.digest).read_bytes()
    return model, pb.Blob(digest=wire.digest, size=wire.size)


@pytest.mark.parametrize("name", ["bf16", "fp16+zstd", "zstd"])
def test_a_model_is_downloaded_as_the_task_says(world, name):
    model, wire = wired(world, 1.0, name)
    bases = []

    async def look():
        bases.append(load_copy(world.runs[7].models[-1])["w"].tolist())

    world.runs[7].does[TRAIN] = [look]
    world.runs[7].does[NEXT] = [look]
    world.runs[7].job.codec_down = name
    tasks = [pb.Task(id=each, model=model, wire=wire, wire_codec=name) for each in (TRAIN, NEXT)]
    results = sent(world, *tasks)
    assert bases == [[1.0] * 4] * 2
    assert [result.trained_from for result in results] == [model.digest] * 2
    downloads = [call for call in world.session.calls if call.startswith("download")]
    assert downloads == [f"download {wire.digest[-4:]}"], "once, and not the model itself"


def test_an_update_is_sent_as_the_task_says(world, monkeypatch):
    kept = []

    async def send(channel, path, blob, transfer_id, *, token):
        kept.append(load_copy(path))
        await channel.send(transfer_id, path, blob)

    monkeypatch.setattr(answering, "send_blob", send)
    world.runs[7].job.codec = "bf16"
    sent(world, pb.Task(id=TRAIN, model=world.model(1.0), codec="bf16"))
    assert [list(arrays) for arrays in kept] == [["h/w"]]
    np.testing.assert_array_equal(kept[0]["h/w"].astype("f4"), 2)  # trained is 3, received was 1


def test_a_change_that_the_codec_cannot_say_is_a_failure(world):
    world.runs[7].does[TRAIN] = [{"w": np.full(4, 1e6, np.float32)}]
    world.runs[7].job.codec = "fp16"
    error = fails(world, pb.Task(id=TRAIN, model=world.model(1.0), codec="fp16")).error
    assert "model['w']: codec fp16: a value is beyond float16; choose codec" in error


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"id": TRAIN, "codec": "none"}, "codec"),  # exact, where less was signed
        ({"id": TRAIN, "codec": "fp16"}, "codec"),
        ({"id": VALIDATE, "codec": "int8"}, "codec"),
        ({"id": TRAIN, "codec": "int8", "wire_codec": "zstd"}, "codec_down"),
    ],
)
def test_a_form_that_was_not_signed_is_refused(world, asked, field):
    world.runs[7].job.codec = "int8"
    world.runs[7].job.codec_down = "bf16"
    error = fails(world, pb.Task(model=world.model(1.0), **asked)).error
    assert error.startswith(f"the server asks for {field} ")
    assert "download" not in " ".join(world.session.calls)


def test_without_filters_the_bytes_stay(world, keep):
    (result,) = sent(world, pb.Task(id=TRAIN, model=world.model(1.0)))
    np.testing.assert_array_equal(keep[0], 3)
    assert result.examples == 100


def test_validation_does_not_move_the_base_of_filters(world, keep):
    world.policy = SitePolicy(filters=(CLIP,))
    train = pb.Task(id=TRAIN, model=world.model(1.0))
    other = pb.Task(id="7/1/validate.global/site-1", model=world.model(50.0))
    sent(world, train, other, pb.Task(id=SUBMIT))
    np.testing.assert_allclose(keep[1], 1.5, rtol=1e-6)


def test_filters_need_something_to_compare_with(world):
    world.policy = SitePolicy(filters=(CLIP,))
    assert "(rule: policy filters)" in fails(world, pb.Task(id=SUBMIT)).error


def test_what_filters_compare_with_outlives_the_site_and_its_cache(world, keep):
    """A site that was killed after its last training still submits its best model."""
    world.policy = SitePolicy(filters=(CLIP,))
    sent(world, pb.Task(id=TRAIN, model=world.model(1.0)))
    for digest in world.blobs.digests():
        world.blobs.delete(digest)
    world.session = FakeSession(world.blobs, world.source)
    world.runs[7] = FakeRun(world.session, world.folder / "run-7", 7)
    sent(world, pb.Task(id=SUBMIT))
    np.testing.assert_allclose(keep[1], 1.5, rtol=1e-6)


def test_an_unknown_filter_is_a_failure(world):
    world.policy = SitePolicy(filters=(Component(name="blur"),))
    assert "blur" in fails(world, pb.Task(id=TRAIN, model=world.model())).error
