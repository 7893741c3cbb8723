"""Denials on the server: in force at once, in the log, and carried to every site in time."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from flplatform.core.errors import PermissionDeniedError, UnauthenticatedError
from flplatform.rpc.v1 import federated_pb2 as pb
from flplatform.security.denials import Denials, open_denial
from flplatform.security.signing import DenialOrder, sign_order
from flplatform.server.client_manager import ClientManager
from flplatform.server.denials import TOPIC, DenialDesk
from flplatform.server.ledger import Ledger
from flplatform.server.relay import RequestRelay
from flplatform.server.server import Trust
from tests.support.federation import provision
from tests.support.stores import MemoryStateStore

ADMINS = {"amy": "project_admin", "ola": "org_admin@a", "mia": "member@b"}


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    folder = tmp_path_factory.mktemp("denials")
    return provision(folder, {"site-1": "a", "site-2": "b"}, ADMINS)


@pytest.fixture
def order(people):
    def make(name, kind="site", who="amy", age_s=0.0, undo=False) -> bytes:
        issued = datetime.now(UTC) - timedelta(seconds=age_s)
        denial = DenialOrder(
            project="test",
            issued_at=issued,
            not_after=issued + timedelta(seconds=60),
            name=name,
            kind=kind,
            undo=undo,
        )
        return sign_order(denial, people.key(who), people.open(who).chain).to_bytes()

    return make


class Runs:
    """Keeps what would be in the log."""

    def __init__(self, clients):
        self.clients = clients
        self.words = []
        self.changed = []
        self.full = False

    async def deny(self, word):
        if self.full:
            raise OSError("full")
        self.words.append(word)
        self.clients.denials.add(word)

    def site_changed(self, site):
        self.changed.append(site)


@pytest.fixture
def desk(people):
    """Make a desk with two registered sites; only inside an event loop."""

    def make():
        clients = ClientManager(10, 60.0, lambda: 0.0, lambda _: None)
        relay = RequestRelay()
        for name in ("site-1", "site-2"):
            clients.register(people.open(name).identity, "peer")
        trust = Trust(people.open("server"), clients.denials)
        found = DenialDesk(trust, Runs(clients), clients, relay)
        found.trust = trust
        return found

    return make


def test_a_denied_site_is_shut_out_at_once(desk, order, people):
    async def main():
        mine = desk()
        certificate = people.open("site-2").chain
        mine.trust.identify("site", certificate)
        assert await mine.deny(order("site-2"), "amy") == ("site", "site-2", False)
        with pytest.raises(PermissionDeniedError, match="revoked by amy") as caught:
            mine.trust.identify("site", certificate)
        assert caught.value.rule == "revoked"
        clients = mine._clients
        assert clients.get("site-2") is None
        assert clients.barred() == {"site-2"}
        assert clients.roster().disabled == {"site-2"}
        assert mine._runs.changed == ["site-2"]
        with pytest.raises(PermissionDeniedError):
            mine.demand_site("site-2")
        mine.demand_site("site-1")
        await mine.deny(order("site-2", undo=True), "amy")
        mine.trust.identify("site", certificate)
        assert clients.barred() == frozenset()

    asyncio.run(main())


def test_an_org_admin_s_word_ends_at_the_organisation(desk, order, people):
    async def main():
        mine = desk()
        await mine.deny(order("site-2", who="ola"), "ola")  # of organisation b
        mine.trust.identify("site", people.open("site-2").chain)
        assert mine._clients.barred() == frozenset()
        await mine.deny(order("site-1", who="ola"), "ola")
        assert mine._clients.barred() == {"site-1"}
        assert [(view.name, view.organisation) for view in mine.denials()] == [
            ("site-2", "a"),
            ("site-1", "a"),
        ]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("fields", "session", "rule"),
    [
        ({}, "ola", "own order"),
        ({"age_s": 200.0}, "amy", "not after"),
        ({"who": "mia"}, "mia", "revoke: project_admin or org_admin"),
        ({"who": "ola", "undo": True}, "ola", "undo a revocation: project_admin"),
    ],
)
def test_what_is_refused_changes_nothing(desk, order, fields, session, rule):
    async def main():
        mine = desk()
        with pytest.raises(PermissionDeniedError) as caught:
            await mine.deny(order("site-2", **fields), session)
        assert caught.value.rule == rule
        assert mine._runs.words == []
        assert mine.denials() == []

    asyncio.run(main())


def test_what_cannot_be_stored_is_not_in_force(desk, order):
    async def main():
        mine = desk()
        mine._runs.full = True
        with pytest.raises(OSError, match="full"):
            await mine.deny(order("site-2"), "amy")
        assert mine._clients.barred() == frozenset()
        assert mine._clients.get("site-2") is not None

    asyncio.run(main())


def test_every_site_gets_all_denials_and_says_whether_it_took_them(desk, order):
    async def main():
        mine = desk()
        relay = mine._relay
        assert await mine.carry(["site-1"], 0.1)  # nothing to carry
        await mine.deny(order("mia", "admin"), "amy")

        async def answer(body: bytes) -> None:
            (request,) = await relay.retrieve("site-1", [], 5)
            assert request.topic == TOPIC
            relay.reply("site-1", pb.SiteReply(request_id=request.id, status="ok", body=body))

        task = asyncio.create_task(answer(b'{"news": 1, "refused": []}'))
        replies = await mine.carry(["site-1", "site-2"], 2.0)
        await task
        assert replies["site-1"].status == "ok"
        assert replies["site-2"].status == "no_reply"
        # Who was silent still has it in the outbox, once, however often it is sent again.
        mine.send("site-2")
        await asyncio.sleep(0)  # the one before is taken back
        assert len(await relay.retrieve("site-2", [], 1)) == 1
        task = asyncio.create_task(answer(b'{"refused": [{"rule": "signature"}]}'))
        assert (await mine.carry(["site-1"], 60))["site-1"].status == "refused"
        await task

    asyncio.run(main())


def test_denials_are_read_from_the_log_after_a_restart(people, order):
    async def main():
        store, denials = MemoryStateStore(), Denials()
        trust = people.open("server").trust
        ledger = Ledger(store, set(), denials)
        ledger.read()
        for signed in (order("site-2"), order("mia", "admin"), order("site-2", undo=True)):
            word = open_denial(signed, trust, datetime.now(UTC), denials, fresh=True)
            await ledger.deny(word)
        again = Denials()
        Ledger(store, set(), again).read()
        assert again.words() == denials.words()
        assert [word.name for word in again.in_force()] == ["mia"]

    asyncio.run(main())


def test_a_denied_admin_is_nobody_to_the_server(people, order):
    async def main():
        denials = Denials()
        trust = Trust(people.open("server"), denials)
        trust.identify("admin", people.open("mia").chain)
        denials.add(
            open_denial(order("mia", "admin"), trust.store, datetime.now(UTC), denials, fresh=True)
        )
        with pytest.raises(PermissionDeniedError):
            trust.identify("admin", people.open("mia").chain)
        with pytest.raises(UnauthenticatedError):
            trust.identify("admin", people.open("site-1").chain)

    asyncio.run(main())
