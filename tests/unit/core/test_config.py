import pytest

from flplatform.core.config import (
    AdminConfig,
    Datasets,
    Environment,
    Environments,
    Overrides,
    Resources,
    ServerConfig,
    ServerLimits,
    ServerPolicy,
    SiteConfig,
    SitePolicy,
    Strict,
    override,
    parse_yaml,
    split_address,
)
from flplatform.core.errors import ConfigError

SERVER = ServerConfig(project="p", name="server", organisation="hub")
SITE = SiteConfig(project="p", name="s", organisation="o", servers=("localhost:1",))
ADMIN = AdminConfig(
    project="p", name="amy@x.org", organisation="o", role="lead", servers=("localhost:2",)
)


@pytest.mark.parametrize(
    "model", [Overrides, ServerPolicy, SitePolicy, Datasets, Environments, Resources]
)
def test_every_local_file_may_be_empty(model: type[Strict]) -> None:
    assert parse_yaml(model, "", "local/x.yml") == model()


def test_site_policy_narrows_by_conditions() -> None:
    text = "commands: {'*': any, start: [o:site, n:amy@x.org, r:lead], shell: none}\nbyoc: none\n"
    policy = parse_yaml(SitePolicy, text, "local/policy.yml")
    assert policy.byoc == ("none",)
    assert policy.commands["start"] == ("o:site", "n:amy@x.org", "r:lead")


@pytest.mark.parametrize(
    "condition", ["", "root", "o:", "n:A", "r:king", "x:y", "any ", "o:site\n", "n:ä", "not any"]
)
def test_unknown_conditions_are_refused(condition: str) -> None:
    with pytest.raises(ConfigError, match="is not a condition"):
        parse_yaml(SitePolicy, f"byoc: {[condition]!r}", "local/policy.yml")


def test_the_default_environment_always_exists() -> None:
    environments = parse_yaml(Environments, "environments: {gpu: {gpus: [0]}}", "e").environments
    assert environments["default"] == Environment()
    assert environments["gpu"].gpus == (0,)


def test_a_dataset_must_say_who_may_use_it() -> None:
    with pytest.raises(ConfigError, match=r"datasets\.heart\.allow: is required"):
        parse_yaml(Datasets, "datasets: {heart: {path: /data}}", "local/datasets.yml")


@pytest.mark.parametrize(
    ("address", "split"),
    [
        ("host.example:8002", ("host.example", 8002)),
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("[::1]:65535", ("::1", 65535)),
    ],
)
def test_addresses(address: str, split: tuple[str, int]) -> None:
    assert split_address(address) == split


@pytest.mark.parametrize(
    "address",
    ["host", "host:", ":1", "host:65536", "::1:5", "h o:1", "h:-1", "http://h:1", "h:1\n"],
)
def test_wrong_addresses(address: str) -> None:
    with pytest.raises(ValueError, match="is not host:port"):
        split_address(address)


def test_overrides_change_addresses_only() -> None:
    assert override(SERVER, Overrides(fl_address="127.0.0.1:0")).fl_address == "127.0.0.1:0"
    assert override(SITE, Overrides(servers=("a:1", "b:2"))).servers == ("a:1", "b:2")
    assert override(ADMIN, Overrides(proxy="p:3128")).proxy == "p:3128"
    assert override(SITE, Overrides()) == SITE


def test_an_override_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="servers: this kit has no such address"):
        override(SERVER, Overrides(servers=("a:1",)))
    with pytest.raises(ConfigError, match="fl_address"):
        override(SITE, Overrides(fl_address="a:1"))


def test_configs_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        setattr(SITE, "name", "other")  # noqa: B010


@pytest.mark.parametrize("name", ["", "A", "-a", ".a", "a b", "a/b", "ä", "a" * 64, "a\n", "a@b"])
def test_wrong_names(name: str) -> None:
    with pytest.raises(ValueError, match="is not a name"):
        SiteConfig(project="p", name=name, organisation="o", servers=("h:1",))


def test_a_server_s_own_reserve_goes_before_the_project_s():
    limits = ServerLimits(reserve_bytes=5)
    assert Resources().reserve_of(limits) == 5
    assert Resources(reserve_bytes=3).reserve_of(limits) == 3
    assert Resources(reserve_bytes=1 << 30).reserve_of(limits) == 1 << 30
