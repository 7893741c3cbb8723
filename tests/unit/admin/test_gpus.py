import pytest

from flplatform.admin.gpus import gpus_at
from flplatform.core.errors import InvalidArgumentError

SITES = ("a", "b")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ((), {}),
        (("2",), {"a": 2, "b": 2}),
        (("a=2",), {"a": 2}),
        (("a=2", "b=1024"), {"a": 2, "b": 1024}),
    ],
)
def test_processes_at_sites(words, found):
    assert gpus_at(words, SITES) == found


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("0",), "'0' is not a number from 1 to 1024"),
        (("1025",), "1025"),
        (("9" * 5000,), "is not a number"),
        (("-1",), "is not a number"),
        (("²",), "is not a number"),
        (("a=",), "'' is not a number"),
        (("=2",), "is N or SITE=N"),
        (("2", "a=3"), "is N or SITE=N,…, not '2'"),
        (("a=2", "a=3"), "names a twice"),
        (("aa=2",), "'aa' is not a target site, did you mean a"),
    ],
)
def test_what_is_no_number_of_processes(words, said):
    with pytest.raises(InvalidArgumentError, match=said) as caught:
        gpus_at(words, SITES)
    assert caught.value.field == "--gpus"
