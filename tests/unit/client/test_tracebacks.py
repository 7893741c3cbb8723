"""Errors as the author of a job sees them."""

import pytest

from flplatform.client.frames import MAX_ERROR_CHARS, MAX_TRACEBACK_BYTES
from flplatform.client.tracebacks import one_line, user_traceback
from flplatform.core.errors import InvalidArgumentError
from flplatform.core.model import check_digest


def caught(code: str, file: str = "/run/code/job.py") -> BaseException:
    with pytest.raises(BaseException) as info:  # noqa: PT011 - whatever the code raises
        exec(compile(code, file, "exec"), {"check_digest": check_digest})
    error = info.value
    # pytest's frames are no part of a run process
    error.__traceback__ = error.__traceback__.tb_next
    return error


class Unspeakable(Exception):
    def __str__(self):
        raise ValueError


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\n  two"), "ValueError: one two"),
        (ValueError(), "ValueError"),
        (InvalidArgumentError("is odd", field="x"), "x: is odd"),
        (Unspeakable(), "Unspeakable: (its text cannot be shown)"),
        (ValueError("x" * 5000), "ValueError: " + "x" * (MAX_ERROR_CHARS - 12)),
    ],
)
def test_one_line(error, line):
    assert one_line(error) == line


def test_only_the_users_frames():
    text = user_traceback(caught("def f():\n    check_digest('x')\nf()"), "/run/code")
    assert [line.strip() for line in text.splitlines() if "File" in line] == [
        'File "job.py", line 3, in <module>',
        'File "job.py", line 2, in f',
    ]
    assert "'x' is not 'blake3:' followed by" in text


def test_no_frame_no_traceback():
    with pytest.raises(InvalidArgumentError) as info:
        check_digest("x")
    info.value.__traceback__ = info.value.__traceback__.tb_next
    assert user_traceback(info.value, "/run/code") == ""


def test_causes_and_groups_are_shown():
    code = (
        "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n"
        "    raise ExceptionGroup('all', [ValueError('inner')]) from e"
    )
    text = user_traceback(caught(code), "/run/code")
    assert "ZeroDivisionError" in text
    assert "ValueError: inner" in text


def test_the_end_of_a_long_one_is_kept():
    text = user_traceback(caught(f"raise ValueError('x' * {MAX_TRACEBACK_BYTES} + 'ü end')"), "/")
    assert len(text.encode()) <= MAX_TRACEBACK_BYTES
    assert text.endswith("ü end\n")
