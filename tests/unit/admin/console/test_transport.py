import asyncio

import pytest

from flplatform.admin.console.transport import Credentials, GrpcTransport, _item
from flplatform.core.errors import ConfigError, InvalidArgumentError, UnauthenticatedError
from flplatform.security.authn import password_of


def test_credentials_are_key_and_password_of_one_passphrase(federation):
    kit, passphrase = federation.open("amy"), federation.passphrase("amy")
    credentials = Credentials.open(kit, passphrase)
    assert credentials.password == password_of(passphrase, "test", "amy")
    assert passphrase not in credentials.password
    assert b"BEGIN PRIVATE KEY" in credentials.key_pem()
    with pytest.raises(UnauthenticatedError, match="passphrase is wrong"):
        Credentials.open(kit, "wrong")
    with pytest.raises(ConfigError, match="not of an admin"):
        Credentials.open(federation.open("site-1"), passphrase)


def test_before_anything_is_known(credentials):
    transport = GrpcTransport(credentials)
    assert transport.prompt() == "fl:test > "
    assert transport.toolbar() == ""
    assert transport.specs() == []
    asyncio.run(transport.close())


def test_looks_do_not_repeat_a_sign_in_that_was_refused(credentials, monkeypatch):
    transport, tries = GrpcTransport(credentials), []

    async def refuse(address: str) -> None:
        tries.append(address)
        raise UnauthenticatedError("sign-in refused")

    async def look() -> None:
        for _ in range(3):
            await transport.refresh()
        with pytest.raises(UnauthenticatedError):  # a command tries
            await transport.connect()

    monkeypatch.setattr(transport, "_sign_in_at", refuse)
    asyncio.run(look())
    assert len(tries) == 2
    assert transport.prompt() == "fl:test  signed out > "
    assert transport.toolbar() == "sign-in refused"


@pytest.mark.parametrize("data", [b"[]", b'"x"', b"{}"])
def test_what_is_no_reply_item(data):
    with pytest.raises(InvalidArgumentError):
        _item(data)
