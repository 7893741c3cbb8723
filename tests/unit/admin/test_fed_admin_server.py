import asyncio
import dataclasses
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from flplatform.admin.fed_admin_server import FedAdminServer
from flplatform.core.errors import ConfigError, UnavailableError


@pytest.fixture
def own(federation, tmp_path):
    folder = shutil.copytree(federation.folder, tmp_path / "federation" / "test")
    return dataclasses.replace(federation, folder=folder)


def make(federation, control) -> FedAdminServer:
    kit = federation.open("server")
    return FedAdminServer(
        kit,
        control,
        blobs=None,
        audit=None,
        trust=SimpleNamespace(store=kit.trust),
        workers=ThreadPoolExecutor(1),
        note_refusal=lambda *_: None,
    )


def test_a_policy_that_names_no_command_stops_the_start(own, control):
    own.local("server", "policy.yml", "roles: {member: {sys_inf: any}}")
    with pytest.raises(ConfigError, match=r"local/policy\.yml.*sys_inf"):
        make(own, control)


def test_a_policy_may_name_every_command_of_the_console(own, control):
    own.local("server", "policy.yml", "roles: {member: {sys_info: any, whoami: any}}")
    make(own, control)


def test_a_port_that_is_taken_is_named(own, control):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        own.local("server", "overrides.yml", f"admin_address: {address}")

        async def main():
            server = make(own, control)
            with pytest.raises(UnavailableError, match=address):
                await server.start()
            await server.stop()

        asyncio.run(main())
