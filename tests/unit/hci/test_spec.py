import dataclasses
import subprocess
import sys

import pytest

from flplatform.hci.spec import ARGUMENT, Argument, CommandSpec, NoArguments, argument


async def nothing(_connection, _args) -> None: ...


def test_argument_carries_its_metadata():
    @dataclasses.dataclass(frozen=True)
    class Args:
        names: tuple[str, ...] = argument(help="names", rest=True, complete="name", default=())

    (field,) = dataclasses.fields(Args)
    about = field.metadata[ARGUMENT]
    assert isinstance(about, Argument)
    assert about.rest
    assert about.complete == "name"
    assert Args() == Args(names=())


def test_an_argument_without_default_is_required():
    @dataclasses.dataclass(frozen=True)
    class Args:
        name: str = argument(help="name")

    with pytest.raises(TypeError, match="name"):
        Args()


def test_verbatim_implies_rest():
    assert argument(help="x", verbatim=True).metadata[ARGUMENT].rest


def test_a_spec_is_frozen_and_its_author_decides_whether_it_mutates():
    spec = CommandSpec("a", "b", NoArguments, nothing, "view", False, ("a",))
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.name = "b"
    with pytest.raises(TypeError, match="mutating"):
        CommandSpec("a", "b", NoArguments, nothing, "view", examples=("a",))


def test_the_server_side_needs_no_terminal_library():
    code = (
        "import sys, flplatform.hci as hci\n"
        "assert not {'prompt_toolkit', 'rich'} & set(sys.modules)\n"
        "assert all(hasattr(hci, name) for name in hci.__all__)\n"
        "assert len(set(hci.__all__)) == len(hci.__all__)\n"
        "import flplatform.hci.shell\n"
        "assert 'prompt_toolkit' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
