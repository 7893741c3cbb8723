"""The event logs of runs, read whole or refused; it blocks, in any thread."""

from flplatform.algorithms.workflows import RunState, replay
from flplatform.core import events as ev
from flplatform.core.errors import DataLossError
from flplatform.core.model import Manifest
from flplatform.core.ports import BlobStore, Row, StateStore
from flplatform.files.modelfile import read_layout
from flplatform.server.ledger import Ledger, decode, read_run


class RunLogs:
    """Reads the streams of runs.

    Args:
        store: where they are.
        blobs: where the models are that they name.
        ledger: knows which runs have ended.
    """

    def __init__(self, store: StateStore, blobs: BlobStore, ledger: Ledger) -> None:
        self._store = store
        self._blobs = blobs
        self._ledger = ledger

    def begun(self, run: int) -> tuple[list[Row], Manifest]:
        """Return the rows of a run and the tensors of its models.

        Raises:
            DataLossError: events are missing.
            FLError: they cannot be read, or not by this release.
        """
        rows = read_run(self._store, run)
        opened = decode(rows[0])
        if not isinstance(opened, ev.RunOpened):
            raise DataLossError(f"{rows[0].stream} does not begin with RunOpened")
        return rows, self.manifest(opened.initial_model)

    def state(self, run: int) -> RunState:
        """Return the state alone: without the events there is little to collect as garbage.

        Raises:
            FLError: as `begun`.
        """
        return replay(decode(row) for row in read_run(self._store, run))

    def events(self, run: int) -> list[ev.Event]:
        """Return all events of a run.

        Raises:
            FLError: as `begun`; also if a run that has ended lacks its end.
        """
        events = [decode(row) for row in read_run(self._store, run)]
        ended = run in self._ledger and self._ledger[run].ended
        if ended and not isinstance(events[-1], ev.RunEnded):
            raise DataLossError(f"{ev.run_stream(run)}: its last events are missing")
        return events

    def manifest(self, model: ev.Blob) -> Manifest:
        """Return the tensors of a model.

        Raises:
            FLError: it is not there, or cannot be read.
        """
        return read_layout(self._blobs.path(model.digest)).manifest
