from flplatform.core import events as ev
from flplatform.server.wording import describe


def test_every_event_can_be_said_in_one_line() -> None:
    texts = {
        ev.SiteAnswered(site="a", accepted=True): "a accepted",
        ev.SiteAnswered(site="a", accepted=False, rule="r", reason="x"): "a declined (r): x",
        ev.StepStarted(index=0, step="scatter_gather"): "scatter_gather started",
        ev.ModelScored(round=1, score=0.51239, examples=3, best=True): (
            "model of round 1 scored 0.5124, the best so far"
        ),
        ev.ModelScored(round=1, score=1.0, examples=3, best=False): "model of round 1 scored 1",
        ev.QuorumSet(min_clients=2, by="me"): "min_clients set to 2 by me",
        ev.RunEnded(status="failed", reason="x"): "failed: x",
        ev.DeployWaitOver(): "DeployWaitOver",
    }
    for event, text in texts.items():
        assert describe(event) == text
