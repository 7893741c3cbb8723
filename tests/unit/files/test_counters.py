"""Sums and durations."""

import asyncio
import math

from hypothesis import given
from hypothesis import strategies as st

from flplatform.files import counters as module
from flplatform.files.counters import OTHERS, SMALLEST_S, Counters, Durations, watch_loop

SECONDS = st.floats(0, 200)


def test_sums():
    counters = Counters()
    counters.add("bytes", "a", 5)
    counters.add("bytes", "b", 7)
    counters.add("bytes", "a")
    assert counters.sums("bytes") == {"a": 6, "b": 7}
    assert (counters.sum("bytes"), counters.sum("nothing")) == (13, 0)
    assert counters.sums("nothing") == {}


def test_keys_are_bounded():
    counters = Counters()
    for number in range(2 * module.MAX_KEYS):
        counters.add("bytes", str(number))
        counters.took("rpc", str(number), 1.0)
    assert counters.sums("bytes")[OTHERS] == module.MAX_KEYS
    assert counters.durations("rpc")[OTHERS]["count"] == module.MAX_KEYS
    assert len(counters.durations("rpc")) == module.MAX_KEYS + 1
    counters.add("bytes", "7")
    assert counters.sums("bytes")["7"] == 2


@given(st.lists(SECONDS, min_size=1, max_size=200), st.sampled_from([0.5, 0.99]))
def test_quantiles_are_off_by_a_bucket_at_most(values, share):
    durations = Durations()
    for value in values:
        durations.add(value)
    true = sorted(values)[math.ceil(share * len(values)) - 1]
    found = durations.quantile(share)
    assert true <= found * (1 + 1e-9) or found == durations.longest_s
    assert found <= max(true * math.sqrt(2) * (1 + 1e-9), SMALLEST_S)


def test_no_durations():
    assert Durations().view() == {"count": 0, "p50_s": 0.0, "p99_s": 0.0, "max_s": 0.0}


def test_a_duration_beyond_all_buckets():
    durations = Durations()
    durations.add(1e9)
    assert durations.view()["count"] == 1


def test_the_loop_is_watched():
    async def scene():
        counters = Counters()
        watching = asyncio.create_task(watch_loop(counters.took, pause_s=0.001))
        async with asyncio.timeout(60):
            while not counters.durations("loop_lag"):
                await asyncio.sleep(0.001)
        watching.cancel()
        assert counters.durations("loop_lag")[""]["count"] >= 1

    asyncio.run(scene())
