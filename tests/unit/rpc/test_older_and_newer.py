"""What earlier releases send is read as they meant it; what later ones add is passed over."""

import json
from typing import Any

import pytest

from flplatform.rpc.v1 import federated_pb2 as pb
from tests.support.wire import GOLDEN, filled, messages, newer, said

FIRST: dict[str, Any] = json.loads(GOLDEN.read_text())


def within(old: Any, new: Any) -> bool:
    """Return whether everything that was said is said still."""
    if isinstance(old, dict):
        return isinstance(new, dict) and all(within(old[key], new.get(key)) for key in old)
    if isinstance(old, list):
        return isinstance(new, list) and all(map(within, old, new))
    return bool(old == new)


@pytest.mark.parametrize("name", FIRST)
def test_messages_of_the_first_release_mean_what_they_meant(name: str) -> None:
    """Neither a message nor a field has gone, changed its number, its type or its name."""
    message = getattr(pb, name).FromString(bytes.fromhex(FIRST[name]["bytes"]))
    assert within(FIRST[name]["says"], said(message))
    assert message.SerializeToString(deterministic=True).hex() == FIRST[name]["bytes"]


def test_every_message_of_the_first_release_is_kept() -> None:
    assert FIRST.keys() <= {kind.DESCRIPTOR.name for kind in messages()}


@pytest.mark.parametrize("kind", messages(), ids=lambda kind: kind.DESCRIPTOR.name)
def test_what_a_later_release_adds_is_passed_over(kind: type[Any]) -> None:
    message = filled(kind)
    longer = newer(filled(kind)).SerializeToString()
    assert len(longer) > len(message.SerializeToString())
    assert said(kind.FromString(longer)) == said(message)
