"""What the FL port refuses is remembered by site, and by run where a task is named."""

from pathlib import Path

import pytest

from flplatform.client.session import Session
from flplatform.core.errors import NotFoundError, ResourceExhaustedError
from flplatform.core.messages import ModelRef
from flplatform.files.digest import digest_of_file
from flplatform.rpc.transfers import send_blob
from flplatform.server.refusals import Refusal, Refusals
from flplatform.server.server import FederatedServer
from tests.support.federation import provision
from tests.unit.server.scene import play


def found(refusal: Refusal | None) -> tuple[str, str, str]:
    assert refusal is not None
    return refusal.what, refusal.code, refusal.rule


def test_what_the_port_refuses(tmp_path: Path) -> None:
    async def it() -> None:
        federation = provision(tmp_path, reserve_bytes=0, max_clients=1)
        server = FederatedServer(federation.open("server"), lambda _: None)
        await server.start()
        federation.point_to(server.port, 0)
        first, second = (Session(federation.open(f"site-{n}"), "none", list) for n in (1, 2))
        try:
            await first.register("")
            with pytest.raises(ResourceExhaustedError):
                await second._register_once()
            last = server.refusals.last("site-2")
            assert found(last) == ("Register", "resource_exhausted", "max_clients")
            assert server.refusals.last("site-1") is None
            path = tmp_path / "model"
            path.write_bytes(b"not a model")
            blob = ModelRef(*digest_of_file(path))
            with pytest.raises(NotFoundError):
                await first.transfer(
                    lambda channel, token: send_blob(
                        channel, path, blob, "5/1/train/site-1", token=token
                    )
                )
            refusal = server.refusals.last("site-1", 5)
            assert found(refusal) == ("5/1/train/site-1", "not_found", "")
            assert server.refusals.last("site-1") == refusal
            why = server.control.diagnosis.site("site-1")
            assert any("there is no run 5" in line.text for line in why.lines)
        finally:
            await first.close("test")
            await second._close_channels()
            await server.stop()

    play(it())


def test_the_log_tells_of_what_the_operator_must_make_room_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    refusals = Refusals()
    for number in range(50):
        error = ResourceExhaustedError(f"{number} bytes are to come", rule="reserve_bytes")
        refusals.note("a", "7/1/train/a", error)
    refusals.note("a", "7/1/train/a", NotFoundError("a round of before"))
    assert [record.getMessage() for record in caplog.records] == [
        "a: 7/1/train/a is refused for want of space here: "
        "0 bytes are to come (rule: reserve_bytes)"
    ]
