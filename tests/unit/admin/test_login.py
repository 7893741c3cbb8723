import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from flplatform.admin.login import NONCE_S, Challenges, LoginDesk
from flplatform.core.config import ServerLimits
from flplatform.core.errors import ConfigError, UnauthenticatedError, UnavailableError
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


def test_a_disk_that_cannot_count_lets_nobody_in(world, monkeypatch):
    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("flplatform.admin.login.write_atomic", full)
    with pytest.raises(UnavailableError, match="disk"):
        asyncio.run(world.login())


@pytest.mark.parametrize("text", ["[", "[]", '{"f": 1}'])
def test_a_damaged_memory_of_attempts_stops_the_start(text, tmp_path, federation, trust):
    (tmp_path / "login_attempts.json").write_text(text)
    with pytest.raises(ConfigError, match="login_attempts"):
        World(tmp_path, federation, trust)


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
