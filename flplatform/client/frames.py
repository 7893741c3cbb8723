"""What a run process and its parent say to each other, and where the files lie that they name.

They share a unix socket: frames of a 4-byte big-endian length and that many bytes of JSON, an
object with a `type`. Weights travel as files, named by path.

    child  → hello {secret, rank}               proves that it is the process that was started
    parent → start {…}                          what to run, see `Start`
    child  → ready {}                           the code is loaded and waits for tasks
    parent → task {task, seed, model}           one at a time, see `Order`
    child  → phase {phase}, metric {name, value, step}
    child  → result {task, file, examples, metrics, received, received_examples, local,
             local_examples}: of a train task with a watched metric, `received` and `local` are
             what the received and the trained model came to on the site's own data;
             or failure {task, error, traceback}; `task` is null while the code is being loaded
    parent → stop {}                            `receive()` returns None and the process ends

End of file ends the process at once.

Where several processes work on each task, each has a socket of its own and gets the same orders.
Rank 0 speaks as above; the others say hello, ready, failure and

    child  → done {task}                        this rank has nothing more to do for the task
    parent → trained {}                         rank 0 has left the trained model in the box

If one of them fails or hangs up, the parent ends them all.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SOCKET = "socket"
SECRET = "secret"  # noqa: S105 - the name of a file
RESULT_FILE = "result.safetensors"
UPDATE_FILE = "update.safetensors"
"""What training returned, beside the whole model, if the job sends changes or some tensors."""
STATE_FOLDER = "state"

LENGTH = struct.Struct(">I")
MAX_ORDER_BYTES = 8 << 20
MAX_REPLY_BYTES = 1 << 20
MAX_ERROR_CHARS = 1000
MAX_TRACEBACK_BYTES = 16 << 10


@dataclass(frozen=True, slots=True)
class Start:
    """What to run; paths are as the run process sees them.

    Attributes:
        box: folder where results and state are exchanged, see `client.box`.
        module: name of the module with `train` and `validate`, or empty.
        script: path of a script within `code`, or empty.
        watch_metric: empty if the job watches none.
        memory_limit_bytes: limit on the private memory of each process; 0 for none.
        rank: which of the processes this one is; rank 0 answers for all.
        world_size: how many there are.
        delta: whether training returns changes.
        partial: whether training may leave tensors out.
    """

    run: int
    site: str
    code: str
    box: str
    module: str
    script: str
    args: dict[str, Any]
    data: dict[str, str]
    watch_metric: str
    watch_mode: str
    memory_limit_bytes: int
    rank: int = 0
    world_size: int = 1
    delta: bool = False
    partial: bool = False


@dataclass(frozen=True, slots=True)
class Order:
    """A task; `model` is the path of its model file, if it has one."""

    task: str
    seed: int
    model: str | None


def encode(kind: str, fields: Mapping[str, Any]) -> bytes:
    """Return a frame with its length in front.

    Raises:
        ValueError: NaN or infinity among the fields.
    """
    frame = {"type": kind, **fields}
    text = json.dumps(frame, ensure_ascii=False, allow_nan=False).encode(errors="replace")
    return LENGTH.pack(len(text)) + text
