"""Every Protocol of the platform on one page: what a room needs from another."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from flplatform.core.messages import ModelRef
from flplatform.core.model import Array, Arrays, Manifest, PartOf


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

    Attributes:
        trouble: why appends have to wait now, as a database that is away; "" if they need not.
    """

    trouble: str

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

    def extents(self) -> dict[str, tuple[int, int]]:
        """Return how many rows each stream has, and its highest seq: the same if none is lost."""

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

    def has_whole(self, digest: str) -> bool:
        """Return whether the blob is here and `checked`; a damaged one is deleted."""

    def path(self, digest: str) -> Path:
        """Return the file of a blob.

        Raises:
            NotFoundError: no such blob.
        """

    def checked(self, digest: str) -> Path:
        """Return the file of a blob whose bytes this process has written or read through.

        The first time it blocks for as long as reading takes.

        Raises:
            NotFoundError: no such blob.
            DataLossError: its bytes are not what they were.
            UnavailableError: it cannot be read now.
        """

    def receive(
        self, transfer_id: str, blob: ModelRef, manifest: Manifest | PartOf | None = None
    ) -> BlobWriter:
        """Start or resume receiving a blob.

        Args:
            transfer_id: names the transfer; another blob under the same id starts anew.
            blob: declared digest and size.
            manifest: if given, the blob must be a canonical model file of exactly these
                tensors, or of such a part, with finite values; checked while the bytes arrive,
                the header first.

        Raises:
            ResourceExhaustedError: the blob would not leave the reserve free.
            UnavailableError: the same transfer is being received right now.
        """

    def forget(self, transfer_id: str) -> None:
        """Delete what a transfer has left, or leaves if it is interrupted: it will not go on."""

    def create(self, fill: Callable[[Path], None]) -> ModelRef:
        """Make a blob from a file that `fill` writes at the path it is given."""

    def delete(self, digest: str) -> None:
        """Remove a blob; mappings of it stay valid."""

    def digests(self) -> list[str]:
        """Return the digests of all blobs."""


@dataclass(frozen=True, slots=True)
class Contribution:
    """One update as aggregation sees it: read-only views and the weight of its site.

    A partial update lacks tensors of the model.
    """

    site: str
    weight: float
    arrays: Arrays


class Share(NamedTuple):
    """What a contribution counts for.

    Attributes:
        weight: factor in the mean; 0 leaves the contribution out.
        scale: factor on the contribution's change of float tensors, 1 for the whole change.
    """

    weight: float
    scale: float = 1.0


Statistic = Literal["", "norms", "distances"]
"""What an aggregator must know of whole updates before it can weigh them.

`norms`: shape (n,), the squared L2 norm of each update's change. `distances`: shape (n, n), the
squared L2 distance between each two updates. Both float64, over the float tensors that the
aggregator does not exclude, in site-name order.
"""


class Aggregator(Protocol):
    """Combines updates into a model: a pure function of values, whatever the order of arrival."""

    @property
    def statistic(self) -> Statistic:
        """What `judge` must be told."""

    def check(self, manifest: Manifest, quorum: int) -> None:
        """Refuse what cannot work, at submission.

        Raises:
            InvalidArgumentError: names the precondition.
        """

    def excludes(self, name: str) -> bool:
        """Return whether a tensor keeps the value that it has in the round's model."""

    def weight_of(self, site: str, examples: int) -> float:
        """Return the weight of a site's update that was trained on `examples` examples."""

    def judge(self, weights: Sequence[float], statistic: Array | None) -> list[Share]:
        """Decide what each contribution counts for, once per round.

        Args:
            weights: of the contributions, in site-name order.
            statistic: what `statistic` names; None if it is empty.
        """

    def combine(
        self, name: str, base: Array, tiles: Sequence[Array], shares: Sequence[Share], out: Array
    ) -> None:
        """Combine one tile of tensor `name`: flat arrays of equal length.

        Args:
            name: of a tensor that is not excluded.
            base: the tile of the round's model.
            tiles: those of the contributions that hold the tensor, at least one.
            shares: theirs.
            out: takes the result before rounding, float64.

        Raises:
            ModelFormatError: a value that has no such combination.
        """


class Optimizer(Protocol):
    """A server optimiser: takes the combined change for a gradient. Pure."""

    @property
    def slots(self) -> Mapping[str, float]:
        """Its state tensors per float tensor of the model, such as `m` -> value at first."""

    def step(self, base: Array, mean: Array, slots: Sequence[Array]) -> None:
        """Move one tile, all arrays flat, float64 and of equal length.

        Args:
            base: the round's model.
            mean: what the aggregator made of it; takes the new model.
            slots: the state before the round, in the order of `slots`; takes the state after it.
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
