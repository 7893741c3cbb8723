import contextlib
import shlex
from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flplatform.core.errors import InvalidArgumentError
from flplatform.hci.grammar import did_you_mean, parse, parse_words, tokenise, wants_json
from flplatform.hci.spec import CommandSpec, NoArguments, argument
from flplatform.hci.view import view_of


@dataclass(frozen=True)
class Everything:
    word: str = argument(help="a word")
    count: int = argument(help="a count", default=1)
    kind: Literal["server", "client", "all"] = argument(help="a kind", default="all")
    rest: tuple[str, ...] = argument(help="more", rest=True, default=())
    least: int | None = argument(help="least", option="--min -m", default=None)
    wait: float = argument(help="wait", option="--wait", default=1.0)
    note: str = argument(help="note", option="--note", default="")
    level: Literal[1, 2] = argument(help="level", option="--level", default=1)
    only: tuple[str, ...] = argument(help="only", option="--only", default=())
    sizes: tuple[int, ...] = argument(help="sizes", option="--sizes", default=())
    all: bool = argument(help="all", option="--all -a", default=False)
    long: bool = argument(help="long", option="--long -l", default=False)


async def nothing(_connection, _args) -> None: ...


def spec_of(arguments: type) -> CommandSpec:
    return CommandSpec("c", "s", arguments, nothing, "view", False, ("c x",))


SPEC = spec_of(Everything)


def parsed(line: str) -> Everything:
    return parse(tokenise(line), SPEC)


whole = st.integers(-(10**17), 10**17)
listed = st.text().filter(lambda text: text and "," not in text)
everything = st.builds(
    Everything,
    word=st.text(),
    count=whole,
    kind=st.sampled_from(["server", "client", "all"]),
    rest=st.lists(st.text()).map(tuple),
    least=st.none() | whole,
    wait=st.floats(allow_nan=False, allow_infinity=False),
    note=st.text(),
    level=st.sampled_from([1, 2]),
    only=st.lists(listed).map(tuple),
    sizes=st.lists(whole).map(tuple),
    all=st.booleans(),
    long=st.booleans(),
)


def options_of(args: Everything, draw) -> list[list[str]]:
    def valued(name: str, value: object) -> list[str]:
        text = str(value)
        if not text.startswith("-") and draw(st.booleans()):
            return [name, text]
        return [f"{name}={text}"]

    options = [
        valued("--wait", repr(args.wait)),
        valued("--note", args.note),
        valued("--level", args.level),
    ]
    options += [] if args.least is None else [valued("--min", args.least)]
    options += [["-a"]] if args.all else []
    options += [["--long"]] if args.long else []
    for name, values in (("--only", args.only), ("--sizes", args.sizes)):
        if values and draw(st.booleans()):
            options.append(valued(name, ",".join(map(str, values))))
        else:
            options.append([word for value in values for word in valued(name, value)])
    return draw(st.permutations(options))


@given(everything, st.data())
def test_any_arguments_survive_being_typed(args, data):
    options = [word for option in options_of(args, data.draw) for word in option]
    free = [args.word, str(args.count), args.kind, *args.rest]
    line = shlex.join([*options, "--", *free])
    assert parsed(line) == args


@given(st.lists(st.text()))
def test_tokenise_undoes_quoting(words):
    assert tokenise(shlex.join(words)) == words


@given(st.text())
def test_no_line_breaks_the_parser(line):
    with contextlib.suppress(InvalidArgumentError):
        assert isinstance(parsed(line), Everything)


@pytest.mark.parametrize("line", ["'", 'a "b', "a\\"])
def test_an_open_quotation_is_a_clear_error(line):
    with pytest.raises(InvalidArgumentError, match="does not end; close it"):
        tokenise(line)


def test_options_may_stand_anywhere():
    assert parsed("w --min 3 7 -la server x --min-less".removesuffix(" --min-less")) == Everything(
        "w", 7, "server", ("x",), least=3, all=True, long=True
    )


def test_negative_numbers_are_not_options():
    assert parsed("w -5 --min -3 --wait -1.5e3").count == -5
    assert parsed("w -5 --min -3 --wait -1.5e3").wait == -1500.0
    assert parsed("-").word == "-"


def test_defaults_are_filled_in_without_the_dataclass():
    values = parse_words(["w"], view_of(SPEC))
    assert Everything(**values) == Everything("w")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("", "WORD: is missing"),
        ("w x", "COUNT: 'x' is not a whole number"),
        ("w 1_0", "COUNT: '1_0' is not a whole number"),
        ("w ٣", "is not a whole number"),
        ("w 1" + "0" * 18, "is not a whole number"),
        ("w 1 servr", "KIND: 'servr' is not one of server, client, all; did you mean server?"),
        ("w --mni 3", "--mni: there is no such option; did you mean --min?"),
        ("w --zzz", "--zzz: there is no such option;"),
        ("w -lx", "-lx: there is no such option"),
        ("w -lm", "-lm: there is no such option"),
        ("w --min", "--min: needs a value"),
        ("w --min --all", "--min: needs a value"),
        ("w --min 3 -m 4", "-m: given twice"),
        ("w --all --all", "--all: given twice"),
        ("w --all=1", "--all: takes no value, got '1'"),
        ("w --wait nan", "--wait: 'nan' is not a number"),
        ("w --wait 1e999", "--wait: '1e999' is not a number"),
        ("w --wait 1_0.0", "is not a number"),
        ("w --only a,,b", "--only: 'a,,b' names nothing in one place"),
        ("w --only=", "--only: '' names nothing"),
        ("w --sizes 1,x", "--sizes: 'x' is not a whole number"),
        ("w --level 3", "--level: '3' is not one of 1, 2"),
    ],
)
def test_errors_name_the_argument_and_show_the_usage(line, text):
    with pytest.raises(InvalidArgumentError) as caught:
        parsed(line)
    assert text in str(caught.value)
    assert caught.value.hint.startswith("usage: c WORD [COUNT]")


def test_too_many_words():
    with pytest.raises(InvalidArgumentError, match="unexpected 'x'; usage: c"):
        parse(["x"], spec_of(NoArguments))


def test_minimum_and_required_option():
    @dataclass(frozen=True)
    class Args:
        to: str = argument(help="to", option="--to")
        n: int = argument(help="n", minimum=1)

    assert parse(["--to", "a", "1"], spec_of(Args)) == Args("a", 1)
    with pytest.raises(InvalidArgumentError, match="N: 0 is below 1, the smallest"):
        parse(["0", "--to=a"], spec_of(Args))
    with pytest.raises(InvalidArgumentError, match="--to: is missing"):
        parse(["1"], spec_of(Args))


def test_a_rest_without_default_needs_a_word():
    @dataclass(frozen=True)
    class Args:
        names: tuple[str, ...] = argument(help="names", rest=True)

    assert parse(["a", "b"], spec_of(Args)).names == ("a", "b")
    with pytest.raises(InvalidArgumentError, match="NAMES: is missing"):
        parse([], spec_of(Args))


def test_verbatim_words_are_never_options():
    @dataclass(frozen=True)
    class Args:
        command: tuple[str, ...] = argument(help="command", verbatim=True)
        every: float = argument(help="every", option="--every", default=2.0)

    assert parse(["--every", "5", "ls", "-l", "--", "--every"], spec_of(Args)) == Args(
        ("ls", "-l", "--", "--every"), 5.0
    )


def test_a_rule_across_fields_is_a_usage_error():
    @dataclass(frozen=True)
    class Args:
        low: int = argument(help="low")
        high: int = argument(help="high")

        def __post_init__(self) -> None:
            if self.low > self.high:
                raise ValueError("LOW is above HIGH")

    with pytest.raises(InvalidArgumentError, match="LOW is above HIGH; usage: c LOW HIGH"):
        parse(["2", "1"], spec_of(Args))


def test_did_you_mean():
    assert did_you_mean("chek_status", ["check_status", "abort"]) == "did you mean check_status?"
    assert did_you_mean("zzz", ["check_status"]) == ""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("list_runs --json", ("list_runs ", True)),
        ("list_runs --json  ", ("list_runs ", True)),
        ("list_runs", ("list_runs", False)),
        ("list_runs '--json'", ("list_runs '--json'", False)),
        ("list_runs x--json", ("list_runs x--json", False)),
        ("--json", ("--json", False)),
        ("", ("", False)),
    ],
)
def test_json_is_wanted_by_the_last_word(line, expected):
    assert wants_json(line) == expected
