"""Aggregation of a round: the same closed set, the same digest."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import numpy as np
import pytest
import safetensors.numpy

from flplatform.algorithms.aggregators import AGGREGATORS
from flplatform.algorithms.tiles import Recipe, aggregate
from flplatform.core.errors import InvalidArgumentError, ModelFormatError
from flplatform.core.messages import ModelRef
from flplatform.core.model import Array, Arrays
from flplatform.core.ports import Contribution
from flplatform.files.modelfile import load, save
from flplatform.server import aggregation
from flplatform.server.aggregation import LostInputError, aggregate_round
from flplatform.store.blobs import FileBlobStore

MEAN = Recipe(AGGREGATORS.create("weighted_mean", {"exclude_vars": "flag"}))
SITES = ["delta", "alpha", "charlie", "bravo"]


def model(seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        "big": rng.standard_normal((700, 1000)).astype("f4"),
        "empty": np.zeros((3, 0), "f8"),
        "flag": np.array([seed % 2 == 0]),
        "half": rng.standard_normal(1001).astype("f2"),
        "steps": np.array(seed * 10, "i8"),
        "wide": rng.standard_normal(200_003),
    }


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as made:
        yield made


@pytest.fixture
def store(tmp_path: Path) -> FileBlobStore:
    return FileBlobStore(tmp_path / "blobs")


def put(store: FileBlobStore, arrays: Arrays) -> ModelRef:
    return store.create(lambda path: save(path, arrays) and None)


def closed(store: FileBlobStore) -> list[tuple[str, ModelRef, float]]:
    return [(site, put(store, model(n)), n + 1.0) for n, site in enumerate(SITES)]


def check_equal(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], strict=True)


def test_the_result_is_a_canonical_model_blob(
    store: FileBlobStore, pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    base = put(store, model(9))
    result, state = aggregate_round(store, closed(store), base, MEAN, pool)
    assert state is None
    expected, _ = aggregate(
        MEAN, model(9), [Contribution(s, n + 1.0, model(n)) for n, s in enumerate(SITES)]
    )
    check_equal(load(store.path(result.digest)), expected)
    assert not expected["flag"][0]
    save(tmp_path / "expected", expected)
    assert store.path(result.digest).read_bytes() == (tmp_path / "expected").read_bytes()
    assert result.size == (tmp_path / "expected").stat().st_size


def test_order_threads_and_page_drops_change_nothing(
    store: FileBlobStore, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, updates = put(store, model(9)), closed(store)
    expected = aggregate_round(store, updates, base, MEAN, pool)
    for parts, between in ((1, 1), (2, 1000), (5, 2)):
        monkeypatch.setattr(aggregation, "PARTS", parts)
        monkeypatch.setattr(aggregation, "TILES_BETWEEN_DROPS", between)
        Random(parts).shuffle(updates)
        assert aggregate_round(store, updates, base, MEAN, pool) == expected


def test_a_base_of_another_library_is_read(store: FileBlobStore, pool: ThreadPoolExecutor) -> None:
    foreign = store.create(
        lambda path: safetensors.numpy.save_file(model(9), path, metadata={"by": "hand"})
    )
    own = put(store, model(9))
    assert foreign != own
    updates = closed(store)
    assert aggregate_round(store, updates, foreign, MEAN, pool) == aggregate_round(
        store, updates, own, MEAN, pool
    )


def test_an_update_of_other_tensors_is_refused(
    store: FileBlobStore, pool: ThreadPoolExecutor
) -> None:
    base, updates = put(store, model(9)), closed(store)
    odd = put(store, model(1) | {"half": np.zeros(3, "f2")})
    with pytest.raises(ModelFormatError, match=r"update of alpha\['half'\]"):
        aggregate_round(store, [updates[0], ("alpha", odd, 1.0)], base, MEAN, pool)
    missing = ModelRef("blake3:" + "0" * 64, 1)
    with pytest.raises(LostInputError, match="no blob"):
        aggregate_round(store, [("alpha", missing, 1.0)], base, MEAN, pool)


@pytest.mark.parametrize("weights", [(0.0, 0.0), (1.0, float("inf"))])
def test_a_refusal_leaves_no_blob(
    store: FileBlobStore, pool: ThreadPoolExecutor, weights: tuple[float, float]
) -> None:
    base = put(store, model(9))
    updates = [
        (site, ref, weight) for (site, ref, _), weight in zip(closed(store), weights, strict=False)
    ]
    before = store.digests()
    with pytest.raises(InvalidArgumentError, match="add up to"):
        aggregate_round(store, updates, base, MEAN, pool)
    assert store.digests() == before


def test_rounds_that_fill_the_pool_do_not_wait_for_each_other(store: FileBlobStore) -> None:
    base, updates = put(store, model(9)), closed(store)
    barrier = threading.Barrier(2)

    def work() -> tuple[ModelRef, ModelRef | None]:
        barrier.wait(60)  # both workers of the pool are taken
        return aggregate_round(store, updates, base, MEAN, pool)

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(work) for _ in range(2)]
        one, other = (future.result(30) for future in futures)
    assert one == other
