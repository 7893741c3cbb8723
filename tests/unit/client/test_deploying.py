import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from flplatform.client.deploying import deploy_verb, reaches
from flplatform.client.verbs import Asked
from flplatform.core.errors import FLError
from flplatform.hci.grammar import tokenise

QUESTION = {
    "job": "heart",
    "has_code": True,
    "data": ["heart"],
    "environment": "default",
    "sites": [],
}


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("deploy heart all", True),
        ("deploy heart client", True),
        ("deploy heart client a b", True),
        ("deploy heart client b", False),
        ("deploy heart server", False),
        ("deploy a client b", False),
        ("deploy all client b", False),
        ("deploy heart client b --run 7", False),
        ("deploy heart client a --run 7", True),
        ("deploy heart --run 7 client a", True),
        ("deploy --run 7 heart all", True),
        ("deploy --run=7 heart all", True),
        ("deploy heart server --run a", False),
        ("deploy heart", False),
        ("deploy", False),
    ],
)
def test_the_words_after_the_job_say_who_is_meant(line: str, meant: bool) -> None:
    assert reaches(tokenise(line), "a") is meant


class Policy:
    """Stands for `client.policy.Policy`."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}

    def check_job(self, submitter: str, author: str, **needs: Any) -> Any:
        self.asked = {"submitter": submitter, "author": author, **needs}
        return SimpleNamespace(isolation="sandbox")


def ask(policy: Policy, body: bytes) -> Any:
    verb = deploy_verb(policy)  # type: ignore[arg-type]
    return asyncio.run(verb.act(Asked("1", "amy", None, body)))  # type: ignore[arg-type]


def test_the_answer_is_the_policys() -> None:
    policy = Policy()
    assert ask(policy, json.dumps(QUESTION).encode()) == {"isolation": "sandbox"}
    assert policy.asked == {
        "submitter": "amy",
        "author": "amy",
        "has_code": True,
        "data": ("heart",),
        "environment": "default",
    }


@pytest.mark.parametrize("body", [b"", b"[]", json.dumps({**QUESTION, "data": 1}).encode()])
def test_a_body_that_is_no_question_is_refused(body: bytes) -> None:
    with pytest.raises(FLError):
        ask(Policy(), body)
