import pytest

from flplatform.admin import units


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, None),
        (0.04, "0.0 s"),
        (14.14, "14.1 s"),
        (99.9, "99.9 s"),
        (100, "2 min"),
        (5000, "83 min"),
        (11_100, "3 h 5 min"),
    ],
)
def test_seconds(value, text):
    assert units.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (56, "56 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (18_240, "18.2 kB"),
        (999_600, "1 MB"),
        (2.5e9, "2.5 GB"),
        (3e15, "3e+03 TB"),
    ],
)
def test_size(value, text):
    assert units.size(value) == text


@pytest.mark.parametrize(("value", "text"), [(None, None), (341.2, "341 d"), (27.4, "27 d !")])
def test_days(value, text):
    assert units.days(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.746, ".746"),
        (1.0, "1.000"),
        (0.0, ".000"),
        (-0.25, "-.250"),
        (12.345, "12.35"),
        (-1.5, "-1.500"),
        (10.05, "10.05"),
        (123456.0, "123456"),
    ],
)
def test_score(value, text):
    assert units.score(value) == text


def test_count_and_moment():
    assert units.count(1, "site") == "1 site"
    assert units.count(2048, "parameter") == "2,048 parameters"
    assert units.moment("2024-05-01T12:04:10.123Z") == "2024-05-01 12:04:10"
    assert units.moment("") == ""
