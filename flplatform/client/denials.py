"""What this site knows of denied names: verified here, kept on disk, never forgotten.

The server only carries denials. It can withhold one, but it cannot forge one, undo one, or make
this site forget what it has learnt.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from flplatform.core.errors import FLError
from flplatform.core.strict import FromNewer, Strict, parse_json
from flplatform.files.durable import write_atomic
from flplatform.security.denials import Denial, Denials, decode, open_denial, read_denial
from flplatform.security.identity import TrustStore
from flplatform.security.signing import MAX_SKEW_S

log = logging.getLogger(__name__)

DENIALS = "denials"
"""Topic of the requests that carry them."""

MAX_ORDERS = 2000
"""Most denials that one request may carry."""


class DenialsBody(FromNewer):
    """What the server carries: signed orders, base64."""

    orders: Annotated[tuple[str, ...], Field(max_length=MAX_ORDERS)]


class DenialFile(Strict):
    """`denials.json` in the site's state."""

    api_version: Literal[1] = 1
    orders: tuple[str, ...] = ()


class DenialBook:
    """The site's set of denials and its file.

    Args:
        path: the file, made with the first denial.
        trust: returns the trust store of now.
        skew_s: how far a signer's clock may be off.

    Raises:
        FLError: the file is damaged; going on without it would admit who is denied.
        OSError: it cannot be read.
    """

    def __init__(
        self, path: Path, trust: Callable[[], TrustStore], skew_s: float = MAX_SKEW_S
    ) -> None:
        self._path = path
        self._trust = trust
        self._skew_s = skew_s
        self._lock = threading.Lock()
        self.denials = Denials()
        if path.exists():
            for text in parse_json(DenialFile, path.read_bytes(), str(path)).orders:
                self.denials.add(read_denial(text))

    def take(self, body: bytes) -> Mapping[str, Any]:
        """Take in what the server carries; durable on return. Thread-safe.

        One that does not hold is refused and named; the others count all the same.

        Raises:
            InvalidArgumentError: the body is malformed.
            OSError: the file cannot be written; nothing was learnt then.
        """
        orders = parse_json(DenialsBody, body, DENIALS).orders
        with self._lock:
            return self._take(orders)

    def _take(self, orders: Sequence[str]) -> Mapping[str, Any]:
        now, refused, news = datetime.now(UTC), [], []
        learnt = Denials(self.denials.words())
        for text in orders:
            try:
                word = self._open(text, now, learnt)
            except FLError as error:
                log.warning("a denial is refused: %s", error)
                refused.append({"rule": error.rule or "signature", "message": error.message})
                continue
            if learnt.add(word):
                news.append(word)
        if news:
            kept = tuple(word.to_text() for word in learnt.words())
            write_atomic(self._path, DenialFile(orders=kept).model_dump_json().encode())
            for word in news:
                self.denials.add(word)
                what = "is not denied any more" if word.undo else "is denied"
                log.warning("%s %s %s, by %s", word.kind, word.name, what, word.by)
        return {"news": len(news), "refused": refused[:20]}

    def _open(self, text: str, now: datetime, learnt: Denials) -> Denial:
        signed = decode(text)
        if known := next((each for each in learnt.words() if each.signed == signed), None):
            return known
        return open_denial(signed, self._trust(), now, learnt, fresh=False, skew_s=self._skew_s)
