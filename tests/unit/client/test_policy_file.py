import logging

import pytest

from flplatform.client.policy_file import PolicyFile
from flplatform.core.config import SitePolicy
from flplatform.core.errors import ConfigError

VERBS = ("abort", "sys_info")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "policy.yml"
    path.write_text("byoc: [none]\n")
    path.chmod(0o600)
    file = PolicyFile(path, SitePolicy())
    file.load(VERBS)
    return file


def test_it_is_read_at_start_and_again_when_it_changes(file):
    assert file.policy.byoc == ("none",)
    assert not file.reload()
    file.path.write_text("byoc: [any]\ncommands: {abort: [none]}\n")
    assert file.reload()
    assert (file.policy.byoc, file.policy.commands) == (("any",), {"abort": ("none",)})


def test_a_misspelt_command_is_found_at_start(file):
    file.path.write_text("commands: {abrt: [any]}\n")
    with pytest.raises(ConfigError, match="commands.abrt: no such command"):
        file.load(VERBS)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("byoc: [any\n", "policy.yml"),
        ("bioc: [any]\n", "bioc"),
        ("commands: {x: any}", "commands.x"),
    ],
)
def test_a_bad_one_leaves_the_old_in_force_and_says_so_once(file, caplog, text, complaint):
    file.path.write_text(text)
    with caplog.at_level(logging.INFO):
        assert not file.reload()
        assert not file.reload()
    assert file.policy.byoc == ("none",)
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert complaint in record.message
    file.path.write_text("byoc: [o:site]\n")
    assert file.reload()


def test_only_a_file_that_others_cannot_write_counts(file, tmp_path, caplog):
    file.path.write_text("byoc: [any]\n")
    file.path.chmod(0o620)
    assert not file.reload()
    assert "has mode 0620: others may write it" in caplog.text
    with pytest.raises(ConfigError, match="others may write it"):
        PolicyFile(file.path, SitePolicy()).load(VERBS)
    elsewhere = tmp_path / "elsewhere.yml"
    file.path.chmod(0o600)
    file.path.rename(elsewhere)
    file.path.symlink_to(elsewhere)
    assert not file.reload()
    file.path.unlink()
    assert not file.reload()  # a policy that vanishes does not widen anything
    assert "has gone" in caplog.text
    assert file.policy.byoc == ("none",)
    file.path.write_text("")
    file.path.chmod(0o600)
    assert file.reload()
    assert file.policy == SitePolicy()


def test_a_site_without_the_file_has_the_defaults(tmp_path):
    file = PolicyFile(tmp_path / "policy.yml", SitePolicy())
    file.load(VERBS)
    assert not file.reload()
    assert file.policy == SitePolicy()
