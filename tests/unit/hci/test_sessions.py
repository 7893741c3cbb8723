import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flplatform.core.errors import InvalidArgumentError, UnauthenticatedError
from flplatform.hci.sessions import LoginThrottle, Sessions, login_refused


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def closed() -> list[str]:
    return []


@pytest.fixture
def sessions(clock, closed) -> Sessions:
    return Sessions(
        idle_s=100,
        absolute_s=250,
        max_per_user=2,
        clock=clock,
        on_close=lambda s: closed.append(s.id),
    )


def opened(sessions: Sessions, user: str = "amy", fingerprint: str = "f0") -> str:
    token, _ = sessions.open(
        user=user, role="lead", organisation="a", peer="p", fingerprint=fingerprint
    )
    return token


def test_a_token_opens_its_session(sessions, clock):
    token, session = sessions.open(
        user="amy", role="lead", organisation="a", peer="p", fingerprint="f0"
    )
    clock.now += 5
    assert sessions.get(token, "f0") is session
    assert (session.user, session.created, session.last_used) == ("amy", 1000.0, 1005.0)
    assert token not in repr(session)
    assert token not in repr(vars(sessions))


def test_another_certificate_does_not_open_it_and_does_not_end_it(sessions):
    token = opened(sessions)
    with pytest.raises(UnauthenticatedError):
        sessions.get(token, "f1")
    assert sessions.get(token, "f0")


@pytest.mark.parametrize("token", ["", "x", "\udc80"])
def test_an_unknown_token(sessions, token):
    with pytest.raises(UnauthenticatedError, match="sign in again"):
        sessions.get(token, "f0")


def test_idle_limit_counts_from_the_last_use(sessions, clock, closed):
    token = opened(sessions)
    clock.now += 99
    sessions.get(token, "f0")
    clock.now += 99
    session = sessions.get(token, "f0")
    clock.now += 100
    with pytest.raises(UnauthenticatedError):
        sessions.get(token, "f0")
    assert closed == [session.id]


def test_absolute_limit_holds_whatever_the_use(sessions, clock):
    token = opened(sessions)
    for _ in range(4):
        clock.now += 60
        sessions.get(token, "f0")
    clock.now += 10
    with pytest.raises(UnauthenticatedError):
        sessions.get(token, "f0")


def test_a_closed_session_never_comes_back(sessions, closed):
    token = opened(sessions)
    session = sessions.get(token, "f0")
    assert sessions.close(session.id)
    assert not sessions.close(session.id)
    assert closed == [session.id]
    with pytest.raises(UnauthenticatedError):
        sessions.get(token, "f0")


def test_close_user_ends_all_of_one_user(sessions):
    amy, other = opened(sessions), opened(sessions)
    ben = opened(sessions, "ben")
    assert sessions.close_user("amy") == 2
    for token in (amy, other):
        with pytest.raises(UnauthenticatedError):
            sessions.get(token, "f0")
    assert [s.user for s in sessions.live()] == ["ben"]
    assert sessions.get(ben, "f0")


def test_the_oldest_session_of_a_user_makes_room(sessions):
    ben = opened(sessions, "ben")
    first, second, third = (opened(sessions) for _ in range(3))
    with pytest.raises(UnauthenticatedError):
        sessions.get(first, "f0")
    assert all(sessions.get(token, "f0") for token in (second, third, ben))


def test_live_drops_the_expired(sessions, clock, closed):
    opened(sessions)
    clock.now += 100
    assert sessions.live() == []
    assert len(closed) == 1


def throttle(clock: Clock) -> LoginThrottle:
    return LoginThrottle(limit=5, window_s=900, clock=clock)


def locked(guard: LoginThrottle, user: str = "amy", fingerprint: str = "f0") -> bool:
    try:
        guard.attempt(user, fingerprint)
    except UnauthenticatedError as error:
        return str(error) == str(login_refused())
    return False


def test_five_failures_lock_until_they_are_old(clock):
    guard = throttle(clock)
    assert [locked(guard) for _ in range(6)] == [False] * 5 + [True]
    clock.now += 899
    assert locked(guard)
    clock.now += 1
    assert not locked(guard)


def test_success_forgets(clock):
    guard = throttle(clock)
    for _ in range(20):
        assert not locked(guard)
        guard.succeeded("amy", "f0")
    assert guard.dump() == {}


@pytest.mark.parametrize("peer", ["", "10.0.0.1:7"])
def test_what_is_taken_back_leaves_all_as_it_was(clock, peer):
    guard = throttle(clock)
    for user in ("amy", "bob"):
        guard.attempt(user, "f0", peer)
    clock.now += 1
    before = guard.dump()
    for user in ("amy", "bob", "amy"):
        guard.attempt(user, "f0", peer)
        guard.take_back(user, "f0", peer)
        assert guard.dump() == before
    guard.take_back("eve", "f0", peer)
    assert guard.dump() == before


def test_a_lock_is_of_one_certificate_and_one_user(clock):
    guard = throttle(clock)
    for _ in range(6):
        locked(guard)
    assert locked(guard)
    assert not locked(guard, fingerprint="f1")
    assert not locked(guard, user="ben")


def test_trying_many_users_locks_the_certificate_and_bounds_the_state(clock):
    guard = throttle(clock)
    assert [locked(guard, f"user{i}") for i in range(100)] == [False] * 20 + [True] * 80
    assert not locked(guard, "user0", "f1")
    assert sum(map(len, guard.dump().values())) == 21


def test_the_lock_survives_a_restart(clock):
    guard = throttle(clock)
    for _ in range(5):
        locked(guard)
    again = throttle(clock)
    again.load(json.loads(json.dumps(guard.dump())))
    assert locked(again)
    clock.now += 900
    assert again.dump() == {}


def test_a_clock_set_back_does_not_lengthen_a_lock(clock):
    guard = throttle(clock)
    for _ in range(5):
        locked(guard)
    clock.now = 10.0
    assert locked(guard)
    clock.now += 900
    assert not locked(guard)


@pytest.mark.parametrize("state", [[], {"f0": 3}, {"f0": [["x", "amy"]]}, {"f0": [[1.0]]}])
def test_a_damaged_state_is_refused(clock, state):
    with pytest.raises(InvalidArgumentError, match="failed sign-ins"):
        throttle(clock).load(state)


@given(st.lists(st.tuples(st.sampled_from(["amy", "ben"]), st.floats(0, 500)), max_size=60))
def test_never_more_than_the_limit_in_any_window(attempts):
    clock = Clock()
    guard = throttle(clock)
    passed: list[tuple[str, float]] = []
    for user, pause in attempts:
        clock.now += pause
        if not locked(guard, user):
            passed.append((user, clock.now))
    for user, when in passed:
        assert sum(u == user and 0 <= when - t < 900 for u, t in passed) <= 5


def test_an_address_waits_longer_after_each_failure_beyond_what_one_certificate_can_cause():
    clock = Clock()
    guard = throttle(clock)
    peer = "ipv4:10.0.0.1:5000"
    for number in range(40):  # of several certificates, each within its own limit
        guard.attempt(f"user-{number}", f"f{number}", f"ipv4:10.0.0.1:{number + 1000}")
    with pytest.raises(UnauthenticatedError):
        guard.attempt("amy", "fresh", peer)
    guard.attempt("amy", "fresh", "ipv4:10.0.0.2:5000")  # elsewhere nobody waits
    clock.now += 1.0
    guard.attempt("amy", "other", peer)
    clock.now += 1.0
    with pytest.raises(UnauthenticatedError):
        guard.attempt("amy", "third", peer)
    clock.now += 1.0
    guard.attempt("amy", "third", peer)
    guard.succeeded("amy", "third", peer)
    again = throttle(clock)
    again.load(json.loads(json.dumps(guard.dump())))
    again.attempt("amy", "fourth", peer)
    with pytest.raises(UnauthenticatedError):  # a restart forgets nothing
        again.attempt("amy", "fifth", peer)


def test_one_certificate_never_slows_down_its_neighbours():
    clock = Clock()
    guard = throttle(clock)
    for number in range(100):
        try:
            guard.attempt(f"user-{number}", "bad", "ipv4:10.0.0.1:1")
        except UnauthenticatedError:
            break
    guard.attempt("amy", "good", "ipv4:10.0.0.1:2")


def test_sessions_of_a_user_end_but_for_one(sessions, clock):
    mine, other = [opened(sessions), opened(sessions)], opened(sessions, "ben")
    kept = sessions.get(mine[1], "f0")
    assert sessions.close_user("amy", keep=kept.id) == 1
    assert [each.user for each in sessions.live()] == ["amy", "ben"]
    assert sessions.get(other, "f0").user == "ben"
    clock.now += 30
    assert sessions.expires_s(kept) == 70.0
    assert kept.proved == 1000.0
