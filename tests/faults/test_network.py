"""Bad networks: a TCP proxy between a site or the console and the server."""

import time

import pytest

from flplatform.core import events as ev
from tests.faults.conftest import LONG
from tests.faults.footprint import settled
from tests.faults.proxy import Proxy
from tests.scenarios.test_why import Talk, cause_of
from workspaces.running import ADMIN

pytestmark = pytest.mark.timeout(600 if LONG else 120)

LATER = pytest.mark.faults_long
ROUNDS = 6
FLOATS = 50_000
MANY_FLOATS = 2_000_000
SLOW_BYTES_S = 500_000


@pytest.fixture
def behind(faulty):
    """Start a federation whose first site reaches the server through a proxy."""
    proxies = []

    def start(**limits):
        federation = faulty("site-1", "site-2", **limits)
        federation.start("server")
        proxy = Proxy(federation.ports["fl_port"])
        proxy.__enter__()
        proxies.append(proxy)
        federation.detours["site-1"] = proxy.port
        federation.redirect()
        federation.start("site-1", "site-2")
        federation.wait_for(lambda: proxy.made >= 1, "site-1 to come through the proxy")
        return federation, proxy

    yield start
    for proxy in proxies:
        proxy.__exit__()


def calm_digest(federation) -> str:
    name = federation.job("calm", rounds=ROUNDS, floats=FLOATS)
    done = federation.console(f"submit_job {name} --wait")
    assert done.returncode == 0, done.stdout + done.stderr
    return federation.final_digest(federation.run_of(name))


def begin(federation, **settings) -> int:
    run = federation.submit("disturbed", rounds=ROUNDS, floats=FLOATS, **settings)
    federation.wait_event(run, ev.UpdateAccepted, round=1)
    return run


def finish(federation, run: int) -> None:
    federation.wait_event(run, ev.RunEnded)
    federation.tally.recovered()
    federation.check(run, calm_digest(federation))


def test_cut_refused_flapping_delayed_and_slow(behind):
    federation, proxy = behind()
    run = begin(federation)
    for cut_after in (0, 2_000, 60_000):  # within the handshake, the first call, an upload
        proxy.cut()
        proxy.change(cut_after=cut_after)
        before = proxy.made
        federation.wait_for(lambda at=before: proxy.made > at + 1, "the site to come again")
        federation.tally.fault("TCP reset after n bytes")
    proxy.change(refuse=True)
    proxy.cut()
    before = proxy.made
    federation.wait_for(lambda: proxy.made > before, "a connection that is refused")
    federation.tally.fault("TCP refused")
    proxy.change()
    for _ in range(5):
        at = len(federation.events(run))
        federation.tally.fault("TCP flapping", int(proxy.cut() > 0))
        until = time.monotonic() + 1.0
        federation.wait_for(
            lambda at=at, until=until: len(federation.events(run)) > at or time.monotonic() > until,
            "progress, or some time",
        )
    proxy.change(delay_s=0.05)
    federation.tally.fault("TCP delay")
    at = len(federation.events(run))
    federation.wait_for(
        lambda: len(federation.events(run)) > at or federation.over(run), "progress at a delay"
    )
    proxy.change(bytes_s=400_000)
    federation.tally.fault("TCP slow")
    federation.wait_event(run, ev.RunEnded)
    proxy.change()
    finish(federation, run)


@pytest.mark.parametrize("receiver", ["site-1", "server"])
def test_an_abort_leaves_nothing_of_what_was_on_its_way(behind, receiver):
    """The part of a download at the site, that of an upload at the server."""
    federation, proxy = behind()
    federation.hold("site-2", 1)
    let_go = federation.hold("site-1", 1)
    slow = {"bytes_s": SLOW_BYTES_S}
    proxy.change(**(slow if receiver == "site-1" else {}))
    run = federation.submit("large", rounds=1, floats=MANY_FLOATS)
    base = federation.wait_event(run, ev.RoundOpened).model
    if receiver == "server":
        model = federation.kit("site-1") / "state" / "blobs" / base.digest.partition(":")[2]
        federation.wait_for(model.exists, "the model to be at the site")
        proxy.change(**slow)
        let_go()
    incoming = federation.kit(receiver) / "state" / "blobs" / "incoming"
    federation.wait_for(
        lambda: any(part.stat().st_size > SLOW_BYTES_S // 4 for part in incoming.iterdir()),
        f"{receiver} to receive",
    )
    done = federation.console(f"abort all --run {run}")
    assert done.returncode == 0, done.stdout
    federation.tally.fault("abort amid a transfer")
    proxy.change()
    federation.wait_event(run, ev.RunEnded)
    for each in ("site-1", "server"):
        settled(federation, each)
    federation.tally.runs += 1


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=LATER) for way in ("stop_up", "stop_down", "both")]
)
def test_frozen_and_one_way(behind, way):
    """The server takes the site for dead, `why` says so, and what was underway goes on."""
    federation, proxy = behind(dead_after_s=3.0)
    let_go = federation.hold("site-1", 2)
    run = begin(federation)
    federation.wait_event(run, ev.UpdateAccepted, round=2, site="site-2")
    stopped = {"stop_up": True, "stop_down": True} if way == "both" else {way: True}
    proxy.change(**stopped)
    federation.tally.fault(f"TCP frozen: {way}")
    let_go()
    console = Talk(federation)
    try:
        told = console.until(
            lambda found: cause_of(found, "site-1") in ("away", "silent", "expected"),
            "a site that is away",
            str(run),
        )
        assert "site-1" in str(told["waits_for"]), told
    finally:
        console.close()
    proxy.change()
    finish(federation, run)


@pytest.mark.faults_long
def test_half_open_connections_are_noticed_within_two_keepalives(behind):
    federation, proxy = behind()
    let_go = federation.hold("site-1", 2)
    run = begin(federation)
    federation.wait_event(run, ev.UpdateAccepted, round=2, site="site-2")
    proxy.lose()
    federation.tally.fault("TCP half-open for good")
    let_go()
    federation.wait_event(run, ev.UpdateAccepted, deadline_s=80, round=2, site="site-1")
    finish(federation, run)


@pytest.mark.faults_long
def test_console_cut_in_the_middle_of_its_commands(behind):
    """A submission that broke and is repeated with its id is one run; an abort, done once."""
    federation, _ = behind()
    with Proxy(federation.ports["admin_port"]) as proxy:
        federation.local(ADMIN, "overrides.yml", f'servers: ["localhost:{proxy.port}"]\n')
        name = federation.job("cut", rounds=ROUNDS, floats=FLOATS)
        identity = "0" * 31 + "1"
        for cut_after in (5_000, 20_000, 150_000):
            proxy.change(cut_after=cut_after)
            with federation.talking(f"submit_job {name} --submission {identity}") as console:
                made = proxy.made
                federation.wait_for(
                    lambda c=console, m=made: c.poll() is not None or proxy.made >= m + 3,
                    "the console to be cut",
                )
            federation.tally.fault("console cut in a submission")
        proxy.change()
        done = federation.console(f"submit_job {name} --submission {identity}")
        assert done.returncode == 0, done.stdout + done.stderr
        numbered = [e.run for e in federation.federation_events() if isinstance(e, ev.RunNumbered)]
        assert len(numbered) == 1, "one submission, one run"
        run = numbered[0]
        federation.wait_event(run, ev.RunEnded)
    federation.local(ADMIN, "overrides.yml", federation._servers("admin_port"))
    finish(federation, run)
