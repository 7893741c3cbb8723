import asyncio

import pytest

from flplatform.admin.console.actions import actions
from flplatform.core.errors import ConfigError
from tests.unit.admin.console.conftest import Screen, done, error


def test_every_command_of_the_console_has_its_action(transport, views):
    named = {view.local for view in views if view.local and view.module != "session"}
    assert set(actions(transport)) == named


def test_actions_do_what_they_are_named_after(transport, tmp_path):
    table, shell = actions(transport), Screen(transport).shell
    with pytest.raises(ConfigError, match=r"job\.yml"):
        asyncio.run(table["submit_job"](["submit_job", str(tmp_path)], shell))
    transport.replies = [[error(), done(3)], [done(5)]]
    assert asyncio.run(table["download_model"](["download_model", "3"], shell)) == 3
    assert asyncio.run(table["wait"](["wait", "3"], shell)) == 5
