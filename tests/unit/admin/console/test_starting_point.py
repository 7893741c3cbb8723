import asyncio
import os

import numpy as np
import pytest

from flplatform.admin.console.starting_point import from_file, from_function
from flplatform.core.errors import ConfigError, InvalidArgumentError, ModelFormatError
from flplatform.core.job import parse_job
from flplatform.files.digest import digest_of
from flplatform.files.modelfile import load, save

JOB = """
name: tiny
executor: {module: tiny}
args: {size: 2}
seed: 5
initial_model: {INITIAL}
"""


def job(folder, initial: str, code: str = ""):
    (folder / "code").mkdir(exist_ok=True)
    (folder / "code" / "tiny.py").write_text(code)
    return parse_job(JOB.replace("{INITIAL}", initial))


def run(make, folder, job, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    return asyncio.run(make(folder, job, work / "model.safetensors"))


def test_a_function_runs_in_another_process_with_a_bare_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("FLP_PASSWORD_FILE", "/secret")
    code = f"""
import os, numpy as np
def first(args, seed):
    assert os.getpid() != {os.getpid()}
    assert not any(name.startswith("FLP") for name in os.environ)
    return {{"w": np.arange(args["size"]) + seed}}
"""
    start = run(from_function, tmp_path, job(tmp_path, "{function: 'tiny:first'}", code), tmp_path)
    assert load(start.path)["w"].tolist() == [5, 6]
    assert start.blob.digest == digest_of(start.path.read_bytes())
    assert start.blob.size == start.path.stat().st_size
    assert start.manifest.parameters == 2


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("print('loading'); raise RuntimeError('no such table')", "no such table"),
        ("x = (", 'Traceback.*\n +File ".*/code/tiny.py", line 1\n'),
        ("def first(args, seed): return 3", "returned a int"),
        ("import sys; sys.exit(0)", "made no model"),
    ],
)
def test_a_function_that_fails_says_what_it_printed(tmp_path, code, complaint):
    with pytest.raises(InvalidArgumentError, match=complaint) as caught:
        run(from_function, tmp_path, job(tmp_path, "{function: 'tiny:first'}", code), tmp_path)
    assert caught.value.field == "initial_model.function"


def test_an_interrupted_function_is_killed(tmp_path):
    code = f"""
import os, time
open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
time.sleep(60)
"""

    async def main():
        making = asyncio.create_task(
            from_function(tmp_path, job(tmp_path, "{function: 'tiny:first'}", code), tmp_path / "m")
        )
        while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
            await asyncio.sleep(0.02)
        making.cancel()
        await asyncio.gather(making, return_exceptions=True)

    asyncio.run(main())
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_file_is_written_anew_in_canonical_form(tmp_path):
    save(tmp_path / "mine.safetensors", {"b": np.ones(2, "f4"), "a": np.zeros(1)})
    data = (tmp_path / "mine.safetensors").read_bytes()
    spaced = data[8:].replace(b'"a"', b' "a"', 1)
    length = int.from_bytes(data[:8], "little") + 1
    (tmp_path / "mine.safetensors").write_bytes(length.to_bytes(8, "little") + spaced)
    start = run(from_file, tmp_path, job(tmp_path, "{file: mine.safetensors}"), tmp_path)
    assert start.path.read_bytes() == data
    assert start.manifest.parameters == 3


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match="there is no"):
        run(from_file, tmp_path, job(tmp_path, "{file: gone.safetensors}"), tmp_path)
    (tmp_path / "bad").write_bytes(b"pickle")
    with pytest.raises(ModelFormatError):
        asyncio.run(from_file(tmp_path, job(tmp_path, "{file: bad}"), tmp_path / "m"))
