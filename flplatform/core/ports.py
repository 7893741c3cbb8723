"""Every Protocol of the platform on one page: what a room needs from another."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flplatform.core.messages import ModelRef
from flplatform.core.model import Array, Arrays, Manifest


@dataclass(frozen=True, slots=True)
class Row:
    """One event as it is stored: `seq` counts from 1 in its stream, without gaps."""

    stream: str
    seq: int
    time: str
    type: str
    version: int
    body: str


class StateStore(Protocol):
    """Append-only event streams. Thread-safe; one writer thread groups commits.

    Constraints: (stream, seq) is unique and gapless; an append is all or nothing and durable
    before its future resolves; appends of one caller keep their order.
    """

    def append(self, rows: Sequence[Row]) -> "Future[None]":
        """Append rows (of any streams) in one transaction.

        The future raises AlreadyExistsError if a seq is taken or would leave a gap (nothing is
        stored), ResourceExhaustedError if there is no space (nothing is stored). Any other
        failed write is fatal: the store's `on_fatal` is called and the store refuses all else.
        """

    def read(self, stream: str, after: int = 0) -> list[Row]:
        """Return the rows of a stream with seq > `after`, in order."""

    def streams(self, prefix: str = "") -> list[str]:
        """Return the names of all streams that start with `prefix`."""

    def close(self) -> None:
        """Write what was accepted, then release the file."""


class BlobWriter(Protocol):
    """One blob being received, off the event loop; not thread-safe."""

    @property
    def offset(self) -> int:
        """Bytes received so far."""

    def write(self, chunk: bytes) -> None:
        """Add bytes in order.

        Raises:
            InvalidArgumentError: more bytes than declared.
            ModelFormatError: the tensor header or a value is refused.
            ResourceExhaustedError: the disk is full.
        """

    def commit(self) -> None:
        """Check length and digest, fsync, and make the blob visible.

        Raises:
            InvalidArgumentError: length or digest differ from what was declared; discarded.
        """

    def suspend(self) -> None:
        """Keep what was received, so that the transfer can resume."""

    def discard(self) -> None:
        """Forget what was received."""


class BlobStore(Protocol):
    """Immutable bytes by digest. A blob is visible only once whole and durable."""

    def has(self, digest: str) -> bool:
        """Return whether the blob is here."""

    def path(self, digest: str) -> Path:
        """Return the file of a blob.

        Raises:
            NotFoundError: no such blob.
        """

    def receive(
        self, transfer_id: str, blob: ModelRef, manifest: Manifest | None = None
    ) -> BlobWriter:
        """Start or resume receiving a blob.

        Args:
            transfer_id: names the transfer; another blob under the same id starts anew.
            blob: declared digest and size.
            manifest: if given, the blob must be a canonical model file of exactly these
                tensors, with finite values; checked while the bytes arrive, the header first.

        Raises:
            ResourceExhaustedError: the blob would not leave the reserve free.
            FailedPreconditionError: the same transfer is being received right now.
        """

    def create(self, fill: Callable[[Path], None]) -> ModelRef:
        """Make a blob from a file that `fill` writes at the path it is given."""

    def delete(self, digest: str) -> None:
        """Remove a blob; mappings of it stay valid."""

    def digests(self) -> list[str]:
        """Return the digests of all blobs."""


@dataclass(frozen=True, slots=True)
class Contribution:
    """One update as aggregation sees it: read-only views and the weight of its site."""

    site: str
    weight: float
    arrays: Arrays


class Aggregator(Protocol):
    """Combines updates into a model: a pure function of values, whatever the order of arrival."""

    def check(self, manifest: Manifest, quorum: int) -> None:
        """Refuse what cannot work, at submission.

        Raises:
            InvalidArgumentError: names the precondition.
        """

    def weight_of(self, site: str, examples: int) -> float:
        """Return the weight of a site's update that was trained on `examples` examples."""

    def combine(
        self, name: str, base: Array, tiles: Sequence[Array], weights: Sequence[float], out: Array
    ) -> None:
        """Combine one tile of tensor `name`: flat arrays of equal length, into `out`.

        `tiles` and `weights` are in site-name order; `base` is the tile of the round's model.
        """


class Filter(Protocol):
    """Changes a result before it leaves a site; chosen by the site's own policy."""

    def __call__(self, arrays: Arrays, received: Arrays) -> dict[str, Array]:
        """Return the arrays to send; `received` is the model the update was trained from."""


class AuditSink(Protocol):
    """The fail-closed audit."""

    def record(
        self,
        actor: Mapping[str, str],
        action: str,
        decision: str,
        *,
        target: str = "",
        reason: str = "",
        details: Mapping[str, str] | None = None,
        correlation_id: str = "",
    ) -> None:
        """Write one durable record.

        Raises:
            OSError: it could not be written; what it speaks of must not happen.
        """
