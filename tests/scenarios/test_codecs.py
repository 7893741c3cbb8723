"""Codecs, changes and partial updates between real processes: what they cost and what they keep."""

from collections.abc import Mapping
from typing import Any

import pytest

from flplatform.core import events as ev
from workspaces.running import ADMIN

pytestmark = [pytest.mark.scenario, pytest.mark.timeout(300)]

CODE = '''
"""Goes half of the way to a target that all sites share, with noise from the task's seed."""
import numpy as np
from flplatform.client.api import TrainResult, ValidateResult

def initial_model(args, seed):
    return {
        "head": np.zeros(int(args["floats"]), np.float32),
        "body": np.ones(1000, np.float32),
        "steps": np.zeros(1, np.int64),
    }

def target(args):
    return np.random.default_rng(1).standard_normal(int(args["floats"])).astype(np.float32)

def train(model, context):
    noise = np.random.default_rng(context.seed).standard_normal(model["head"].size)
    way = target(context.args) - model["head"]
    change = {
        "head": np.float32(0.5) * way + np.float32(0.01) * noise.astype(np.float32),
        "body": np.full(1000, 0.125, np.float32),
        "steps": np.ones(1, np.int64),
    }
    if context.args.get("partial"):
        del change["body" if context.site == "site-1" else "steps"]
    if not context.args.get("delta"):
        change = {name: model[name] + value for name, value in change.items()}
    return TrainResult(change, 10 + len(context.site))

def validate(model, context):
    off = model["head"].astype(np.float64) - target(context.args)
    return ValidateResult({"loss": float(np.sqrt(np.mean(off * off)))}, 10)
'''

JOB = """
name: {name}
workflow: [scatter_gather]
rounds: 3
min_clients: 2
executor: {{module: halfway}}
seed: 7
watch: {{metric: loss, mode: min}}
initial_model: {{function: "halfway:initial_model"}}
keep_updates: all
args: {args}
{more}
"""


def run(running: Any, number: int, args: Mapping[str, Any], more: str = "") -> float:
    """Submit a job as run `number` and wait for its end; return its last model's loss."""
    submit(running, number, args, more, "--wait")
    assert running.wait_event(number, ev.RunEnded).status == "finished"
    scores = [e.score for e in running.events(number) if isinstance(e, ev.ModelScored)]
    return scores[-1]


def submit(running: Any, number: int, args: Mapping[str, Any], more: str, wait: str = "") -> None:
    job = running.kit(ADMIN) / "transfer" / f"job{number}"
    (job / "code").mkdir(parents=True)
    (job / "code" / "halfway.py").write_text(CODE)
    (job / "job.yml").write_text(JOB.format(name=f"job{number}", args=dict(args), more=more))
    done = running.console(f"submit_job job{number} {wait}")
    assert done.returncode == 0, done.stdout + done.stderr


def moved(running: Any) -> tuple[int, int]:
    """Return how many bytes of blobs the sites have downloaded and uploaded so far."""
    stats = running.ask("show_stats client")["data"]["stats"]
    return tuple(
        sum(each[key] for each in stats.values()) for key in ("received_bytes", "sent_bytes")
    )


def verified(running: Any, number: int) -> list[str]:
    answer = running.ask(f"lineage {number} --verify")
    return [each["result"] for each in answer["data"]["verified"]]


def test_codecs_cost_less_and_learn_the_same(federation: Any) -> None:
    running = federation("site-1", "site-2")
    running.start_all()
    args = {"floats": 200_000}
    plain = run(running, 1, args)
    down, up = moved(running)
    small = run(running, 2, args, "codec: int8+zstd\ncodec_down: bf16")
    both = moved(running)
    assert small == pytest.approx(plain, rel=0.01)
    assert 0.4 < (both[0] - down) / down < 0.65  # its last model is scored as it is
    assert 0.1 < (both[1] - up) / up < 0.27
    assert verified(running, 2) == ["same"] * 3

    fedadam = "optimizer: {name: fedadam, args: {learning_rate: 0.3}}"
    changes = (
        f"updates: delta\npartial_updates: true\n{fedadam}\ncodec: fp16+zstd\ncodec_down: zstd"
    )
    assert run(running, 3, {"floats": 1000, "delta": True, "partial": True}, changes) < 0.5
    assert verified(running, 3) == ["same"] * 3


def test_server_killed_while_it_takes_an_encoded_update(federation: Any) -> None:
    running = federation("site-1", "site-2")
    running.start_all()
    args, codec = {"floats": 4_000_000}, "codec: int8+zstd\ncodec_down: bf16+zstd"
    submit(running, 1, args, codec)
    blobs = running.kit("server") / "state" / "blobs"
    running.wait_event(1, ev.RoundOpened, round=2)
    running.wait_for(
        lambda: (
            any(path.stat().st_size for path in (blobs / "incoming").glob("*.part"))
            or any(blobs.glob(".tmp-*"))
        ),
        "an upload to begin",
    )
    running.kill("server")
    running.start("server")
    assert running.wait_event(1, ev.RunEnded).status == "finished"
    run(running, 2, args, codec)
    assert running.final_digest(1) == running.final_digest(2)
    accepted = [e for e in running.events(1) if isinstance(e, ev.UpdateAccepted)]
    assert len({e.task_id for e in accepted}) == len(accepted) == 6
    left = {f"blake3:{path.name}" for path in blobs.iterdir()}
    assert not left & {e.wire for e in accepted}
    published = [e for e in running.events(1) if isinstance(e, ev.ModelPublished)]
    assert not left & {e.wire.digest for e in published}
