import asyncio
import json
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from flplatform.client.validating import validation_verb
from flplatform.client.verbs import Asked
from flplatform.core.config import Environment
from flplatform.core.errors import FLError, PermissionDeniedError
from flplatform.security.identity import Identity

END = datetime(2100, 1, 1, tzinfo=UTC)
LEA = Identity("test", "admin", "clinic", "lea", "lead", "ab" * 32, 1, END)
QUESTION = {
    "has_code": True,
    "data": ["heart"],
    "environment": "default",
    "author": "amy",
    "author_organisation": "hub",
    "author_role": "project_admin",
}


class Policy:
    """Stands for `client.policy.Policy`."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}

    def check_job(self, submitter: Identity, author: Identity, **needs: Any) -> Any:
        self.asked = {"submitter": submitter, "author": author, **needs}
        return SimpleNamespace(isolation="sandbox", environment=Environment(max_runs=2))


def ask(policy: Policy, body: bytes, running: int = 0) -> Any:
    verb = validation_verb(policy, lambda: {"default": running})  # type: ignore[arg-type]
    assert (verb.permission, verb.mutating) == ("validate", False)
    return asyncio.run(verb.act(Asked("1", LEA, None, body)))  # type: ignore[arg-type]


def test_the_answer_is_the_policys_about_a_validation() -> None:
    policy = Policy()
    assert ask(policy, json.dumps(QUESTION).encode(), 1) == {"isolation": "sandbox"}
    author = policy.asked.pop("author")
    assert (author.name, author.organisation, author.role) == ("amy", "hub", "project_admin")
    assert policy.asked == {
        "submitter": LEA,
        "has_code": True,
        "data": ("heart",),
        "environment": "default",
        "purpose": "validate",
    }


def test_a_site_that_is_busy_says_so() -> None:
    with pytest.raises(PermissionDeniedError) as error:
        ask(Policy(), json.dumps(QUESTION).encode(), 2)
    assert error.value.rule == "environments.yml: max_runs = 2"


@pytest.mark.parametrize("body", [b"", b"[]", json.dumps({**QUESTION, "data": 1}).encode()])
def test_a_body_that_is_no_question_is_refused(body: bytes) -> None:
    with pytest.raises(FLError):
        ask(Policy(), body)
