"""Results in any order, any number of times, through restarts: each task counts the first of them.

The model is a dict: task id → digest of the result that was accepted.
"""

import asyncio
import tempfile
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from flplatform.core import events as ev
from flplatform.core.errors import AlreadyExistsError, FailedPreconditionError, FLError
from flplatform.core.messages import ModelRef, TaskId
from flplatform.rpc.v1 import federated_pb2 as pb
from tests.unit.server.scene import DEADLINE_S, Scene, until

SITES = ("a", "b")
ROUNDS = 3
T = TypeVar("T")

sites = st.sampled_from(SITES)
values = st.integers(1, 3)
"""Few, so that packets agree and disagree."""
numbers = st.integers(0, 1000)


class Submissions(RuleBasedStateMachine):
    """Packets are made, kept, and sent whenever the machine likes, alone or many at once."""

    scene: Scene

    @initialize()
    def begin(self) -> None:
        self._runner = asyncio.Runner()
        self._folder = tempfile.TemporaryDirectory()
        self._workers = ThreadPoolExecutor(2)
        self.packets: list[pb.SubmitResultRequest] = []
        self.accepted: dict[str, str] = {}
        self.scene = Scene(Path(self._folder.name), self._workers)
        self._do(self._begin())

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        async def bounded() -> T:
            async with asyncio.timeout(DEADLINE_S):
                return await work

        return self._runner.run(bounded())

    async def _begin(self) -> None:
        self.scene.obeying(*SITES)
        await self.scene.submit(SITES, rounds=ROUNDS)
        await self._calm()

    async def _calm(self) -> None:
        """Wait until the server waits for sites, or for nothing any more."""
        await until(lambda: self.scene.runs.ended(1) or any(map(self.scene.runs.tasks.of, SITES)))

    def teardown(self) -> None:
        if not hasattr(self, "scene"):
            return
        try:
            self._do(self._finish())
        finally:
            self._do(self.scene.close())
            self._runner.close()
            self._workers.shutdown()
            self._folder.cleanup()

    async def _finish(self) -> None:
        """Whatever came before, the run can be brought to its end."""
        while not self.scene.runs.ended(1):
            for site in SITES:
                for task in self.scene.runs.tasks.of(site):
                    packet = self.scene.result(task, upload=False)
                    await self._send_all([packet])
            await self._calm()
        await self.scene.ended()
        assert self.scene.events()[-1].status == "finished"
        self._look()
        assert len(self.accepted) == ROUNDS * len(SITES)

    # ---- sites ----

    @rule(site=sites, value=values)
    def work(self, site: str, value: int) -> None:
        """Make a packet for the open task; it is not sent yet."""
        for task in self.scene.runs.tasks.of(site):
            self.packets.append(self.scene.result(task, float(value), upload=False))

    @precondition(lambda self: self.packets)
    @rule(number=numbers)
    def send(self, number: int) -> None:
        """Send a packet of now or of long ago, for the first time or again."""
        self._do(self._send_all([self.packets[number % len(self.packets)]]))

    @precondition(lambda self: self.packets)
    @rule(order=st.lists(numbers, min_size=2, max_size=6))
    def send_many_at_once(self, order: list[int]) -> None:
        self._do(self._send_all([self.packets[number % len(self.packets)] for number in order]))

    @rule(site=sites)
    def ask(self, site: str) -> None:
        """What is open is what has no outcome."""
        open_now = {str(task.id) for task in self.scene.runs.tasks.of(site)}
        assert not open_now & self.accepted.keys()

    @rule(site=sites)
    def register_again(self, site: str) -> None:
        self.scene.live(site)

    @rule()
    def kill(self) -> None:
        self._do(self._kill())

    async def _kill(self) -> None:
        await self.scene.restart()
        self.scene.obeying(*SITES)
        await self._calm()
        self._look()

    # ---- what must come of it ----

    async def _send_all(self, packets: list[pb.SubmitResultRequest]) -> None:
        for packet in packets:
            self._upload(packet)
        open_before = {str(t.id) for site in SITES for t in self.scene.runs.tasks.of(site)}
        answers = await asyncio.gather(*map(self._send, packets))
        for packet, answer in zip(packets, answers, strict=True):
            task, digest = packet.task_id, packet.result.blob.digest
            match answer:
                case "accepted":
                    assert task in open_before, f"{task} was not open"
                    assert task not in self.accepted, f"{task} is accepted twice"
                    self.accepted[task] = digest
                case FLError():
                    assert type(answer) in (AlreadyExistsError, FailedPreconditionError), answer
        for packet, answer in zip(packets, answers, strict=True):
            task, digest = packet.task_id, packet.result.blob.digest
            known = self.accepted.get(task)
            assert known is not None, f"{task} was open and {answer!r} settled nothing"
            if answer == "duplicate":
                assert known == digest, "other bytes are no duplicate"
            if isinstance(answer, AlreadyExistsError):
                assert known != digest, "the same bytes are no contradiction"
        await self._calm()
        self._look()

    def _upload(self, packet: pb.SubmitResultRequest) -> None:
        """Uploads are repeated as far as the task is open, as a site does it."""
        if packet.task_id not in self.accepted:
            blob = ModelRef(packet.result.blob.digest, packet.result.blob.size)
            assert blob in [self.scene.model(float(value)) for value in range(1, 4)]
            self.scene.runs.uploads.note(TaskId.parse(packet.task_id), blob.digest)

    async def _send(self, packet: pb.SubmitResultRequest) -> str | FLError:
        try:
            return await self.scene.training.submit_result(packet.task_id.split("/")[-1], packet)
        except FLError as error:
            return error

    def _look(self) -> None:
        """The log says the same as the dict."""
        logged = [(e.task_id, e.digest) for e in self.scene.events(kind=ev.UpdateAccepted)]
        assert sorted(logged) == sorted(self.accepted.items())
        for closed in self.scene.events(kind=ev.RoundClosed):
            counted = {f"1/{closed.round}/train/{c.site}": c.digest for c in closed.contributions}
            assert counted == {
                task: digest
                for task, digest in self.accepted.items()
                if task.split("/")[1] == str(closed.round)
            }


TestSubmissions = Submissions.TestCase
TestSubmissions.settings = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # a lost packet takes long to shrink
)
