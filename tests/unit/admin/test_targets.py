import pytest

from flplatform.admin.targets import (
    RunArguments,
    SiteArguments,
    TargetArguments,
    current_run,
    only_active,
    resolve,
)
from flplatform.core.errors import FailedPreconditionError, InvalidArgumentError
from tests.support.control import ENDED, FakeControl, run

KNOWN = ("b", "a", "c")


@pytest.mark.parametrize(
    ("words", "server", "sites", "unknown"),
    [
        (("server",), True, (), ()),
        (("all",), True, ("a", "b", "c"), ()),
        (("client",), False, ("a", "b", "c"), ()),
        (("client", "c", "a", "c"), False, ("c", "a"), ()),
        (("client", "x", "b", "y"), False, ("b",), ("x", "y")),
        (("client", "server"), False, (), ("server",)),
    ],
)
def test_targets_are_resolved(words, server, sites, unknown):
    targets = resolve(TargetArguments(words).targets, KNOWN)
    assert (targets.server, targets.sites, targets.unknown) == (server, sites, unknown)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("a",), "did you mean client a"),
        (("a", "b"), "server, client .* or all, not 'a'"),
        (("server", "a"), "nothing can follow server"),
        (("all", "a"), "nothing can follow all"),
        (("Client",), "not 'Client'"),
    ],
)
def test_what_is_no_target(words, complaint):
    with pytest.raises(ValueError, match=complaint):
        TargetArguments(words)


def test_sites_alone_are_targets_too():
    assert SiteArguments(("a", "b")).targets == ("client", "a", "b")


def test_the_current_run(in_hand):
    control = FakeControl(run_views={3: run(3), 5: run(5, **ENDED)})
    in_hand()
    assert current_run(control, None) == 3
    assert current_run(control, 5) == 5
    in_hand(run=5)
    assert current_run(control, RunArguments().run) == 5
    in_hand()
    assert current_run(control, None) == 3
    control.run_views[4] = run(4)
    assert current_run(control, None) == 3  # what was checked is what is done
    in_hand()
    assert only_active(control) is None
    with pytest.raises(InvalidArgumentError, match="several runs are active: 3, 4"):
        current_run(control, None)
    control.run_views.clear()
    with pytest.raises(FailedPreconditionError, match="no run is active"):
        current_run(control, None)
