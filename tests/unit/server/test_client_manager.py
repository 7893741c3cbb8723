from collections.abc import Sequence

import pytest

from flplatform.core.errors import NotFoundError, ResourceExhaustedError, UnauthenticatedError
from flplatform.rpc.errors import REPLACED_TOKEN
from flplatform.server.client_manager import ClientManager, RunReport
from tests.unit.server.scene import Clock, identity

DAY_S = 86_400.0


class Scene:
    def __init__(self, max_clients: int = 3) -> None:
        self.clock = Clock()
        self.changes: list[list[str]] = []
        self.clients = ClientManager(max_clients, 60.0, self.clock, self._changed)

    def _changed(self, names: Sequence[str]) -> None:
        self.changes.append(list(names))

    def register(self, name: str, fingerprint: str = "") -> str:
        return self.clients.register(identity(name, fingerprint=fingerprint), "peer", "1.0", "none")

    def holds(self, name: str, token: str, fingerprint: str = "") -> bool:
        try:
            self.clients.check_token(identity(name, fingerprint=fingerprint), token)
        except UnauthenticatedError:
            return False
        return True


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_a_registered_site_is_live(scene: Scene) -> None:
    token = scene.register("a")
    assert scene.holds("a", token)
    assert scene.clients.live() == scene.clients.roster().usable == {"a"}
    assert scene.changes == [["a"]]
    (client,) = scene.clients.clients()
    assert (client.name, client.version, client.isolation) == ("a", "1.0", "none")
    assert scene.clients.get("b") is None


def test_registering_again_keeps_the_one_place(scene: Scene) -> None:
    first = scene.register("a")
    for _ in range(10):
        second = scene.register("a")
    assert not scene.holds("a", first)
    assert scene.holds("a", second)
    assert len(scene.clients.clients()) == 1
    assert scene.changes == [["a"]], "it came once"


def test_tokens_are_long_and_never_alike(scene: Scene) -> None:
    tokens = {scene.register("a") for _ in range(1000)}
    assert len(tokens) == 1000
    assert min(map(len, tokens)) >= 43, "256 bits, six to a character"


@pytest.mark.parametrize("token", ["", "x", "é", "A" * 43])
def test_no_other_token_holds(scene: Scene, token: str) -> None:
    scene.register("a")
    assert not scene.holds("a", token)
    assert not scene.holds("b", token)


def test_a_token_is_its_certificates(scene: Scene) -> None:
    token = scene.register("a")
    scene.register("b")
    assert not scene.holds("b", token)
    assert not scene.holds("a", token, fingerprint="of a renewed certificate")
    assert scene.holds("a", token)


def test_a_token_lives_for_a_day_after_the_last_heartbeat(scene: Scene) -> None:
    token = scene.register("a")
    scene.clock.now += DAY_S
    assert scene.holds("a", token)
    scene.clients.heartbeat("a", ())
    scene.clock.now += DAY_S
    assert scene.holds("a", token)
    scene.clock.now += 1
    assert not scene.holds("a", token)


def test_the_lifetime_of_tokens_can_be_set() -> None:
    clock = Clock()
    clients = ClientManager(3, 60.0, clock, lambda _: None, token_s=5.0)
    token = clients.register(identity("a"), "peer")
    clock.now += 5.5
    with pytest.raises(UnauthenticatedError):
        clients.check_token(identity("a"), token)


def test_any_call_is_a_sign_of_life(scene: Scene) -> None:
    token = scene.register("a")
    for _ in range(5):
        scene.clock.now += 59.0
        assert scene.holds("a", token)
        scene.clients.expire()
    assert scene.clients.live() == {"a"}


def test_a_refused_call_is_none(scene: Scene) -> None:
    scene.register("a")
    scene.clock.now += 59.0
    scene.holds("a", "wrong")
    scene.clock.now += 1.0
    scene.clients.expire()
    assert scene.clients.live() == set()


def test_the_silent_are_dropped_together(scene: Scene) -> None:
    tokens = {}
    for name in "abc":
        tokens[name] = scene.register(name)
        scene.clock.now += 10.0
    assert scene.clients.expire() == pytest.approx(30.0)
    scene.clock.now += 40.0
    assert scene.clients.expire() == pytest.approx(10.0)
    assert scene.changes[-1] == ["a", "b"]
    assert scene.clients.live() == {"c"}
    assert not scene.holds("a", tokens["a"])
    scene.clock.now += 10.0
    scene.clients.expire()
    assert scene.clients.live() == set()
    assert scene.clients.expire() > 60.0, "nobody to wait for"


def test_who_was_dropped_may_come_back(scene: Scene) -> None:
    scene.register("a")
    scene.clock.now += 60.0
    scene.clients.expire()
    assert scene.holds("a", scene.register("a"))
    assert scene.changes == [["a"], ["a"], ["a"]]


def test_places_are_counted_by_names() -> None:
    scene = Scene(max_clients=2)
    scene.register("a")
    scene.register("b")
    scene.register("a")
    with pytest.raises(ResourceExhaustedError) as caught:
        scene.register("c")
    assert caught.value.rule == "max_clients"
    assert scene.clients.live() == {"a", "b"}
    scene.clients.remove("b")
    scene.register("c")


def test_a_removed_site_must_register_again(scene: Scene) -> None:
    token = scene.register("a")
    scene.clients.remove("a")
    assert not scene.holds("a", token)
    assert scene.changes == [["a"], ["a"]]
    with pytest.raises(NotFoundError):
        scene.clients.remove("a")
    assert scene.holds("a", scene.register("a"))


def test_after_a_restart_sites_count_as_there_for_one_dead_time(scene: Scene) -> None:
    scene.register("b")
    scene.changes.clear()
    scene.clients.presume(["a", "b", "c"])
    assert scene.clients.live() == {"a", "b", "c"}
    assert [client.name for client in scene.clients.clients()] == ["b"]
    scene.clock.now += 30.0
    token = scene.register("a")
    assert scene.changes == [], "it had never gone"
    assert scene.holds("b", scene.register("b"))
    scene.clock.now += 29.0
    assert scene.clients.expire() == pytest.approx(1.0)
    assert scene.changes == []
    scene.clock.now += 1.0
    scene.clients.expire()
    assert scene.changes == [["c"]]
    assert scene.clients.live() == {"a", "b"}
    assert scene.holds("a", token)


def test_an_expected_site_can_be_removed(scene: Scene) -> None:
    scene.clients.presume(["a"])
    scene.clients.remove("a")
    assert scene.clients.live() == set()


def test_expected_sites_take_no_places() -> None:
    scene = Scene(max_clients=1)
    scene.clients.presume(["a", "b"])
    scene.register("c")


def test_disabled_sites_are_there_and_not_usable(scene: Scene) -> None:
    scene.register("a")
    scene.register("b")
    roster = scene.clients.roster()
    scene.clients.disabled.add("b")
    assert roster.usable == {"a", "b"}, "a roster is a value"
    assert scene.clients.roster().usable == {"a"}
    assert scene.clients.roster().live == {"a", "b"}


def test_reports_are_kept_until_the_next(scene: Scene) -> None:
    scene.register("a")
    report = RunReport(1, 2, "training", 5.0)
    scene.clients.heartbeat("a", iter([report]))
    assert scene.clients.get("a").reports == (report,)
    scene.clients.heartbeat("a", ())
    assert scene.clients.get("a").reports == ()


def test_who_has_gone_is_still_known(scene: Scene) -> None:
    scene.register("a")
    scene.register("b")
    scene.clients.presume(["c"])
    scene.clock.now += 10.0
    scene.clients.remove("a")
    scene.clock.now += 50.0
    scene.clients.expire()
    assert scene.clients.known == {"a": "a", "b": "b"}
    assert scene.clients.gone == {"a": 1010.0, "b": 1000.0}, "when they were last heard of"
    scene.register("b")
    assert set(scene.clients.gone) == {"a"}


def test_who_left_on_purpose_is_told_from_who_was_lost(scene: Scene) -> None:
    for name in ("stops", "removed"):
        scene.register(name)
    scene.clock.now += 30.0
    scene.register("lost")
    scene.clients.remove("stops")
    scene.clients.remove("removed", "removed")
    scene.clock.now += 60.0
    scene.clients.expire()
    assert scene.clients.parted == {"stops": "stopped", "removed": "removed"}
    assert set(scene.clients.gone) == {"stops", "removed", "lost"}
    scene.register("stops")
    assert scene.clients.parted == {"removed": "removed"}


# ---- two processes with one kit -----------------------------------------------------------------


def fight(scene: Scene, changes: int, pause_s: float = 1.0) -> None:
    """Let two processes take a's registration from each other."""
    theirs = scene.register("a")
    for _ in range(changes):
        mine = scene.register("a")
        assert not scene.holds("a", theirs)
        scene.clock.now += pause_s
        theirs, mine = mine, theirs


def told(caplog: pytest.LogCaptureFixture) -> int:
    return caplog.text.count("a registers again and again, from peer and peer")


def contested(scene: Scene) -> bool:
    return scene.clients.is_contested(scene.clients.get("a"))


def test_two_processes_with_one_kit_are_told_ever_more_rarely(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    counts = []
    for changes in (5, 6, 10, 25, 100):
        caplog.clear()
        fight(scene, changes)
        counts.append(told(caplog))
        assert contested(scene) == (changes > 5)
        scene.clock.now += 61.0
        assert not contested(scene), "it is over"
    assert counts == [0, 1, 1, 3, 5]


def test_whose_token_is_replaced_is_told_so(scene: Scene) -> None:
    first = scene.register("a")
    scene.register("a")
    with pytest.raises(UnauthenticatedError) as caught:
        scene.clients.check_token(identity("a"), first)
    assert caught.value.rule == REPLACED_TOKEN
    scene.clients.remove("a")
    with pytest.raises(UnauthenticatedError) as caught:
        scene.clients.check_token(identity("a"), first)
    assert caught.value.rule == "token"


def test_a_site_that_is_started_again_and_again_is_not_accused(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(100):
        token = scene.register("a")
        assert scene.holds("a", token)
    fight(scene, 20, pause_s=61.0)  # calls on their way that are late, now and then
    assert not contested(scene)
    assert caplog.text == ""


# ---- standstills of the server ------------------------------------------------------------------


def tick(scene: Scene, seconds: float) -> None:
    """Let time pass as it does for a server at work: it looks at the clock in between."""
    end = scene.clock.now + seconds
    while scene.clock.now < end:
        scene.clients.watch()
        scene.clients.expire()
        scene.clock.now = min(end, scene.clock.now + scene.clients.look_s)
    scene.clients.watch()
    scene.clients.expire()


def test_silence_while_the_server_stood_still_is_nobodys(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    token = scene.register("a")
    scene.clients.presume(["b"])
    tick(scene, 30.0)
    caplog.clear()
    scene.clock.now += 7200.0
    scene.clients.watch()
    scene.clients.expire()
    assert scene.clients.live() == {"a", "b"}
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "stood still for 7199.0 s" in caplog.text
    tick(scene, 10.0)
    assert scene.holds("a", token), "its heartbeats have waited"
    assert len(caplog.records) == 1, "told once"
    tick(scene, 18.0)
    assert scene.clients.live() == {"a", "b"}
    tick(scene, 2.0)
    assert scene.clients.live() == {"a"}, "who stays silent is dropped all the same"
    tick(scene, 40.0)
    assert scene.clients.live() == set()


def test_who_asks_first_notices_the_standstill(scene: Scene) -> None:
    scene.register("a")
    tick(scene, 30.0)
    assert scene.clients.stood_still_s() == 0.0
    scene.clock.now += 101.0
    assert scene.clients.stood_still_s() == pytest.approx(100.0)
    scene.clients.watch()
    assert scene.clients.stood_still_s() == pytest.approx(100.0), "counted once"
    scene.clients.expire()
    assert scene.clients.live() == {"a"}


def test_who_is_heard_before_the_standstill_is_noticed_gets_nothing_on_top(scene: Scene) -> None:
    token = scene.register("a")
    tick(scene, 30.0)
    scene.clock.now += 7200.0
    assert scene.holds("a", token)
    scene.register("b")
    scene.clients.presume(["c"])
    tick(scene, 59.0)
    assert scene.clients.live() == {"a", "b", "c"}
    tick(scene, 1.0)
    assert scene.clients.live() == set()


def test_a_server_that_is_a_little_late_did_not_stand_still(scene: Scene) -> None:
    scene.register("a")
    for _ in range(10):
        scene.clients.watch()
        scene.clients.expire()
        scene.clock.now += scene.clients.look_s + 5.5
    assert scene.clients.stood_still_s() == 0.0
    scene.clients.expire()
    assert scene.clients.live() == set()


def test_a_server_that_stands_still_again_and_again_still_drops_the_dead(scene: Scene) -> None:
    scene.register("a")
    for _ in range(61):
        scene.clients.watch()
        scene.clients.expire()
        scene.clock.now += 30.0
    assert scene.clients.live() == set()


def test_where_nobody_watches_no_standstill_is_seen(scene: Scene) -> None:
    assert scene.clients.stood_still_s() == 0.0
    scene.clock.now += 1000.0
    assert scene.clients.stood_still_s() == 0.0
