from pathlib import Path

import pytest

from flplatform.core.errors import ConfigError
from provisioning.project import Project, load_project

GOOD = """
api_version: 1
name: heart
description: Four clinics
validity_days: {sites: 90}
server:
  organisation: hub
  addresses: [fl.example.org, localhost, 127.0.0.1, "::1"]
  fl_port: 8002
  admin_port: 8003
  limits: {max_clients: 10, heartbeat_s: 5}
sites:
  - {name: cleveland, organisation: ccf}
  - {name: va, organisation: va}
admins:
  - {name: amy@clinic-a.org, organisation: clinic-a, role: project_admin}
"""


def load(tmp_path: Path, text: str) -> Project:
    path = tmp_path / "project.yml"
    path.write_text(text)
    return load_project(path)


def test_a_project_is_typed(tmp_path: Path) -> None:
    project = load(tmp_path, GOOD)
    assert [item.name for item in project.participants] == [
        "server",
        "cleveland",
        "va",
        "amy@clinic-a.org",
    ]
    assert project.server.limits.heartbeat_s == 5.0
    assert (project.validity_days.sites, project.validity_days.admins) == (90, 365)


def test_all_problems_are_listed_with_line_and_path(tmp_path: Path) -> None:
    text = (
        GOOD.replace("name: heart", "name: Heart")
        .replace("fl_port: 8002", "fl_port: 80020")
        .replace("organisation: va}", "organization: va}")
        .replace("role: project_admin", "role: king")
        .replace("sites: 90", "sites: 400")
        .replace("localhost", "'local host'")
    )
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    lines = [problem.split(": ")[:2] for problem in caught.value.problems]
    assert lines == [
        ["project.yml:3", "name"],
        ["project.yml:5", "validity_days.sites"],
        ["project.yml:8", "server.addresses[1]"],
        ["project.yml:9", "server.fl_port"],
        ["project.yml:14", "sites[1].organisation"],
        ["project.yml:14", "sites[1].organization"],
        ["project.yml:16", "admins[0].role"],
    ]
    assert "did you mean 'organisation'?" in caught.value.problems[5]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("name: va,", "name: cleveland,", "12: sites[0].name: 'cleveland' is the name of 2"),
        ("name: va,", "name: all,", "13: sites[1].name: 'all' has a meaning in commands"),
        ("name: va,", "name: global,", "'global' has a meaning"),
        ("amy@clinic-a.org", "va", "15: admins[0].name: 'va' is the name of 2 participants"),
        ("amy@clinic-a.org", "submitter", "'submitter' has a meaning"),
        ("organisation: va", "organisation: site", "'site' has a meaning in policies"),
        ("admin_port: 8003", "admin_port: 8002", "9: server.admin_port: is 8002, as is fl_port"),
        ("{sites: 90}", "{issuers: 80, sites: 90}", "4: validity_days.sites: is longer"),
    ],
)
def test_contradictions_between_entries(tmp_path: Path, old: str, new: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, GOOD[1:].replace(old, new))
    assert any(problem in item for item in caught.value.problems), caught.value.problems


@pytest.mark.parametrize("host", ["", "a b", "-a", "http://x", "a/b", "x..y", "h:1", "ä.de"])
def test_wrong_hosts(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="neither a host name nor an IP address"):
        load(tmp_path, GOOD.replace("fl.example.org", f"{host!r}"))


def test_an_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_project(tmp_path / "missing.yml")
    (tmp_path / "latin.yml").write_bytes(b"name: \xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_project(tmp_path / "latin.yml")
