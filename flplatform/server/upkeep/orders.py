"""The check of start orders: what is stored is what an admin signed.

Whether the signer was trusted is not asked: certificates end, are renewed and revoked, and sites
have judged that at the time.
"""

import base64
from collections.abc import Iterator

from cryptography.exceptions import UnsupportedAlgorithm

from flplatform.core import events as ev
from flplatform.core.config import parse_json
from flplatform.core.errors import FLError
from flplatform.security.signing import Signed, StartOrder, check_signature
from flplatform.server.upkeep.findings import RESTORE, Finding
from flplatform.server.upkeep.history import History

ORDER = "signed order"


def check_orders(history: History) -> Iterator[Finding]:
    """Find start orders whose signature does not hold, or that are of another job."""
    for _, run in sorted(history.runs.items()):
        events = run.stream.events
        opened = events[0][1] if events else None
        for row, event in events:
            if isinstance(event, ev.RunOpened | ev.TargetsAdded) and (
                why := _why_wrong(event, opened)
            ):
                yield Finding(run.stream.name, ORDER, why, RESTORE, row.seq)


def _why_wrong(event: ev.RunOpened | ev.TargetsAdded, opened: ev.Event | None) -> str:
    try:
        signed = Signed.from_bytes(base64.b64decode(event.order, validate=True))
        check_signature(StartOrder.TAG, signed)
        order = parse_json(StartOrder, signed.payload, "start order")
    except (FLError, UnsupportedAlgorithm, ValueError) as error:
        return " ".join(str(error).split())
    if isinstance(event, ev.RunOpened) and order.submission_id != event.submission_id:
        return f"the order is for submission {order.submission_id}, not {event.submission_id}"
    digest = f"blake3:{order.job_digest}"
    if isinstance(opened, ev.RunOpened) and digest != opened.job_blob.digest:
        return f"the order is to start {digest}, and the run is of {opened.job_blob.digest}"
    return ""
