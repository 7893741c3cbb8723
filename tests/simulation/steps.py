"""Steps towards a run, by the federation's log: numbers, staged jobs, prepared runs."""

from flplatform.core import events as ev


class Steps:
    """Reads the federation's log as somebody who knows the rules and not the program.

    Attributes:
        numbers: every number that was given.
        staged: jobs that lie ready, by name.
        prepared: numbers of runs that have not begun → what is deployed for them.
        submissions: of these runs and of those that have begun, by number.
    """

    def __init__(self) -> None:
        self.numbers: set[int] = set()
        self.staged: dict[str, ev.JobStaged] = {}
        self.prepared: dict[int, ev.RunPrepared | None] = {}
        self.submissions: dict[int, str] = {}

    def take(self, event: ev.Event) -> None:
        """Take the next event.

        Raises:
            AssertionError: it must not be there.
        """
        match event:
            case ev.JobStaged():
                self.staged[event.name] = event
            case ev.JobUnstaged():
                assert event.name in self.staged, "what was not staged is unstaged"
                del self.staged[event.name]
            case ev.RunReserved():
                assert event.run not in self.numbers, "a number is given twice"
                self.numbers.add(event.run)
                self.prepared[event.run] = None
                self._note(event.run, event.submission_id)
            case ev.RunPrepared():
                job, before = self.staged[event.job_name], self.prepared[event.run]
                assert (event.job_blob, event.model) == (job.job_blob, job.model)
                if before and before.job_blob == event.job_blob:
                    assert set(before.sites) < set(event.sites), "nothing is deployed anew"
                self.prepared[event.run] = event
            case ev.RunNumbered() if event.run in self.prepared:
                deployed = self.prepared.pop(event.run)
                assert deployed is not None, "a run begins of which nothing is deployed"
                assert deployed.job_blob.digest == event.job_digest
                assert self.submissions[event.run] == event.submission_id
            case ev.RunNumbered():
                assert event.run == max(self.numbers, default=0) + 1, "a number is left out"
                self.numbers.add(event.run)
                self._note(event.run, event.submission_id)
            case ev.RunDeleted():
                self.prepared.pop(event.run, None)

    def _note(self, run: int, submission_id: str) -> None:
        assert submission_id not in self.submissions.values(), "one submission is two runs"
        self.submissions[run] = submission_id

    def blobs(self) -> set[str]:
        """Return the digests of all that lies ready."""
        ready: list[ev.JobStaged | ev.RunPrepared] = list(self.staged.values())
        ready += [each for each in self.prepared.values() if each]
        return {blob.digest for each in ready for blob in (each.job_blob, each.model)}
