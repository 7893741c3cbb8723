"""What the admin side needs of the server, in one name."""

from typing import Protocol

from flplatform.core.control import ModelsControl, RunsControl, ServerControlPort, SitesControl


class Control(RunsControl, ModelsControl, SitesControl, ServerControlPort, Protocol):
    """Everything an operator can see and do."""
