import json
from dataclasses import dataclass
from typing import Literal

import pytest

from flplatform.core.errors import InternalError, InvalidArgumentError
from flplatform.hci.spec import CommandSpec, NoArguments, argument
from flplatform.hci.view import SpecView, help_page, schema, usage, view_of


@dataclass(frozen=True)
class SubmitArguments:
    job: str = argument(help="folder of the job", complete="path")
    kind: Literal["fast", "slow"] = argument(help="how", default="fast")
    only: tuple[str, ...] = argument(
        help="only these", option="--only", complete="target", metavar="NAME", default=()
    )
    least: int | None = argument(help="at least", option="--min -m", minimum=1, default=None)
    wait: float = argument(help="seconds", option="--wait", metavar="S", default=2.5)
    follow: bool = argument(help="stay", option="--follow", default=False)


async def nothing(_connection, _args) -> None: ...


async def ask(_args) -> str:
    return "sure?"


SPEC = CommandSpec(
    name="submit",
    summary="Submits a job.",
    arguments=SubmitArguments,
    handler=nothing,
    permission="train",
    mutating=True,
    examples=("submit jobs/a --min 3",),
    confirm=ask,
    aliases=("send",),
    states="always",
    local="submit",
    needs=("a job",),
)


def view_for(arguments: type) -> SpecView:
    return view_of(CommandSpec("c", "s", arguments, nothing, "view", False, ("c",)))


def test_usage_line():
    assert usage(view_of(SPEC)) == (
        "submit JOB [fast|slow] [--only NAME,…] [--min LEAST] [--wait S] [--follow]"
    )


def test_usage_of_the_rest_and_of_a_required_option():
    @dataclass(frozen=True)
    class Args:
        to: str = argument(help="to", option="--to")
        names: tuple[str, ...] = argument(help="names", rest=True)

    assert usage(view_for(Args)) == "c --to TO NAMES…"
    assert usage(view_for(NoArguments)) == "c"


def test_help_page_says_everything():
    page = help_page(view_of(SPEC))
    for text in (
        usage(view_of(SPEC)),
        "Submits a job.",
        "folder of the job",
        "one of fast, slow; default fast",
        "--min, -m",
        "default 2.5",
        "right     train",
        "legal     always",
        "needs     a job",
        "also      send",
        "confirm   asked for",
        "example   submit jobs/a --min 3",
    ):
        assert text in page
    assert "default False" not in page
    assert "confirm" not in help_page(view_for(NoArguments))


def test_wire_form_survives_json():
    view = view_of(SPEC, "training")
    assert view.module == "training"
    assert view.confirms
    assert SpecView.from_dict(json.loads(json.dumps(view.to_dict()))) == view


def test_a_newer_servers_extra_key_is_ignored():
    value = {**view_of(SPEC).to_dict(), "colour": "red"}
    assert SpecView.from_dict(value) == view_of(SPEC)


@pytest.mark.parametrize(
    "change", [{"name": 3}, {"parameters": [{}]}, {"mutating": "yes"}, {"examples": None}]
)
def test_a_malformed_wire_form_is_refused(change):
    with pytest.raises(InvalidArgumentError, match="not the description"):
        SpecView.from_dict({**view_of(SPEC).to_dict(), **change})


def test_json_schema():
    @dataclass(frozen=True)
    class Args:
        gpus: Literal[1, 2] = argument(help="gpus")
        names: tuple[str, ...] = argument(help="names", rest=True, default=())

    assert schema(view_for(Args)) == {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "c",
        "type": "object",
        "properties": {
            "gpus": {"type": "integer", "enum": [1, 2], "description": "gpus"},
            "names": {
                "type": "array",
                "items": {"type": "string"},
                "default": [],
                "description": "names",
            },
        },
        "required": ["gpus"],
        "additionalProperties": False,
    }
    assert schema(view_of(SPEC))["properties"]["least"] == {
        "type": "integer",
        "minimum": 1.0,
        "description": "at least",
    }


def bad(**fields):
    annotations = {name: hint for name, (hint, _) in fields.items()}
    values = {name: value for name, (_, value) in fields.items()}
    return dataclass(frozen=True)(type("Args", (), {"__annotations__": annotations, **values}))


Words = tuple[str, ...]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (bad(a=(str, "x")), "not made by argument"),
        (bad(a=(bytes, argument(help="a"))), "no command line can hold"),
        (bad(a=(int | str, argument(help="a"))), "no command line can hold"),
        (bad(a=(tuple[int, str], argument(help="a", rest=True))), "no command line can hold"),
        (bad(a=(tuple[Words, ...], argument(help="a", rest=True))), "no command line can hold"),
        (bad(a=(Literal["a", 1], argument(help="a"))), "no command line can hold"),
        (bad(a=("Missing", argument(help="a"))), "Missing"),
        (bad(a=(bool, argument(help="a", default=False))), "flag a needs an option"),
        (bad(a=(bool, argument(help="a", option="--a", default=True))), "flag a needs"),
        (bad(a=(bool, argument(help="a", option="--a"))), "flag a needs"),
        (bad(a=(str, argument(help="a", rest=True))), "only a positional tuple"),
        (bad(a=(Words, argument(help="a"))), "takes the rest"),
        (bad(a=(Words, argument(help="a", option="--a", rest=True))), "only a positional"),
        (bad(a=(str, argument(help="a", option="a"))), "spelled like an option"),
        (
            bad(
                a=(str, argument(help="a", option="--a")),
                b=(str, argument(help="b", option="--a")),
            ),
            "given twice",
        ),
        (
            bad(a=(Words, argument(help="a", rest=True)), b=(str, argument(help="b"))),
            "b cannot follow a",
        ),
        (bad(a=(str, argument(help="a", default=object()))), "default"),
        (int, "not a dataclass"),
    ],
)
def test_arguments_that_no_line_can_hold(arguments, text):
    with pytest.raises(InternalError, match="command c: ") as caught:
        view_for(arguments)
    assert text in str(caught.value)


def test_a_required_argument_after_an_optional_one_is_refused():
    @dataclass(frozen=True, kw_only=True)
    class Args:
        a: str = argument(help="a", default="")
        b: str = argument(help="b")

    with pytest.raises(InternalError, match="b cannot follow a"):
        view_for(Args)
