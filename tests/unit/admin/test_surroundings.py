import pytest

from flplatform.admin import surroundings
from tests.support.control import ENDED, run, site


@pytest.fixture
def busy(control):
    control.run_views = {7: run(7, round=1, rounds=15, targets=("a", "b", "c", "d"))}
    control.run_views[7] = run(
        7,
        round=1,
        rounds=15,
        targets=("a", "b", "c", "d"),
        answers={"a": "ok", "b": "ok", "c": "declined: no", "d": "…"},
    )
    control.site_views = [site("a"), site("b"), site("c"), site("d", state="expected")]
    return control


def test_the_prompt_of_the_only_active_run(busy):
    assert surroundings.prompt(busy, None) == "fl:heart  run 7 training r1/15  2/4 sites > "
    busy.site_views[0] = site("a", state="expected")
    assert surroundings.prompt(busy, 7) == "fl:heart  run 7 training r1/15  1/4 sites > "


def test_the_prompt_after_and_without_a_run(busy):
    busy.run_views[7] = run(7, **ENDED)
    assert surroundings.prompt(busy, 7) == "fl:heart  run 7 finished  3/4 sites > "
    assert surroundings.prompt(busy, None) == "fl:heart  3/4 sites > "
    assert surroundings.prompt(busy, 9) == "fl:heart  3/4 sites > "


def test_the_toolbar_is_the_last_event(busy):
    assert surroundings.toolbar(busy) == "run 3: round 7 opened with 2 sites"
    busy.last_event = ""
    assert surroundings.toolbar(busy) == "server is serving"


@pytest.mark.parametrize(
    ("kind", "prefix", "found"),
    [
        ("site", "", ["a", "b", "c", "d"]),
        ("target", "", ["all", "client", "server"]),
        ("target", "c", ["client"]),
        ("target:client", "", ["a", "b", "c", "d"]),
        ("target:server", "", []),
        ("site:a", "c", ["c"]),
        ("run", "", ["7"]),
        ("planet", "", []),
    ],
)
def test_completion(busy, kind, prefix, found):
    assert surroundings.values(busy, kind, prefix) == found
