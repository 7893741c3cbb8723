"""Registries: names and typed arguments, nothing imported by name."""

import pytest
from pydantic import BaseModel, ConfigDict

from flplatform.core.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError
from flplatform.core.plugins import Registry


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    size: int = 1


class Args(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    factor: float
    inner: Inner = Inner()


@pytest.fixture
def registry() -> Registry[tuple[str, Args]]:
    made: Registry[tuple[str, Args]] = Registry("thing")
    made.register("beta", Args, lambda args: ("beta", args))
    made.register("alpha", Args, lambda args: ("alpha", args))
    return made


def test_names_are_sorted_and_taken_once(registry: Registry[tuple[str, Args]]) -> None:
    assert registry.names() == ["alpha", "beta"]
    with pytest.raises(AlreadyExistsError, match="thing 'beta' is registered already"):
        registry.register("beta", Args, lambda args: ("other", args))


def test_a_factory_gets_checked_arguments(registry: Registry[tuple[str, Args]]) -> None:
    made = registry.create("beta", {"factor": 2.0, "inner": {"size": 3}})
    assert made == ("beta", Args(factor=2.0, inner=Inner(size=3)))


def test_an_unknown_name_lists_the_known(registry: Registry[tuple[str, Args]]) -> None:
    with pytest.raises(NotFoundError, match="no thing 'os.system'; known: alpha, beta"):
        registry.create("os.system", {}, "aggregator")


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        ({}, "args.factor"),
        ({"factor": "much"}, "args.factor"),
        ({"factor": 1.0, "more": 1}, "args.more"),
        ({"factor": 1.0, "inner": {"size": "x"}}, "args.inner.size"),
    ],
)
def test_a_wrong_argument_is_named_by_its_path(
    registry: Registry[tuple[str, Args]], arguments: dict[str, object], path: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        registry.create("alpha", arguments)
    assert caught.value.field == path
    with pytest.raises(InvalidArgumentError) as caught:
        registry.create("alpha", arguments, "steps[0].aggregator")
    assert caught.value.field == f"steps[0].aggregator.{path}"
