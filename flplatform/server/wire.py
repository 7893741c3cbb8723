"""Codecs at the server: what an update may weigh, what it comes to, and models for the way down."""

from functools import partial
from pathlib import Path

from flplatform.algorithms.codecs import (
    decode,
    encode,
    part_on_wire,
    split_codec,
    wire_manifest,
)
from flplatform.core.errors import InvalidArgumentError, NotFoundError, UnavailableError
from flplatform.core.job import JobSpec
from flplatform.core.messages import TRAIN, ModelRef, Task
from flplatform.core.model import Manifest, PartOf, encode_header
from flplatform.core.ports import BlobStore
from flplatform.files.modelfile import FoundCheck, ModelCheck, load, model_check
from flplatform.files.wire import opened, unpack, write_model, write_wire
from flplatform.files.zstd import compress, compress_bound

Expected = Manifest | PartOf | None
"""What bytes must be as they come; None leaves that for later."""


def admissible(job: JobSpec, manifest: Manifest, task: Task, blob: ModelRef) -> Expected:
    """Return what the bytes of a task's model must be as they come; None if they are packed.

    Raises:
        InvalidArgumentError: they are too many, or not as many as they must be.
    """
    codec, packed = split_codec(task.codec)
    part = job.partial_updates and task.id.kind == TRAIN
    whole = wire_manifest(codec, manifest)
    most = whole.file_bytes()
    if packed:
        most = compress_bound(most)
    if blob.size > most or (blob.size < most and not (part or packed)):
        form = "" if task.codec == "none" else f" with codec {task.codec}"
        bound = "at most " if part or packed else ""
        raise InvalidArgumentError(
            f"is {blob.size} bytes; a model of run {task.id.run}{form} has {bound}{most}",
            field="blob.size",
        )
    if packed:
        return None
    return PartOf(whole) if part else whole


def undo(
    blobs: BlobStore, job: JobSpec, manifest: Manifest, task: Task, wire: ModelRef
) -> ModelRef:
    """Make the canonical model file that an encoded update stands for: durable on return.

    Args:
        blobs: holds the wire blob and the task's model, and takes the result.
        job: says whether updates are changes, and whether they may be partial.
        manifest: the tensors of the job's model.
        task: whose update it is.
        wire: what came; from anybody.

    Raises:
        ModelFormatError: it is not what the codec makes of such an update.
        UnavailableError: the wire blob is not here any more: it must be sent again.
        ResourceExhaustedError: the disk is full.
    """
    codec, packed = split_codec(task.codec)
    expected = PartOf(manifest) if job.partial_updates else manifest
    base = None
    if job.updates == "full" and task.model is not None:
        base = load(blobs.checked(task.model.digest))
    base_codec, _ = split_codec(task.wire_codec)
    try:
        source = blobs.checked(wire.digest)
    except NotFoundError:
        raise UnavailableError(f"{wire.digest} is gone", hint="send it again") from None

    def check(size: int) -> ModelCheck | FoundCheck:
        if codec == "none":
            return model_check(expected, size)
        whole = wire_manifest(codec, manifest)
        if not isinstance(expected, PartOf):
            return model_check(whole, size)
        model_check(PartOf(whole), size)
        return FoundCheck(size, len(encode_header(whole)), partial(part_on_wire, codec, manifest))

    def fill(target: Path) -> None:
        if codec == "none":
            return unpack(source, target, check)
        with opened(source, target, check, packed=packed) as plain:
            arrays = load(plain)
            part = part_on_wire(codec, manifest, Manifest.of(arrays))
            write_model(
                target, part, lambda write: decode(codec, part, arrays, base, write, base_codec)
            )
        return None

    return blobs.create(fill)


def make_wire(blobs: BlobStore, model: ModelRef, name: str) -> ModelRef:
    """Make what sites download instead of a model: the same model, the same bytes.

    Args:
        blobs: holds the model and takes the result.
        model: the model.
        name: the job's `codec_down`, not `none`.

    Raises:
        ModelFormatError: a value is beyond what the codec can say.
        ResourceExhaustedError: the disk is full.
    """
    codec, packed = split_codec(name)
    arrays = load(blobs.checked(model.digest))
    manifest = Manifest.of(arrays)

    def fill(target: Path) -> None:
        if codec == "none":
            compress(blobs.checked(model.digest), target)
        else:
            wire = wire_manifest(codec, manifest)
            write_wire(
                target,
                wire,
                lambda write: encode(codec, manifest, arrays, None, write),
                packed=packed,
            )

    return blobs.create(fill)
