"""Each signed command counts once, whatever happens in between."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from flplatform.client import seen
from flplatform.client.seen import SeenIds
from flplatform.core.errors import PermissionDeniedError


def after(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


def refused(ids: SeenIds, order_id: str, rule: str = "single use") -> None:
    with pytest.raises(PermissionDeniedError) as error:
        ids.use(order_id, after(60))
    assert error.value.rule == rule


def test_once(tmp_path):
    ids = SeenIds(tmp_path / "seen.json")
    ids.use("a", after(60))
    ids.use("b", after(60))
    refused(ids, "a")
    refused(ids, "b")


def test_once_over_restarts(tmp_path):
    path = tmp_path / "seen.json"
    SeenIds(path).use("a", after(60))
    SeenIds(path).use("b", after(60))
    refused(SeenIds(path), "a")
    refused(SeenIds(path), "b")
    assert path.stat().st_mode & 0o077 == 0


def test_what_has_expired_is_forgotten_only_when_no_skew_could_revive_it(tmp_path):
    path = tmp_path / "seen.json"
    ids = SeenIds(path)
    ids.use("old", after(-61))
    ids.use("late", after(-31))
    ids.use("new", after(60))
    assert set(json.loads(path.read_text())) == {"late", "new"}
    refused(SeenIds(path), "late")


def test_an_id_that_cannot_be_kept_is_used_up_and_not_obeyed(tmp_path, monkeypatch):
    ids = SeenIds(tmp_path / "seen.json")

    def full(*_):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(seen, "write_atomic", full)
        with pytest.raises(OSError, match="full"):
            ids.use("a", after(60))
    refused(ids, "a")
    ids.use("b", after(60))


def test_memory_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(seen, "MAX_IDS", 2)
    ids = SeenIds(tmp_path / "seen.json")
    ids.use("a", after(60))
    ids.use("b", after(-61))
    ids.use("c", after(60))
    refused(ids, "d", "command rate")


def test_ids_are_kept_as_long_as_the_clocks_may_differ(tmp_path):
    path = tmp_path / "seen.json"
    ended = datetime.now(UTC) - timedelta(seconds=100)
    SeenIds(path, skew_s=60).use("a" * 32, ended)
    with pytest.raises(PermissionDeniedError):
        SeenIds(path, skew_s=60).use("a" * 32, ended)
    brief = SeenIds(path, skew_s=10)
    brief.use("b" * 32, ended)
    brief.use("c" * 32, ended)  # cleans up: the others are past their end and twice the skew
    assert "a" * 32 not in path.read_text()
