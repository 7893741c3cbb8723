import asyncio
import fcntl
import os

import pytest

from flplatform.admin.console import files
from flplatform.admin.console.local_folder import FOLDER
from flplatform.core.errors import (
    AlreadyExistsError,
    DataLossError,
    FailedPreconditionError,
    FLError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from flplatform.files.digest import digest_of
from flplatform.hci.grammar import tokenise
from tests.unit.admin.console.conftest import Screen, data, done, error, text

BLOBS = {digest_of(content): content for content in (b"round one", b"round two")}
ONE, TWO = BLOBS


def entry(name, digest=ONE, size=9, made=False):
    return {"name": name, "digest": digest, "size": size, "made": made}


def offer(*entries, **contents):
    pieces = [data(f"content {name}", piece) for name, piece in contents.items()]
    return [data("files", list(entries)), *pieces, done(0)]


@pytest.fixture
def fetched(monkeypatch):
    """Stands for `rpc.transfers.fetch_blob`; what is fetched is logged with its offset."""
    log, breaks = [], []

    async def fetch(channel, blob, blobs, *, token, progress):
        if blobs.has(blob.digest):
            return blobs.path(blob.digest)
        writer = blobs.receive(f"download {blob.digest}", blob)
        log.append((blob.digest, writer.offset))
        content = BLOBS[blob.digest][writer.offset :]
        if breaks:
            writer.write(content[:4])
            writer.suspend()
            raise breaks.pop()
        writer.write(content)
        progress(blob.size)
        writer.commit()
        return blobs.path(blob.digest)

    monkeypatch.setattr(files, "fetch_blob", fetch)
    return log, breaks


@pytest.fixture
def screen(transport, tmp_path):
    screen = Screen(transport)
    screen.shell.remembered[FOLDER] = str(tmp_path)
    return screen


def run(transport, screen, line):
    argv = tokenise(line) if isinstance(line, str) else line
    return asyncio.run(files.ACTIONS[argv[0]](transport, argv, screen.shell))


def lying(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_folder_arrives_whole_over_a_cut(transport, screen, fetched, tmp_path):
    log, breaks = fetched
    breaks.append(UnavailableError("gone"))
    reply = offer(
        entry("runs/7/best.safetensors", TWO),
        entry("runs/7/log.txt", digest_of(b"line\n"), 5, made=True),
        entry("runs/7/models/round-1.safetensors", ONE),
        entry("runs/7/models/round-2.safetensors", TWO),
        **{"runs/7/log.txt": "line\n"},
    )
    transport.replies = [reply, list(reply)]
    assert run(transport, screen, "download_folder runs/7") == 0
    target = tmp_path / "run-7"
    assert lying(target) == [
        "best.safetensors", "log.txt", "models", "models/round-1.safetensors",
        "models/round-2.safetensors",
    ]  # fmt: skip
    assert (target / "best.safetensors").read_bytes() == b"round two"
    assert (target / "models" / "round-2.safetensors").read_bytes() == b"round two"
    assert (target / "log.txt").read_text() == "line\n"
    assert log == [(TWO, 0), (TWO, 4), (ONE, 0)]
    assert {path.stat().st_mode & 0o777 for path in target.rglob("*.*")} == {0o600}
    assert lying(tmp_path)[0] == "run-7"
    assert "4 files" in screen.lines[-1]


def test_what_came_is_kept_when_the_console_ends(transport, screen, fetched, tmp_path):
    log, breaks = fetched
    breaks.append(InvalidArgumentError("the console ends here"))
    transport.replies = [offer(entry("transfer/a")), offer(entry("transfer/a"))]
    with pytest.raises(InvalidArgumentError, match="ends here"):
        run(transport, screen, "download_file transfer/a")
    assert not (tmp_path / "a").exists()
    assert run(transport, screen, "download_file transfer/a") == 0
    assert log == [(ONE, 0), (ONE, 4)]
    assert lying(tmp_path) == ["a"]


HOSTILE = [
    "/etc/passwd", "../x", "runs/7/../../x", "runs/7//etc/passwd", "runs/8/log.txt", "runs/7",
    "runs/7/..%2fx", "runs/7/a\\b", "runs/7/.bashrc", "runs/7/-rf", "runs/7/a\0", "transfer/x",
    "runs/7/\x1b[2J", "runs/7/" + "x" * 300, "runs/7/a/./b", "runs/7/e\u0301",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.usefixtures("fetched")
def test_a_server_that_lies_about_names_writes_nothing(transport, screen, tmp_path, name):
    for line, entries in (
        ("download_folder runs/7", [entry("runs/7/ok"), entry(name)]),
        ("download_file runs/7/log.txt", [entry(name)]),
    ):
        transport.replies = [offer(*entries)]
        with pytest.raises(FLError):
            run(transport, screen, line)
    assert not [path for path in lying(tmp_path) if not path.startswith(".fl-download-")]


@pytest.mark.parametrize(
    "entries",
    [
        [entry("runs/7/a"), entry("runs/7/a")],
        [entry("runs/7/a"), entry("runs/7/A")],
        [entry("runs/7/a"), entry("runs/7/a/b")],
        [],
        "all of them",
        [{"name": "runs/7/a"}],
        [entry("runs/7/a", "blake3:../../x")],
        [entry("runs/7/a", size="9")],
        [entry(f"runs/7/{n}") for n in range(files.MAX_FILES + 1)],
    ],
)
@pytest.mark.usefixtures("fetched")
def test_a_list_that_cannot_be_is_refused(transport, screen, tmp_path, entries):
    transport.replies = [[data("files", entries), done(0)]]
    with pytest.raises(InvalidArgumentError):
        run(transport, screen, "download_folder runs/7")
    assert not (tmp_path / "run-7").exists()


@pytest.mark.parametrize(("content", "size"), [("other", 5), ("line\nline\n", 5), ("line\n", 6)])
def test_contents_are_held_against_their_digest(transport, screen, tmp_path, content, size):
    listed = entry("runs/7/log.txt", digest_of(b"line\n"), size, made=True)
    transport.replies = [offer(listed, **{"runs/7/log.txt": content})]
    with pytest.raises(DataLossError):
        run(transport, screen, "download_file runs/7/log.txt")
    assert not (tmp_path / "log.txt").exists()


@pytest.mark.usefixtures("fetched")
def test_nothing_is_overwritten_not_even_by_a_race(transport, screen, tmp_path, monkeypatch):
    (tmp_path / "a").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for line in (
        "download_file transfer/a",
        "download_file transfer/b --to link",
        "download_folder transfer --to a",
        "download_folder transfer --to link",
    ):
        with pytest.raises(AlreadyExistsError):
            run(transport, screen, line)
    monkeypatch.setattr(files, "_demand_new", lambda _: None)
    transport.replies = [offer(entry("transfer/a")), offer(entry("transfer/b"))]
    with pytest.raises(AlreadyExistsError):
        run(transport, screen, "download_file transfer/a")
    (tmp_path / "taken").mkdir()
    with pytest.raises(AlreadyExistsError):
        run(transport, screen, "download_folder transfer --to taken")
    assert (tmp_path / "a").read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()
    assert lying(tmp_path / "taken") == []


@pytest.mark.usefixtures("fetched")
def test_two_consoles_do_not_write_into_one_download(transport, screen, tmp_path):
    with files._parts(tmp_path, transport, "transfer/a") as parts:
        handle = os.open(parts, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(handle)
        with pytest.raises(FailedPreconditionError, match="another console"):
            run(transport, screen, "download_file transfer/a")


def test_a_refusal_is_shown_and_its_code_returned(transport, screen, tmp_path):
    (tmp_path / "a").write_text("x")
    for line in ("download_file transfer/a --to b", "download_folder runs/7", "upload_file a"):
        transport.replies = [[error("lea may not"), done(3)]]
        assert run(transport, screen, line) == 3
    assert "lea may not" in screen.err.getvalue()


def test_an_upload_is_announced_and_sent_until_it_has_arrived(
    transport, screen, tmp_path, monkeypatch
):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_bytes(b"round one")
    breaks, sent = [UnavailableError("gone")], []

    async def send(channel, path, blob, transfer_id, *, token, progress):
        sent.append((path.read_bytes(), blob.digest, transfer_id))
        progress(blob.size)
        if breaks:
            raise breaks.pop()

    monkeypatch.setattr(files, "send_blob", send)
    transport.replies = [[data("transfer_id", "file/amy/1"), done(0)] for _ in range(2)]
    assert run(transport, screen, "upload_file data/a.txt") == 0
    assert [words for words, _ in transport.sent] == [["announce_file", "a.txt", ONE, "9"]] * 2
    assert sent == [(b"round one", ONE, "file/amy/1")] * 2
    assert screen.lines[-1].startswith("transfer/a.txt (9 B)")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("upload_file none", NotFoundError),
        ("upload_file empty", InvalidArgumentError),
        ("upload_file full ../x", InvalidArgumentError),
        ("upload_file full .x", InvalidArgumentError),
        ("upload_file .hidden", InvalidArgumentError),
    ],
)
def test_what_cannot_be_uploaded_is_not_announced(transport, screen, tmp_path, line, what):
    (tmp_path / "empty").touch()
    (tmp_path / "full").write_text("x")
    (tmp_path / ".hidden").write_text("x")
    with pytest.raises(what):
        run(transport, screen, line)
    assert not transport.sent


def test_the_local_folder(transport, screen, tmp_path, credentials):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a\x1b.txt").write_text("abc")
    assert run(transport, screen, "lcd sub") == 0
    assert run(transport, screen, "lpwd") == 0
    assert screen.lines[-1] == str(tmp_path / "sub")
    assert run(transport, screen, "lls") == 0
    screen.shell._renderer.flush()
    assert "a\\x1b.txt" in screen.out.getvalue()
    with pytest.raises(NotFoundError):
        run(transport, screen, "lcd none")
    assert run(transport, screen, "lcd") == 0
    assert screen.lines[-1] == str(credentials.kit.folder / "transfer")


def test_info_says_where_to_and_asks_the_server(transport, screen, tmp_path):
    transport.replies = [[text("there is nothing in transfer"), done(0)]]
    assert run(transport, screen, "info") == 0
    assert str(tmp_path) in screen.lines[0]
    assert transport.sent == [(["info"], b"")]
