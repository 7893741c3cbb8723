"""What leaves a site of a task's model: checked, filtered, and as the task wants it on the wire.

Filters see whole models. Where a job sends changes or some tensors only, and the site's policy
has filters, what is sent is made again from the filtered model.
"""

import shutil
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
from flplatform.files.durable import PRIVATE_DIR
from flplatform.files.modelfile import check_finite, load, save

DRAFTS = "outgoing"
"""Folder below a task's, for what is on its way to being sent."""


def prepare(
    work: Path, outcome: Outcome, base: Path | None, filters: Sequence[Component], task: Task
) -> ModelRef | None:
    """Leave what is to be sent in `work/result.safetensors`; return its digest and size.

    What the task left is kept until the last step: after an OSError this can be done again.

    Args:
        work: holds the model, and the update beside it if there is one.
        outcome: names both; None comes back if it has no model.
        base: the model that filters compare with and changes count from: the one that was trained
            from, see `state.base_of`.
        filters: of the site's policy.
        task: names the codec.

    Raises:
        FailedPreconditionError: there are filters and no base.
        ModelFormatError: a tensor is unknown, missing or not finite, or beyond the codec.
        OSError: the disk refused.
    """
    if not outcome.file:
        return None
    drafts = work / DRAFTS
    shutil.rmtree(drafts, ignore_errors=True)
    drafts.mkdir(PRIVATE_DIR)
    try:
        return _prepare(work / outcome.file, drafts, outcome, base, filters, task)
    finally:
        shutil.rmtree(drafts, ignore_errors=True)


def _prepare(
    path: Path,
    drafts: Path,
    outcome: Outcome,
    base: Path | None,
    filters: Sequence[Component],
    task: Task,
) -> ModelRef:
    work = path.parent
    path = _filter(path, base, filters, drafts)
    if outcome.update and base is not None:
        anew = path if filters else None
        path = _update(work / outcome.update, anew, base, drafts, delta=outcome.delta)
    if task.codec not in ("", "none"):
        encode_update(task.codec, path, None if outcome.delta else base, drafts / "wire")
        path = drafts / "wire"
    blob = ModelRef(*digest_of_file(path))
    if path != work / RESULT_FILE:
        path.replace(work / RESULT_FILE)  # the state may link what lay there
    if outcome.update:
        (work / outcome.update).unlink(missing_ok=True)
    return blob


def _filter(path: Path, base: Path | None, filters: Sequence[Component], drafts: Path) -> Path:
    """Check a whole model; return the file of the filtered one."""
    arrays = load(path)
    check_finite(arrays)
    if base:
        Manifest.of(load(base)).check_same(Manifest.of(arrays), "update")
    if not filters:
        return path
    if base is None:
        raise FailedPreconditionError(
            "this site has kept no model that filters could compare with",
            rule="policy filters",
        )
    for item in filters:
        arrays = FILTERS.create(item.name, item.args, "filters")(arrays, load(base))
    save(drafts / "filtered", arrays)
    return drafts / "filtered"


def _update(path: Path, anew: Path | None, base: Path, drafts: Path, *, delta: bool) -> Path:
    """Check an update; return its file, made of the whole model `anew` if there is one."""
    update, received = load(path), load(base)
    Manifest.of(received).check_part(Manifest.of(update), "update")
    if anew is None:
        check_finite(update)
        return path
    made = update_of(load(anew), received, update.keys(), delta=delta)
    save(drafts / "update", made)
    return drafts / "update"
