"""Events in words."""

from flplatform.core import events as ev


def moment(time: str) -> str:
    """Say a UTC time of the log to the second."""
    return f"{time[:19].replace('T', ' ')} UTC"


def outcome(status: str, reason: str) -> str:
    """Say how a run ended, not twice that it was aborted."""
    return reason if reason.startswith(f"{status} ") else f"{status}: {reason}"


def describe(event: ev.Event) -> str:
    """Say an event in one line, for logs and the toolbar."""
    match event:
        case ev.SiteAnswered(site=site, accepted=True):
            return f"{site} accepted"
        case ev.SiteAnswered(site=site):
            return f"{site} declined ({event.rule}): {event.reason}"
        case ev.RunOpened() if event.source_run:
            models = len(event.source_models)
            return (
                f"opened by {event.submitter} to validate {models} models of run "
                f"{event.source_run} at {len(event.sites)} sites"
            )
        case ev.RunOpened():
            return f"opened by {event.submitter} for {len(event.sites)} sites"
        case ev.DeployWaitOver():
            return "deploy_wait_s is over: who has not answered is not waited for"
        case ev.DeadlineExtended():
            return f"the deadline of round {event.round} passed and was extended"
        case ev.GatherOpened():
            return f"{event.stage} opened with {len(event.participants)} sites"
        case ev.SiteWithdrawn():
            return f"{event.site} {event.reason}"
        case ev.TargetsAdded():
            return f"{', '.join(event.sites)} added by {event.by}"
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
            return outcome(event.status, event.reason)
        case _:
            return type(event).__name__
