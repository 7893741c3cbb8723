import math

from hypothesis import given, settings
from hypothesis import strategies as st

from flplatform.hci.plot import plot


def lines(series, **options) -> list[str]:
    return plot("auc", "step", series, **options).plain.split("\n")


def test_a_rising_curve():
    assert lines({"a": [0, 1, 2, 3]}, width=4, height=2) == [
        "auc  a",
        "3 │  ⡠⠊",
        "0 │⡠⠊",
        "  └1step 4",
    ]


def test_a_flat_curve_and_a_single_point():
    assert lines({"a": [5.0, 5.0]}, width=2, height=1)[1] == "5.000 │⠉⠉"
    assert lines({"a": [5.0]}, width=2, height=1)[1] == "5.000 │⠁"


def test_values_that_are_not_finite_leave_gaps():
    (line,) = lines({"a": [1, math.nan, 1, math.inf, None, 10**400]}, width=3, height=1)[1:2]
    assert line == "1 │⠁⠁"
    assert lines({"a": [math.nan]}) == ["auc  no values"]
    assert lines({}) == ["auc  no values"]


def test_curves_share_a_picture_in_colour_and_stand_apart_without():
    series = {"a": [0, 1], "b": [1, 0]}
    together = plot("auc", "step", series, height=3)
    assert len(together.plain.split("\n")) == 5
    assert {"cyan", "magenta"} <= {str(span.style) for span in together.spans}
    apart = lines(series, height=3, colour=False)
    assert len(apart) == 10
    assert apart[5] == "  b"


def test_names_are_escaped():
    text = plot("\x1b[2J", "\x07", {"\n": [1]}).plain
    assert "\x1b" not in text
    assert "\x07" not in text


number = st.floats() | st.integers() | st.none()


@settings(max_examples=50)
@given(st.dictionaries(st.text(max_size=5), st.lists(number, max_size=20), max_size=3))
def test_any_values_can_be_drawn(series):
    for colour in (True, False):
        for line in lines(series, width=10, height=3, colour=colour):
            assert "\x1b" not in line


def test_the_axis_may_begin_anywhere():
    assert lines({"a": [1, 2]}, width=14, height=1, ends=(101, 400))[-1].endswith("└101   step 400")
