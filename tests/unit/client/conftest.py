import shutil
import tempfile
from pathlib import Path

import pytest

from flplatform.client import executors, sandbox
from flplatform.client.sandbox import Level
from tests.support.jobs import Site

LEVELS = ("none", "bubblewrap", "namespaces")


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


@pytest.fixture
def site_outside_tmp():
    """A site that a private /tmp does not hide."""
    folder = Path(tempfile.mkdtemp(dir="/var/tmp"))
    yield Site(folder)
    shutil.rmtree(folder)


@pytest.fixture(params=LEVELS)
def isolation(request, monkeypatch):
    """Every level and tool that works on this host; the value is the level's name."""
    if request.param == "none":
        return "none"
    if problem := sandbox._probe(request.param):
        pytest.skip(f"{request.param}: {problem}")
    level = Level("sandbox", request.param)
    monkeypatch.setattr(executors, "available_level", lambda: level)
    return "sandbox"
