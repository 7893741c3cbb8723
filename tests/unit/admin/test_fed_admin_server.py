import asyncio
import dataclasses
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from flplatform.admin.fed_admin_server import FedAdminServer
from flplatform.core.errors import ConfigError, UnavailableError
from flplatform.hci import CommandSpec, NoArguments


@pytest.fixture
def own(federation, tmp_path):
    folder = shutil.copytree(federation.folder, tmp_path / "federation" / "test")
    return dataclasses.replace(federation, folder=folder)


def make(federation, control, **more) -> FedAdminServer:
    kit = federation.open("server")
    return FedAdminServer(
        kit,
        control,
        blobs=None,
        audit=None,
        trust=SimpleNamespace(store=kit.trust),
        workers=ThreadPoolExecutor(1),
        note_refusal=lambda *_: None,
        **more,
    )


def test_a_policy_that_names_no_command_stops_the_start(own, control):
    own.local("server", "policy.yml", "roles: {member: {sys_inf: any}}")
    with pytest.raises(ConfigError, match=r"local/policy\.yml.*sys_inf"):
        make(own, control)


def test_a_policy_may_name_every_command_of_the_console(own, control):
    own.local("server", "policy.yml", "roles: {member: {sys_info: any, whoami: any}}")
    make(own, control)


async def nothing(connection, args):
    pass


def command(name: str = "a", permission: str = "view") -> CommandSpec:
    return CommandSpec(name, "summary", NoArguments, nothing, permission, False, (name,))


def module(*specs: CommandSpec):
    """What makes a module of a package."""
    return lambda parts: SimpleNamespace(name="more", summary="x", commands=lambda: specs)


def no_disk(parts):
    raise OSError("no disk")


def test_a_package_adds_commands_that_the_policy_may_name(own, control):
    own.local("server", "policy.yml", "roles: {member: {round_times: any}}")
    server = make(own, control, more={"x of y 1": module(command("round_times"))})
    assert server._console.register.view("round_times").module == "more"


@pytest.mark.parametrize(
    ("factory", "complaint"),
    [
        (no_disk, "OSError: no disk"),
        (lambda parts: 3, "'int' object has no attribute 'commands'"),
        (module(), "it has no commands"),
        (module(command(permission="")), "command a: permission '' is not one of train"),
        (module(command(permission="session")), "command a: permission 'session' is not one of"),
        (module(command(name="abort")), "command abort: the name abort is taken"),
        (module(command(name="help")), "command help: the name help is taken"),
    ],
)
def test_a_package_that_is_wrong_stops_the_start_and_is_named(own, control, factory, complaint):
    with pytest.raises(ConfigError) as raised:
        make(own, control, more={"x of y 1": factory})
    assert raised.value.message.startswith("command module x of y 1: ")
    assert complaint in raised.value.message
    assert "command_modules in local/resources.yml" in raised.value.hint


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
