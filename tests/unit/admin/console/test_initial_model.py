import io
import json
import sys

import numpy as np
import pytest

from flplatform.admin.console import initial_model
from flplatform.core.errors import InvalidArgumentError, ModelFormatError
from flplatform.files.modelfile import load


@pytest.fixture
def code(tmp_path, monkeypatch):
    """Returns a function that writes a module and forgets it afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "code"
    folder.mkdir()

    def write(body: str):
        (folder / "starter_module.py").write_text(f"import numpy as np\n{body}")
        monkeypatch.delitem(sys.modules, "starter_module", raising=False)
        return folder

    yield write
    sys.modules.pop("starter_module", None)


def build(folder, tmp_path, name="initial"):
    target = tmp_path / "model.safetensors"
    initial_model.build(folder, f"starter_module:{name}", {"n": 3}, 7, target)
    return load(target)


def test_the_function_gets_arguments_and_seed(code, tmp_path):
    folder = code("def initial(args, seed): return {'w': np.full(args['n'], seed, 'f4')}")
    assert build(folder, tmp_path)["w"].tolist() == [7, 7, 7]


def test_what_is_no_model_is_refused(code, tmp_path):
    with pytest.raises(InvalidArgumentError, match="returned a list"):
        build(code("def initial(args, seed): return [1]"), tmp_path)
    with pytest.raises(ModelFormatError, match="NaN"):
        build(code("def initial(args, seed): return {'w': np.array([np.nan])}"), tmp_path)
    with pytest.raises(AttributeError):
        build(code("x = 1"), tmp_path)


def test_the_request_comes_by_standard_input(code, tmp_path, monkeypatch):
    folder = code("def initial(args, seed): return {'w': np.zeros(args['n'])}")
    request = {
        "code": str(folder),
        "function": "starter_module:initial",
        "args": {"n": 2},
        "seed": 1,
        "target": str(tmp_path / "m"),
    }
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(request)))
    initial_model.main()
    assert load(tmp_path / "m")["w"].dtype == np.float64
