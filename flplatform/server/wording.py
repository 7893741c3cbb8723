"""Events in words."""

from flplatform.core import events as ev


def moment(time: str) -> str:
    """Say a UTC time of the log to the second."""
    return f"{time[:19].replace('T', ' ')} UTC"


def count(number: int, noun: str) -> str:
    """Return `1 site` or `2 sites`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def outcome(status: str, reason: str) -> str:
    """Say how a run ended, not twice that it was aborted."""
    return reason if reason.startswith(f"{status} ") else f"{status}: {reason}"


def declined(answer: ev.SiteAnswered, said: str = "declined") -> str:
    """Say a refusal with its rule, if it has one."""
    return f"{said}{answer.rule and f' ({answer.rule})'}: {answer.reason}"


def describe(event: ev.Event) -> str:
    """Say an event in one line, for logs and the toolbar."""
    match event:
        case ev.SiteAnswered(site=site, accepted=True):
            return f"{site} accepted"
        case ev.SiteAnswered(site=site):
            return f"{site} {declined(event)}"
        case ev.RunOpened() if event.source_run:
            models = count(len(event.source_models), "model")
            return (
                f"opened by {event.submitter} to validate {models} of run "
                f"{event.source_run} at {count(len(event.sites), 'site')}"
            )
        case ev.RunOpened():
            return f"opened by {event.submitter} for {count(len(event.sites), 'site')}"
        case ev.DeployWaitOver():
            return "deploy_wait_s is over: who has not answered is not waited for"
        case ev.DeadlineExtended():
            return f"the deadline of round {event.round} passed and was extended"
        case ev.GatherOpened():
            return f"{event.stage} opened with {count(len(event.participants), 'site')}"
        case ev.SiteWithdrawn():
            return f"{event.site} {event.reason}"
        case ev.TargetsAdded():
            return f"{', '.join(event.sites)} added by {event.by}"
        case ev.StepStarted():
            return f"{event.step} started"
        case ev.RoundOpened():
            return f"round {event.round} opened with {count(len(event.participants), 'site')}"
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
