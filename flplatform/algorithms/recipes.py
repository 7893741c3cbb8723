"""How a job says that its updates become a model."""

from collections.abc import Mapping
from typing import Any

from flplatform.algorithms.optimizers import OPTIMIZERS
from flplatform.algorithms.robust import AGGREGATORS
from flplatform.algorithms.tiles import Recipe
from flplatform.core.errors import InvalidArgumentError
from flplatform.core.events import RoundClosed
from flplatform.core.job import JobSpec
from flplatform.core.model import Manifest


def recipe_of(job: JobSpec) -> Recipe:
    """Return the recipe that a job asks for.

    Raises:
        NotFoundError: there is no aggregator or optimiser of that name.
        InvalidArgumentError: one of its arguments is wrong.
    """
    optimizer = job.optimizer
    return _recipe(
        job.aggregator.name,
        job.aggregator.args,
        job.updates == "delta",
        optimizer.name if optimizer else "",
        optimizer.args if optimizer else {},
    )


def recipe_of_round(closed: RoundClosed) -> Recipe:
    """Return the recipe that a closed round names.

    Raises:
        FLError: this release does not know it.
    """
    return _recipe(
        closed.aggregator,
        closed.aggregator_args,
        closed.updates == "delta",
        closed.optimizer,
        closed.optimizer_args,
    )


def _recipe(
    aggregator: str,
    aggregator_args: Mapping[str, Any],
    delta: bool,
    optimizer: str,
    optimizer_args: Mapping[str, Any],
) -> Recipe:
    return Recipe(
        AGGREGATORS.create(aggregator, aggregator_args, "aggregator"),
        delta,
        OPTIMIZERS.create(optimizer, optimizer_args, "optimizer") if optimizer else None,
    )


def check_recipe(job: JobSpec, manifest: Manifest, quorum: int) -> None:
    """Refuse a job whose updates cannot become a model, at submission.

    Args:
        job: as submitted.
        manifest: the tensors of its model.
        quorum: the least number of updates that a round closes with.

    Raises:
        FLError: names the precondition.
    """
    recipe = recipe_of(job)
    recipe.check(manifest, quorum)
    whole = job.aggregator.name != "weighted_mean" or recipe.aggregator.statistic
    if job.partial_updates and whole:
        raise InvalidArgumentError(
            f"{job.aggregator.name} compares whole updates",
            field="partial_updates",
            hint="use weighted_mean without max_norm",
        )
