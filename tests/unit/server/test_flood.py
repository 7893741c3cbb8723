"""A site that calls without end: it is told to wait, others are served, and nothing grows."""

import asyncio
import time
from collections import Counter
from pathlib import Path

import psutil

from flplatform.core.errors import ResourceExhaustedError
from flplatform.rpc.v1 import federated_pb2 as pb
from flplatform.server.server import SITE_CALLS
from tests.support.federation import provision
from tests.unit.server.scene import play, refused, until
from tests.unit.server.test_server import SiteAt, serving

CALLS = 60
"""At once, from one site; a connection carries a hundred."""
FLOODS = 30
MORE_BYTES = 16_000_000
"""What this process may hold more after all floods than after the first of them."""
OTHERS_S = 30.0
"""A heartbeat of another site takes milliseconds, and behind the flood's calls a minute."""


def test_who_floods_the_server_is_told_to_wait_and_others_are_served(tmp_path: Path) -> None:
    federation = provision(tmp_path, reserve_bytes=0, waiting_call_s=60.0)
    answers: Counter[str] = Counter()

    async def call(site: SiteAt) -> None:
        error = await refused(site.session.training("GetTask", pb.GetTaskRequest()))
        assert type(error) is ResourceExhaustedError, error
        assert error.rule == "max_calls"
        assert error.hint, "it is told what to do"
        answers["refused"] += 1

    async def flood(site: SiteAt, other: SiteAt) -> None:
        before = answers["refused"]
        calls = [asyncio.create_task(call(site)) for _ in range(CALLS)]
        await until(lambda: answers["refused"] - before >= CALLS - SITE_CALLS)
        began = time.monotonic()
        await other.session.training("Heartbeat", pb.HeartbeatRequest())
        assert time.monotonic() - began < OTHERS_S
        for each in calls:
            each.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    async def it() -> None:
        async with serving(federation):
            one, two = SiteAt(federation, "site-1"), SiteAt(federation, "site-2")
            for site in (one, two):
                await site.session.register("")
            base = 0
            for number in range(FLOODS):
                await flood(one, two)
                if number == 0:
                    base = psutil.Process().memory_info().rss
            assert psutil.Process().memory_info().rss - base < MORE_BYTES
            await one.session.training("Heartbeat", pb.HeartbeatRequest())
            for site in (one, two):
                await site.session.close("done")

    play(it())
    assert answers["refused"] >= FLOODS * (CALLS - SITE_CALLS)
