"""The best local model, and what of the state is copied or linked."""

import json

import pytest

from flplatform.client.box import Box
from flplatform.client.state import LocalScore, base_of, collect, current_state, submit
from flplatform.core.errors import ConfigError, InvalidArgumentError
from flplatform.core.job import Watch

MOST = Watch(metric="acc", mode="max")


class Site:
    """Train tasks one after the other, each accepted."""

    def __init__(self, folder):
        self.folder = folder
        self.box = Box(folder)
        self.states = folder / "states"
        self.states.mkdir()

    def train(self, number, watch=MOST, metrics=None, **more):
        current = current_state(self.states)
        self.box.prepare(None, current / "user" if current else None, 1000)
        (self.box.box / "result.safetensors").write_text(f"model {number}")
        (self.box.box / "state" / str(number)).touch()
        work = self.folder / f"work-{number}"
        work.mkdir()
        metrics = {"acc": more.pop("acc")} if metrics is None else metrics
        score = LocalScore(round=number, metrics=metrics, examples=9)
        collect(self.box, work, current, watch, score, 1000, 1000)
        assert (work / "result.safetensors").read_text() == f"model {number}"
        (work / "state").rename(self.states / str(number))
        return self.states / str(number)

    def best(self, name="submitted"):
        work = self.folder / name
        work.mkdir(exist_ok=True)
        score = submit(current_state(self.states), work)
        return (work / "result.safetensors").read_text(), score.round


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def test_the_best_is_kept_and_the_users_state_goes_on(site):
    first = site.train(1, acc=0.5)
    second = site.train(2, acc=0.5)  # a tie keeps the earlier one
    assert site.best("a") == ("model 1", 1)
    assert (second / "best.safetensors").samefile(first / "best.safetensors")
    assert sorted(path.name for path in (second / "user").iterdir()) == ["1", "2"]
    site.train(3, acc=0.6)
    assert site.best("b") == ("model 3", 3)
    assert json.loads((site.states / "3" / "best.json").read_bytes())["metrics"] == {"acc": 0.6}


def test_the_least_may_be_the_best(site):
    least = Watch(metric="acc", mode="min")
    for number, acc in enumerate((2, 1, 3), 1):
        site.train(number, least, acc=acc)
    assert site.best() == ("model 2", 2)


def test_without_a_watch_it_is_the_last(site):
    for number in (1, 2):
        site.train(number, None, metrics={})
    assert site.best() == ("model 2", 2)


def test_the_watched_metric_must_be_there(site):
    with pytest.raises(InvalidArgumentError, match="local"):
        site.train(1, metrics={"loss": 1.0})


def test_there_may_be_none(site, tmp_path):
    assert submit(None, tmp_path) is None
    (site.states / "1").mkdir()
    assert submit(current_state(site.states), tmp_path) is None


def test_a_damaged_score_is_told(site, tmp_path):
    state = site.train(1, acc=1)
    (state / "best.json").write_text("{}")
    with pytest.raises(ConfigError, match="best.json"):
        submit(state, tmp_path)


def test_current_state(tmp_path):
    assert current_state(tmp_path / "none") is None
    assert current_state(tmp_path) is None
    for name in ("9", "10", "x"):
        (tmp_path / name).mkdir()
    assert current_state(tmp_path) == tmp_path / "10"


def test_the_base_of_the_last_training_comes_with_the_best(site, tmp_path):
    for number in (1, 2):
        model = tmp_path / f"received {number}"
        model.write_text(f"received {number}")
        state = site.train(number, acc=1 - number / 10)
        (work := tmp_path / "work").mkdir()
        state.rename(work / "state")
        assert base_of(work, model) == base_of(work, model) == model  # as after a full disk
        (work / "state").rename(state)
        work.rmdir()
        model.unlink()
    assert site.best() == ("model 1", 1)
    base = base_of(site.folder / "submitted", None)
    assert base is not None
    assert base.read_text() == "received 2"


def test_a_release_before_has_kept_no_base(site):
    site.train(1, acc=0.5)
    site.best()
    assert base_of(site.folder / "submitted", None) is None


def test_a_task_without_a_state_keeps_no_base(tmp_path):
    model = tmp_path / "model"
    assert base_of(tmp_path, model) == model
    assert list(tmp_path.iterdir()) == []
