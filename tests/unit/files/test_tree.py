import os
import socket
import tempfile
import threading
from pathlib import Path

import pytest

from flplatform.core.errors import InvalidArgumentError, NotFoundError, PermissionDeniedError
from flplatform.files.tree import Mount, Tree

SECRET = b"the key of the site"


@pytest.fixture
def host(tmp_path: Path) -> Path:
    (tmp_path / "startup").mkdir()
    (tmp_path / "startup" / "participant.key").write_bytes(SECRET)
    box = tmp_path / "runs" / "run-7" / "box"
    box.mkdir(parents=True)
    (box / "a.txt").write_text("hello\n")
    (box / "deep").mkdir()
    (box / "deep" / "b.txt").write_text("b\n")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "site.log").write_text("started\n")
    return tmp_path


@pytest.fixture
def tree(host: Path) -> Tree:
    return Tree(
        {
            "logs": Mount(host, ("logs",)),
            "runs/7/box": Mount(host, ("runs", "run-7", "box")),
            "runs/7/metrics.jsonl": Mount(host, ("logs", "site.log")),
        }
    )


def read(tree: Tree, path: str) -> bytes:
    with tree.file(path) as handle:
        return os.read(handle, 1000)


def names(tree: Tree, path: str) -> list[str]:
    return sorted(entry.name for entry in tree.entries(path))


def test_what_is_mounted_is_there_and_nothing_else(tree):
    assert names(tree, "") == ["logs", "runs"]
    assert names(tree, "runs") == ["7"]
    assert names(tree, "runs/7") == ["box", "metrics.jsonl"]
    assert names(tree, "runs/7/box") == ["a.txt", "deep"]
    assert names(tree, "runs/7/box/a.txt") == ["a.txt"]
    assert read(tree, "runs/7/box/deep/b.txt") == b"b\n"
    assert read(tree, "runs/7/metrics.jsonl") == b"started\n"
    for path in ("startup", "startup/participant.key", "runs/8/box", "runs/7/state", "state"):
        with pytest.raises(NotFoundError):
            read(tree, path)
        with pytest.raises(NotFoundError):
            names(tree, path)


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../startup/participant.key", "logs/../startup/participant.key", "logs//x",
     "logs/..%2fstartup", "logs\\..\\startup", "logs/\0", "logs/.", "logs/-x", "logs/.x",
     "/proc/self/environ", "logs/" + "a/" * 40, "x" * 300],
)  # fmt: skip
def test_traversal_is_refused_before_the_disk_is_touched(tree, path):
    with pytest.raises(InvalidArgumentError):
        read(tree, path)
    with pytest.raises(InvalidArgumentError):
        names(tree, path)


def test_a_folder_is_not_read(tree):
    for path in ("runs", "logs", "runs/7/box/deep"):
        with pytest.raises(NotFoundError, match="is a folder"):
            read(tree, path)


def test_links_are_refused_wherever_they_stand(tree, host):
    box = host / "runs" / "run-7" / "box"
    (box / "file").symlink_to(host / "startup" / "participant.key")
    (box / "folder").symlink_to(host / "startup")
    (box / "inner").symlink_to("deep")
    for path in ("file", "folder/participant.key", "folder", "inner/b.txt"):
        with pytest.raises(PermissionDeniedError, match="symbolic link") as caught:
            read(tree, f"runs/7/box/{path}")
        assert caught.value.rule
    shown = {entry.name: entry for entry in tree.entries("runs/7/box")}
    assert not shown["folder"].is_folder


def test_a_mount_whose_own_way_is_swapped_for_a_link_is_refused(tree, host):
    run = host / "runs" / "run-7"
    run.rename(host / "elsewhere")
    run.symlink_to(host)
    (host / "box").mkdir()
    (host / "box" / "a.txt").write_bytes(SECRET)
    with pytest.raises(PermissionDeniedError, match="symbolic link"):
        read(tree, "runs/7/box/a.txt")


def test_what_is_no_regular_file_is_refused(tree):
    with tempfile.TemporaryDirectory(prefix="flt-") as short:
        box = Path(short) / "box"
        box.mkdir()
        os.mkfifo(box / "fifo")
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(box / "socket"))
            tree = Tree({"runs": Mount(Path(short), ("box",))})
            for name in ("fifo", "socket"):
                with pytest.raises(PermissionDeniedError, match="neither a file nor a folder"):
                    read(tree, f"runs/{name}")
    with pytest.raises(PermissionDeniedError):  # another file system, and a device at that
        read(Tree({"logs": Mount(Path("/"), ("dev", "null"))}), "logs")


def test_a_second_name_of_a_file_elsewhere_is_refused(tree, host):
    os.link(host / "startup" / "participant.key", host / "logs" / "x.log")
    with pytest.raises(PermissionDeniedError, match="second name"):
        read(tree, "logs/x.log")


@pytest.mark.parametrize("name", ["participant.key", "ca.PEM", "a.p12"])
def test_a_file_named_like_a_key_is_refused(tree, host, name):
    (host / "logs" / name).write_bytes(SECRET)
    with pytest.raises(PermissionDeniedError, match="name of a key"):
        read(tree, f"logs/{name}")


def test_who_swaps_while_it_is_opened_gets_nothing_out(tree, host):
    """A thread turns the folder into a link to the kit's and back, as fast as it can."""
    box = host / "runs" / "run-7" / "box"
    (box / "deep" / "participant.key.txt").write_text("harmless")
    (host / "startup" / "participant.key.txt").write_bytes(SECRET)
    stop = threading.Event()
    swaps = 0

    def swap() -> None:
        nonlocal swaps
        while not stop.is_set():
            (box / "deep").rename(box / "away")
            (box / "deep").symlink_to(host / "startup")
            swaps += 1
            (box / "deep").unlink()
            (box / "away").rename(box / "deep")

    thread = threading.Thread(target=swap)
    thread.start()
    got, refused = 0, 0
    try:
        while (got < 20 or refused < 20) and got + refused < 200_000:
            try:
                assert read(tree, "runs/7/box/deep/participant.key.txt") == b"harmless"
                got += 1
            except (PermissionDeniedError, NotFoundError):
                refused += 1
    finally:
        stop.set()
        thread.join()
    assert got
    assert refused
    assert swaps
