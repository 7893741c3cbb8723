from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from flplatform.admin.transfers import PortBlobs, Transfers
from flplatform.admin.user_files import file_transfer
from flplatform.core.config import ServerLimits
from flplatform.core.errors import (
    InvalidArgumentError,
    PermissionDeniedError,
    ResourceExhaustedError,
)
from flplatform.core.messages import ModelRef
from flplatform.files.digest import digest_of
from flplatform.store.blobs import FileBlobStore
from tests.unit.admin.conftest import USERS, session_of

ID = "0123456789abcdef" * 2


def who(name: str) -> SimpleNamespace:
    return SimpleNamespace(identity=USERS[name])


@pytest.fixture
def transfers(console):
    limits = ServerLimits(max_job_bytes=100, max_model_bytes=1000)
    return Transfers(
        console.rights,
        limits,
        lambda caller: session_of(caller.identity.name),
        console.transfers.user_files,
    )


def test_uploads_of_a_submission_are_admitted(transfers):
    transfers.admit(who("amy"), f"{ID}/job", ModelRef("x", 100))
    transfers.admit(who("lea"), f"{ID}/model", ModelRef("x", 1000))


@pytest.mark.parametrize(
    "transfer_id",
    [f"{ID}/code", ID, f"{ID}/job/x", f"{ID.upper()}/job", "1/2/train/a", f"{ID}/job\n"],
)
def test_other_uploads_are_not(transfers, transfer_id):
    with pytest.raises(InvalidArgumentError, match="SUBMISSION"):
        transfers.admit(who("amy"), transfer_id, ModelRef("x", 1))


@pytest.mark.parametrize(("part", "size"), [("job", 101), ("model", 1001)])
def test_too_large(transfers, part, size):
    with pytest.raises(ResourceExhaustedError) as caught:
        transfers.admit(who("amy"), f"{ID}/{part}", ModelRef("x", size))
    assert caught.value.rule == f"max_{part}_bytes"


@pytest.mark.parametrize("name", ["oli", "max"])
def test_who_may_not_submit_may_not_upload(transfers, name):
    with pytest.raises(PermissionDeniedError):
        transfers.admit(who(name), f"{ID}/job", ModelRef("x", 1))


def test_a_grant_is_of_one_session_and_ends_with_it(transfers):
    transfers.grant(session_of("amy"), "d1")
    transfers.release(who("amy"), "d1")
    for name, digest in (("amy", "d2"), ("lea", "d1")):
        with pytest.raises(PermissionDeniedError, match="not granted"):
            transfers.release(who(name), digest)
    transfers.end_session(session_of("amy"))
    transfers.end_session(session_of("amy"))
    with pytest.raises(PermissionDeniedError):
        transfers.release(who("amy"), "d1")


CONTENT = b"some text"
FILE = ModelRef(digest_of(CONTENT), len(CONTENT))


def test_a_file_is_received_once_announced_and_by_who_announced_it(transfers, tmp_path):
    transfer_id = file_transfer("lea", FILE.digest)
    port = PortBlobs(FileBlobStore(tmp_path / "blobs"), transfers.user_files)
    with pytest.raises(PermissionDeniedError, match="announce"):
        port.receive(transfer_id, FILE)
    transfers.user_files.announce("lea", "notes.txt", FILE)
    transfers.admit(who("lea"), transfer_id, FILE)
    port.receive(transfer_id, FILE).suspend()
    with pytest.raises(PermissionDeniedError, match="announce"):
        port.receive(transfer_id, ModelRef(FILE.digest, FILE.size + 1))
    for name, blob in (("amy", FILE), ("lea", ModelRef("blake3:" + "0" * 64, 9))):
        with pytest.raises(PermissionDeniedError, match="announce"):
            transfers.admit(who(name), transfer_id, blob)
    with pytest.raises(PermissionDeniedError, match="may not"):
        transfers.admit(who("max"), file_transfer("max", FILE.digest), FILE)


def test_admission_does_not_wait_for_who_writes(transfers):
    """Admitting is done on the event loop; an index is written under the lock of all files."""
    with ThreadPoolExecutor(1) as pool, transfers.user_files._lock:
        pool.submit(transfers.admit, who("lea"), file_transfer("lea", FILE.digest), FILE).result(
            10.0
        )


@pytest.mark.parametrize("user", ["", "..", "../lea", "a/b", "lea\n", "LEA"])
def test_a_transfer_id_with_an_odd_user_is_none(transfers, user):
    with pytest.raises(InvalidArgumentError):
        transfers.admit(who("lea"), f"file/{user}/{'0' * 64}", FILE)


def test_the_port_keeps_files_of_users_apart_from_the_federations_blobs(transfers, tmp_path):
    blobs = FileBlobStore(tmp_path / "blobs")
    port = PortBlobs(blobs, transfers.user_files)
    transfers.user_files.announce("lea", "notes.txt", FILE)
    writer = port.receive(file_transfer("lea", FILE.digest), FILE)
    writer.write(CONTENT)
    writer.commit()
    assert not blobs.has(FILE.digest)
    assert not transfers.user_files.store("amy").has(FILE.digest)
    assert port.path(FILE.digest).read_bytes() == CONTENT
    writer = port.receive(f"{ID}/job", FILE)
    writer.write(CONTENT)
    writer.commit()
    assert port.path(FILE.digest) == blobs.path(FILE.digest)
