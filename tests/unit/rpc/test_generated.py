"""The checked-in protobuf code is what the pinned generator makes of the .proto file."""

import hashlib
import importlib.util
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def protos() -> ModuleType:
    spec = importlib.util.spec_from_file_location("protos", ROOT / "tools" / "protos.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def generator(protos: ModuleType, pytestconfig: pytest.Config) -> Path:
    """The interpreter of the generator's environment, which is installed once and kept."""
    version = hashlib.sha256(protos.REQUIREMENTS.read_bytes()).hexdigest()[:16]
    folder = pytestconfig.cache.mkdir(f"protos-{version}")
    complete = folder / "complete"
    if not complete.exists():
        shutil.rmtree(folder)
        try:
            protos.install(folder)
        except subprocess.CalledProcessError:
            pytest.skip("the pinned generator cannot be installed: no package index in reach")
        complete.touch()
    return folder / "bin" / "python"


@pytest.mark.timeout(300)
def test_the_generated_code_is_current(protos: ModuleType, generator: Path) -> None:
    assert protos.stale(generator) == [], "run: make protos"


def test_a_changed_proto_is_noticed(
    protos: ModuleType, generator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / protos.PROTO.parent
    shutil.copytree(ROOT / protos.PROTO.parent, folder)
    monkeypatch.setattr(protos, "ROOT", tmp_path)
    proto = tmp_path / protos.PROTO
    proto.write_text(proto.read_text().replace("bool committed = 1;", "bool committed = 2;"))
    assert protos.stale(generator) == ["federated_pb2.py"]
