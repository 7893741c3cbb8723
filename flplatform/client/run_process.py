"""The process in which a job's code runs: `python -m flplatform.client.run_process SCRATCH`.

Or one of the processes, where several work on each task (see `client.ranks`). It talks to its
parent alone, over the unix socket in the scratch folder (see `client.frames`). It needs nothing
but the standard library and NumPy, so it starts fast and under any interpreter that has them.
"""

import contextlib
import copy
import faulthandler
import importlib
import json
import os
import queue
import random
import resource
import runpy
import socket
import sys
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from flplatform.client import api
from flplatform.client.frames import (
    LENGTH,
    MAX_ORDER_BYTES,
    RESULT_FILE,
    SECRET,
    SOCKET,
    STATE_FOLDER,
    UPDATE_FILE,
    Order,
    Start,
    encode,
)
from flplatform.client.tracebacks import one_line, user_traceback
from flplatform.client.update import whole_model
from flplatform.core.errors import FailedPreconditionError, InvalidArgumentError
from flplatform.core.messages import TRAIN, TaskId
from flplatform.core.model import Array, Manifest
from flplatform.files.modelfile import load, save

NICENESS = 5
"""Added, so that training does not starve the site's parent."""
EXIT_PARENT_GONE = 113

Steps = Generator[api.Task, object, dict[str, Any]]


class Link:
    """The socket to the parent: a thread of its own reads, any thread may send."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._lock = threading.Lock()
        self._frames: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="parent", daemon=True).start()

    def next(self) -> dict[str, Any]:
        """Wait for the parent's next frame."""
        return self._frames.get()

    def send(self, kind: str, **fields: Any) -> None:
        """Send a frame; if nobody reads any more, the process ends."""
        data = encode(kind, fields)
        try:
            with self._lock:
                self._socket.sendall(data)
        except OSError:
            os._exit(EXIT_PARENT_GONE)

    def _read(self) -> None:
        with contextlib.suppress(OSError, EOFError, ValueError):
            while True:
                (length,) = LENGTH.unpack(self._exactly(LENGTH.size))
                if length > MAX_ORDER_BYTES:
                    break
                self._frames.put(json.loads(self._exactly(length)))
        # The parent is gone, or is not what it should be. os._exit waits for no user code.
        os._exit(EXIT_PARENT_GONE)

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            chunk = self._socket.recv(min(count - len(data), 1 << 16))
            if not chunk:
                raise EOFError
            data += chunk
        return bytes(data)


class Session:
    """Turns orders into calls of the user's code, and its answers into replies.

    Not thread-safe, but for `log_metric`: tasks belong to the thread that receives them.
    """

    def __init__(self, link: Link, start: Start) -> None:
        self._link = link
        self._start = start
        self._box = Path(start.box)
        self._leads = start.rank == 0
        self._order: Order | None = None
        self._steps: Steps | None = None
        self._task: api.Task | None = None
        self._in_hand = False
        self._ready = False
        self._reported: BaseException | None = None
        self.orders = 0
        self.ended = False

    def receive(self) -> api.Task | None:
        """Return the next task for the user's code, its seeds set; None once the run has ended.

        Raises:
            FailedPreconditionError: the task before has not been answered.
        """
        if self._in_hand:
            raise FailedPreconditionError("receive() was called again before send()")
        while self._task is None:
            if not self._next_order():
                return None
        self._in_hand = True
        seed = self._task.context.seed
        random.seed(seed)
        np.random.seed(seed % (1 << 32))
        return self._task

    def send(self, result: object) -> None:
        """Check the answer to the task in hand; when it was the order's last, reply.

        Raises:
            FailedPreconditionError: there is no task in hand.
            FLError: the answer does not fit; the order has failed.
        """
        if not self._in_hand:
            raise FailedPreconditionError("send() was called without a task from receive()")
        try:
            self._advance(result)
        except Exception as error:
            self.fail(error)
            raise

    def log_metric(self, name: str, value: float, step: int | None) -> None:
        """Pass a checked number on to the parent."""
        if self._leads:
            self._link.send("metric", name=name, value=value, step=step)

    @property
    def busy(self) -> bool:
        """Whether an order waits for its reply."""
        return self._order is not None

    def fail(self, error: BaseException) -> None:
        """Report an error: of the order in hand, or of the user's code if there is none."""
        if error is self._reported:
            return
        self._reported = error
        task = self._order.task if self._order is not None else None
        self._order = self._steps = self._task = None
        self._in_hand = False
        trace = user_traceback(error, self._start.code)
        print(trace or one_line(error), file=sys.stderr, flush=True)
        self._link.send("failure", task=task, error=one_line(error), traceback=trace)

    def _next_order(self) -> bool:
        if not self._ready:
            self._ready = True
            self._link.send("ready")
        if self.ended:
            return False
        self._reported = None  # it holds the frames of the user's code, and their arrays
        frame = self._link.next()
        if frame.pop("type") == "stop":
            self.ended = True
            return False
        self._order = Order(**frame)
        self.orders += 1
        try:
            self._steps = self._do(self._order)
            self._advance(None)
        except Exception as error:  # noqa: BLE001 - a defect or a damaged file fails one order
            self.fail(error)
        return True

    def _advance(self, answer: object) -> None:
        assert self._steps is not None
        assert self._order is not None
        self._task, self._in_hand = None, False
        try:
            self._task = self._steps.send(answer)
        except StopIteration as done:
            if self._leads:
                self._link.send("result", task=self._order.task, **done.value)
            else:
                self._link.send("done", task=self._order.task)
            self._order = self._steps = None

    def _do(self, order: Order) -> Steps:
        """Yield what the user's code must do for an order; return the reply's fields."""
        task = TaskId.parse(order.task)
        if order.model is None:
            raise InvalidArgumentError(f"task {order.task} came without a model")
        context = api.Context(
            run=self._start.run,
            round=task.round,
            seed=order.seed,
            site=self._start.site,
            args=copy.deepcopy(self._start.args),
            data={name: Path(path) for name, path in self._start.data.items()},
            state_dir=self._box / STATE_FOLDER,
            rank=self._start.rank,
            world_size=self._start.world_size,
        )
        if task.kind == TRAIN:
            return self._train(context, load(Path(order.model)))
        return self._validate(context, load(Path(order.model)))

    def _train(self, context: api.Context, model: dict[str, Array]) -> Steps:
        manifest = Manifest.of(model)
        watched = self._start.watch_metric
        nothing = api.ValidateResult({}, 0)
        received, local = nothing, nothing
        if watched:
            received = yield from self._measure("validate_received", context, model)
        self._enter("train")
        answer = yield api.Task("train", dict(model), context)
        result = self._box / RESULT_FILE
        if self._leads:
            trained = api.check_train(answer, manifest, partial=self._start.partial)
            whole = trained.model
            if self._start.delta or self._start.partial:
                save(self._box / UPDATE_FILE, trained.model)
                whole = whole_model(model, trained.model, delta=self._start.delta)
            save(result, whole)
        else:  # what it returned, if anything, does not count
            trained = api.TrainResult({}, 0)
            if watched:
                self._await_trained()
        if watched:
            local = yield from self._measure("validate_trained", context, load(result))
        return {
            "file": RESULT_FILE,
            "examples": trained.examples,
            "metrics": trained.metrics,
            "received": received.metrics,
            "received_examples": received.examples,
            "local": local.metrics,
            "local_examples": local.examples,
        }

    def _validate(self, context: api.Context, model: dict[str, Array]) -> Steps:
        measured = yield from self._measure("validate", context, model)
        return {
            "file": None,
            "examples": measured.examples,
            "metrics": measured.metrics,
            "received": {},
            "received_examples": 0,
            "local": {},
            "local_examples": 0,
        }

    def _measure(
        self, phase: str, context: api.Context, model: dict[str, Array]
    ) -> Generator[api.Task, object, api.ValidateResult]:
        self._enter(phase)
        answer = yield api.Task("validate", dict(model), context)
        if not self._leads:
            return api.ValidateResult({}, 0)
        watched = "" if phase == "validate" else self._start.watch_metric
        return api.check_validate(answer, watched)

    def _enter(self, phase: str) -> None:
        if self._leads:
            self._link.send("phase", phase=phase)

    def _await_trained(self) -> None:
        """Wait for the model of rank 0, which is the one that all ranks validate."""
        if self._link.next()["type"] != "trained":
            self.ended = True
            raise FailedPreconditionError("the run ended before rank 0 had trained")


def _functions(name: str) -> None:
    """Call the functions of a module until the run ends."""
    module = importlib.import_module(name)
    _function(module, TRAIN if hasattr(module, TRAIN) else "validate")
    while (task := api.receive()) is not None:
        api.send(_function(module, task.kind)(task.model, task.context))


def _function(module: ModuleType, kind: str) -> Callable[[dict[str, Array], api.Context], Any]:
    function = getattr(module, kind, None)
    if not callable(function):
        raise FailedPreconditionError(
            f"module {module.__name__!r} has no function {kind}(model, context)"
        )
    return function  # type: ignore[no-any-return]


def _script(path: Path) -> None:
    """Run a script until its loop ends."""
    sys.argv = [str(path)]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as leaving:
        if leaving.code:
            raise


def serve(session: Session, body: Callable[[], None]) -> int:
    """Run the user's code until the run ends, again after an error; return the exit status."""
    while not session.ended:
        before = session.orders
        try:
            body()
            if session.busy:
                session.fail(FailedPreconditionError("the script ended before send()"))
            elif session.orders == before and not session.ended:
                raise FailedPreconditionError("the script ended without calling receive()")
        except BaseException as error:  # noqa: BLE001 - also a sys.exit() of the user's code
            session.fail(error)
            if session.orders == before:
                return 1
    return 0


def _limit(start: Start) -> None:
    faulthandler.enable()
    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if start.memory_limit_bytes:
        # RLIMIT_AS would count mapped models and what CUDA reserves without using it.
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        allowed = start.memory_limit_bytes
        limit = allowed if hard == resource.RLIM_INFINITY else min(allowed, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def main() -> int:
    """Connect to the parent, load the job's code and serve it; return the exit status."""
    scratch = Path(sys.argv[1])
    secret = (scratch / SECRET).read_text()
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(scratch / SOCKET))
    link = Link(connection)
    link.send("hello", secret=secret, rank=int(os.environ.get("RANK", "0")))
    frame = link.next()
    frame.pop("type")
    start = Start(**frame)
    _limit(start)
    session = Session(link, start)
    api.attach(session)
    sys.path.insert(0, start.code)
    if start.module:
        return serve(session, lambda: _functions(start.module))
    return serve(session, lambda: _script(Path(start.code, start.script)))


if __name__ == "__main__":
    sys.exit(main())
