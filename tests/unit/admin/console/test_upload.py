import asyncio
from datetime import UTC, datetime

import pytest

from flplatform.admin.console import packing
from flplatform.admin.console.upload import upload_folder
from flplatform.core.errors import ConfigError, InvalidArgumentError, UnavailableError
from flplatform.files.digest import digest_of
from flplatform.hci.grammar import tokenise
from flplatform.security.package import open_package
from tests.unit.admin.console.conftest import Screen, data, done, error
from tests.unit.admin.console.test_submit import JOB, Uploads, job  # noqa: F401

STAGED = [data("job", {"name": "tiny", "parameters": 14}), done(0)]


@pytest.fixture
def uploads(monkeypatch) -> Uploads:
    uploads = Uploads()
    monkeypatch.setattr(packing, "send_blob", uploads)
    return uploads


def run(transport, line: str) -> tuple[int, Screen]:
    screen = Screen(transport)
    return asyncio.run(upload_folder(transport, tokenise(line), screen.shell)), screen


@pytest.mark.usefixtures("job")
def test_a_job_is_packed_uploaded_and_staged(transport, tmp_path, uploads, trust):
    transport.replies = [STAGED]
    code, screen = run(transport, f"upload_folder {tmp_path / 'tiny'}")
    assert code == 0
    (package_id, model_id) = uploads.sent
    assert (package_id[-4:], model_id[-6:]) == ("/job", "/model")
    (tmp_path / "p.zip").write_bytes(uploads.sent[package_id])
    package = open_package(tmp_path / "p.zip", trust.store, datetime.now(UTC))
    assert (package.author.name, package.job.name) == ("amy", "tiny")
    assert package.model.size == len(uploads.sent[model_id])
    ((staged, attachment),) = transport.sent
    assert staged == ["stage", "tiny", digest_of(uploads.sent[package_id])]
    assert attachment == b"", "nothing is started, so nothing is signed to start"
    assert screen.lines[-1].endswith("signed by amy · staged as tiny (14 parameters)")


@pytest.mark.usefixtures("job")
def test_an_upload_begun_again_goes_on_where_it_stopped(transport, tmp_path, uploads):
    transport.replies = [STAGED, STAGED, STAGED]
    run(transport, f"upload_folder {tmp_path / 'tiny'}")
    ids = list(uploads.sent)
    run(transport, f"upload_folder {tmp_path / 'tiny'}")
    assert list(uploads.sent) == ids, "the same job under the same name: the same transfers"
    run(transport, f"upload_folder {tmp_path / 'tiny'} --as other")
    assert len(uploads.sent) == 4
    assert transport.sent[-1][0][1] == "other"


@pytest.mark.usefixtures("job")
def test_a_broken_connection_is_survived(transport, tmp_path, uploads):
    uploads.broken = 1
    transport.replies = [[UnavailableError("gone")], STAGED]
    code, _ = run(transport, f"upload_folder {tmp_path / 'tiny'}")
    assert code == 0
    assert transport.sent[0] == transport.sent[1]


@pytest.mark.usefixtures("job")
def test_a_refusal_is_the_result(transport, tmp_path, uploads):
    transport.replies = [[error("heart is amy's"), done(3)]]
    code, screen = run(transport, f"upload_folder {tmp_path / 'tiny'}")
    assert code == 3
    assert "heart is amy's" in screen.err.getvalue()


@pytest.mark.usefixtures("job")
def test_what_is_wrong_is_told_before_anything_is_sent(transport, tmp_path, uploads):
    with pytest.raises(InvalidArgumentError, match="'../x' is not 1 to 63") as caught:
        run(transport, f"upload_folder {tmp_path / 'tiny'} --as ../x")
    assert caught.value.field == "--as"
    with pytest.raises(ConfigError, match=r"no job\.yml"):
        run(transport, f"upload_folder {tmp_path}")
    (tmp_path / "tiny" / "job.yml").write_text(JOB.replace("module: tiny", "module: nope"))
    with pytest.raises(InvalidArgumentError, match=r"there is no code/nope\.py"):
        run(transport, f"upload_folder {tmp_path / 'tiny'}")
    assert uploads.sent == {}
    assert transport.sent == []
