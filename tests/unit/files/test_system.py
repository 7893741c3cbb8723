import logging
import resource

import pytest

from flplatform.files.system import MAX_FILES, raise_file_limit, warn_of_few_files


def test_the_limit_of_open_files_goes_up_to_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = (1024, 4096)
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    made: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: made.append(new))
    assert raise_file_limit() == 4096
    limits = (1024, resource.RLIM_INFINITY)
    assert raise_file_limit() == MAX_FILES
    assert made == [(4096, 4096), (MAX_FILES, resource.RLIM_INFINITY)]
    limits = (4096, 4096)
    assert raise_file_limit() == 4096
    assert len(made) == 2


def test_a_limit_that_cannot_be_raised_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("not allowed")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert raise_file_limit() == 1024


@pytest.mark.parametrize(("allowed", "few"), [(2099, True), (2100, False), (-1, False)])
def test_too_few_open_files_for_all_sites_are_an_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, allowed: int, few: bool
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (allowed, allowed))
    with caplog.at_level(logging.ERROR):
        warn_of_few_files(1000)
    assert ("1000 sites need 2100" in caplog.text) is few
