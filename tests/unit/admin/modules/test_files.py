import pytest

from flplatform.core.files_view import RunFile
from flplatform.core.messages import ModelRef
from flplatform.files.digest import digest_of
from tests.support.control import ENDED, run
from tests.support.files import made

MODEL = ModelRef("blake3:" + "5" * 64, 56)


@pytest.fixture
def console(console, control):
    control.run_views = {7: run(7, submitter="lea", submitter_organisation="a", **ENDED)}
    control.files.runs[7] = [
        made("log.txt", "é" * 300_000),
        made("metrics.csv", "round\n"),
        RunFile("models/round-1.safetensors", MODEL),
        RunFile("models/round-2.safetensors", MODEL),
    ]
    return console


def put(console, user, name, content=b"hello"):
    files, blob = console.transfers.user_files, ModelRef(digest_of(content), len(content))
    files.announce(user, name, blob)
    writer = files.store(user).receive(name, blob)
    writer.write(content)
    writer.commit()
    return blob


def granted(console, user):
    return console.transfers._granted.get(f"s-{user}", set())


def names(reply):
    return [entry["name"] for entry in reply.data("files")]


def test_a_folder_of_a_run_is_granted_and_its_texts_come_along(console):
    reply = console("download_folder runs/7", "lea")
    assert names(reply) == [
        "runs/7/log.txt", "runs/7/metrics.csv",
        "runs/7/models/round-1.safetensors", "runs/7/models/round-2.safetensors",
    ]  # fmt: skip
    assert granted(console, "lea") == {MODEL.digest}
    pieces = [item["value"] for item in reply.items if item.get("name") == "content runs/7/log.txt"]
    assert len(pieces) == 2
    assert "".join(pieces) == "é" * 300_000
    assert names(console("download_folder runs/7/models", "lea"))[0].endswith("round-1.safetensors")


def test_one_file(console):
    reply = console("download_file runs/7/models/round-2.safetensors", "lea")
    assert names(reply) == ["runs/7/models/round-2.safetensors"]
    assert reply.code == 0
    reply = console("download_file runs/7/metrics.csv", "lea")
    assert reply.data("content runs/7/metrics.csv") == "round\n"


@pytest.mark.parametrize(("user", "code"), [("amy", 0), ("lea", 0), ("oli", 0), ("max", 3)])
def test_results_are_for_who_submitted_the_run_or_runs_the_place(console, user, code):
    assert console("download_folder runs/7", user).code == code
    assert console("info runs/7", user).code == code


def test_a_lead_does_not_get_anothers_run(console, control):
    control.run_views[8] = run(8, submitter="amy", **ENDED)
    control.files.runs[8] = control.files.runs[7]
    for line in ("download_folder runs/8", "download_file runs/8/log.txt", "info runs/8"):
        reply = console(line, "lea")
        assert reply.code == 3
        assert reply.error["rule"] == "role lead: files = n:submitter"
    assert not granted(console, "lea")


def test_own_files_are_seen_by_their_owner_only(console):
    blob = put(console, "lea", "data/a.txt")
    assert names(console("info", "lea")) == ["transfer/data/a.txt"]
    assert names(console("download_folder transfer", "lea")) == ["transfer/data/a.txt"]
    assert names(console("download_folder transfer/data", "lea")) == ["transfer/data/a.txt"]
    assert granted(console, "lea") == {blob.digest}
    assert names(console("info", "amy")) == []
    assert console("download_file transfer/data/a.txt", "amy").error["code"] == "not_found"
    assert console("info", "max").code == 3


def test_an_upload_is_announced(console):
    digest = digest_of(b"hello")
    reply = console(f"announce_file notes.txt {digest} 5", "lea")
    assert reply.data("transfer_id") == f"file/lea/{digest.removeprefix('blake3:')}"
    assert console("info", "lea").table["rows"] == [
        ["transfer/notes.txt", 5, "not all of it has arrived"]
    ]
    assert console("download_file transfer/notes.txt", "lea").error["code"] == "not_found"
    assert console(f"announce_file ../x {digest} 5", "lea").code == 2
    assert console(f"announce_file big {digest} 5000", "lea").error["rule"] == "max_transfer_bytes"
    assert console(f"announce_file notes.txt {digest} 5", "max").code == 3


def test_deleting_asks_and_names_what_goes(console):
    put(console, "lea", "a.txt")
    reply = console("delete_file transfer/a.txt", "lea", confirmed=False)
    assert reply.question == "delete transfer/a.txt on the server. Continue?"
    assert console("delete_file transfer/a.txt", "amy").error["code"] == "not_found"
    assert console("delete_file transfer/a.txt", "lea").statuses == {"transfer/a.txt": "ok"}
    assert console("delete_file runs/7/log.txt", "lea").code == 2


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "runs/7/../8/log.txt", "runs/07/log.txt", "runs/x/log.txt", "runs",
     "state/events.db", "transfer/../x", "runs/7/..%2f", "runs/7/\0", "transfer", "runs/7",
     "runs/-1/log.txt", "runs/7/.x", "elsewhere/a"],
)  # fmt: skip
def test_names_outside_of_the_tree_are_refused(console, name):
    assert console(["download_file", "--", name], "amy").code == 2


def test_what_is_not_there_is_said(console):
    assert console("download_file runs/7/nothing.csv").error["code"] == "not_found"
    assert console("download_folder runs/7/nothing").error["code"] == "not_found"
    assert console("download_folder runs/9").error["code"] == "not_found"


@pytest.mark.parametrize("line", ["lpwd", "lls", "lcd /tmp", "upload_file a"])
def test_what_belongs_to_the_console(console, line):
    assert console(line).error["code"] == "failed_precondition"
