from datetime import UTC, datetime

import pytest

from flplatform.core.config import AdminConfig, ServerConfig, ServerLimits, SiteConfig
from provisioning.authority import create
from provisioning.builders import BUILDERS, Plan, build, config_of, inputs_of
from provisioning.project import Admin, Project, Server, Site, Validity

NOW = datetime.now(UTC).replace(microsecond=0)
SITE = Site(name="s", organisation="a")
ADMIN = Admin(name="amy", organisation="a", role="lead")
PROJECT = Project(
    name="heart",
    server=Server(organisation="hub", addresses=("fl.example.org", "::1"), fl_port=1, admin_port=2),
    sites=(SITE,),
    admins=(ADMIN,),
)


@pytest.fixture(scope="module")
def plan() -> Plan:
    authority, root = create("heart", 100, NOW)
    lists = root.revocations((), 1, NOW)
    return Plan(PROJECT, authority, PROJECT.participants, lists, {"amy": "secret phrase"}, NOW)


def test_configurations() -> None:
    server = config_of(PROJECT, PROJECT.server)
    assert isinstance(server, ServerConfig)
    assert (server.fl_address, server.admin_address) == ("0.0.0.0:1", "0.0.0.0:2")
    site, admin = config_of(PROJECT, SITE), config_of(PROJECT, ADMIN)
    assert isinstance(site, SiteConfig)
    assert site.servers == ("fl.example.org:1", "[::1]:1")
    assert isinstance(admin, AdminConfig)
    assert (admin.servers, admin.role) == (("fl.example.org:2", "[::1]:2"), "lead")


def test_builders_return_files_only_for_targets(plan: Plan) -> None:
    for builder in BUILDERS:
        files = builder(plan)
        assert set(files) <= {"server", "s", "amy"}
        for kit in files.values():
            for file in kit:
                assert file.path.split("/")[0] in ("startup", "local")
                assert file.mode & 0o077 == 0


def test_no_path_is_built_twice_and_the_signature_is_last(plan: Plan) -> None:
    for kit in build(plan).values():
        paths = [file.path for file in kit]
        assert len(set(paths)) == len(paths)
        assert paths[-2:] == ["startup/manifest.json", "startup/manifest.sig"]


def test_inputs_change_with_what_a_kit_is_made_of_and_only_then() -> None:
    server = PROJECT.server.model_copy(update={"fl_port": 9})
    limits = PROJECT.server.model_copy(update={"limits": ServerLimits(max_clients=3)})
    grown = PROJECT.model_copy(update={"sites": (SITE, Site(name="t", organisation="b"))})
    changes = {
        "port": PROJECT.model_copy(update={"server": server}),
        "limits": PROJECT.model_copy(update={"server": limits}),
        "days": PROJECT.model_copy(update={"validity_days": Validity(sites=9)}),
    }
    touched = {"port": {"server", "s"}, "limits": {"server"}, "days": {"s"}}
    for participant in PROJECT.participants:
        before = inputs_of(PROJECT, participant)
        assert inputs_of(grown, participant) == before
        for change, project in changes.items():
            current = next(p for p in project.participants if p.name == participant.name)
            assert (inputs_of(project, current) != before) == (participant.name in touched[change])
