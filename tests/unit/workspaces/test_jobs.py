from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from flplatform.core.job import parse_job
from flplatform.core.model import Manifest

JOBS = sorted(path.parent for path in (Path(__file__).parents[3] / "workspaces").glob("*/job.yml"))


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.name)
def test_each_job_is_complete(job, job_module):
    spec = parse_job((job / "job.yml").read_text())
    assert spec.name == job.name
    entry = spec.executor.script or spec.executor.module + ".py"
    assert (job / "code" / entry).is_file()
    module, function = spec.initial_model.function.split(":")
    args = dict(spec.args) | ({"size_mb": 0.001} if job.name == "echo" else {})
    Manifest.of(getattr(job_module(job.name, module), function)(args, spec.seed))


@pytest.mark.parametrize("job", ["heart_loop", "heart_torch", "heart_ddp", "heart_tensorflow"])
def test_the_copies_of_heart_data_are_the_same(workspaces, job):
    # Jobs are folders that need no other, so each carries its copy; a change must reach all.
    copies = [workspaces / name / "code" / "heart_data.py" for name in ("heart", job)]
    assert copies[0].read_bytes() == copies[1].read_bytes()


@pytest.mark.parametrize("job", ["heart_loop", "heart_torch", "heart_ddp", "heart_tensorflow"])
def test_all_variants_start_from_the_same_model(job_module, job):
    expected = job_module("heart", "heart").initial_model({}, 42)
    model = job_module(job, "initial").initial_model({}, 42)
    for one, other in zip(expected.values(), model.values(), strict=True):
        np.testing.assert_array_equal(one.ravel(), other.ravel())


def test_the_loop_does_what_the_functions_do(job_module, heart_context, monkeypatch):
    heart = job_module("heart", "heart")
    model = heart.initial_model({}, 42)
    context = heart_context("va")
    loop = job_module("heart_loop", "train_loop")
    tasks = [
        SimpleNamespace(kind=kind, model=model, context=context) for kind in ("train", "validate")
    ]
    sent: list = []
    monkeypatch.setattr(loop, "receive", lambda: tasks.pop(0) if tasks else None)
    monkeypatch.setattr(loop, "send", sent.append)
    loop.main()
    trained, validated = sent
    expected = heart.train(model, context)
    for name in model:
        np.testing.assert_allclose(trained.model[name], expected.model[name], atol=1e-6)
        assert trained.model[name].dtype == np.float32
    assert trained.examples == expected.examples
    assert validated.metrics == pytest.approx(heart.validate(model, context).metrics)
    assert validated.examples == 45


def test_echo_returns_the_very_model(job_module, heart_context):
    echo = job_module("echo", "echo")
    model = echo.initial_model({"size_mb": 2}, 42)
    assert model["payload"].nbytes == 2_000_000
    assert model["payload"].dtype == np.float32
    context = heart_context(args={}, data={})
    assert echo.train(model, context)[:2] == (model, 1)
    assert echo.validate(model, context).metrics == {}


def test_hello_adds_each_sites_number(job_module, heart_context):
    hello = job_module("hello", "hello")
    model = hello.initial_model({}, 0)
    args = {"numbers": {"site-1": 1.0, "site-2": 3.0}}
    results = []
    for site in ("site-1", "site-2", "elsewhere"):
        context = heart_context(site, args=args, data={})
        results.append(float(hello.train(model, context).model["total"][0]))
        assert context.logged == [("number", results[-1])]
    assert results == [1.0, 3.0, 1.0]
    assert hello.validate({"total": np.float32([4])}, context).metrics == {"total": 4.0}
