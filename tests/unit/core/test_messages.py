"""Task ids, seeds and the bounds of what a site reports."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flplatform.core.errors import InvalidArgumentError
from flplatform.core.messages import (
    MAX_EXAMPLES,
    RESERVED_SITE_NAMES,
    SITE_NAME,
    TaskId,
    check_examples,
    check_metrics,
    task_seed,
)

SITES = st.from_regex(SITE_NAME, fullmatch=True).map(lambda name: name.rstrip("\n"))
KINDS = st.sampled_from(["train", "submit_model"]) | SITES.map(lambda name: f"validate.{name}")
NUMBERS = st.integers(0, 999_999_999)


@settings(deadline=None)
@given(task=st.builds(TaskId, run=NUMBERS, round=NUMBERS, kind=KINDS, site=SITES))
def test_a_task_id_reads_as_it_is_written(task: TaskId) -> None:
    assert TaskId.parse(str(task)) == task


@pytest.mark.parametrize(
    "text",
    [
        "", "1/2/train", "1/2/train/a/b", "x/2/train/a", "-1/2/train/a", "1/2/learn/a",
        "1/2/validate./a", "1/2/validate/a", "1/2/validate.A/a", "1/2/train/A", "1/2/train/",
        "1/2/train/../a", "1/2/train/a\n", "1 /2/train/a", "1234567890/2/train/a",
        "1/2/train/" + "a" * 64, "1/2/train/" + "a" * 500,
    ],
)  # fmt: skip
def test_what_is_no_task_id_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="run/round/kind/site") as caught:
        TaskId.parse(text)
    assert len(str(caught.value)) < 250


def test_a_validate_task_names_the_models_owner() -> None:
    assert TaskId.parse("1/2/validate.global/site-1").owner == "global"
    assert TaskId.parse("1/2/train/site-1").owner == ""


def test_no_site_may_have_a_reserved_name() -> None:
    assert {"server", "all", "global", "last"} <= RESERVED_SITE_NAMES


def test_seeds_depend_on_every_part_and_never_on_the_run() -> None:
    assert task_seed(1, 2, "train", "a") == 3098885521272977076
    parts = [(1, 2, "train", "a"), (2, 2, "train", "a"), (1, 3, "train", "a"),
             (1, 2, "submit_model", "a"), (1, 2, "train", "b")]  # fmt: skip
    seeds = {task_seed(*part) for part in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_metrics_in_bounds_pass() -> None:
    assert check_metrics({"val loss": -0.5, "n": 3}) == {"val loss": -0.5, "n": 3}


@pytest.mark.parametrize(
    ("metrics", "where"),
    [
        ({"a": math.nan}, r"metrics\['a'\]"),
        ({"a": math.inf}, r"metrics\['a'\]"),
        ({"a": -math.inf}, r"metrics\['a'\]"),
        ({"": 1.0}, "metrics"),
        ({"a\n": 1.0}, "printable"),
        ({"a" * 101: 1.0}, "1 to 100"),
        ({str(n): 1.0 for n in range(201)}, "has 201 entries"),
    ],
)
def test_metrics_out_of_bounds_are_refused(metrics: dict[str, float], where: str) -> None:
    with pytest.raises(InvalidArgumentError, match=where):
        check_metrics(metrics)


def test_examples_have_bounds() -> None:
    assert check_examples(0) == 0
    assert check_examples(MAX_EXAMPLES) == MAX_EXAMPLES
    for examples in (-1, MAX_EXAMPLES + 1):
        with pytest.raises(InvalidArgumentError, match="examples"):
            check_examples(examples)
