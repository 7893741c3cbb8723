from flplatform.core import events as ev
from flplatform.server.wording import describe


def test_every_event_can_be_said_in_one_line() -> None:
    texts = {
        ev.SiteAnswered(site="a", accepted=True): "a accepted",
        ev.SiteAnswered(site="a", accepted=False, rule="r", reason="x"): "a declined (r): x",
        ev.SiteAnswered(site="a", accepted=False, reason="x"): "a declined: x",
        ev.StepStarted(index=0, step="scatter_gather"): "scatter_gather started",
        ev.ModelScored(round=1, score=0.51239, examples=3, best=True): (
            "model of round 1 scored 0.5124, the best so far"
        ),
        ev.ModelScored(round=1, score=1.0, examples=3, best=False): "model of round 1 scored 1",
        ev.QuorumSet(min_clients=2, by="me"): "min_clients set to 2 by me",
        ev.SiteWithdrawn(site="a", by="me", reason="withdrawn by me"): "a withdrawn by me",
        ev.TargetsAdded(sites=("c", "d"), order="", by="me"): "c, d added by me",
        ev.RunEnded(status="failed", reason="x"): "failed: x",
        ev.RunEnded(status="aborted", reason="aborted by me"): "aborted by me",
        ev.DeployWaitOver(): "deploy_wait_s is over: who has not answered is not waited for",
        ev.DeadlineExtended(round=2): "the deadline of round 2 passed and was extended",
    }
    for event, text in texts.items():
        assert describe(event) == text
