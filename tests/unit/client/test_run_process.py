"""The child's side, spoken to by hand over its socket."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from flplatform.client.box import Box
from flplatform.client.frames import LENGTH, SECRET, SOCKET, Order, Start, encode
from flplatform.files.modelfile import load, save

ROOT = Path(__file__).parents[3]
NOTING = """
import random
import numpy as np

def train(model, context):
    value = float(model["w"][0]) + context.args["step"]
    context.log_metric("seeded", np.random.random() + random.random())
    return {"w": np.full(1, value, np.float32)}, 1, {"seen": np.random.random()}

def validate(model, context):
    return {"score": -abs(float(model["w"][0]) - 3), "drawn": np.random.random()}, 4
"""


class Child:
    """A run process and the parent's end of its socket."""

    def __init__(self, folder: Path, code: str, **changes) -> None:
        self.folder = folder
        self.scratch = folder / "s"
        self.scratch.mkdir()
        (folder / "code").mkdir()
        (folder / "code" / "job.py").write_text(textwrap.dedent(code))
        (self.scratch / SECRET).write_text("the secret")
        self.box = Box(folder)
        self.box.prepare(None, None, 1 << 30)
        fields = {
            "run": 7,
            "site": "site-1",
            "code": str(folder / "code"),
            "box": str(self.box.box),
            "module": "job",
            "script": "",
            "args": {"step": 2},
            "data": {},
            "watch_metric": "score",
            "watch_mode": "max",
            "memory_limit_bytes": 0,
        }
        self.start = Start(**fields | changes)

    def __enter__(self):
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(self.scratch / SOCKET))
            server.listen()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "flplatform.client.run_process", str(self.scratch)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, "RANK": str(self.start.rank)},
            )
            server.settimeout(60)
            self.socket, _ = server.accept()
        rank = self.start.rank
        assert self.next() == {"type": "hello", "secret": "the secret", "rank": rank}
        self.socket.sendall(encode("start", asdict(self.start)))
        return self

    def __exit__(self, *_):
        self.socket.close()
        self.process.kill()
        self.process.communicate()

    def exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            chunk = self.socket.recv(count - len(data))
            assert chunk, self.process.stdout.read().decode()
            data += chunk
        return data

    def next(self) -> dict:
        (length,) = LENGTH.unpack(self.exactly(LENGTH.size))
        return json.loads(self.exactly(length))

    def order(self, kind: str, value: float | None, number: int = 1, seed: int = 5) -> list[dict]:
        """Give a task and return all that is said about it."""
        model = None
        for folder in (self.box.inbox, self.box.box):
            for path in folder.glob("*.safetensors"):
                path.unlink()
        if value is not None:
            model = str(self.box.inbox / "model.safetensors")
            save(Path(model), {"w": np.full(1, value, np.float32)})
        order = Order(f"7/{number}/{kind}/site-1", seed, model)
        self.socket.sendall(encode("task", asdict(order)))
        said = [self.next()]
        while said[-1]["type"] not in ("result", "done", "failure"):
            said.append(self.next())
        assert said[-1].pop("task") == order.task
        return said

    def result(self) -> float:
        return float(load(self.box.box / "result.safetensors")["w"][0])


def test_train_is_surrounded_by_validation(tmp_path):
    with Child(tmp_path, NOTING) as child:
        assert child.next() == {"type": "ready"}
        *said, result = child.order("train", 0)
        assert [frame.get("phase", frame["type"]) for frame in said] == [
            "validate_received",
            "train",
            "metric",
            "validate_trained",
        ]
        assert (result["received"]["score"], result["received_examples"]) == (-3, 4)
        assert (result["local"]["score"], result["local_examples"]) == (-1, 4)
        assert (result["file"], result["examples"], child.result()) == ("result.safetensors", 1, 2)


CHANGING = """
import numpy as np

def train(model, context):
    return {"w": np.full(1, 2, np.float32)}, 1

def validate(model, context):
    return {"score": float(model["w"][0])}, 4
"""


def test_a_change_is_left_beside_the_whole_model_that_it_makes(tmp_path):
    with Child(tmp_path, CHANGING, delta=True) as child:
        child.next()
        *_, result = child.order("train", 5)
        assert (result["file"], child.result(), result["local"]["score"]) == (
            "result.safetensors", 7, 7,
        )  # fmt: skip
        assert load(child.box.box / "update.safetensors")["w"].tolist() == [2]


@pytest.mark.parametrize(
    ("returned", "error"),
    [("{}", "has no tensors"), ('{"x": np.ones(1, np.float32)}', "no such tensor")],
)
def test_a_part_is_some_of_what_was_received(tmp_path, returned, error):
    code = CHANGING.replace('{"w": np.full(1, 2, np.float32)}', returned)
    with Child(tmp_path, code, partial=True) as child:
        child.next()
        *_, failure = child.order("train", 5)
        assert error in failure["error"]


def test_without_a_watch_there_is_only_training(tmp_path):
    with Child(tmp_path, NOTING, watch_metric="", watch_mode="") as child:
        child.next()
        *said, result = child.order("train", 1)
        assert [frame["type"] for frame in said] == ["phase", "metric"]
        assert (result["received"], result["local"]) == ({}, {})


def test_a_rank_other_than_0_does_the_same_and_returns_nothing(tmp_path):
    with Child(tmp_path, NOTING, rank=1, world_size=2) as child:
        assert child.next() == {"type": "ready"}
        trained = child.box.box / "result.safetensors"
        child.order("validate.global", 0)
        order = Order("7/1/train/site-1", 5, str(child.box.inbox / "model.safetensors"))
        child.socket.sendall(encode("task", asdict(order)))
        child.socket.settimeout(0.3)
        with pytest.raises(TimeoutError):  # the trained model that it shall validate is rank 0's
            child.next()
        assert not trained.exists()
        child.socket.settimeout(60)
        save(trained, {"w": np.full(1, 9, np.float32)})
        child.socket.sendall(encode("trained", {}))
        assert child.next() == {"type": "done", "task": order.task}


def test_what_another_rank_returns_need_be_no_result(tmp_path):
    code = """
    def train(model, context):
        assert (context.rank, context.world_size) == (1, 3)
        context.log_metric("loss", 1.0)
    """
    with Child(tmp_path, code, rank=1, world_size=3, watch_metric="") as child:
        child.next()
        assert child.order("train", 0) == [{"type": "done"}]


def test_seeds_make_tasks_repeatable(tmp_path):
    with Child(tmp_path, NOTING) as child:
        child.next()
        first = child.order("train", 0, seed=1 << 62)
        other = child.order("train", 0, seed=6)
        again = child.order("train", 0, seed=1 << 62)
        drawn = [frame["value"] for frame in (*first, *other, *again) if frame["type"] == "metric"]
        assert drawn[0] == drawn[2] != drawn[1]
        assert first[-1]["received"] == again[-1]["received"] != other[-1]["received"]
        assert first[-1]["metrics"] == again[-1]["metrics"]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("def train(model, context): return model", "train: must return TrainResult"),
        ("def train(model, context): model['w'] += 1", "read-only"),
        ("def train(model, context): raise SystemExit(1)", "SystemExit: 1"),
        ("def train(model, context): raise StopIteration", "StopIteration"),
        ("def validate(model, context): return {}, 1", "'job' has no function train"),
        ("from flplatform.client.api import receive\ndef train(m, c): receive()", "again before"),
        (
            "from flplatform.client.api import send\ndef train(m, c):\n send((m, 1))\n send(1)",
            "without a task",
        ),
    ],
)
def test_misuse_fails_the_task_and_the_next_one_is_served(tmp_path, code, error):
    with Child(tmp_path, code, watch_metric="") as child:
        child.next()
        *_, said = child.order("train", 0)
        if said["type"] == "result":  # sent by hand; the second send fails what is no task
            said = child.next()
            assert said["task"] is None
        assert error in said["error"]
        *_, said = child.order("validate.global", 0, 2)
        assert said["type"] in ("failure", "result")


def test_the_watched_metric_must_be_there(tmp_path):
    with Child(tmp_path, NOTING, watch_metric="accuracy") as child:
        child.next()
        *_, said = child.order("train", 0)
        assert "there is no 'accuracy', which the job watches; returned: score" in said["error"]
        *_, said = child.order("validate.global", 0)
        assert said["type"] == "result"


def test_a_damaged_model_fails_one_task(tmp_path):
    with Child(tmp_path, NOTING) as child:
        child.next()
        bad = tmp_path / "bad.safetensors"
        bad.write_bytes(b"\0" * 100)
        child.socket.sendall(encode("task", asdict(Order("7/1/train/site-1", 1, str(bad)))))
        assert "header" in child.next()["error"]
        assert child.order("train", 0)[-1]["type"] == "result"


SCRIPT = """
from flplatform.client.api import receive, send

{before}
while (task := receive()) is not None:
    {body}
"""


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("break", "the script ended before send()"),
        ("raise ValueError(task.kind)", "ValueError: train"),
        ("send(1)", "train: must return"),
        ("receive()", "receive() was called again before send()"),
    ],
)
def test_a_script_that_fails_runs_again(tmp_path, body, error):
    code = SCRIPT.format(
        before="",
        body=f"if task.context.round == 1: {body}\n    send((task.model, 1))",
    )
    with Child(tmp_path, code, module="", script="job.py", watch_metric="") as child:
        child.next()
        assert error in child.order("train", 0)[-1]["error"]
        assert child.order("train", 0, 2)[-1]["type"] == "result"


def test_a_script_may_do_one_task_at_a_time(tmp_path):
    code = SCRIPT.format(before="", body="send((task.model, 1)); break")
    with Child(tmp_path, code, module="", script="job.py", watch_metric="") as child:
        child.next()
        for number in (1, 2, 3):
            assert child.order("train", 0, number)[-1]["type"] == "result"


def test_stop_ends_the_loop(tmp_path):
    code = SCRIPT.format(before="", body="send((task.model, 1))") + "\nprint('bye')"
    with Child(tmp_path, code, module="", script="job.py") as child:
        child.next()
        child.socket.sendall(encode("stop", {}))
        assert child.process.wait(60) == 0
        assert child.process.stdout.read() == b"bye\n"


@pytest.mark.parametrize("frame", [b"", LENGTH.pack(1 << 30), LENGTH.pack(3) + b"no!"])
def test_hanging_up_or_nonsense_ends_it_at_once(tmp_path, frame):
    code = "import time\ndef train(model, context): time.sleep(1000)"
    with Child(tmp_path, code, watch_metric="") as child:
        child.next()
        model = tmp_path / "m.safetensors"
        save(model, {"w": np.zeros(1, np.float32)})
        child.socket.sendall(encode("task", asdict(Order("7/1/train/site-1", 1, str(model)))))
        assert child.next()["phase"] == "train"
        if frame:
            child.socket.sendall(frame)
        else:
            child.socket.shutdown(socket.SHUT_RDWR)
        assert child.process.wait(60) == 113


def test_limits(tmp_path):
    code = """
    import os, resource

    def validate(model, context):
        return {
            "core": resource.getrlimit(resource.RLIMIT_CORE)[0],
            "data": resource.getrlimit(resource.RLIMIT_DATA)[1],
            "nice": os.nice(0),
        }, 1
    """
    with Child(tmp_path, code, memory_limit_bytes=1 << 33) as child:
        child.next()
        said = child.order("validate.global", 0)[-1]
        assert said["metrics"] == {"core": 0, "data": 1 << 33, "nice": os.nice(0) + 5}


def test_it_is_light():
    """No wire, no store, no console, no pydantic: it must start fast, anywhere."""
    program = (
        "import sys, flplatform.client.run_process;"
        "print([m for m in ('grpc', 'pydantic', 'sqlalchemy', 'blake3', 'asyncio') "
        "if m in sys.modules])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True
    )
    assert printed.stdout == b"[]\n"
