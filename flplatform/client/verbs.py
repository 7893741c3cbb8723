"""What a signed command may make this site do: a closed table of `SiteVerb`s.

A verb is added by putting it into the table that `client.client` builds. The agent in
`client.requests` has verified signature, targets, role, policy and single use before `act` runs.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flplatform.security.authz import Permission
from flplatform.security.identity import Identity
from flplatform.security.signing import CommandOrder

Body = Mapping[str, Any]
"""A reply: a JSON object, at most 1 MiB encoded."""

Submitter = tuple[str, str]
"""Name and organisation of who submitted the run that a command is about; empty for none."""


def targets(argv: Sequence[str], site: str) -> bool:
    """Return whether the words that the user typed reach `site`.

    `VERB all`, `VERB client` and `VERB client … site …` do.
    """
    words = [word for word in argv[1:] if not word.startswith("-")]
    if words[:1] == ["all"]:
        return True
    return words[:1] == ["client"] and (len(words) == 1 or site in words[1:])


def everyone(_argv: Sequence[str], _site: str) -> bool:
    """Reach whom the command is sent: for verbs whose words name no hosts."""
    return True


def nobodys(_signer: Identity, _argv: Sequence[str]) -> Submitter:
    """Say that a command is about no run."""
    return "", ""


def own(signer: Identity, _argv: Sequence[str]) -> Submitter:
    """Say that a command is about a submission of the signer's own."""
    return signer.name, signer.organisation


@dataclass(frozen=True, slots=True)
class Asked:
    """One verified command.

    Attributes:
        request_id: the relay's id of the request.
        signer: whom the signature names; the only identity to go by.
        order: what was signed, the words that the user typed among it.
        body: what the server adds, JSON, unsigned: it may narrow a command, never widen it.
    """

    request_id: str
    signer: Identity
    order: CommandOrder
    body: bytes


@dataclass(frozen=True, slots=True)
class SiteVerb:
    """One verb of the table.

    Attributes:
        name: the console's verb.
        permission: the right that it needs here, by role and by this site's own policy.
        act: carries it out and returns what the row shows.
        mutating: whether it changes anything, and so is audited before it starts.
        reaches: (argv, site) -> whether the signed words mean this site.
        submitter: (signer, argv) -> whose run the command is about, for conditions such as
            `n:submitter`.
        repeatable: whether the same order may come again while it is fresh, as after a restart of
            this site: only for verbs that change nothing and tell no more the second time.
    """

    name: str
    permission: Permission
    act: Callable[[Asked], Awaitable[Body]]
    mutating: bool = False
    reaches: Callable[[Sequence[str], str], bool] = targets
    submitter: Callable[[Identity, Sequence[str]], Submitter] = nobodys
    repeatable: bool = False
