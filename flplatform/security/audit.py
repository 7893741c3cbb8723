"""The audit: one JSON line per decision, chained by hashes, durable before the deed.

A record's hash covers its exact text, which holds the hash of the record before it, so an edited,
missing or moved line breaks the chain. `<log>.head` remembers the last record, so that a cut tail
is noticed too, and `<log>.checkpoint` holds a record's number and hash, signed with the host's own
key every `CHECKPOINT_EVERY` records and at close: who rewrites the log and its head without that
key is found out for all records up to there. (Who has the key, or puts an older checkpoint back,
can still hide what came after it: compare heads with copies kept elsewhere.) A record that cannot
be written raises, and what it speaks of must not happen.

Arguments are recorded as they were typed: no command takes a secret as an argument. Passwords
travel beside a command, never in its words, and so never come here.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from flplatform.core.errors import (
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    UnauthenticatedError,
)
from flplatform.files.durable import PRIVATE_FILE, sync, write_atomic
from flplatform.security.audit_files import (
    exchange,
    is_open_as,
    lines,
    lines_backwards,
    move_torn_tail_aside,
    open_append,
    rotated,
    tail,
)
from flplatform.security.kit import Kit
from flplatform.security.signing import Signed, check_signature, sign

log = logging.getLogger(__name__)

ZERO_HASH = "0" * 64
MAX_FIELD_CHARS = 1024
MAX_DETAILS = 40

_HASH_KEY = b', "hash": "'
_END = b'"}\n'
_SUFFIX_BYTES = len(_HASH_KEY) + len(ZERO_HASH) + len(_END)
CHECKPOINT_EVERY = 256
CHECKPOINT_TAG = "audit"
_ACTOR_FIELDS = ("role", "organisation", "fingerprint", "peer")


@dataclass(frozen=True, slots=True)
class Head:
    """The last record of a log: its number (from 1; 0 if there is none) and hash."""

    seq: int = 0
    hash: str = ZERO_HASH


class Seal(Protocol):
    """Makes and checks the signatures of checkpoints."""

    def sign(self, payload: bytes) -> Signed:
        """Sign with the host's own key, under `CHECKPOINT_TAG`."""

    def check(self, signed: Signed) -> None:
        """Demand a signature of this host.

        Raises:
            UnauthenticatedError: it is another's, or does not hold.
        """


@dataclass(frozen=True)
class KitSeal:
    """Signs as the host whose kit this is, and knows its own earlier certificates."""

    kit: Kit

    def sign(self, payload: bytes) -> Signed:
        """See `Seal`."""
        return sign(CHECKPOINT_TAG, payload, self.kit.private_key(), self.kit.chain)

    def check(self, signed: Signed) -> None:
        """See `Seal`.

        Raises:
            UnauthenticatedError: it is another's, or does not hold.
        """
        certificate = check_signature(CHECKPOINT_TAG, signed)
        own = self.kit.identity
        issued = certificate.not_valid_before_utc
        signer = self.kit.trust.verify_chain(certificate, own.kind, issued)
        if signer.uri != own.uri:
            raise UnauthenticatedError(f"it is signed by {signer.uri}, not by {own.uri}")


class AuditLog:
    """An open log of one participant. Thread-safe; one process at a time.

    Args:
        path: the current file; filled ones are renamed to `<path>.000001` and so on.
        name: the participant whose log it is, written into every record.
        rotate_bytes: size from which on a new file is begun.
        seal: signs checkpoints; without it none are made.

    Raises:
        DataLossError: the end of the log is damaged or cut.
        FailedPreconditionError: another process has the log open.
        OSError: it cannot be opened or written.
    """

    def __init__(
        self, path: Path, name: str, rotate_bytes: int = 64 << 20, seal: Seal | None = None
    ) -> None:
        self._seal = seal
        self._path = path
        self._name = name
        self._rotate_bytes = rotate_bytes
        self._lock = threading.Lock()
        self._broken = False
        self._head_file = os.open(_head_path(path), os.O_RDWR | os.O_CREAT, PRIVATE_FILE)
        try:
            fcntl.flock(self._head_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._head_file)
            raise FailedPreconditionError(f"{path} is open in another process") from None
        try:
            torn = move_torn_tail_aside(path)
            self._head = _last_record(path)
            _check_not_cut(path, self._head, _read_head(path))
            self._file = open_append(path)
        except BaseException:
            os.close(self._head_file)
            raise
        if torn is not None:
            itself = {"name": name, "role": "audit"}
            self.record(itself, "audit.repair", "allowed", target=torn.name, reason="torn record")

    @property
    def path(self) -> Path:
        """The current file."""
        return self._path

    @property
    def head(self) -> Head:
        """The last record."""
        return self._head

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
        """Write one record and wait until it is on disk.

        Args:
            actor: `Identity.as_actor()`.
            action: what was asked, such as a command.
            decision: `allowed`, `denied` or `failed`.
            target: what it concerns.
            reason: the rule or error.
            details: further text; never secrets.
            correlation_id: the id that the event log has too.

        Raises:
            OSError: it could not be written; what it speaks of must not happen.
        """
        texts = {
            "time": datetime.now(UTC).isoformat(timespec="microseconds"),
            "log": self._name,
            "actor": actor.get("name", ""),
            **{field: actor.get(field, "") for field in _ACTOR_FIELDS},
            "action": action,
            "target": target,
            "decision": decision,
            "reason": reason,
            "correlation_id": correlation_id,
        }
        more = list((details or {}).items())[:MAX_DETAILS]
        with self._lock:
            self._write(
                {
                    "seq": self._head.seq + 1,
                    "monotonic_s": round(time.monotonic(), 6),
                    **{key: _short(text) for key, text in texts.items()},
                    "details": {_short(key): _short(text) for key, text in more},
                    "prev": self._head.hash,
                }
            )

    def close(self) -> None:
        """Sign a last checkpoint and release the files."""
        with self._lock:
            if not self._broken:
                self._checkpoint(ending=True)
            self._broken = True
            os.close(self._file)
            os.close(self._head_file)

    def _write(self, record: dict[str, Any]) -> None:
        if self._broken:
            raise OSError(f"{self._path}: closed, or an earlier write failed")
        line, digest = _seal(record)
        self._append(line)
        self._head = Head(record["seq"], digest)
        # Not fsynced: after a power cut the head may lag behind the log, but never lead it.
        os.pwrite(self._head_file, _head_text(self._head), 0)
        if self._head.seq % CHECKPOINT_EVERY == 0:
            self._checkpoint()
        if os.fstat(self._file).st_size >= self._rotate_bytes:
            self._rotate()

    def _checkpoint(self, ending: bool = False) -> None:
        """Sign the last record; the log goes on without it, for the record itself is durable.

        Args:
            ending: it is the last one. Where key or folder are gone by then, that is why the
                process ends: it was told as the error that it is, and must stay the last one.
        """
        if self._seal is None or not self._head.seq:
            return
        text = {"log": self._name, "seq": self._head.seq, "hash": self._head.hash}
        try:
            signed = self._seal.sign(json.dumps(text).encode())
            write_atomic(_checkpoint_path(self._path), signed.to_bytes())
        except OSError as error:
            told = ending and isinstance(error, FileNotFoundError)
            level = logging.WARNING if told else logging.ERROR
            log.log(level, "%s: no checkpoint of record %d: %s", self._path, self._head.seq, error)

    def _append(self, line: bytes) -> None:
        size = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, line)
            if written != len(line):
                text = f"{self._path}: the disk took {written} of {len(line)} bytes"
                raise OSError(errno.ENOSPC, text)
        except OSError:
            self._broken = True  # until the file is as it was
            os.ftruncate(self._file, size)
            self._broken = False
            raise
        try:
            sync(self._file)
        except OSError:
            self._broken = True  # what the disk holds is unknown from here on
            raise

    def _rotate(self) -> None:
        """Begin a new file; while that fails the log goes on in the old one.

        The record that filled it is durable, so that no failure here is one of the record.
        """
        try:
            fresh = exchange(self._path)
        except OSError as error:
            if is_open_as(self._path, self._file):
                log.error("%s: goes on in the same file, none can be begun: %s", self._path, error)
                return
            self._broken = True  # nobody would look for the next record where it would be written
            log.critical(
                "%s: takes no more records, a new file could not be begun and the old one not be "
                "put back: %s",
                self._path,
                error,
            )
            return
        os.close(self._file)
        self._file = fresh


def verify(path: Path, seal: Seal | None = None) -> Head:
    """Check the whole chain, rotated files included, and return its last record.

    A log that is being written is checked up to the record that was its last at the start. What
    stands behind the last whole record was never acknowledged: see `unfinished_bytes`.

    Args:
        path: the current file.
        seal: checks the signed checkpoint; None leaves it out.

    Raises:
        DataLossError: names the first file and line that does not fit.
    """
    head, saved = Head(), _read_head(path)
    signed = _read_checkpoint(path, seal) if seal is not None else Head()
    for file, number, line in lines(path):
        where = f"{file}:{number}"
        record = _check_line(line, where)
        if record["seq"] != head.seq + 1:
            raise DataLossError(f"{where}: record {record['seq']} follows record {head.seq}")
        if record["prev"] != head.hash:
            raise DataLossError(f"{where}: does not continue the record before it")
        head = Head(record["seq"], record["hash"])
        if head.seq == saved.seq and head != saved:
            raise DataLossError(f"{where}: record {head.seq} is not the one that was written")
        if head.seq == signed.seq and head != signed:
            raise DataLossError(f"{where}: record {head.seq} is not the one that was signed")
    _check_not_cut(path, head, saved)
    _check_not_cut(path, head, signed)
    if head.seq and not _head_path(path).exists():  # it is made before the first record
        raise DataLossError(
            f"{_head_path(path)} is missing: whether the end of {path.name} was cut cannot be told"
        )
    if seal is not None and head.seq - signed.seq > 2 * CHECKPOINT_EVERY:
        raise DataLossError(
            f"{path}: record {head.seq} is the last, but the last signed one is {signed.seq}",
            hint="the checkpoint was taken away or put back",
        )
    return head


def newest(path: Path) -> Iterator[dict[str, Any]]:
    """Yield all records, newest first, each checked by itself; a block of the log in memory.

    Raises:
        DataLossError: a line is not a record, or its text was changed.
    """
    files = [path, *reversed(rotated(path))]
    if not path.exists():  # it has just been rotated
        files = files[1:]
    for file in files:
        for line in lines_backwards(file):
            yield _check_line(line, str(file))


def records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield all records, oldest first, each checked by itself; `verify` checks the chain.

    Raises:
        DataLossError: a line is not a record, or its text was changed.
    """
    for file, number, line in lines(path):
        yield _check_line(line, f"{file}:{number}")


def _short(text: str) -> str:
    return text if len(text) <= MAX_FIELD_CHARS else text[:MAX_FIELD_CHARS] + "..."


def _seal(record: dict[str, Any]) -> tuple[bytes, str]:
    body = json.dumps(record).encode()  # ASCII: control and other odd characters are escaped
    digest = hashlib.sha256(body).hexdigest()
    return body[:-1] + _HASH_KEY + digest.encode() + _END, digest


def _check_line(line: bytes, where: str) -> dict[str, Any]:
    body = line[:-_SUFFIX_BYTES] + b"}"
    digest = hashlib.sha256(body).hexdigest().encode()
    if line[-_SUFFIX_BYTES:] != _HASH_KEY + digest + _END:
        raise DataLossError(f"{where}: this record was changed or cut")
    record: dict[str, Any] = json.loads(line)
    return record


def _head_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.head")


def _checkpoint_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.checkpoint")


def _read_checkpoint(path: Path, seal: Seal) -> Head:
    """Return the record that was signed last; 0 if none was.

    Raises:
        DataLossError: the checkpoint is not one of this host.
    """
    file = _checkpoint_path(path)
    try:
        signed = Signed.from_bytes(file.read_bytes())
        seal.check(signed)
        text = json.loads(signed.payload)
        return Head(int(text["seq"]), str(text["hash"]))
    except FileNotFoundError:
        return Head()
    except (InvalidArgumentError, UnauthenticatedError, ValueError, KeyError, TypeError) as error:
        raise DataLossError(f"{file}: is not a checkpoint: {error}") from None


def _head_text(head: Head) -> bytes:
    return f"{head.seq:020d} {head.hash}\n".encode()


def _read_head(path: Path) -> Head:
    try:
        seq, digest = _head_path(path).read_text().split()
        return Head(int(seq), digest)
    except (FileNotFoundError, ValueError):
        return Head()


def _check_not_cut(path: Path, last: Head, saved: Head) -> None:
    if last.seq < saved.seq or (last.seq == saved.seq and last != saved):
        raise DataLossError(
            f"{path}: ends with record {last.seq}, but record {saved.seq} was written",
            hint=f"keep the evidence: move {path.name}* elsewhere, then start again",
        )


def _last_record(path: Path) -> Head:
    for file in [path, *reversed(rotated(path))]:
        if file.exists() and (end := tail(file)):
            record = _check_line(end[end.rfind(b"\n", 0, -1) + 1 :], f"the end of {file}")
            return Head(record["seq"], record["hash"])
    return Head()
