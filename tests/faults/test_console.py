"""Consoles killed in the middle of their commands; a new console does the same again."""

import os
import random
from pathlib import Path

import psutil
import pytest

from flplatform.core import events as ev
from tests.faults.conftest import LONG
from tests.faults.footprint import temporary_files
from tests.faults.proxy import Proxy
from tests.scenarios.test_why import Talk
from workspaces.running import ADMIN

pytestmark = pytest.mark.timeout(900 if LONG else 300)

KILLS = 20 if LONG else 1
"""Of each command; of the submission one more."""
FLOATS = 80_000
SPEED = 800_000
"""Bytes in a second to and from the console, so that there is a middle to be killed in."""
TALK = 25_000
"""More than signing in and asking take, in bytes."""


class Fragile:
    """Consoles behind a slow proxy that die at a point drawn from a seed.

    Attributes:
        talk: a console of the test's own, which stays and uses no proxy.
    """

    def __init__(self, federation, proxy: Proxy, draw: random.Random) -> None:
        self.federation = federation
        self.proxy = proxy
        self.draw = draw
        self.moved: dict[str, int] = {}
        self.talk = Talk(federation)
        assert self.talk.ask("ops")["ok"]
        federation.local(ADMIN, "overrides.yml", f'servers: ["localhost:{proxy.port}"]\n')
        proxy.change(bytes_s=SPEED)

    def kill_in(self, line: str, most: int) -> None:
        """Kill a console once some bytes of its command have passed, at most `most`.

        Who ends before that tells how many are enough: what is there is not uploaded again.
        """
        start = self.proxy.passed
        point = start + self.draw.randrange(min(most, self.moved.get(line, most)))
        with self.federation.talking(line) as console:
            self.federation.wait_for(
                lambda: console.poll() is not None or self.proxy.passed >= point,
                f"byte {point} of {line!r}",
            )
            if console.poll() is None:
                console.kill()
                self.federation.tally.fault(f"console killed in {line.split()[0]}")
            else:
                self.moved[line] = self.proxy.passed - start

    def again(self, line: str) -> dict:
        """Have a living console do something, once the server knows of the other's end."""
        answers: list[dict] = []

        def answered() -> bool:
            answers.append(self.talk.ask(line))
            return "is being received right now" not in str(answers[-1])

        self.federation.wait_for(answered, f"an answer to {line!r}", deadline_s=60)
        assert answers[-1]["ok"], str(answers[-1])
        return answers[-1]

    def quiet(self, files: int) -> None:
        """See to it that the server holds nothing for those who have gone."""
        server = psutil.Process(self.federation.processes["server"].pid)
        told = [""]

        def let_go() -> bool:
            commands = [row["target"] for row in self.again("ops --all")["rows"]]
            told[0] = f"{commands}, {server.num_fds()} of {files} open files"
            return len(commands) <= 1 and server.num_fds() <= files + 3

        self.federation.wait_for(let_go, "the server to let go", deadline_s=60)
        left = temporary_files(self.federation.kit("server"))
        assert not left, left


@pytest.fixture
def fragile(faulty, monkeypatch, tmp_path):
    """Start a federation and what kills its consoles."""
    federation = faulty("site-1")
    federation.start_all()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    seed = int(os.environ.get("FAULTS_SEED", random.randrange(1 << 24)))
    federation.tally.seeds.append(seed)
    with Proxy(federation.ports["admin_port"]) as proxy:
        made = Fragile(federation, proxy, random.Random(seed))
        yield made
        made.talk.close()


def numbered(federation, name: str) -> list[int]:
    found = [e for e in federation.federation_events() if isinstance(e, ev.RunNumbered)]
    return [event.run for event in found if event.job_name == name]


def test_killed_in_the_middle_of_its_commands(fragile):
    federation = fragile.federation
    server = psutil.Process(federation.processes["server"].pid)
    fragile.again(f"submit_job {federation.job('calm', rounds=1, floats=FLOATS)} --wait")
    calm = federation.run_of("calm")
    files = server.num_fds()
    transfer = federation.kit(ADMIN) / "transfer"
    size = 4 * FLOATS + TALK

    identity = f"{fragile.draw.getrandbits(128):032x}"
    job = federation.job("once", rounds=1, floats=FLOATS + 1)
    for _ in range(KILLS + 1):
        fragile.kill_in(f"submit_job {job} --submission {identity}", size)
    fragile.again(f"submit_job {job} --submission {identity}")
    federation.wait_event(federation.run_of(job), ev.RunEnded)
    assert len(numbered(federation, job)) == 1, "one submission, one run"
    federation.check(federation.run_of(job))

    job = federation.job("staged", rounds=1, floats=FLOATS + 2)
    for _ in range(KILLS):
        fragile.kill_in(f"upload_folder {job}", size)
    fragile.again(f"upload_folder {job}")
    staged = [e for e in federation.federation_events() if isinstance(e, ev.JobStaged)]
    assert {event.name for event in staged} == {job}
    assert [row[0] for row in fragile.again("list_jobs")["tables"][0]["rows"]] == [job]

    model = transfer / "model.safetensors"
    whole = transfer / "whole.safetensors"
    fragile.again(f"download_model {calm} --to {whole}")
    for _ in range(KILLS):
        fragile.kill_in(f"download_model {calm} --to {model}", size)
        if model.exists():
            assert model.read_bytes() == whole.read_bytes(), "a model is there whole or not at all"
            model.unlink()
    fragile.again(f"download_model {calm} --to {model}")
    assert model.read_bytes() == whole.read_bytes()

    let_go = federation.hold("site-1", 1)
    job = federation.job("ended", rounds=1, floats=10)
    fragile.again(f"submit_job {job}")
    run = federation.run_of(job)
    federation.wait_event(run, ev.RoundOpened)
    for _ in range(KILLS):
        fragile.kill_in(f"abort all --run {run}", TALK)
    answer = fragile.talk.ask(f"abort all --run {run}")
    assert answer["ok"] or "aborted" in str(answer), answer
    federation.wait_event(run, ev.RunEnded)
    let_go()
    federation.check(run, status="aborted")
    fragile.quiet(files)


@pytest.mark.faults_long
def test_a_submission_that_was_accepted_and_is_given_again_names_its_run(fragile):
    line = f"submit_job {fragile.federation.job('twice', rounds=1)} --submission {'2' * 32}"
    first = fragile.again(line)["data"]["submission"]["run"]
    assert fragile.again(line)["data"]["submission"]["run"] == first


@pytest.mark.faults_long
def test_what_a_killed_console_leaves_is_cleared_away(fragile, tmp_path: Path):
    federation = fragile.federation
    fragile.again(f"submit_job {federation.job('calm', rounds=1, floats=FLOATS)} --wait")
    fragile.talk.close()
    job = federation.job("left", rounds=1, floats=FLOATS + 1)
    line = f"submit_job {job} --submission {'1' * 32}"
    with federation.talking(line) as console:
        federation.wait_for(lambda: any(tmp_path.glob("fl-submit-*")), "its folder")
        console.kill()
    fragile.talk = Talk(federation)
    fragile.again(line)
    assert not any(tmp_path.glob("fl-submit-*"))
