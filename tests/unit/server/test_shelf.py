import pytest

from flplatform.core import events as ev
from flplatform.core.errors import FailedPreconditionError
from flplatform.server.shelf import Shelf
from tests.support.workflows import job, run_opened

MODEL = ev.Blob(digest="model", size=1)


def staged(name: str = "heart", package: str = "package") -> ev.JobStaged:
    return ev.JobStaged(
        name=name,
        job=job(),
        job_blob=ev.Blob(digest=package, size=1),
        model=MODEL,
        parameters=3,
        has_code=True,
        by="amy",
        organisation="hub",
    )


def reserved(run: int = 7) -> ev.RunReserved:
    return ev.RunReserved(run=run, submission_id=f"{run}" * 32, by="amy", organisation="hub")


def prepared(*sites: str, package: str = "package", run: int = 7) -> ev.RunPrepared:
    blob = ev.Blob(digest=package, size=1)
    return ev.RunPrepared(
        run=run, job_name="heart", job_blob=blob, model=MODEL, sites=sites, by="amy"
    )


def shelf(*events: ev.Event) -> Shelf:
    found = Shelf()
    for event in events:
        found.apply(event, "now")
    return found


def opened(*sites: str, package: str = "package") -> ev.RunOpened:
    blob = ev.Blob(digest=package, size=1)
    return run_opened(sites, job()).model_copy(update={"job_blob": blob})


def test_a_name_holds_what_was_staged_last() -> None:
    found = shelf(staged(), staged(package="newer"), staged("lung"))
    assert {name: job.package.digest for name, job in found.jobs.items()} == {
        "heart": "newer",
        "lung": "package",
    }
    assert found.jobs["heart"].staged == "now"
    assert found.blobs() == {"newer", "package", "model"}
    found.apply(ev.JobUnstaged(name="heart", by="amy"), "")
    assert list(found.jobs) == ["lung"]


def test_what_is_deployed_is_needed_though_it_is_not_staged_any_more() -> None:
    found = shelf(staged(), reserved(), prepared("a"), ev.JobUnstaged(name="heart", by="amy"))
    assert found.blobs() == {"package", "model"}


@pytest.mark.parametrize(
    "end",
    [
        ev.RunDeleted(run=7, by="amy"),
        ev.RunNumbered(
            run=7, submission_id="7" * 32, job_digest="", job_name="heart", submitter="amy"
        ),
    ],
)
def test_a_run_is_prepared_until_it_begins_or_is_deleted(end: ev.Event) -> None:
    found = shelf(reserved(), reserved(8), prepared("a"))
    assert found.of_submission("7" * 32) is found.prepared[7]
    with pytest.raises(FailedPreconditionError, match="run 7 is prepared") as caught:
        found.demand_begun(7)
    assert "delete_run_number 7" in caught.value.hint
    found.apply(end, "")
    assert found.of_submission("7" * 32) is None
    assert list(found.prepared) == [8]
    found.demand_begun(7)
    assert found.blobs() == set()


def test_a_run_begins_with_what_is_deployed_and_nothing_else() -> None:
    run = shelf(reserved(), prepared("a", "b")).prepared[7]
    run.check(opened("a"))
    run.check(opened("a", "b"))
    with pytest.raises(FailedPreconditionError, match="another package"):
        run.check(opened("a", package="newer"))
    with pytest.raises(FailedPreconditionError, match="c: not deployed") as caught:
        run.check(opened("a", "c"))
    assert caught.value.hint == "deploy heart client c"
    with pytest.raises(FailedPreconditionError, match="nothing is deployed"):
        shelf(reserved()).prepared[7].check(opened("a"))
