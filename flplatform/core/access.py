"""What a security officer sees and does: who is denied, and whose certificate ends when."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from flplatform.core.control import SiteReply


@dataclass(frozen=True, slots=True)
class DenialView:
    """A denial that is in force.

    Attributes:
        kind: `site` or `admin`.
        organisation: whose names it reaches; empty for every organisation's.
        since: when it was signed, ISO 8601.
    """

    name: str
    kind: str
    organisation: str
    since: str
    by: str
    reason: str


class AccessControl(Protocol):
    """Denials of names, and certificates of sites."""

    def denials(self) -> list[DenialView]:
        """Return the denials in force, oldest first."""

    def denied(self, kind: str, name: str, organisation: str) -> DenialView | None:
        """Return the denial that is in force for a participant, if there is one."""

    async def deny(self, order: bytes, signer: str) -> tuple[str, str, bool]:
        """Take in a signed denial, durably, in force on return.

        Args:
            order: a signed denial, or the undoing of one.
            signer: who must have signed it.

        Returns:
            Kind and name, and whether it is undone.

        Raises:
            FLError: the signature does not hold, or it is not the signer's to give.
            ResourceExhaustedError: it cannot be stored, so nothing has happened.
        """

    async def carry(self, sites: Sequence[str], timeout_s: float) -> dict[str, SiteReply]:
        """Send all denials to sites and wait for their answers; who is silent gets them later."""

    def site_certificates(self) -> Mapping[str, datetime]:
        """Return when the certificate of each site ends that has registered since the start."""
