"""Cross-site validation: checking its results and reading its matrix."""

from collections.abc import Iterator
from dataclasses import replace

from flplatform.algorithms.workflows import RunState
from flplatform.core.control import MatrixView
from flplatform.core.errors import InvalidArgumentError
from flplatform.core.events import SourceModel
from flplatform.core.messages import (
    GLOBAL_OWNER,
    TaskId,
    TaskResult,
    check_examples,
    check_metrics,
)
from flplatform.rpc.v1 import federated_pb2 as pb


class ValidateResultProcessor:
    """Results of validate tasks: metrics only, no model."""

    topics = ("validate",)

    def process(self, task_id: TaskId, outcome: pb.TaskOutcome) -> TaskResult:
        """Check the metrics of one model on one site's data.

        Raises:
            InvalidArgumentError: names the field.
        """
        if outcome.HasField("blob"):
            raise InvalidArgumentError(f"{task_id} takes metrics, not a model", field="blob")
        metrics = check_metrics(outcome.metrics)
        return TaskResult(blob=None, examples=check_examples(outcome.examples), metrics=metrics)


def cross_validation(state: RunState) -> MatrixView:
    """Read the matrix out of a run's state; whatever is missing is named in `gaps`."""
    gaps = {("*", site): reason for site, reason in _absences(state)}
    gaps |= {
        (owner, "*"): f"no local model: {reason}"
        for owner, reason in state.opened.source_gaps.items()
    }
    submit, validate = state.gathers.get("submit"), state.gathers.get("validate")
    if submit and submit.closed:
        for task_id, reason in submit.closed.gaps.items():
            gaps[TaskId.parse(task_id).site, "*"] = f"no local model: {reason}"
    models = _models(state)
    watch = state.job.watch
    view = MatrixView(
        owners=(),
        sites=(),
        cells={},
        gaps=gaps,
        global_round=models[GLOBAL_OWNER].round if GLOBAL_OWNER in models else state.best_model[0],
        complete=bool(validate and validate.closed),
        metric=watch.metric if watch else "",
        mode=watch.mode if watch else "max",
        source_run=state.opened.source_run,
    )
    if validate is None:
        return view
    if validate.closed:
        for task_id, reason in validate.closed.gaps.items():
            key = TaskId.parse(task_id)
            gaps[key.owner, key.site] = reason
    return replace(
        view,
        owners=tuple(sorted(models, key=lambda owner: (_rank(models[owner]), owner))),
        sites=validate.opened.participants,
        cells={(key.owner, key.site): result.metrics for key, result in validate.results.items()},
        models=models,
    )


def _absences(state: RunState) -> Iterator[tuple[str, str]]:
    """Yield the targets that have no column, each with the reason."""
    validate = state.gathers.get("validate")
    there = validate.opened.participants if validate else ()
    for site in state.targets:
        answer = state.answers.get(site)
        if site in there:
            continue
        if site in state.withdrawn:
            yield site, state.withdrawn[site].reason
        elif answer and not answer.accepted:
            yield site, f"declined: {answer.rule or answer.reason}"
        elif validate and answer:
            yield site, "it joined when the validation had begun"
        elif validate:
            yield site, "it did not answer the start in time (deploy_wait_s)"


def _models(state: RunState) -> dict[str, SourceModel]:
    """Return the models that are validated, and what each of them is."""
    if state.opened.source_run:
        return dict(state.opened.source_models)
    validate = state.gathers.get("validate")
    if validate is None:
        return {}
    return {
        owner: SourceModel(
            digest=blob.digest,
            size=blob.size,
            kind="best" if owner == GLOBAL_OWNER else "local",
            round=state.best_model[0] if owner == GLOBAL_OWNER else validate.opened.round,
        )
        for owner, blob in validate.opened.models.items()
    }


def _rank(model: SourceModel) -> int:
    """Return where a model's row stands: sites first, then global models, the best one last."""
    return {"local": 0, "update": 0, "round": 1, "latest": 2, "best": 3}[model.kind]
