"""Plain files that users keep on the server, each in a folder of his or her own.

    <root>/<user>/index.json   name → digest, size, time
    <root>/<user>/blobs/       the bytes, by digest

A name is text in the index; no file is ever made under it. An upload is announced first: name,
size and digest take up quota from then on, and only announced bytes are received. Users do not
share bytes: who knows a digest does not have the file.
"""

import contextlib
import re
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from flplatform.core.config import PERSON_PATTERN
from flplatform.core.errors import (
    AlreadyExistsError,
    FLError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
)
from flplatform.core.messages import ModelRef
from flplatform.core.model import check_digest
from flplatform.core.ports import BlobWriter
from flplatform.core.strict import Strict, parse_json
from flplatform.files.durable import private_dir, write_atomic
from flplatform.files.names import check_path, collision
from flplatform.store.blobs import FileBlobStore

INDEX = "index.json"
MAX_FILES = 1000


def not_announced() -> PermissionDeniedError:
    """Return the refusal of an upload that takes up no quota."""
    return PermissionDeniedError(
        "this file was not announced", rule="announce", hint="upload_file announces it"
    )


def file_transfer(user: str, digest: str) -> str:
    """Return the transfer id under which a user uploads an announced file."""
    return f"file/{user}/{digest.partition(':')[2]}"


class Staged(Strict):
    """One file as the index has it."""

    digest: Annotated[str, Field(pattern=r"^blake3:[0-9a-f]{64}$")]
    size: Annotated[int, Field(ge=1)]
    announced: datetime


class Index(Strict):
    """`index.json`."""

    version: Literal[1] = 1
    files: dict[str, Staged] = {}


@dataclass(frozen=True, slots=True)
class StagedFile:
    """One staged file; `whole` is whether all of it has arrived."""

    name: str
    blob: ModelRef
    announced: datetime
    whole: bool


class UserFiles:
    """Keeps the files of all users. Thread-safe; it blocks on the disk.

    Args:
        root: the folder, made when it is needed.
        max_bytes: what the files of one user may take.
        reserve_bytes: space to leave free on the disk.
    """

    def __init__(self, root: Path, max_bytes: int, reserve_bytes: int = 0) -> None:
        self._root = root
        self._max_bytes = max_bytes
        self._reserve_bytes = reserve_bytes
        self._lock = threading.RLock()
        self._stores: dict[str, FileBlobStore] = {}
        self._indices: dict[str, Index] = {}

    def announce(self, user: str, name: str, blob: ModelRef) -> None:
        """Note that a file will be uploaded; the same again changes nothing.

        Raises:
            InvalidArgumentError: the name, the size or the digest is none.
            AlreadyExistsError: another file has the name, or one too much like it.
            ResourceExhaustedError: it does not fit the user's quota.
        """
        check_path(name, "NAME")
        check_digest(blob.digest)
        if blob.size < 1:
            raise InvalidArgumentError("is empty; there is nothing to upload", field="LOCAL")
        with self._lock:
            files = dict(self._index(user).files)
            known = files.get(name)
            if known is not None and (known.digest, known.size) == (blob.digest, blob.size):
                return
            if known is not None and self._store(user).has(known.digest):
                raise AlreadyExistsError(
                    f"transfer/{name} exists", hint=f"give another name, or delete_file {name}"
                )
            if other := collision(name, files):
                raise AlreadyExistsError(
                    f"transfer/{other} exists, which cannot lie beside {name}",
                    hint="give another name",
                )
            if known is not None:  # it was announced and never came
                del files[name]
                self._drop(user, known.digest, known.size, files)
            self._check_quota(files, blob)
            now = datetime.now(UTC)
            files[name] = Staged(digest=blob.digest, size=blob.size, announced=now)
            self._write(user, files)

    def _check_quota(self, files: dict[str, Staged], blob: ModelRef) -> None:
        limit = self._max_bytes
        used = sum(file.size for file in files.values())
        if used + blob.size > limit:
            raise ResourceExhaustedError(
                f"{blob.size} bytes are too much: {used} of {limit} are taken",
                rule="max_transfer_bytes",
                hint="info lists your files; delete_file NAME frees one",
            )
        if len(files) >= MAX_FILES:
            raise ResourceExhaustedError(
                f"you keep {MAX_FILES} files here", hint="delete_file NAME frees one"
            )

    def delete(self, user: str, name: str) -> StagedFile:
        """Forget a file; its bytes go unless another name has them, too.

        Raises:
            NotFoundError: there is none of this name.
        """
        with self._lock:
            file = self.file(user, name)
            files = dict(self._index(user).files)
            del files[name]
            self._write(user, files)
            self._drop(user, file.blob.digest, file.blob.size, files)
            return file

    def _drop(self, user: str, digest: str, size: int, left: dict[str, Staged]) -> None:
        """Delete bytes, or the part of them that has arrived, unless another name has them."""
        if digest in {other.digest for other in left.values()}:
            return
        store = self._store(user)
        if store.has(digest):
            store.delete(digest)
            return
        with contextlib.suppress(FLError):  # it is being received: swept at the next start
            store.receive(file_transfer(user, digest), ModelRef(digest, size)).discard()

    def files(self, user: str) -> list[StagedFile]:
        """Return a user's files in name order."""
        with self._lock:
            store, found = self._store(user), sorted(self._index(user).files.items())
            return [
                StagedFile(
                    name, ModelRef(file.digest, file.size), file.announced, store.has(file.digest)
                )
                for name, file in found
            ]

    def file(self, user: str, name: str) -> StagedFile:
        """Return one of a user's files.

        Raises:
            NotFoundError: there is none of this name.
        """
        found = next((file for file in self.files(user) if file.name == name), None)
        if found is None:
            raise NotFoundError(f"there is no transfer/{name[:80]}", hint="info lists your files")
        return found

    def receive(self, user: str, blob: ModelRef) -> BlobWriter:
        """Start or resume receiving a file.

        Raises:
            PermissionDeniedError: it was not announced.
        """
        if blob not in (file.blob for file in self.files(user)):
            raise not_announced()
        return self.store(user).receive(file_transfer(user, blob.digest), blob)

    def store(self, user: str) -> FileBlobStore:
        """Return where a user's bytes are."""
        with self._lock:
            return self._store(user)

    def path(self, digest: str) -> Path | None:
        """Return the file of a digest among the users at work, None if nobody has it."""
        with self._lock:
            stores = list(self._stores.values())
        return next((store.path(digest) for store in stores if store.has(digest)), None)

    # ---- the disk ----

    def _folder(self, user: str) -> Path:
        return private_dir(self._root / _person(user))

    def _store(self, user: str) -> FileBlobStore:
        if user not in self._stores:
            store = FileBlobStore(self._folder(user) / "blobs", self._reserve_bytes)
            known = {file.digest for file in self._index(user).files.values()}
            for digest in set(store.digests()) - known:
                store.delete(digest)  # deleted while it was being received
            self._stores[user] = store
        return self._stores[user]

    def _index(self, user: str) -> Index:
        if user not in self._indices:
            path = self._folder(user) / INDEX
            self._indices[user] = (
                parse_json(Index, path.read_bytes(), str(path)) if path.exists() else Index()
            )
        return self._indices[user]

    def _write(self, user: str, files: dict[str, Staged]) -> None:
        index = Index(files=files)
        write_atomic(self._folder(user) / INDEX, index.model_dump_json(indent=1).encode())
        self._indices[user] = index


def _person(user: str) -> str:
    """Return the name of a certificate's person, which is a safe name of a folder.

    Raises:
        InvalidArgumentError: it is not.
    """
    if not re.fullmatch(PERSON_PATTERN, user, re.ASCII):
        raise InvalidArgumentError(f"{user[:80]!r} is not a person's name", field="user")
    return user
