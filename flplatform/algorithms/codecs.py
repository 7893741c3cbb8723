"""Codecs: what weights look like while they cross the wire. Pure functions over tiles.

A wire file is a model file of other tensors. Float tensors are encoded, as the change from a base
where there is one: changes are small, and so is their error. Other tensors travel as they are.

    bf16, fp16   h/NAME, d/NAME        float32, float64 rounded to two bytes
    int8         q/NAME and s/NAME     int8 and a float32 scale per block of `BLOCK` values
    all          t/NAME                as it is

Linear quantisation by blocks, each scaled by its largest magnitude: Dettmers et al., 2022. The
error of a value is at most half a unit of its last place (bf16, fp16), or half its block's scale,
which is the block's largest magnitude / 127 (int8).
"""

import math
from typing import Literal, get_args

import numpy as np

from flplatform.algorithms.tiles import Tile, Write, tiles_of
from flplatform.core.errors import InvalidArgumentError, ModelFormatError
from flplatform.core.model import (
    DTYPES,
    Array,
    Arrays,
    Manifest,
    TensorSpec,
    encode_header,
    is_float,
    parse_header,
)

Codec = Literal["none", "bf16", "fp16", "int8"]
CODECS: tuple[Codec, ...] = get_args(Codec)
PACKED = "zstd"
"""Named beside a codec or alone: what crosses the wire is compressed as well."""

BLOCK = 1024
"""Values that share a scale; tiles begin and end at blocks."""
LEVELS = 127.0

_HALVES = {"bf16": "BF16", "fp16": "F16"}
_PREFIXES = {"F32": "h/", "F64": "d/"}
_WIDE = {prefix: code for code, prefix in _PREFIXES.items()}


def split_codec(name: str) -> tuple[Codec, bool]:
    """Return what a job's `codec` names: a codec, and whether zstd follows.

    Raises:
        InvalidArgumentError: this release does not know it.
    """
    if name == PACKED:
        return "none", True
    first, plus, after = name.partition("+")
    for codec in CODECS:
        if first == codec and (not plus or (after == PACKED and codec != "none")):
            return codec, after == PACKED
    raise InvalidArgumentError(
        f"{name[:60]!r} is unknown to this release",
        field="codec",
        hint=f"known are {', '.join(CODECS)}, each but none also with +{PACKED}, and {PACKED}",
    )


def wire_manifest(codec: Codec, manifest: Manifest) -> Manifest:
    """Return the tensors of a wire file of a model with these tensors."""
    if codec == "none":
        return manifest
    specs = []
    for spec in manifest.tensors:
        if codec == "int8" and is_float(DTYPES[spec.dtype]):
            blocks = -(-math.prod(spec.shape) // BLOCK)
            specs.append(TensorSpec(f"q/{spec.name}", "I8", spec.shape))
            specs.append(TensorSpec(f"s/{spec.name}", "F32", (blocks,)))
        elif codec != "int8" and spec.dtype in _PREFIXES:
            name = _PREFIXES[spec.dtype] + spec.name
            specs.append(TensorSpec(name, _HALVES[codec], spec.shape))
        else:
            specs.append(TensorSpec(f"t/{spec.name}", spec.dtype, spec.shape))
    return Manifest(tuple(sorted(specs, key=lambda spec: spec.name)))


def check_codec(name: str, manifest: Manifest) -> None:
    """Refuse a codec whose wire file of this model could not be read.

    Raises:
        InvalidArgumentError: this release does not know the codec.
        ModelFormatError: too many tensors, or names that are too long.
    """
    wire = wire_manifest(split_codec(name)[0], manifest)
    parse_header(encode_header(wire), wire.file_bytes())


def part_on_wire(codec: Codec, whole: Manifest, found: Manifest) -> Manifest:
    """Return which tensors of the model `whole` a wire file holds: all or some of them.

    Raises:
        ModelFormatError: the tensors in the file are not those of such a part.
    """
    names = {spec.name for spec in found.tensors}
    part = Manifest(
        tuple(
            spec
            for spec in whole.tensors
            if wire_manifest(codec, Manifest((spec,))).tensors[0].name in names
        )
    )
    wire_manifest(codec, part).check_same(found, "update")
    return part


def model_on_wire(found: Manifest) -> Manifest:
    """Return the tensors of the model that a wire file of bf16 or fp16 holds.

    Raises:
        ModelFormatError: it is no such file.
    """
    specs = []
    for spec in found.tensors:
        prefix, name = spec.name[:2], spec.name[2:]
        if prefix not in ("t/", *_WIDE) or not name:
            raise ModelFormatError("is no tensor of a model on the wire", field=spec.name[:60])
        specs.append(TensorSpec(name, _WIDE.get(prefix, spec.dtype), spec.shape))
    return Manifest(tuple(sorted(specs, key=lambda spec: spec.name)))


def encode(
    codec: Codec, manifest: Manifest, arrays: Arrays, base: Arrays | None, out: Write
) -> None:
    """Encode a model, or its change from `base`, tile by tile.

    Args:
        codec: any but `none`.
        manifest: the tensors of the model.
        arrays: the model.
        base: what changes are taken from; None encodes the values themselves.
        out: takes the tensors of the wire file; see `wire_manifest`.

    Raises:
        ModelFormatError: a value is beyond what the codec can say.
    """
    specs = {spec.name: spec for spec in manifest.tensors}
    for tile in tiles_of(manifest):
        values = arrays[tile.name].reshape(-1)[tile.cut]
        spec = specs[tile.name]
        if _as_it_is(codec, spec):
            out(f"t/{tile.name}", tile.start, values)
            continue
        wide = values.astype(np.float64)
        with np.errstate(over="ignore"):  # an infinite change is refused below
            if base is not None:
                wide -= base[tile.name].reshape(-1)[tile.cut]
        if codec == "int8":
            quantised, scales = _quantise(wide, tile.name, codec)
            out(f"q/{tile.name}", tile.start, quantised)
            out(f"s/{tile.name}", tile.start // BLOCK, scales)
        else:
            half = _narrow(wide, DTYPES[_HALVES[codec]], tile.name, codec)
            out(_PREFIXES[spec.dtype] + tile.name, tile.start, half)


def _as_it_is(codec: Codec, spec: TensorSpec) -> bool:
    return not is_float(DTYPES[spec.dtype]) if codec == "int8" else spec.dtype not in _PREFIXES


def decode(
    codec: Codec,
    manifest: Manifest,
    wire: Arrays,
    base: Arrays | None,
    out: Write,
    base_codec: Codec = "none",
) -> None:
    """Undo `encode`.

    Args:
        codec: any but `none`.
        manifest: the tensors of the model.
        wire: the tensors of the wire file, of `wire_manifest`.
        base: as given to `encode`, with the same values.
        out: takes the tensors of the model.
        base_codec: how `base` itself had come to who encoded: its values are rounded like that.

    Raises:
        ModelFormatError: a value is beyond its tensor's dtype.
    """
    specs = {spec.name: spec for spec in manifest.tensors}
    for tile in tiles_of(manifest):
        values = decode_tile(codec, specs[tile.name], tile, wire, base, base_codec)
        out(tile.name, tile.start, values)


def decode_tile(
    codec: Codec,
    spec: TensorSpec,
    tile: Tile,
    wire: Arrays,
    base: Arrays | None,
    base_codec: Codec = "none",
) -> Array:
    """Return one tile of the model, flat; see `decode`.

    Raises:
        ModelFormatError: a value is beyond its tensor's dtype.
    """
    dtype = DTYPES[spec.dtype]
    if _as_it_is(codec, spec):
        return wire[f"t/{tile.name}"].reshape(-1)[tile.cut]
    if codec == "int8":
        wide = wire[f"q/{tile.name}"].reshape(-1)[tile.cut].astype(np.float64)
        scales = wire[f"s/{tile.name}"][tile.start // BLOCK : -(-tile.stop // BLOCK)]
        wide *= np.repeat(scales.astype(np.float64), BLOCK)[: wide.size]
    else:
        wide = wire[_PREFIXES[spec.dtype] + tile.name].reshape(-1)[tile.cut].astype(np.float64)
    if base is not None:
        origin = base[tile.name].reshape(-1)[tile.cut]
        if base_codec != "none" and not _as_it_is(base_codec, spec):
            half = DTYPES[_HALVES[base_codec]]
            origin = _narrow(origin.astype(np.float64), half, tile.name, base_codec)
        with np.errstate(over="ignore"):  # an infinite sum is refused below
            wide += origin.astype(np.float64)
    return _narrow(wide, dtype, tile.name)


def _quantise(values: Array, name: str, codec: Codec) -> tuple[Array, Array]:
    """Return int8 levels and float32 scales; a block of zeros has scale 0."""
    padded = np.zeros(-(-values.size // BLOCK) * BLOCK)
    padded[: values.size] = values
    blocks = padded.reshape(-1, BLOCK)
    largest = np.maximum(blocks.max(axis=1, initial=0.0), -blocks.min(axis=1, initial=0.0))
    scales = _narrow(largest / LEVELS, np.dtype("<f4"), name, codec)
    # A scale rounded down, or to nothing, must not push the largest value beyond the levels.
    short = scales.astype(np.float64) * LEVELS < largest
    scales[short] = np.nextafter(scales[short], np.float32(np.inf))
    divisor = np.where(scales > 0, scales.astype(np.float64), 1.0)
    levels = np.rint(blocks / divisor[:, None])
    return levels.astype(np.int8).reshape(-1)[: values.size], scales


def _narrow(values: Array, dtype: np.dtype[np.generic], name: str, codec: Codec = "none") -> Array:
    """Round float64 values to a dtype.

    Raises:
        ModelFormatError: one is not finite there.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        result: Array = values.astype(dtype)
    if not np.isfinite(result).all():
        by = "" if codec == "none" else f"codec {codec}: "
        others = "none, zstd or bf16" if codec == "fp16" else "none or zstd"
        raise ModelFormatError(
            f"{by}a value is beyond {dtype.name}",
            field=f"model[{name!r}]",
            hint=f"choose codec {others} in job.yml" if by else "",
        )
    return result


def error_bound(codec: Codec, values: Array) -> Array:
    """Return the largest error that `codec` may make in each of these flat float64 values.

    Args:
        codec: how they are encoded.
        values: what is encoded: changes, if there is a base.
    """
    if codec == "none":
        return np.zeros(values.size)
    if codec == "int8":
        padded = np.zeros(-(-values.size // BLOCK) * BLOCK)
        padded[: values.size] = np.abs(values)
        largest = padded.reshape(-1, BLOCK).max(axis=1, initial=0.0)
        # The scale may be one unit of float32 above largest / 127.
        scale = largest / LEVELS * (1 + 2.0**-22) + 2.0**-149
        return np.repeat(scale / 2, BLOCK)[: values.size]
    bits, smallest = (8, 2.0**-133) if codec == "bf16" else (11, 2.0**-24)
    return np.maximum(np.abs(values) * 2.0**-bits, smallest / 2)
