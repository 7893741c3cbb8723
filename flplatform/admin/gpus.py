"""How many processes work on a job at each site: `2`, or `site=2,site-b=4`."""

from collections.abc import Collection, Mapping, Sequence

from flplatform.core.errors import InvalidArgumentError
from flplatform.hci import did_you_mean

MOST = 1024
"""Processes at one site; see `security.signing.StartOrder`."""


def parse_gpus(words: Sequence[str]) -> tuple[int, Mapping[str, int]]:
    """Return the number for all sites, 0 if there is none, and those of named ones.

    Raises:
        InvalidArgumentError: it is neither a number for all nor SITE=NUMBER for some.
    """
    if len(words) == 1 and "=" not in words[0]:
        return _number(words[0]), {}
    named: dict[str, int] = {}
    for word in words:
        site, equals, number = word.partition("=")
        if not site or not equals:
            raise InvalidArgumentError(f"is N or SITE=N,…, not {word[:80]!r}", field="--gpus")
        if site in named:
            raise InvalidArgumentError(f"names {site} twice", field="--gpus")
        named[site] = _number(number)
    return 0, named


def _number(word: str) -> int:
    if not word.isascii() or not word.isdecimal() or not 1 <= int(word[:9]) <= MOST:
        raise InvalidArgumentError(
            f"{word[:20]!r} is not a number from 1 to {MOST}", field="--gpus"
        )
    return int(word)


def gpus_at(words: Sequence[str], sites: Collection[str]) -> dict[str, int]:
    """Return site -> processes for the target sites of a start.

    Raises:
        InvalidArgumentError: as `parse_gpus`, or a name is not one of the targets.
    """
    everywhere, named = parse_gpus(words)
    for site in named:
        if site not in sites:
            near = did_you_mean(site, sites)
            raise InvalidArgumentError(
                f"{site[:80]!r} is not a target site{near and f', {near}'}", field="--gpus"
            )
    return dict.fromkeys(sites, everywhere) if everywhere else dict(named)
