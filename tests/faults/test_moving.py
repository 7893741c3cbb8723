"""Everybody dies, and the server comes back elsewhere with what was in its folder."""

import shutil

import pytest

from flplatform.core import events as ev

pytestmark = pytest.mark.timeout(300)


def test_a_server_goes_on_in_another_place(faulty, monkeypatch):
    """Another folder and other ports, as on another host; the old folder is gone."""
    federation = faulty("site-1", "site-2")
    federation.start_all()
    let_go = federation.hold("site-1", 2)
    run = federation.submit("disturbed", rounds=3)
    federation.wait_event(run, ev.UpdateAccepted, round=2, site="site-2")
    before, ports = federation.events(run), dict(federation.ports)
    for name in ("server", *federation.sites):
        federation.kill_hard(name)
        federation.tally.fault("SIGKILL of everybody")
    old, new = federation.kit("server"), federation.folder / "elsewhere"
    shutil.copytree(old, new)
    shutil.rmtree(old)
    kit = federation.kit
    monkeypatch.setattr(federation, "kit", lambda name: new if name == "server" else kit(name))
    federation.local("server", "overrides.yml", "")
    federation.ports.clear()
    let_go()
    federation.start_all()
    federation.tally.recovered()
    assert federation.ports["fl_port"] != ports["fl_port"], "the sites find it where it is now"
    assert federation.wait_event(run, ev.RunEnded).status == "finished"
    assert federation.events(run)[: len(before)] == before
    assert not old.exists()
    federation.check_against_calm(run, rounds=3)
