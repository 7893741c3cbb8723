"""The files of a kit: what provisioning signs and what a host's owner may set.

Defaults are such that every local file may be empty. Names ending in `_s` are seconds (float),
in `_bytes` sizes (int).
"""

import re
from typing import Annotated, Literal, TypeVar, cast

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, field_validator

from flplatform.core.errors import ConfigError
from flplatform.core.strict import Strict as Strict
from flplatform.core.strict import parse_json as parse_json
from flplatform.core.strict import parse_yaml as parse_yaml

Role = Literal["project_admin", "org_admin", "lead", "member"]
Isolation = Literal["sandbox", "none"]
ShellCommand = Literal["pwd", "ls", "cat", "head", "tail", "grep", "env"]

NAME_PATTERN = r"[a-z0-9][a-z0-9._-]{0,62}"
PERSON_PATTERN = r"[a-z0-9][a-z0-9._@+-]{0,62}"
CONDITION_PATTERN = rf"any|none|[no]:{PERSON_PATTERN}|r:(?:project_admin|org_admin|lead|member)"


def _matching(pattern: str, what: str) -> AfterValidator:
    compiled = re.compile(pattern, re.ASCII)

    def check(value: str) -> str:
        if not compiled.fullmatch(value):
            raise ValueError(f"{value!r:.80} is not {what}")
        return value

    return AfterValidator(check)


Name = Annotated[
    str, _matching(NAME_PATTERN, "a name: 1 to 63 of a-z 0-9 . _ -, the first a letter or digit")
]
"""A project, site, server or organisation."""
PersonName = Annotated[
    str, _matching(PERSON_PATTERN, "a person's name: 1 to 63 of a-z 0-9 . _ @ + -")
]
Condition = Annotated[
    str,
    _matching(
        CONDITION_PATTERN,
        "a condition: any, none, o:site, o:submitter, n:submitter, n:NAME, o:ORGANISATION, r:ROLE",
    ),
]
Seconds = Annotated[float, Field(gt=0, le=31_536_000)]
Bytes = Annotated[int, Field(ge=0)]
Port = Annotated[int, Field(ge=0, le=65535)]


def _as_tuple(value: object) -> object:
    if isinstance(value, list):
        return tuple(value)
    return (value,) if isinstance(value, str) else value


Conditions = Annotated[tuple[Condition, ...], BeforeValidator(_as_tuple)]
"""Any one of them suffices; none at all refuses everybody."""


def split_address(address: str) -> tuple[str, int]:
    """Split `host:port` or `[v6]:port`.

    Raises:
        ValueError: it is neither, or the port is above 65535.
    """
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})", address)
    if match is None or int(match[2]) > 65535:
        raise ValueError(f"{address!r} is not host:port")
    return match[1].strip("[]"), int(match[2])


def _check_address(address: str) -> str:
    split_address(address)
    return address


Address = Annotated[str, AfterValidator(_check_address)]
"""`host:port`, `[v6]:port`; port 0 binds to a free one."""
Addresses = Annotated[tuple[Address, ...], Field(min_length=1)]


class Component(Strict):
    """Something chosen by name from a registry, with its arguments."""

    name: str = Field(min_length=1, max_length=100)
    args: dict[str, JsonValue] = {}


# ---------------------------------------------------------------------------- signed kit files


class ServerLimits(Strict):
    """What the server grants; part of `project.yml` and of the server's kit."""

    max_clients: int = Field(1000, ge=1)
    heartbeat_s: Seconds = 10.0
    dead_after_s: Seconds = 60.0
    waiting_call_s: Seconds = 60.0
    max_connection_age_s: Annotated[float, Field(ge=1, le=3600)] = 3600.0
    transfer_slots: int = Field(32, ge=1)
    transfer_slots_per_site: int = Field(2, ge=1)
    min_transfer_bytes_s: float = Field(64_000.0, ge=0, allow_inf_nan=False)
    transfer_stall_s: Seconds = 30.0
    reserve_bytes: Bytes = 1 << 30
    max_model_bytes: Bytes = 64 << 30
    max_job_bytes: Bytes = 1 << 30
    max_transfer_bytes: Bytes = 10 << 30
    token_s: Seconds = 86_400.0
    session_idle_s: Seconds = 1800.0
    session_s: Seconds = 28_800.0
    login_attempts: int = Field(5, ge=1)
    login_lock_s: Seconds = 900.0
    clock_skew_s: Seconds = 30.0


class ServerConfig(Strict):
    """`startup/fed_server.json`."""

    api_version: Literal[1] = 1
    project: Name
    name: Name
    organisation: Name
    fl_address: Address = "0.0.0.0:8002"
    admin_address: Address = "0.0.0.0:8003"
    public_addresses: tuple[str, ...] = ("localhost",)
    state_folder: str = "state"
    limits: ServerLimits = ServerLimits()


class SiteConfig(Strict):
    """`startup/fed_client.json`."""

    api_version: Literal[1] = 1
    project: Name
    name: Name
    organisation: Name
    servers: Addresses
    proxy: Address | None = None
    heartbeat_s: Seconds = 10.0
    request_timeout_s: Seconds = 30.0
    backoff_max_s: Seconds = 30.0
    clock_skew_s: Seconds = 30.0
    state_folder: str = "state"


class AdminConfig(Strict):
    """`startup/fed_admin.json`."""

    api_version: Literal[1] = 1
    project: Name
    name: PersonName
    organisation: Name
    role: Role
    servers: Addresses
    proxy: Address | None = None
    request_timeout_s: Seconds = 30.0


# ------------------------------------------------------------------- local files, site-owned


class Overrides(Strict):
    """`local/overrides.yml`: addresses and ports of this host, nothing else."""

    fl_address: Address | None = None
    admin_address: Address | None = None
    servers: Addresses | None = None
    proxy: Address | None = None


C = TypeVar("C", bound=ServerConfig | SiteConfig | AdminConfig)


def override(config: C, overrides: Overrides) -> C:
    """Return `config` with this host's addresses.

    Raises:
        ConfigError: an override that this kind of kit does not have.
    """
    given = overrides.model_dump(exclude_none=True)
    problems = tuple(
        f"local/overrides.yml: {key}: this kit has no such address"
        for key in given
        if key not in type(config).model_fields
    )
    if problems:
        raise ConfigError("local/overrides.yml does not fit this kit", problems=problems)
    return cast(C, config.model_copy(update=given))


class ServerPolicy(Strict):
    """A server's `local/policy.yml`: what the console roles may do.

    `roles` maps a role to permission categories or single commands; a command beats its
    category; what is missing is refused. An absent role keeps its default.
    """

    allow_root: bool = True
    roles: dict[Role, dict[str, Conditions]] = {}
    allowed_shell_cmds: tuple[ShellCommand, ...] = ()


class SitePolicy(Strict):
    """A site's `local/policy.yml`: narrows what the roles grant, and never widens it.

    `commands` maps a command, a permission category or `*` to who may use it here; the most
    special entry counts, and a command that no entry covers is refused.
    """

    allow_root: bool = True
    minimum_isolation: Isolation = "none"
    allow_foreign_code_unsandboxed: bool = False
    submitters: Conditions = ("any",)
    byoc: Conditions = ("any",)
    commands: dict[str, Conditions] = {"*": ("any",)}
    allowed_shell_cmds: tuple[ShellCommand, ...] = ()
    filters: tuple[Component, ...] = ()
    max_examples: Annotated[int, Field(ge=1)] | None = None


class Dataset(Strict):
    """One dataset: where it lies (absolute, or relative to the kit) and who may train on it."""

    path: str = Field(min_length=1)
    allow: Conditions


class Datasets(Strict):
    """`local/datasets.yml`."""

    datasets: dict[Name, Dataset] = {}


class Environment(Strict):
    """Where a run's code runs; `python` empty means the site's own interpreter, limit 0 none.

    Several processes may work on a run together: as many as there are GPUs, or where there are
    none `max_processes`. `memory_limit_bytes` is the limit of each of them.
    """

    python: str = ""
    gpus: tuple[Annotated[int, Field(ge=0)], ...] = ()
    max_processes: int = Field(8, ge=1, le=1024)
    memory_limit_bytes: Bytes = 0
    max_runs: int = Field(1, ge=1)


class Environments(Strict):
    """`local/environments.yml`; `default` always exists."""

    environments: dict[Name, Environment] = Field(default={}, validate_default=True)

    @field_validator("environments")
    @classmethod
    def _with_default(cls, value: dict[str, Environment]) -> dict[str, Environment]:
        return {"default": Environment(), **value}


class Resources(Strict):
    """`local/resources.yml`: what this host gives; the last three are read by a server only.

    `state_reconnect_s` is how long the database of `state_url` may be away, lost or not yet there.
    `command_modules` names the console modules of installed packages that are loaded; no others.
    """

    blob_cache_bytes: Bytes = 64 << 30
    reserve_bytes: Bytes = 1 << 30
    log_bytes: Bytes = 50 << 20
    log_files: int = Field(5, ge=1)
    state_url: str = ""
    state_reconnect_s: Seconds = 60.0
    command_modules: tuple[Name, ...] = ()

    def reserve_of(self, limits: "ServerLimits") -> int:
        """Return the disk space that a server leaves free: its own word goes before the project's.

        Args:
            limits: what the project file says.
        """
        said_here = "reserve_bytes" in self.model_fields_set
        return self.reserve_bytes if said_here else limits.reserve_bytes
