"""What leaves a site of a task's model: checked, filtered, and as the task wants it on the wire.

Filters see whole models. Where a job sends changes or some tensors only, and the site's policy
has filters, what is sent is made again from the filtered model.
"""

from collections.abc import Sequence
from pathlib import Path

from flplatform.algorithms.filters import FILTERS
from flplatform.client.frames import RESULT_FILE
from flplatform.client.run_spec import Outcome
from flplatform.client.update import update_of
from flplatform.client.wire import encode_update
from flplatform.core.config import Component
from flplatform.core.errors import FailedPreconditionError
from flplatform.core.messages import ModelRef, Task
from flplatform.core.model import Manifest
from flplatform.files.digest import digest_of_file
from flplatform.files.modelfile import check_finite, load, save


def prepare(
    work: Path, outcome: Outcome, base: Path | None, filters: Sequence[Component], task: Task
) -> ModelRef | None:
    """Leave what is to be sent in `work/result.safetensors`; return its digest and size.

    Args:
        work: holds the model, and the update beside it if there is one.
        outcome: names both; None comes back if it has no model.
        base: the model that filters compare with and changes count from: the one that was trained
            from, or for the best local model the last one that was received for training.
        filters: of the site's policy.
        task: names the codec.

    Raises:
        FailedPreconditionError: there are filters and no base.
        ModelFormatError: a tensor is unknown, missing or not finite, or beyond the codec.
        OSError: the disk refused.
    """
    if not outcome.file:
        return None
    path = work / outcome.file
    _filter(path, base, filters)
    if outcome.update and base is not None:
        path = _update(work / outcome.update, path, base, delta=outcome.delta, anew=bool(filters))
    if task.codec not in ("", "none"):
        wire = work / "wire"
        encode_update(task.codec, path, None if outcome.delta else base, wire)
        path.unlink()
        path = wire
    if path.name != RESULT_FILE:
        path.replace(work / RESULT_FILE)  # the state may link what lay there
    return ModelRef(*digest_of_file(work / RESULT_FILE))


def _filter(path: Path, base: Path | None, filters: Sequence[Component]) -> None:
    arrays = load(path)
    check_finite(arrays)
    if base:
        Manifest.of(load(base)).check_same(Manifest.of(arrays), "update")
    if not filters:
        return
    if base is None:
        raise FailedPreconditionError(
            "no model was received since this site's restart that filters could compare with",
            rule="policy filters",
        )
    for item in filters:
        arrays = FILTERS.create(item.name, item.args, "filters")(arrays, load(base))
    filtered = path.with_suffix(".filtered")
    save(filtered, arrays)
    filtered.replace(path)


def _update(path: Path, whole: Path, base: Path, *, delta: bool, anew: bool) -> Path:
    update, received = load(path), load(base)
    Manifest.of(received).check_part(Manifest.of(update), "update")
    if anew:
        made = update_of(load(whole), received, update.keys(), delta=delta)
        filtered = path.with_suffix(".filtered")
        save(filtered, made)
        filtered.replace(path)
    else:
        check_finite(update)
    return path
