import asyncio

import numpy as np
import pytest

from flplatform.admin.console import download
from flplatform.core.errors import AlreadyExistsError, UnavailableError
from flplatform.core.messages import ModelRef
from flplatform.files.digest import digest_of_file
from flplatform.files.modelfile import load, save
from flplatform.hci.grammar import tokenise
from tests.unit.admin.console.conftest import Screen, data, done, error


@pytest.fixture
def model(tmp_path):
    save(tmp_path / "original", {"w": np.arange(3.0)})
    return ModelRef(*digest_of_file(tmp_path / "original"))


@pytest.fixture
def _server(transport, model, tmp_path, monkeypatch):
    """Stands for `rpc.transfers.fetch_blob`; the connection breaks once."""
    breaks = [UnavailableError("gone")]

    async def fetch(channel, blob, blobs, *, token, progress):
        writer = blobs.receive("x", blob)
        content = (tmp_path / "original").read_bytes()[writer.offset :]
        if breaks:
            writer.write(content[:10])
            writer.suspend()
            raise breaks.pop()
        assert writer.offset == 10
        writer.write(content)
        progress(blob.size)
        writer.commit()
        return blobs.path(blob.digest)

    monkeypatch.setattr(download, "fetch_blob", fetch)
    found = {"run": 3, "round": 12, "digest": model.digest, "size": model.size}
    transport.replies = [[data("model", found), done(0)] for _ in range(2)]


def run(transport, line):
    screen = Screen(transport)
    return asyncio.run(download.download_model(transport, tokenise(line), screen.shell)), screen


@pytest.mark.usefixtures("_server")
def test_a_model_arrives_whole_though_the_connection_breaks(transport, tmp_path):
    target = tmp_path / "out" / "m.safetensors"
    target.parent.mkdir()
    code, screen = run(transport, f"download_model 3 best --to {target}")
    assert code == 0
    assert load(target)["w"].tolist() == [0, 1, 2]
    assert target.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in target.parent.iterdir()] == ["m.safetensors"]
    assert screen.lines[-1].startswith("round 12, 3 parameters (")


@pytest.mark.usefixtures("_server")
def test_by_default_it_lies_in_the_kits_transfer_folder(transport, credentials):
    run(transport, "download_model 3")
    target = credentials.kit.folder / "transfer" / "run-3-round-12.safetensors"
    assert target.exists()
    target.unlink()


@pytest.mark.usefixtures("_server")
def test_a_file_is_never_overwritten(transport, tmp_path):
    (tmp_path / "m").write_text("mine")
    with pytest.raises(AlreadyExistsError):
        run(transport, f"download_model 3 --to {tmp_path / 'm'}")
    with pytest.raises(AlreadyExistsError):
        download._name(tmp_path / "original", tmp_path / "m")
    assert (tmp_path / "m").read_text() == "mine"


@pytest.mark.usefixtures("_server")
def test_a_file_of_that_name_is_told_before_anything_is_downloaded(transport, credentials):
    answer = transport.replies[0]
    run(transport, "download_model 3")
    transport.replies = [answer]
    with pytest.raises(AlreadyExistsError):  # and not that of a second fetch
        run(transport, "download_model")
    assert len(list((credentials.kit.folder / "transfer").iterdir())) == 1


def test_a_refusal_makes_no_file(transport, tmp_path):
    transport.replies = [[error("lea may not download_model"), done(3)]]
    code, _ = run(transport, f"download_model 3 --to {tmp_path / 'm'}")
    assert code == 3
    assert not (tmp_path / "m").exists()
