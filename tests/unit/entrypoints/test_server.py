import importlib
import logging
import sys

import pytest

from flplatform.core.errors import ConfigError
from flplatform.entrypoints.server import command_modules


@pytest.fixture
def offered(tmp_path, monkeypatch):
    """Put packages `fl-NAME 0.3` on the path, each with an entry point."""
    monkeypatch.syspath_prepend(tmp_path)

    def offer(package: str, code: str, entry: str) -> None:
        module = f"offered_{package}"
        (tmp_path / f"{module}.py").write_text(code)
        about = tmp_path / f"fl_{package}-0.3.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fl-{package}\nVersion: 0.3")
        (about / "entry_points.txt").write_text(
            f"[flplatform.command_modules]\n{entry.format(module)}\n"
        )
        monkeypatch.delitem(sys.modules, module, raising=False)
        importlib.invalidate_caches()

    return offer


def test_only_what_is_listed_is_loaded_and_logged(offered, caplog):
    offered("one", "def make(parts): return 1", "one = {}:make")
    offered("two", "raise AssertionError('loaded')", "two = {}:make")
    with caplog.at_level(logging.INFO):
        found = command_modules(["one"])
    assert [*found] == ["one of fl-one 0.3"]
    assert found["one of fl-one 0.3"](None) == 1
    assert "command module one of fl-one 0.3" in caplog.text
    assert command_modules([]) == {}


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("import nonesuch", "bad of fl-bad 0.3: ModuleNotFoundError: No module named 'nonesuch'"),
        ("", "bad of fl-bad 0.3: AttributeError: .*'make'"),
        ("make = 3", "bad of fl-bad 0.3: offered_bad:make is no function of Parts"),
    ],
)
def test_what_cannot_be_loaded_names_its_package(offered, code, complaint):
    offered("bad", code, "bad = {}:make")
    with pytest.raises(ConfigError, match=complaint):
        command_modules(["bad"])


def test_a_name_must_mean_one_package(offered):
    offered("one", "make = dict", "same = {}:make")
    with pytest.raises(ConfigError, match="'sam' is not installed.*: same"):
        command_modules(["sam"])
    offered("two", "make = dict", "same = {}:make")
    with pytest.raises(ConfigError, match="'same' is offered by several packages"):
        command_modules(["same"])
