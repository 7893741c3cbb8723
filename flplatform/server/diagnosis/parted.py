"""Sites of a run that do no work for it: withdrawn, declined, or without the run itself."""

from flplatform.core import events as ev
from flplatform.core.diagnosis import Line, run_lost
from flplatform.server.diagnosis.facts import Facts
from flplatform.server.wording import declined, describe

TELLING = ev.TaskFailed | ev.UpdateAccepted | ev.ResultAccepted | ev.SiteAnswered
"""What shows whether a site has a run."""


def lost(facts: Facts) -> dict[str, Line]:
    """Return the sites that take part and do not have the run, and what each last said."""
    unheard, found = set(facts.state.taking_part), dict[str, Line]()
    begin = run_lost(facts.state.run)
    for event, time in zip(reversed(facts.events), reversed(facts.times), strict=True):
        if not unheard:
            break
        if isinstance(event, ev.TargetsAdded):
            unheard.difference_update(event.sites)
        elif isinstance(event, TELLING) and event.site in unheard:
            unheard.discard(event.site)
            if isinstance(event, ev.TaskFailed) and event.error.startswith(begin):
                found[event.site] = Line(time, describe(event))
    return found


def parting(facts: Facts, site: str) -> str:
    """Say that a site was withdrawn or has declined, and why; empty if it takes part."""
    run = facts.state.run
    if event := facts.state.withdrawn.get(site):
        return f"was withdrawn from run {run} by {event.by}"
    answer = facts.state.answers.get(site)
    if answer is None or answer.accepted:
        return ""
    return declined(answer, f"declined run {run}")
