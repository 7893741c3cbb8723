"""Cross-site validation: checking its results and reading its matrix."""

from collections.abc import Mapping
from dataclasses import dataclass

from flplatform.algorithms.workflows import RunState
from flplatform.core.errors import InvalidArgumentError
from flplatform.core.messages import (
    GLOBAL_OWNER,
    VALIDATE,
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


@dataclass(frozen=True, slots=True)
class CrossValidation:
    """The matrix of a run.

    Attributes:
        owners: model owners in name order, `global` last.
        sites: data sites in name order.
        cells: (owner, site) → metrics.
        gaps: (owner, site) → why there is no cell; owner `*` where a site has none at all.
        global_round: round of the best global model.
        complete: whether the step is done.
    """

    owners: tuple[str, ...]
    sites: tuple[str, ...]
    cells: Mapping[tuple[str, str], Mapping[str, float]]
    gaps: Mapping[tuple[str, str], str]
    global_round: int
    complete: bool


def cross_validation(state: RunState) -> CrossValidation:
    """Read the matrix out of a run's state; whatever is missing is named in `gaps`."""
    gaps = {
        ("*", answer.site): f"declined: {answer.rule or answer.reason}"
        for answer in state.answers.values()
        if not answer.accepted
    }
    submit, validate = state.gathers.get("submit"), state.gathers.get("validate")
    owners: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    cells = {}
    if submit and submit.closed:
        for task_id, reason in submit.closed.gaps.items():
            gaps[TaskId.parse(task_id).site, "*"] = f"no local model: {reason}"
    if validate:
        sites = validate.opened.participants
        owners = (*sorted(validate.opened.models.keys() - {GLOBAL_OWNER}), GLOBAL_OWNER)
        cells = {(key.owner, key.site): result.metrics for key, result in validate.results.items()}
        if validate.closed:
            for task_id, reason in validate.closed.gaps.items():
                key = TaskId.parse(task_id)
                gaps[key.kind.removeprefix(VALIDATE), key.site] = reason
    return CrossValidation(
        owners=owners,
        sites=sites,
        cells=cells,
        gaps=gaps,
        global_round=state.best_model[0],
        complete=bool(validate and validate.closed),
    )
