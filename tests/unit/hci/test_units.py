import math
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flplatform.hci import units


@pytest.mark.parametrize(
    ("name", "title", "unit"),
    [
        ("since_s", "SINCE", "s"),
        ("last_seen_s", "LAST SEEN", "s"),
        ("memory_free_bytes", "MEMORY FREE", "bytes"),
        ("certificate_days", "CERT", "days"),
        ("submitted_at", "SUBMITTED", "at"),
        ("status", "STATUS", ""),
        ("_s", "_S", "s"),
    ],
)
def test_a_name_tells_heading_and_unit(name, title, unit):
    assert (units.heading(name), units.unit_of(name)) == (title.replace("_", " "), unit)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.75981, "", ".760"),
        (-0.5, "", "-.500"),
        (0.0, "", ".000"),
        (7, "", "7"),
        (12.0, "", "12"),
        (1.2e-5, "", "1.2e-05"),
        (123456.7, "", "123457"),
        (1e20, "", "1e+20"),
        (math.nan, "s", "nan"),
        (math.inf, "", "inf"),
        (1.24, "s", "1.2 s"),
        (187_200, "s", "2 d 4 h"),
        (18_240, "bytes", "18.2 kB"),
        (27.4, "days", "27 d !"),
        ("2024-05-01T12:04:10.123Z", "at", "2024-05-01 12:04"),
        ("text", "s", "text"),
    ],
)
def test_shown(value, unit, text):
    assert units.shown(value, unit) == text


def test_a_moment_of_today_is_a_time():
    now = datetime.now(UTC).isoformat()
    assert units.shown(now, "at") in (now[11:19], now[:16].replace("T", " "))  # at midnight
    assert units.shown("", "at") == ""


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        ("4", "15", "4/15"),
        ("4", "–", "4"),
        ("22.9 GB", "25.3 GB", "22.9 of 25.3 GB"),
        ("512 MB", "25.3 GB", "512 MB of 25.3 GB"),
    ],
)
def test_fraction(part, whole, text):
    assert units.fraction(part, whole) == text


@given(st.floats(-1e300, 1e300))
def test_a_number_is_shown_within_a_part_in_a_thousand(value):
    text = units.number(value)
    assert math.isclose(float(text), value, rel_tol=0.06, abs_tol=5e-4)
    assert len(text) <= 14
