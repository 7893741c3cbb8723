from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from flplatform.admin.modules.certificates import CertificatesModule
from flplatform.admin.users import KnownUser
from flplatform.hci import AdminServer, CommandRegister
from tests.support.control import site
from tests.unit.admin.conftest import Console


@pytest.fixture
def console(control, tmp_path, federation, trust):
    console = Console(control, tmp_path / "policy.yml")
    ends = (datetime.now(UTC) + timedelta(days=40)).isoformat()
    users = [KnownUser(name="lea", password_hash="", role="lead", not_after=ends)]
    module = CertificatesModule(
        control, SimpleNamespace(users=lambda: users), federation.open("server"), trust
    )
    console.register = CommandRegister([module])
    console.server = AdminServer(console.register, console.rights, console)
    return console


def test_every_certificate_is_there_the_next_end_first(console, control):
    now = datetime.now(UTC)
    control.site_views = [site("a"), site("b", state="away"), site("c", state="away")]
    control.access.certificates = {"a": now + timedelta(days=12), "b": now - timedelta(days=1)}
    reply = console("certs")
    found = reply.data("certificates")
    days = [each["left_days"] for each in found if each["left_days"] is not None]
    assert days == sorted(days)
    assert [each["name"] for each in found[:3]] == ["b", "a", "lea"]
    by = {(each["kind"], each["name"]): each for each in found}
    assert (by["site", "b"]["state"], by["site", "b"]["source"]) == ("ended", "last seen")
    assert (by["site", "a"]["state"], by["site", "a"]["source"]) == ("ends soon", "live")
    assert by["lead", "lea"]["state"] == "ok"
    assert found[-1] == {
        "name": "c",
        "kind": "site",
        "organisation": "c",
        "left_days": None,
        "ends_at": None,
        "source": "not seen yet",
        "state": "unknown",
    }
    kinds = {each["kind"] for each in found}
    assert kinds == {
        *("server", "site", "lead", "root", "revocation list"),
        *("server issuer", "site issuer", "admin issuer"),
    }
    assert "2 of" in reply.text
    assert len(reply.table["rows"]) == len(found)
