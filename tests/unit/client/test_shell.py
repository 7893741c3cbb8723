"""A look at a site, as signed by an admin."""

import asyncio
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from flplatform.client.shell import SiteShell, reaches
from flplatform.client.verbs import Asked
from flplatform.core.config import SitePolicy
from flplatform.core.errors import FLError, InvalidArgumentError, PermissionDeniedError
from flplatform.files import shell_words
from flplatform.security.signing import CommandOrder

ALL = shell_words.COMMANDS


class Audit:
    def __init__(self):
        self.records = []
        self.full = False

    def record(self, actor, action, decision, *, details, correlation_id, **_):
        if self.full:
            raise OSError(28, "No space left on device")
        self.records.append((actor["name"], action, decision, details["arguments"], correlation_id))


@pytest.fixture
def site(tmp_path):
    """A kit with everything in it that nobody may see, and a little that somebody may."""
    for path, text in {
        "startup/participant.key": "key",
        "local/policy.yml": "policy",
        "local/datasets.yml": "datasets",
        "logs/site.log": "started\n",
        "logs/run-7.log": "step 1\n",
        "state/audit.jsonl": "audit",
        "state/seen.json": "seen",
        "state/spool/7/result": "result",
        "state/blobs/55": "weights",
        "state/work/x": "x",
        "state/runs/submissions.json": "{}",
        "state/runs/run-7/start.json": "order",
        "state/runs/run-7/state/1/best.safetensors": "weights",
        "state/runs/run-7/code/train.py": "print()\n",
        "state/runs/run-7/process/secret": "secret",
        "state/runs/run-7/process/inbox/model.safetensors": "weights",
        "state/runs/run-7/process/box/state/count": "3",
        "state/runs/.tmp-8/code/x.py": "",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    kit = SimpleNamespace(
        folder=tmp_path,
        state_folder=lambda: tmp_path / "state",
        identity=SimpleNamespace(project="heart", name="site-1"),
    )
    found = SimpleNamespace(audit=Audit(), policy=SitePolicy(allowed_shell_cmds=ALL))
    site_shell = SiteShell(kit, lambda: found.policy, found.audit, "sandbox")
    verbs = {verb.name: verb for verb in site_shell.verbs()}

    def look(*argv):
        now = datetime.now(UTC)
        order = CommandOrder(
            project="heart",
            issued_at=now,
            not_after=now + timedelta(seconds=60),
            id="0" * 32,
            argv=argv,
        )
        signer = SimpleNamespace(as_actor=lambda: {"name": "amy"})
        body = asyncio.run(verbs[argv[0]].act(Asked("request-1", signer, order, b"")))
        return body["text"]

    found.look, found.verbs = look, verbs
    return found


def test_what_a_site_shows(site):
    assert site.look("ls", "client", "-R").splitlines() == [
        "/:", "logs/", "runs/", "", "logs:", "run-7.log", "site.log", "", "runs:", "7/", "",
        "runs/7:", "box/", "code/", "", "runs/7/box:", "state/", "", "runs/7/box/state:", "count",
        "", "runs/7/code:", "train.py",
    ]  # fmt: skip
    assert site.look("cat", "client", "logs/run-7.log") == "step 1\n"
    assert site.look("cat", "client", "site-1", "runs/7/code/train.py") == "print()\n"
    assert "FLP_ISOLATION=sandbox\n" in site.look("env", "all")


@pytest.mark.parametrize(
    "path",
    ["runs/7/start.json", "runs/7/state/1/best.safetensors", "runs/7/process/secret",
     "runs/7/inbox/model.safetensors", "runs/submissions.json", "runs/run-7/start.json",
     "logs/../startup/participant.key", "startup/participant.key", "runs/8/code/x.py",
     "runs/7/box/../../start.json", "/etc/passwd", "state/audit.jsonl", "local/policy.yml"],
)  # fmt: skip
def test_what_it_does_not(site, path):
    for command in ("cat", "head", "tail", "ls"):
        with pytest.raises(FLError):
            site.look(command, "client", "--", path)
    with pytest.raises(FLError):
        site.look("grep", "client", "x", "--", path)


@pytest.mark.parametrize("command", ALL)
def test_everything_is_off_unless_the_policy_of_now_lists_it(site, command):
    operands = {"grep": ("x", "logs/site.log"), "pwd": (), "env": ()}.get(
        command, ("logs/site.log",)
    )
    site.look(command, "client", *operands)
    others = tuple(name for name in ALL if name != command)
    for allowed in ((), others):
        site.policy = SitePolicy(allowed_shell_cmds=allowed)
        with pytest.raises(PermissionDeniedError) as caught:
            site.look(command, "client", *operands)
        assert caught.value.rule == f"policy allowed_shell_cmds = {', '.join(allowed) or 'none'}"


def test_a_look_is_audited_first_with_its_words(site):
    site.look("cat", "client", "logs/site.log")
    words = '["cat", "client", "logs/site.log"]'
    assert site.audit.records == [("amy", "cat", "allowed", words, "request-1")]
    site.audit.full = True
    with pytest.raises(OSError, match="No space"):
        site.look("cat", "client", "logs/site.log")


@pytest.mark.parametrize(
    ("words", "reached"),
    [
        ("ls client", True),
        ("ls client site-1 logs", True),
        ("ls client site-2 logs", False),
        ("cat client site-2 site-1 logs/x", True),
        ("cat client logs/site-1", True),
        ("cat client site-2 logs/site-1", False),
        ("ls server site-1", False),
        ("ls server logs", False),
        ("pwd all", True),
    ],
)
def test_whom_signed_words_reach(site, words, reached):
    argv = words.split()
    assert site.verbs[argv[0]].reaches is reaches
    if words == "ls server site-1":  # it cannot be read: `act` says why
        with pytest.raises(InvalidArgumentError):
            site.look(*argv)
    else:
        assert reaches(argv, "site-1") is reached
