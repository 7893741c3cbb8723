"""The admin port as a console meets it: real kits, real TLS, a federation in memory behind it."""

import asyncio
import dataclasses
import io
import json
import os
import secrets
import shutil
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pexpect
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from flplatform.admin.console.actions import actions
from flplatform.admin.console.transport import Credentials, GrpcTransport
from flplatform.admin.fed_admin_server import FedAdminServer
from flplatform.core.control import SiteReply
from flplatform.core.errors import (
    InvalidArgumentError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)
from flplatform.core.messages import ModelRef
from flplatform.files.digest import digest_of_file
from flplatform.files.modelfile import load
from flplatform.hci.shell import Shell
from flplatform.rpc.channel import TOKEN_KEY, open_channel
from flplatform.rpc.errors import from_rpc
from flplatform.rpc.transfers import fetch_blob, send_blob
from flplatform.rpc.v1 import federated_pb2 as pb
from flplatform.rpc.v1 import federated_pb2_grpc as pb_grpc
from flplatform.security.audit import AuditLog, records, verify
from flplatform.security.signing import CommandOrder, Signed, open_order
from flplatform.server.server import Trust
from flplatform.store.blobs import FileBlobStore
from tests.support.control import FakeControl, run, site
from tests.support.federation import Federation, provision


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return provision(
        tmp_path_factory.mktemp("admin-port"),
        sites={"site-1": "a", "site-2": "b"},
        admins={"amy": "project_admin", "lea": "lead@a", "max": "member"},
        login_attempts=2,
        session_idle_s=5.0,
        reserve_bytes=0,
        max_job_bytes=100_000,
    )


@pytest.fixture
def federation(original: Federation, tmp_path: Path) -> Federation:
    folder = shutil.copytree(original.folder, tmp_path / "federation" / "test")
    return dataclasses.replace(original, folder=folder)


@pytest.fixture
def control() -> FakeControl:
    ok = SiteReply("ok", {"runs": []})
    return FakeControl(
        site_views=[site("site-1", "a"), site("site-2", "b")],
        replies={"site-1": ok, "site-2": ok},
    )


class Port:
    """A running admin side."""

    def __init__(self, federation: Federation, control: FakeControl) -> None:
        self.federation = federation
        self.control = control
        self.kit = federation.open("server")
        self.folder = self.kit.state_folder()
        self.folder.mkdir(exist_ok=True)
        self.trust = Trust(self.kit)
        self.audit_path = self.folder / "audit.jsonl"
        self.audit = AuditLog(self.audit_path, "server")
        self.blobs = FileBlobStore(self.folder / "blobs")
        self.workers = ThreadPoolExecutor(2)
        self.refusals: list[tuple[str, str, Exception]] = []
        self.server = self.make()

    def make(self) -> FedAdminServer:
        return FedAdminServer(
            self.kit,
            self.control,
            blobs=self.blobs,
            audit=self.audit,
            trust=self.trust,
            workers=self.workers,
            note_refusal=lambda method, name, _, error: self.refusals.append(
                (method.rpartition("/")[2], name, error)
            ),
        )

    def credentials(self, name: str) -> Credentials:
        return Credentials.open(self.federation.open(name), self.federation.passphrase(name))

    def channel(self, name: str) -> aio.Channel:
        kit = self.federation.open(name)
        secret = self.federation.passphrase(name) if kit.identity.kind == "admin" else None
        return open_channel(
            f"localhost:{self.server.port}",
            key_pem=kit.key_pem(secret),
            chain_pem=kit.chain,
            trusted_pem=self.federation.open("amy").trust.tls_roots("server"),
        )

    @property
    def log(self) -> list[tuple[str, str, str]]:
        return [(r["actor"], r["action"], r["decision"]) for r in records(self.audit_path)]


@asynccontextmanager
async def serving(federation: Federation, control: FakeControl) -> AsyncIterator[Port]:
    port = Port(federation, control)
    await port.server.start()
    federation.point_to(1, port.server.port)
    try:
        yield port
    finally:
        await port.server.stop()
        port.audit.close()
        port.workers.shutdown()


@asynccontextmanager
async def signed_in(port: Port, name: str = "amy") -> AsyncIterator[GrpcTransport]:
    transport = GrpcTransport(port.credentials(name))
    try:
        await transport.connect()
        yield transport
    finally:
        await transport.close()


async def execute(transport: GrpcTransport, *argv: str, **options: Any) -> list[dict[str, Any]]:
    confirmed = options.pop("confirmed", True)
    return [item async for item in transport.execute(list(argv), confirmed, **options)]


async def under_way(control: FakeControl) -> None:
    """Wait until a command waits for a run to change."""
    while not control.changed._waiters:
        await asyncio.sleep(0.001)


def test_a_command_from_key_press_to_rows(federation, control):
    control.run_views = {3: run(3)}

    async def main():
        async with serving(federation, control) as port:
            async with signed_in(port) as transport:
                transport.current_run = lambda: 3
                items = await execute(transport, "check_status", "client", "site-1", "sit-2")
                await transport.refresh()
                names = await transport.complete("site", "site-")
                assert transport.prompt() == "fl:heart  run 3 training r7/20  0/2 sites > "
                assert transport.toolbar() == control.last_event
                assert names == ["site-1", "site-2"]
                assert transport.welcome.role == "project_admin"
                assert transport.welcome.project == "test"
                commands = {view.name for view in transport.specs()}
                assert {"submit_job", "check_status", "help", "bye"} <= commands
                assert not {"preflight", "submit"} & commands
            return port, items

    port, items = asyncio.run(main())
    assert [(item["target"], item["status"]) for item in items if item["type"] == "row"] == [
        ("site-1", "ok"),
        ("sit-2", "unknown"),
    ]
    ((sites, topic, signed),) = control.asked
    assert (sites, topic) == (("site-1",), "check_status")
    signer, order = open_order(
        CommandOrder, Signed.from_bytes(signed), federation.open("site-1").trust, datetime.now(UTC)
    )
    assert signer.name == "amy"
    assert order.argv == ("check_status", "client", "site-1", "sit-2")
    assert order.run == 3
    assert port.log == [("amy", "login", "allowed")]


def test_only_users_get_through_the_handshake(federation, control):
    async def main():
        async with serving(federation, control) as port:
            for name in ("site-1", "server"):
                channel = port.channel(name)
                with pytest.raises(aio.AioRpcError) as caught:
                    await pb_grpc.AdminConsoleStub(channel).Challenge(pb.Empty(), timeout=30)
                assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
                await channel.close()
            channel = port.channel("max")
            health = health_pb2_grpc.HealthStub(channel)
            reply = await health.Check(health_pb2.HealthCheckRequest(), timeout=30)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(aio.AioRpcError) as caught:
                await pb_grpc.FederatedTrainingStub(channel).Quit(pb.QuitRequest(), timeout=30)
            assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
            await channel.close()

    asyncio.run(main())


def test_wrong_passwords_lock_and_a_restart_does_not_forget(federation, control):
    async def main():
        async with serving(federation, control) as port:
            right = port.credentials("amy")
            wrong = dataclasses.replace(right, password="wrong")
            texts = set()
            for credentials in (wrong, wrong, right):
                with pytest.raises(UnauthenticatedError) as caught:
                    await GrpcTransport(credentials).connect()
                texts.add(str(caught.value))
            assert len(texts) == 1
            await port.server.stop()
            port.server = port.make()
            await port.server.start()
            federation.point_to(1, port.server.port)
            with pytest.raises(UnauthenticatedError):
                await GrpcTransport(port.credentials("amy")).connect()
            async with signed_in(port, "lea"):
                pass
            return port

    port = asyncio.run(main())
    assert port.log == [("amy", "login", "denied")] * 4 + [("lea", "login", "allowed")]
    assert verify(port.audit_path).seq == 5


def test_a_login_needs_a_fresh_challenge(federation, control):
    async def main():
        async with serving(federation, control) as port:
            channel = port.channel("amy")
            stub, credentials = pb_grpc.AdminConsoleStub(channel), port.credentials("amy")
            record = credentials.kit.user_record()
            request = pb.LoginRequest(
                nonce=(await stub.Challenge(pb.Empty())).nonce,
                password=credentials.password,
                user_file=record.payload,
                user_signature=record.to_detached(),
            )
            await stub.Login(request)
            for nonce in (request.nonce, b""):
                request.nonce = nonce
                with pytest.raises(aio.AioRpcError) as caught:
                    await stub.Login(request)
                assert from_rpc(caught.value).rule == "challenge"
            await channel.close()

    asyncio.run(main())


def order(credentials: Credentials, *argv: str, age_s: float = 0.0) -> bytes:
    now = datetime.now(UTC) - timedelta(seconds=age_s)
    return credentials.sign(
        CommandOrder(
            project="test",
            issued_at=now,
            not_after=now + timedelta(seconds=60),
            id=secrets.token_hex(16),
            argv=argv,
        )
    )


async def send(channel: aio.Channel, token: str, signed: bytes) -> list[dict[str, Any]]:
    call = pb_grpc.AdminConsoleStub(channel).Execute(
        pb.ExecuteRequest(signed=signed), metadata=((TOKEN_KEY, token),)
    )
    try:
        return [json.loads(reply.item) async for reply in call]
    except aio.AioRpcError as error:
        raise from_rpc(error) from None


def test_orders_count_once_and_only_for_who_signed(federation, control):
    async def main():
        async with (
            serving(federation, control) as port,
            signed_in(port, "amy") as amy,
            signed_in(port, "lea") as lea,
        ):
            signed = order(amy.credentials, "list_runs")
            assert (await send(amy._channel, amy._token, signed))[-1]["exit_code"] == 0
            for channel, token, text, rule in (
                (amy._channel, amy._token, signed, "single use"),
                (lea._channel, lea._token, order(amy.credentials, "list_runs"), "own order"),
                (
                    amy._channel,
                    amy._token,
                    order(amy.credentials, "list_runs", age_s=120),
                    "not after",
                ),
            ):
                with pytest.raises(PermissionDeniedError) as caught:
                    await send(channel, token, text)
                assert caught.value.rule == rule
            # a token is worth nothing with another certificate, and nor is a made up one
            for token in (amy._token, "", secrets.token_urlsafe(32)):
                with pytest.raises(UnauthenticatedError):
                    await send(lea._channel, token, order(lea.credentials, "list_runs"))
            with pytest.raises(InvalidArgumentError):
                await send(amy._channel, amy._token, b"unsigned")
            return port

    port = asyncio.run(main())
    refused = [(method, name, type(error).__name__) for method, name, error in port.refusals]
    assert refused == [
        ("Execute", "amy", "PermissionDeniedError"),
        ("Execute", "lea", "PermissionDeniedError"),
        ("Execute", "amy", "PermissionDeniedError"),
        *[("Execute", "lea", "UnauthenticatedError")] * 3,
        ("Execute", "amy", "ConfigError"),
    ]


def test_an_ended_session_is_opened_again_for_the_next_command(federation, control):
    async def main():
        async with serving(federation, control) as port, signed_in(port) as transport:
            token = transport._token
            await pb_grpc.AdminConsoleStub(transport._channel).Logout(
                pb.Empty(), metadata=((TOKEN_KEY, token),)
            )
            with pytest.raises(UnauthenticatedError):
                await send(transport._channel, token, order(transport.credentials, "list_runs"))
            assert (await execute(transport, "list_runs"))[-1]["exit_code"] == 0
            assert transport._token != token
            return port

    port = asyncio.run(main())
    assert port.log == [("amy", "login", "allowed")] * 2


def test_errors_are_items_with_their_codes(federation, control):
    async def main():
        async with serving(federation, control) as port:
            async with signed_in(port) as amy:
                unknown = await execute(amy, "check_stats", "all")
                wrong = await execute(amy, "check_status", "site-1")
            async with signed_in(port, "max") as max_:
                refused = await execute(max_, "shutdown", "all")
            return port, unknown, wrong, refused

    port, unknown, wrong, refused = asyncio.run(main())
    assert unknown[0]["hint"] == "did you mean check_status?"
    assert unknown[-1]["exit_code"] == 2
    assert "did you mean client site-1?" in wrong[0]["message"]
    assert wrong[0]["hint"].startswith("usage: check_status TARGET")
    assert refused[0]["rule"] == "role member: operate is not granted"
    assert refused[-1]["exit_code"] == 3
    assert port.log[-1] == ("max", "shutdown", "denied")
    assert control.calls == []


def test_a_question_is_asked_before_anything_happens(federation, control):
    async def main():
        async with serving(federation, control) as port, signed_in(port) as amy:
            asked = await execute(amy, "shutdown", "server", confirmed=False)
            assert control.calls == []
            await execute(amy, "shutdown", "server")
            return port, asked

    port, asked = asyncio.run(main())
    assert asked == [
        {"type": "confirm", "question": "shut down the server: no run is active. Continue?"}
    ]
    assert control.calls == [("stop", False)]
    assert port.log[-1] == ("amy", "shutdown", "allowed")


def test_a_yes_means_the_run_that_the_question_named(federation, control):
    control.run_views = {3: run(3)}

    async def main():
        async with serving(federation, control) as port, signed_in(port) as amy:
            shell = Shell(amy, env={})
            amy.current_run = lambda: shell.remembered.get("run")

            async def yes_after_a_while(_question: str, _hidden: bool) -> str:
                control.update(3, status="finished", ended="now")
                control.run_views[4] = run(4)
                return "y"

            shell.asker = yes_after_a_while
            assert await shell.run_command("abort") == 1
            assert shell.remembered == {"run": 3}

    asyncio.run(main())
    assert control.calls == []


def test_uploads_and_downloads_have_rights_of_their_own(federation, control, tmp_path):
    path = tmp_path / "blob"
    path.write_bytes(b"x" * 5000)
    blob = ModelRef(*digest_of_file(path))
    submission = secrets.token_hex(16)
    mine = FileBlobStore(tmp_path / "mine")

    async def main():
        async with (
            serving(federation, control) as port,
            signed_in(port, "amy") as amy,
            signed_in(port, "max") as max_,
        ):

            async def upload(who: GrpcTransport, transfer_id: str, what: ModelRef) -> None:
                await send_blob(who._channel, path, what, transfer_id, token=who._token)

            with pytest.raises(PermissionDeniedError, match="may not submit_job"):
                await upload(max_, f"{submission}/job", blob)
            with pytest.raises(InvalidArgumentError, match="SUBMISSION"):
                await upload(amy, "3/1/train/site-1", blob)
            with pytest.raises(ResourceExhaustedError, match="max_job_bytes"):
                await upload(amy, f"{submission}/job", ModelRef(blob.digest, 200_000))
            await upload(amy, f"{submission}/job", blob)
            assert port.blobs.path(blob.digest).read_bytes() == path.read_bytes()

            async def download(who: GrpcTransport) -> Path:
                return await fetch_blob(who._channel, blob, mine, token=who._token)

            with pytest.raises(PermissionDeniedError, match="not granted"):
                await download(amy)
            control.run_views, control.models = {1: run(1)}, {(1, "best"): blob}
            assert (await execute(max_, "download_model", "1"))[-1]["exit_code"] == 3
            assert (await execute(amy, "download_model", "1"))[-1]["exit_code"] == 0
            with pytest.raises(PermissionDeniedError, match="not granted"):
                await download(max_)
            assert (await download(amy)).read_bytes() == path.read_bytes()

    asyncio.run(main())


JOB = """
name: tiny
min_clients: 1
executor: {module: tiny}
initial_model: {function: "tiny:first"}
"""


def test_a_job_goes_up_and_a_model_comes_down(federation, control, tmp_path, capsys):
    code = tmp_path / "tiny" / "code"
    code.mkdir(parents=True)
    (code.parent / "job.yml").write_text(JOB)
    (code / "tiny.py").write_text(
        "import numpy as np\ndef first(args, seed): return {'w': np.arange(14, dtype='f4')}\n"
    )
    control.replies["site-2"] = SiteReply("refused", message="no", rule="policy byoc = none")
    target = tmp_path / "model.safetensors"

    async def main():
        async with serving(federation, control) as port, signed_in(port, "lea") as transport:
            shell = Shell(transport, actions=actions(transport), assume_yes=True, env={})
            transport.current_run = lambda: shell.remembered.get("run")
            assert await shell.run_command(f"submit_job {code.parent}") == 0
            ((signed, user, quorum),) = control.orders
            assert (user, quorum, shell.remembered) == ("lea", None, {"run": 1})
            model = next(
                ModelRef(digest, port.blobs.path(digest).stat().st_size)
                for digest in port.blobs.digests()
                if port.blobs.path(digest).stat().st_size < 300
            )
            control.update(1, submitter="lea", submitter_organisation="a")
            control.models = {(1, 5): model}
            assert await shell.run_command(f"download_model 1 5 --to {target}") == 0
            assert await shell.run_command("set_min_clients 1") == 0
            control.update(1, status="failed", ended="now", reason="no quorum")
            assert await shell.run_command("wait") == 5
            return json.loads(signed)

    asyncio.run(main())
    assert load(target)["w"].tolist() == list(range(14))
    assert control.calls == [("set_min_clients", 1, 1, "lea")]
    out = capsys.readouterr().out
    assert "site-1 ok · site-2 refused: rule policy byoc = none: no" in out
    assert "run 1 started" in out


def test_revocation_ends_sessions_and_what_they_have_under_way(federation, control):
    control.run_views = {3: run(3)}

    async def main():
        async with serving(federation, control) as port, signed_in(port, "lea") as lea:
            waiting = asyncio.create_task(execute(lea, "wait", "3"))
            await under_way(control)
            federation.revoke("lea")
            port.trust.store = port.kit.reload_trust()
            port.server.look()
            with pytest.raises(UnauthenticatedError, match="revoked"):
                await waiting
            with pytest.raises(UnauthenticatedError, match="revoked"):
                await execute(lea, "list_runs")

    asyncio.run(main())


def test_who_waits_is_not_idle(federation, control):
    control.run_views = {3: run(3)}

    async def main():
        async with serving(federation, control) as port, signed_in(port) as amy:
            clock = SimpleNamespace(ahead=0.0)
            sessions = port.server._sessions
            real = sessions.clock
            sessions.clock = lambda: real() + clock.ahead
            waiting = asyncio.create_task(execute(amy, "wait", "3"))
            await under_way(control)
            clock.ahead = 4.9
            port.server.look()
            clock.ahead = 8.0
            port.server.look()
            assert len(sessions.live()) == 1
            control.update(3, status="finished", ended="now")
            assert (await waiting)[-1]["exit_code"] == 0
            clock.ahead = 20.0
            port.server.look()
            assert sessions.live() == []

    asyncio.run(main())


def test_stopping_ends_commands_under_way_and_the_console_finds_the_server_again(
    federation, control
):
    control.run_views = {3: run(3)}

    async def main():
        async with serving(federation, control) as port, signed_in(port) as amy:
            waiting = asyncio.create_task(execute(amy, "wait", "3"))
            await under_way(control)
            address = port.server.port
            await port.server.stop()
            items = await waiting
            assert items[-2]["message"] == "cancelled: the server is stopping"
            assert items[-1]["exit_code"] == 4
            with pytest.raises(UnavailableError):
                await execute(amy, "list_runs")
            port.federation.local("server", "overrides.yml", f"admin_address: 127.0.0.1:{address}")
            port.kit = federation.open("server")
            port.server = port.make()
            await port.server.start()
            async with asyncio.timeout(60):
                while True:
                    try:
                        items = await execute(amy, "list_runs")
                        break
                    except UnavailableError:
                        await asyncio.sleep(0.1)
            assert items[-1]["exit_code"] == 0

    asyncio.run(main())


def test_fl_admin_from_a_script(federation, control, tmp_path):
    secret = federation.folder / "secrets" / "amy.txt"
    script = tmp_path / "script"
    script.write_text("# a comment\nlist_runs\ncheck_status client nowhere\nlist_runs\n")

    async def main():
        async def fl_admin(*options: str, text: str = "") -> tuple[int, str, str]:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "flplatform.entrypoints.admin"),
                *(str(federation.kit("amy")), *options),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            out, err = await process.communicate(text.encode())
            return process.returncode or 0, out.decode(), err.decode()

        password = ("--password-file", str(secret))
        async with serving(federation, control):
            found = await asyncio.gather(
                fl_admin(*password, "-c", "list_runs", "-c", "check_status server", "--json"),
                fl_admin(*password, "--script", str(script)),
                fl_admin(*password, "--script", str(script), "--keep-going", "--json"),
                fl_admin(*password, text="no_such_command\n"),
                fl_admin(*password, "-c", "shutdown server"),
                fl_admin(*password, "-c", "shutdown server", "--yes"),
                fl_admin("-c", "list_runs"),
            )
        return [*found, await fl_admin(*password, "-c", "list_runs")]

    json_lines, script_run, kept_going, unknown, asked, yes, nobody, gone = asyncio.run(main())
    assert json_lines[0] == 0, json_lines
    documents = [json.loads(line) for line in json_lines[1].splitlines()]
    assert [document["command"] for document in documents] == ["list_runs", "check_status server"]
    assert all(document["ok"] for document in documents)
    assert script_run[0] == 1, script_run
    assert "unknown site" in script_run[1]
    assert "stopped at line 3" in script_run[2]
    assert kept_going[0] == 1, kept_going
    assert len(kept_going[1].splitlines()) == 3
    assert unknown[0] == 2, unknown
    assert "unknown command" in unknown[2]
    assert (asked[0], yes[0]) == (2, 0)
    assert "--yes" in asked[2]
    assert nobody[0] == 2
    assert "--password-file" in nobody[2]
    assert gone[0] == 4
    assert control.calls == [("stop", False)]


def test_the_console_tries_every_server_address(federation, control):
    async def main():
        async with serving(federation, control) as port:
            text = f'servers: ["localhost:1", "localhost:{port.server.port}"]'
            federation.local("amy", "overrides.yml", text)
            async with signed_in(port) as amy:
                assert amy.address == f"localhost:{port.server.port}"
                assert (await execute(amy, "list_runs"))[-1]["exit_code"] == 0

    asyncio.run(main())


def at_a_terminal(federation: Federation) -> str:
    console = pexpect.spawn(
        sys.executable,
        ["-P", "-m", "flplatform.entrypoints.admin", str(federation.kit("amy"))],
        dimensions=(40, 120),
        timeout=60,
        encoding="utf8",
        env={**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
    )
    screen = io.StringIO()
    console.logfile_read = screen
    for expected, typed in (
        ("passphrase of amy", "wrong"),
        ("the passphrase is wrong", federation.passphrase("amy")),
        ("signed in as amy  project_admin of hub", ""),
        ("fl:heart  run 3 training r7/20  0/2 sites >", "check_status client site-1"),
        ("1 ok", "abort"),
        ("1 site training. Continue", "n"),
        ("nothing was done", "bye"),
    ):
        console.expect(expected)
        if typed:
            console.sendline(typed)
    console.expect(pexpect.EOF)
    console.close()
    assert console.exitstatus == 0
    return screen.getvalue()


def test_fl_admin_at_a_terminal(federation, control):
    control.run_views = {3: run(3)}

    async def main():
        async with serving(federation, control):
            return await asyncio.to_thread(at_a_terminal, federation)

    screen = asyncio.run(main())
    assert federation.passphrase("amy") not in screen
    assert "certificate valid 36" in screen
    assert control.calls == []
    history = federation.kit("amy") / "state" / "history"
    assert history.stat().st_mode & 0o777 == 0o600
    assert "check_status client site-1" in history.read_text()


def test_a_session_sets_how_long_sites_may_take(federation, control):
    control.replies = {}

    async def main():
        async with (
            serving(federation, control) as port,
            signed_in(port) as amy,
            signed_in(port, "lea") as lea,
        ):
            await execute(amy, "set_timeout", "30")
            replies = [await execute(who, "check_status", "all") for who in (amy, lea)]
            return [
                {item["detail"] for item in items if item["type"] == "row"} for items in replies
            ]

    assert asyncio.run(main()) == [{"", "after 30.0 s"}, {"", "after 2.0 s"}]
