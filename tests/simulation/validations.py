"""What must hold of matrices: each cell is of the model that was asked, and each gap says why."""

from collections.abc import Callable, Sequence
from typing import Any

from flplatform.algorithms.workflows import replay
from flplatform.core import events as ev
from flplatform.core.messages import SUBMIT_MODEL, TaskId
from flplatform.server.validation import cross_validation
from tests.simulation import models


def check_source(
    opened: ev.RunOpened, source: Sequence[ev.Event], read: Callable[[str], Any]
) -> None:
    """Check that a validation on demand is of models that its source run has.

    Args:
        opened: its first event.
        source: the events of its source run, so far.
        read: returns the bytes of a blob on the server.

    Raises:
        AssertionError: a model is another one.
        NotFoundError: a model is not there.
    """
    first = source[0]
    assert isinstance(first, ev.RunOpened)
    assert opened.job_blob == first.job_blob
    made = {0: first.initial_model.digest}
    given: set[tuple[str, int, str, str]] = set()
    bests: list[int] = []
    ended = isinstance(source[-1], ev.RunEnded)
    for event in source:
        match event:
            case ev.ModelPublished():
                made[event.round] = event.model.digest
            case ev.ModelScored() if event.best:
                bests.append(event.round)
            case ev.UpdateAccepted():
                given.add(("update", event.round, event.site, event.digest))
            case ev.ResultAccepted() if f"/{SUBMIT_MODEL}/" in event.task_id:
                number = TaskId.parse(event.task_id).round
                given.add(("local", number, event.site, event.digest))
    assert opened.source_models, "there is nothing to validate"
    for owner, model in opened.source_models.items():
        read(model.digest)
        if model.kind in ("update", "local"):
            assert (model.kind, model.round, owner, model.digest) in given, f"another {owner}"
            continue
        assert made[model.round] == model.digest, f"another model of round {model.round}"
        # A source run at work may have gone on a little since they were chosen.
        latest = {max(made)} if ended else {opened.source_round - 1, opened.source_round}
        match model.kind:
            case "best" if ended and bests:
                assert model.round == bests[-1], "not the best model"
            case "best":
                assert model.round in {*bests, *latest}, "not the best model"
            case "latest":
                assert model.round in latest, "not the latest model"
            case _:
                assert owner == f"r{model.round}", "another round"


def check_gather(asked: ev.GatherOpened, opened: ev.RunOpened | None) -> None:
    """Check that a validation on demand is of the models that it was opened for.

    Raises:
        AssertionError: it is not.
    """
    assert opened is not None
    if opened.source_run:
        wanted = {owner: model.digest for owner, model in opened.source_models.items()}
        assert {owner: model.digest for owner, model in asked.models.items()} == wanted


def check_cell(
    event: ev.ResultAccepted, gathers: Sequence[ev.GatherOpened], read: Callable[[str], Any]
) -> None:
    """Check that a result was measured on the model that was asked.

    Raises:
        AssertionError: it was not.
    """
    task_id = TaskId.parse(event.task_id)
    asked = [
        gather.models[task_id.owner].digest
        for gather in gathers
        if gather.round == task_id.round
        and task_id.owner in gather.models
        and event.site in gather.participants
    ]
    assert len(asked) == 1, f"{event.task_id} was not asked"
    expected = models.accuracy(read(asked[0]))
    assert event.metrics == {"accuracy": expected}, f"{event.task_id} measures another model"


def check_matrix(events: Sequence[ev.Event], count: Callable[[str], None]) -> None:
    """Check that the matrix of a finished run has a row for each model, and names all gaps.

    Raises:
        AssertionError: a cell or a column is neither there nor explained.
    """
    state = replay(events)
    if "cross_site_validation" not in state.job.workflow:
        return
    view = cross_validation(state)
    assert view.complete, "the matrix is not complete"
    owners = {*state.opened.source_models} or {*state.gathers["validate"].opened.models}
    assert set(view.owners) == owners
    for site in state.targets:
        if site not in view.sites:
            assert ("*", site) in view.gaps, f"{site} has no column, and nobody knows why"
    for owner in view.owners:
        for site in view.sites:
            there = (owner, site) in view.cells
            count("matrix cell" if there else "matrix gap")
            assert there != ((owner, site) in view.gaps), f"the cell {owner} at {site}"
    for owner in state.opened.source_gaps:
        assert (owner, "*") in view.gaps
