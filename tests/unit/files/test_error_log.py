"""What was logged as a warning or worse is counted, and bounded."""

import logging
import threading

import pytest

from flplatform.files import error_log
from flplatform.files.error_log import ErrorLog


@pytest.fixture
def logger():
    handler = ErrorLog()
    logger = logging.getLogger("flplatform.test_error_log")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.errors = handler
    yield logger
    logger.removeHandler(handler)


def test_counts_and_last_messages(logger):
    for number in range(30):
        logger.warning("odd %d", number)
    logger.error("bad")
    logger.info("fine")
    view = logger.errors.view()
    assert view["counts"] == [["WARNING", logger.name, 30], ["ERROR", logger.name, 1]]
    assert len(view["last"]) == error_log.MAX_MESSAGES
    assert view["last"][-1][1:] == ["ERROR", logger.name, "bad"]
    assert view["last"][0][3] == "odd 11"
    assert view["since"] <= view["last"][0][0]


def test_an_exception_is_named(logger):
    try:
        raise ValueError("the cause")
    except ValueError:
        logger.exception("it failed")
    assert logger.errors.view()["last"][-1][3] == "it failed [ValueError: the cause]"


def test_it_is_reset(logger):
    before = logger.errors.view()["since"]
    logger.error("bad")
    logger.error("bad")
    assert logger.errors.reset() == 2
    view = logger.errors.view()
    assert (view["counts"], view["last"]) == ([], [])
    assert view["since"] >= before


def test_it_is_bounded(logger):
    for number in range(500):
        record = logging.makeLogRecord(
            {"name": f"logger {number}", "levelno": 40, "levelname": "ERROR", "msg": "x" * 10_000}
        )
        logger.errors.handle(record)
    view = logger.errors.view()
    assert len(view["counts"]) == error_log.MAX_LOGGERS + 1
    assert ["ERROR", error_log.OTHERS, 300] in view["counts"]
    assert {len(entry[3]) for entry in view["last"]} == {error_log.MAX_CHARS}


def test_a_record_that_cannot_be_shown(logger):
    record = logging.makeLogRecord({"levelname": "ERROR", "msg": "%d", "args": ("no number",)})
    logger.errors.emit(record)
    assert logger.errors.view()["last"][-1][3] == "(cannot be shown)"


def test_threads_lose_no_record(logger):
    def work():
        for _ in range(500):
            logger.error("x")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert logger.errors.reset() == 2000


def test_one_is_installed_for_the_process():
    root = logging.getLogger()
    before = list(root.handlers)
    try:
        first = ErrorLog.installed()
        assert ErrorLog.installed() is first
        assert root.handlers.count(first) == 1
    finally:
        root.handlers[:] = before
