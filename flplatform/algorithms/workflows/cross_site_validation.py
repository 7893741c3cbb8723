"""Cross-site validation: every site's best model and the global model, on every site's data.

First each site hands in its best local model (`submit_model`), then every site validates every
model. A validation on demand takes its models from an earlier run, as they were when it was
opened. The matrix has explicit gaps: each missing cell names why it is missing.
"""

from flplatform.algorithms.workflows.draft import Draft, Timers, gather_pending
from flplatform.algorithms.workflows.state import RunState
from flplatform.core.events import Blob
from flplatform.core.messages import GLOBAL_OWNER
from flplatform.core.workflow import Instruction


def pending(state: RunState) -> list[Instruction]:
    """Return what the step needs done now."""
    return [*gather_pending(state, "submit"), *gather_pending(state, "validate")]


def advance(draft: Draft, fired: Timers) -> bool:
    """Go on as far as possible; return whether the step is done."""
    everyone = tuple(sorted(draft.state.deployed))
    if draft.state.opened.source_run:
        if "validate" not in draft.state.gathers:
            draft.open_gather("validate", everyone, _source_models(draft.state))
        return draft.close_gather("validate", fired)
    if "submit" not in draft.state.gathers:
        draft.open_gather("submit", everyone, {})
    if not draft.close_gather("submit", fired):
        return False
    if "validate" not in draft.state.gathers:
        draft.open_gather("validate", everyone, _models(draft.state))
    return draft.close_gather("validate", fired)


def _source_models(state: RunState) -> dict[str, Blob]:
    return {
        owner: Blob(digest=model.digest, size=model.size)
        for owner, model in sorted(state.opened.source_models.items())
    }


def _models(state: RunState) -> dict[str, Blob]:
    results = state.gathers["submit"].results
    models = {
        task_id.site: Blob(digest=event.digest, size=event.size)
        for task_id, event in sorted(results.items())
    }
    return {**models, GLOBAL_OWNER: state.best_model[1]}
