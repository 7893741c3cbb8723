"""What a newer server adds to a request does not keep an older site from it."""

import json
from typing import Any

import pytest

from flplatform.client import denials, logs, officer, requests, validating, why
from flplatform.core.strict import FromNewer, parse_json

START = {"run": 1, "digest": "blake3:" + "0" * 64, "size": 1}


@pytest.mark.parametrize(
    "body",
    [
        requests.StartBody, requests.PreflightBody, denials.DenialsBody, validating.ValidationBody,
        officer.CanBody, logs.LogsBody, why.WhyBody,
    ],
)  # fmt: skip
def test_every_unsigned_body_passes_over_what_it_does_not_know(body: Any) -> None:
    assert issubclass(body, FromNewer)


def test_a_start_with_one_more_key() -> None:
    text = json.dumps({**START, "priority": {"class": 3}}).encode()
    assert parse_json(requests.StartBody, text, "start") == requests.StartBody(**START)
