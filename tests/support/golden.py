"""Writes the golden log of a release: one finished run with every type of event in it.

    python -m tests.support.golden

A golden log is written once, when its release is made, and never again: later releases must read
it as it is. The file's name holds the version.
"""

import json
from dataclasses import asdict
from pathlib import Path

from flplatform.core.events import (
    EVENTS,
    FEDERATION,
    Blob,
    Event,
    JobStaged,
    JobUnstaged,
    NameRevoked,
    RunDeleted,
    RunNumbered,
    RunPrepared,
    RunReserved,
    RunSummarised,
    SiteDisabled,
    SiteEnabled,
    encode,
    run_stream,
)
from flplatform.core.messages import SUBMIT_MODEL
from flplatform.core.ports import Row
from tests.support.workflows import RUN, SOURCE, Played, digest, job, run_opened

GOLDEN = Path(__file__).parents[1] / "golden"
FIRST = GOLDEN / "run-0.1.jsonl"


def played() -> Played:
    """Play two rounds and the validation of three hospitals, with something odd in each."""
    run = Played(
        ("aachen", "basel", "cork"),
        workflow=["scatter_gather", "cross_site_validation"],
        rounds=2,
        watch={"metric": "accuracy"},
        aggregator={"name": "weighted_mean", "args": {"site_weights": {"basel": 2.0}}},
        args={"learning_rate": 0.01, "layers": [8, 1]},
        seed=42,
    )
    run.accept("aachen", "basel")
    run.fire("deploy")
    run.update("aachen", examples=30, accuracy=0.5, tested=30, loss=0.7)
    run.fire("deadline")
    run.accept("cork")
    run.update("basel", examples=20, accuracy=0.625, tested=20, loss=0.6)
    run.publish()
    run.update("aachen", examples=30, accuracy=0.75, tested=30, loss=0.5)
    run.set_quorum(1)
    run.add("delft")
    run.accept("delft")
    run.withdraw("delft")
    run.fail("cork", "OSError: no such dataset: heart")
    run.fire("wait")
    run.publish()
    run.validate("aachen", "last", 0.7, 30)
    run.validate("basel", "last", 0.7, 20)
    run.validate("cork", "last", 0.6, 10)
    run.submit_model("aachen", "basel")
    run.fail("cork", "FileNotFoundError: no best model", SUBMIT_MODEL)
    for site in ("aachen", "basel"):
        for owner in ("aachen", "basel", "global"):
            run.validate(site, owner, 0.8)
    run.fire("gather/validate")
    return run


def steps() -> list[Event]:
    """Stage a job, and prepare a run with it that is never started."""
    package, model = Blob(digest=digest("job"), size=1000), Blob(digest=digest("model"), size=100)
    return [
        JobStaged(
            name="heart",
            job=job(rounds=3),
            job_blob=package,
            model=model,
            parameters=14,
            has_code=True,
            by="lead",
            organisation="hospital",
        ),
        RunReserved(run=RUN - 1, submission_id="5" * 32, by="lead", organisation="hospital"),
        RunPrepared(
            run=RUN - 1,
            job_name="heart",
            job_blob=package,
            model=model,
            sites=("aachen", "basel"),
            by="lead",
        ),
        JobUnstaged(name="heart", by="lead"),
    ]


def rows() -> list[Row]:
    """Return the rows of both streams, as a store keeps them."""
    run = played()
    state = run.state
    assert state.ended is not None
    federation = [
        SiteDisabled(site="basel", by="operator"),
        SiteEnabled(site="basel", by="operator"),
        NameRevoked(name="dora", kind="site", order="c2lnbmVk", by="operator"),
        *steps(),
        RunNumbered(
            run=RUN,
            submission_id=state.opened.submission_id,
            job_digest=digest("job"),
            job_name=state.job.name,
            submitter=state.opened.submitter,
            organisation=state.opened.submitter_organisation,
        ),
        RunSummarised(
            run=RUN,
            status=state.ended.status,
            reason=state.ended.reason,
            round=state.round,
            rounds=state.job.rounds,
        ),
        RunDeleted(run=RUN, by="operator"),
    ]
    again = run_opened(("aachen",), job(workflow=["cross_site_validation"]), **SOURCE)
    found = [
        *_stored(FEDERATION, federation),
        *_stored(run_stream(RUN), run.events),
        *_stored(run_stream(RUN + 1), [again.model_copy(update={"run": RUN + 1})]),
    ]
    missing = set(EVENTS) - {(row.type, row.version) for row in found}
    assert not missing, f"the played run lacks {missing}"
    return found


def _stored(stream: str, events: list[Event]) -> list[Row]:
    return [
        Row(stream, seq, f"2025-01-01T12:00:{seq:02}.000000Z", *encode(event))
        for seq, event in enumerate(events, 1)
    ]


if __name__ == "__main__":
    FIRST.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows()))
