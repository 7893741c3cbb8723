"""Events in words."""

from flplatform.core import events as ev


def describe(event: ev.Event) -> str:
    """Say an event in one line, for logs and the toolbar."""
    match event:
        case ev.SiteAnswered(site=site, accepted=True):
            return f"{site} accepted"
        case ev.SiteAnswered(site=site):
            return f"{site} declined ({event.rule}): {event.reason}"
        case ev.StepStarted():
            return f"{event.step} started"
        case ev.RoundOpened():
            return f"round {event.round} opened with {len(event.participants)} sites"
        case ev.UpdateAccepted():
            return f"update of {event.site} for round {event.round} accepted"
        case ev.ResultAccepted():
            return f"{event.task_id} done"
        case ev.TaskFailed():
            return f"{event.task_id} failed: {event.error}"
        case ev.RoundClosed():
            return f"round {event.round} closed: {event.reason}"
        case ev.ModelPublished():
            return f"model of round {event.round} published"
        case ev.ModelScored():
            best = ", the best so far" if event.best else ""
            return f"model of round {event.round} scored {event.score:.4g}{best}"
        case ev.GatherClosed():
            return f"{event.stage} done: {event.reason}"
        case ev.QuorumSet():
            return f"min_clients set to {event.min_clients} by {event.by}"
        case ev.RunEnded():
            return f"{event.status}: {event.reason}"
        case _:
            return type(event).__name__
