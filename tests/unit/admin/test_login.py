import asyncio
import errno
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from flplatform.admin.login import NONCE_S, Challenges, LoginDesk
from flplatform.core.config import ServerLimits
from flplatform.core.errors import UnauthenticatedError, UnavailableError
from flplatform.hci import Sessions
from flplatform.rpc.interceptors import Caller
from flplatform.security.authn import password_of


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_nonce_is_good_for_one_login_of_one_certificate():
    challenges = Challenges(Clock())
    nonce = challenges.make("f1")
    assert len(nonce) == 32
    for other in (b"", b"x" * 32, nonce[:-1]):
        with pytest.raises(UnauthenticatedError):
            challenges.use(other, "f1")
    with pytest.raises(UnauthenticatedError):
        challenges.use(nonce, "f2")
    challenges.use(nonce, "f1")
    with pytest.raises(UnauthenticatedError) as caught:
        challenges.use(nonce, "f1")
    assert caught.value.rule == "challenge"


def test_a_nonce_expires():
    clock = Clock()
    challenges = Challenges(clock)
    early, late = challenges.make("f"), challenges.make("f")
    clock.now += NONCE_S
    challenges.use(early, "f")
    clock.now += 0.1
    with pytest.raises(UnauthenticatedError):
        challenges.use(late, "f")


def test_open_challenges_are_bounded_per_certificate():
    challenges = Challenges(Clock())
    mine = challenges.make("mine")
    nonces = [challenges.make("f") for _ in range(5)]
    with pytest.raises(UnauthenticatedError):
        challenges.use(nonces[0], "f")
    challenges.use(nonces[1], "f")
    challenges.use(mine, "mine")


class Audit:
    def __init__(self) -> None:
        self.records: list[tuple] = []
        self.broken = False

    def record(self, actor, action, decision, *, reason="", **_) -> None:
        if self.broken:
            raise OSError("disk full")
        self.records.append((actor["name"], actor["peer"], action, decision, reason))


class World:
    """A desk, and a user in front of it."""

    def __init__(self, folder, federation, trust, name="amy", **limits) -> None:
        self.kit = federation.open(name)
        self.password = password_of(federation.passphrase(name), "test", name)
        self.caller = Caller(self.kit.identity, "10.0.0.1")
        self.audit = Audit()
        self.sessions = Sessions()
        self.folder = folder
        self.desk = LoginDesk(
            folder=folder,
            limits=ServerLimits(login_attempts=2, **limits),
            trust=trust,
            sessions=self.sessions,
            audit=self.audit,
            workers=ThreadPoolExecutor(1),
        )

    async def login(self, password: str = "", nonce: bytes | None = None):
        record = self.kit.user_record()
        if nonce is None:
            nonce = self.desk.challenges.make(self.kit.identity.fingerprint)
        return await self.desk.login(
            self.caller,
            nonce,
            password or self.password,
            record.payload,
            record.to_detached(),
        )


@pytest.fixture
def world(tmp_path, federation, trust):
    return World(tmp_path, federation, trust)


def refused(world: World, **options) -> UnauthenticatedError:
    with pytest.raises(UnauthenticatedError) as caught:
        asyncio.run(world.login(**options))
    return caught.value


def test_who_proves_everything_gets_a_session(world):
    token, session = asyncio.run(world.login())
    assert world.sessions.get(token, world.kit.identity.fingerprint) is session
    assert (session.user, session.role, session.organisation) == ("amy", "project_admin", "hub")
    assert session.peer == "10.0.0.1"
    assert world.audit.records == [("amy", "10.0.0.1", "login", "allowed", "")]


def test_a_wrong_password_is_counted_and_audited(world):
    assert refused(world, password="wrong").message == "sign-in refused"
    assert world.audit.records == [("amy", "10.0.0.1", "login", "denied", "sign-in refused")]
    assert world.sessions.live() == []


def test_a_replayed_nonce_is_refused(world):
    nonce = world.desk.challenges.make(world.kit.identity.fingerprint)
    asyncio.run(world.login(nonce=nonce))
    assert refused(world, nonce=nonce).rule == "challenge"
    assert refused(world, nonce=b"").rule == "challenge"
    assert [record[3] for record in world.audit.records] == ["allowed", "denied", "denied"]


def test_after_too_many_failures_even_the_right_password_is_refused(
    world, tmp_path, federation, trust
):
    wrong = [refused(world, password="wrong") for _ in range(2)]
    locked = refused(world)
    assert {str(locked)} == {str(each) for each in wrong}
    again = World(tmp_path, federation, trust)  # a restart forgets nothing
    assert refused(again).message == "sign-in refused"
    other = World(tmp_path, federation, trust, "lea")  # and locks nobody else
    assert asyncio.run(other.login())[1].user == "lea"


def test_success_forgives(world):
    for _ in range(3):
        refused(world, password="wrong")
        asyncio.run(world.login())
    assert json.loads((world.folder / "login_attempts.json").read_text()) == {}


def test_without_audit_nobody_gets_in(world):
    world.audit.broken = True
    with pytest.raises(UnavailableError):
        asyncio.run(world.login())
    assert world.sessions.live() == []
    assert refused(world, password="wrong").message == "sign-in refused"


def full(*_) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def broken(*_) -> None:
    raise OSError(errno.EIO, "Input/output error")


async def open_session(world: World):
    return (await world.login())[1]


WAYS = {
    "login": lambda world, _, password: world.login(password=password),
    "prove again": lambda world, session, password: world.desk.prove_again(
        session, world.kit.identity, password or world.password
    ),
    "change": lambda world, session, password: world.desk.change_password(
        session, world.kit.identity, password or world.password, "new"
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wrong", ["", "wrong"])
def test_a_full_disk_neither_locks_out_nor_looks_at_a_password(
    world, monkeypatch, caplog, way, wrong
):
    """Who fills the disk learns nothing by guessing; the right user comes in as soon as it can."""
    session = asyncio.run(open_session(world))
    with monkeypatch.context() as patch:
        patch.setattr("flplatform.admin.login.write_atomic", full)
        for method in ("check", "begin_change"):
            patch.setattr(world.desk.users, method, lambda *_: pytest.fail("it was looked at"))
        for _ in range(10):
            with pytest.raises(UnavailableError, match="disk is full") as caught:
                asyncio.run(WAYS[way](world, session, wrong))
            assert "free space on the disk of the server" in caught.value.hint
    assert "forgiven" not in caplog.text
    asyncio.run(WAYS[way](world, session, ""))


@pytest.mark.parametrize("way", WAYS)
def test_earlier_failures_stay_counted_on_a_full_disk(world, monkeypatch, way):
    session = asyncio.run(open_session(world))
    with pytest.raises(UnauthenticatedError):
        asyncio.run(WAYS[way](world, session, "wrong"))
    with monkeypatch.context() as patch:
        patch.setattr("flplatform.admin.login.write_atomic", full)
        for _ in range(3):
            with pytest.raises(UnavailableError):
                asyncio.run(WAYS[way](world, session, "wrong"))
    with pytest.raises(UnauthenticatedError):
        asyncio.run(WAYS[way](world, session, "wrong"))
    with pytest.raises(UnauthenticatedError):  # the limit is two
        asyncio.run(WAYS[way](world, session, ""))


@pytest.mark.parametrize("way", WAYS)
def test_guesses_are_counted_whatever_the_audit_says(world, monkeypatch, way):
    """The disk takes the attempt, but not the record: a right password costs no attempt."""
    session = asyncio.run(open_session(world))
    world.audit.broken = True
    for _ in range(3):
        with pytest.raises(UnavailableError):
            asyncio.run(WAYS[way](world, session, ""))
    assert json.loads((world.folder / "login_attempts.json").read_text()) == {}
    for _ in range(2):
        with pytest.raises(UnauthenticatedError):
            asyncio.run(WAYS[way](world, session, "wrong"))
    with pytest.raises(UnauthenticatedError):
        asyncio.run(WAYS[way](world, session, ""))


def test_a_user_who_cannot_be_stored_is_not_locked_out(world, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("flplatform.admin.users.write_atomic", full)
        for _ in range(3):
            with pytest.raises(UnavailableError, match="full"):
                asyncio.run(world.login())
    assert asyncio.run(world.login())[1].user == "amy"


def test_a_disk_that_fails_otherwise_lets_nobody_in(world, monkeypatch):
    monkeypatch.setattr("flplatform.admin.login.write_atomic", broken)
    with pytest.raises(UnavailableError, match="disk") as caught:
        asyncio.run(world.login())
    assert "space" not in str(caught.value)


def test_what_was_right_counts_as_that_though_it_cannot_be_forgiven_on_the_disk(
    world, monkeypatch, caplog
):
    real, saves = world.desk._save, []

    async def save_once():
        saves.append(1)
        await real() if len(saves) == 1 else full()

    monkeypatch.setattr(world.desk, "_save", save_once)
    assert asyncio.run(world.login())[1].user == "amy"
    assert "forgiven" in caplog.text


@pytest.mark.parametrize("text", ["[", "[]", '{"f": 1}', "", "\x00\x00"])
def test_a_damaged_memory_of_attempts_is_begun_anew(text, tmp_path, federation, trust, caplog):
    path = tmp_path / "login_attempts.json"
    path.write_text(text)
    world = World(tmp_path, federation, trust)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"{path} is damaged and made anew" in record.getMessage()
    refused(world, password="wrong")
    (failures,) = json.loads(path.read_text()).values()
    assert len(failures) == 1


def test_logins_at_the_same_time_take_turns(world):
    async def at_once(password: str):
        return await asyncio.gather(
            *(world.login(password=password) for _ in range(4)), return_exceptions=True
        )

    async def main():
        return await at_once(world.password), await at_once("wrong")

    sessions, refusals = asyncio.run(main())
    assert len({session.id for _, session in sessions}) == 4
    assert {type(refusal) for refusal in refusals} == {UnauthenticatedError}
    (failures,) = json.loads((world.folder / "login_attempts.json").read_text()).values()
    assert len(failures) == 2
