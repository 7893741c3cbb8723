from flplatform.client.run_spec import JobCodeError, RunProcessCrashed
from flplatform.core.errors import FailedPreconditionError, UnavailableError
from flplatform.core.messages import TaskFailure


def test_errors_carry_what_the_author_needs():
    crashed = RunProcessCrashed("the run process was killed", "last words")
    assert isinstance(crashed, UnavailableError)
    assert (str(crashed), crashed.log_tail) == ("the run process was killed", "last words")
    unloadable = JobCodeError(TaskFailure("E: no", "File job.py"))
    assert isinstance(unloadable, FailedPreconditionError)
    assert str(unloadable) == "the job's code cannot be loaded: E: no"
    assert unloadable.traceback == "File job.py"
