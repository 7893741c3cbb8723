"""What the admin side needs of the server, in one name."""

from typing import Protocol

from flplatform.core.access import AccessControl
from flplatform.core.control import ModelsControl, RunsControl, ServerControlPort, SitesControl
from flplatform.core.diagnosis import DiagnosisControl
from flplatform.core.files_view import FilesControl
from flplatform.core.lifecycle import LifecycleControl
from flplatform.core.lineage import LineageControl
from flplatform.core.logs import LogsControl
from flplatform.core.staging import StagingControl
from flplatform.core.stats import StatsControl
from flplatform.core.validation import ValidationControl


class Control(RunsControl, ModelsControl, SitesControl, ServerControlPort, Protocol):
    """Everything an operator can see and do."""

    @property
    def access(self) -> AccessControl:
        """Denials of names, and certificates."""

    @property
    def files(self) -> FilesControl:
        """Files of runs."""

    @property
    def diagnosis(self) -> DiagnosisControl:
        """Why things wait."""

    @property
    def lineage(self) -> LineageControl:
        """Where models come from."""

    @property
    def staging(self) -> StagingControl:
        """Steps towards a run."""

    @property
    def lifecycle(self) -> LifecycleControl:
        """Sites that leave and join runs, barred sites, deleted runs."""

    @property
    def logs(self) -> LogsControl:
        """Logs of runs."""

    @property
    def stats(self) -> StatsControl:
        """The server process's own errors and numbers."""

    @property
    def validations(self) -> ValidationControl:
        """Validation on demand."""
