"""Codecs at a site: updates on their way out, models on their way in."""

from functools import partial
from pathlib import Path

from flplatform.algorithms.codecs import (
    decode,
    encode,
    model_on_wire,
    split_codec,
    wire_manifest,
)
from flplatform.core.errors import DataLossError, ModelFormatError
from flplatform.core.messages import ModelRef, Task
from flplatform.core.model import LENGTH_BYTES, MAX_HEADER_BYTES, Manifest
from flplatform.core.ports import BlobStore
from flplatform.files.modelfile import FoundCheck, load
from flplatform.files.wire import opened, unpack, write_model, write_wire
from flplatform.files.zstd import compress


def encode_update(name: str, update: Path, base: Path | None, target: Path) -> None:
    """Write an update as it crosses the wire to `target`, which must not exist.

    Args:
        name: the task's codec, not `none`.
        update: a model file.
        base: the model file that it was trained from; None if the update is a change already.
        target: the wire file.

    Raises:
        InvalidArgumentError: this release does not know the codec.
        ModelFormatError: a change is beyond what the codec can say.
        OSError: the disk refused.
    """
    codec, packed = split_codec(name)
    if codec == "none":
        return compress(update, target)
    arrays, origin = load(update), load(base) if base else None
    manifest = Manifest.of(arrays)
    return write_wire(
        target,
        wire_manifest(codec, manifest),
        lambda write: encode(codec, manifest, arrays, origin, write),
        packed=packed,
    )


def decode_model(blobs: BlobStore, task: Task, wire: Path) -> str:
    """Make the model of a task from the form in which it was downloaded; return its digest.

    Raises:
        InvalidArgumentError: this release does not know the codec.
        ModelFormatError: the file is not what the codec makes of a model of this size.
        DataLossError: what came exactly is not the task's model.
        ResourceExhaustedError: the disk is full.
    """
    codec, packed = split_codec(task.wire_codec)
    assert task.model is not None
    size = task.model.size

    def check(file_bytes: int) -> FoundCheck:
        if file_bytes > size + MAX_HEADER_BYTES:
            raise ModelFormatError(f"holds {file_bytes} bytes of a model of {size}", field="wire")
        accept = partial(_demand_size, size) if codec == "none" else model_on_wire
        return FoundCheck(file_bytes, LENGTH_BYTES + MAX_HEADER_BYTES, accept)

    def fill(target: Path) -> None:
        if codec == "none":
            return unpack(wire, target, check)
        with opened(wire, target, check, packed=packed) as plain:
            arrays = load(plain)
            manifest = model_on_wire(Manifest.of(arrays))
            _demand_size(size, manifest)
            write_model(
                target, manifest, lambda write: decode(codec, manifest, arrays, None, write)
            )
        return None

    made: ModelRef = blobs.create(fill)
    if codec == "none" and made.digest != task.model.digest:
        blobs.delete(made.digest)
        raise DataLossError(f"what came for {task.model.digest} is {made.digest}")
    return made.digest


def _demand_size(size: int, manifest: Manifest) -> None:
    if manifest.file_bytes() != size:
        raise ModelFormatError(
            f"stands for a model of {manifest.file_bytes()} bytes, not {size}", field="wire"
        )
