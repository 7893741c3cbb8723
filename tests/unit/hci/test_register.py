import dataclasses
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flplatform.core.errors import InternalError, InvalidArgumentError
from flplatform.hci.register import CommandRegister
from flplatform.hci.spec import CommandSpec, argument


@dataclass(frozen=True)
class Args:
    n: int = argument(help="n", default=1)


async def nothing(_connection, _args) -> None: ...


GOOD = CommandSpec(
    "look", "looks", Args, nothing, "view", False, ("look", "see 3"), aliases=("see",)
)


class Module:
    summary = "for tests"

    def __init__(self, *specs, name="things"):
        self.name = name
        self._specs = specs

    def commands(self):
        return self._specs


def test_find_by_name_and_alias():
    register = CommandRegister([Module(GOOD)])
    assert register.find("look") is register.find("see") is GOOD
    assert register.view("see").module == "things"
    assert [view.name for view in register.views()] == ["look"]


def test_a_typo_is_answered_with_the_nearest_command():
    register = CommandRegister(
        [Module(dataclasses.replace(GOOD, name="check_status", examples=("see",)))]
    )
    with pytest.raises(InvalidArgumentError) as caught:
        register.find("chek_status")
    assert str(caught.value) == "unknown command 'chek_status'; did you mean check_status?"
    with pytest.raises(InvalidArgumentError, match="type help"):
        register.find("zzzz")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"permission": ""}, "has no permission"),
        ({"summary": ""}, "has no summary"),
        ({"examples": ()}, "has no examples"),
        ({"examples": ("look x",)}, "'look x': N: 'x' is not a whole number"),
        ({"examples": ("look 'x",)}, "does not end"),
        ({"examples": ("",)}, "is of another command"),
        ({"examples": ("hear",)}, "is of another command"),
        ({"name": "Look"}, "lower case"),
        ({"name": ""}, "lower case"),
        ({"aliases": ("a b",)}, "lower case"),
        ({"aliases": ("look", "see")}, "look is taken"),
        ({"aliases": ("see", "see")}, "see is taken"),
        ({"arguments": int}, "not a dataclass"),
    ],
)
def test_a_bad_command_is_refused_by_name(change, text):
    spec = dataclasses.replace(GOOD, **change)
    with pytest.raises(InternalError, match=f"^command {spec.name}: ") as caught:
        CommandRegister([Module(spec)])
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("name", "alias"), [("look", "l"), ("see", "l"), ("l", "look"), ("l", "see")]
)
def test_a_name_is_taken_once_over_all_modules(name, alias):
    other = dataclasses.replace(GOOD, name=name, aliases=(alias,), examples=(name,))
    register = CommandRegister([Module(GOOD)])
    with pytest.raises(InternalError, match="is taken"):
        register.add(Module(other, name="others"))
    assert register.find("look") is GOOD


@given(st.text(max_size=8))
def test_only_plain_names_are_accepted(name):
    spec = dataclasses.replace(GOOD, name=name, examples=("see",))
    plain = name.isascii() and name.replace("_", "").isalnum() and name == name.lower()
    if plain and name[0].isalpha() and name != "see":
        assert CommandRegister([Module(spec)]).find(name) is spec
    else:
        with pytest.raises(InternalError):
            CommandRegister([Module(spec)])
