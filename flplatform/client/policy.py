"""The site decides: what may run here, on which data, for whom. Pure; every refusal has a rule."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from flplatform.client.verbs import SiteVerb
from flplatform.core.config import Environment, Isolation, SitePolicy
from flplatform.core.errors import PermissionDeniedError
from flplatform.security.authz import (
    Decision,
    Permission,
    Request,
    decide_at_site,
    decide_dataset,
    decide_job,
    decide_validation,
    demand,
)
from flplatform.security.denials import Denials
from flplatform.security.identity import Identity
from flplatform.security.kit import Kit

Purpose: TypeAlias = Literal["train", "validate"]
"""What a start order allows; see `security.signing.StartOrder`."""


class DatasetAbsentError(PermissionDeniedError):
    """Nothing lies where a dataset is mapped to, as before its disk is mounted: it may pass."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a job gets at this site.

    Attributes:
        data: dataset name → path.
        environment: interpreter and limits.
        isolation: the level it will run under.
        processes: how many work on it together.
        purpose: `validate` allows tasks that measure models, and no others.
    """

    data: Mapping[str, Path]
    environment: Environment
    isolation: Isolation
    processes: int = 1
    purpose: Purpose = "train"


class Policy:
    """A site's own policy over signed originators.

    Args:
        kit: the site's verified kit.
        isolation: the best isolation level of this host, `sandbox` or `none`.
        denials: who is revoked, kept up to date.
        rules: returns the site's policy of now; default the one in the kit.
    """

    def __init__(
        self,
        kit: Kit,
        isolation: Isolation,
        denials: Denials | None = None,
        rules: Callable[[], SitePolicy] | None = None,
    ) -> None:
        self._kit = kit
        self._isolation = isolation
        self._denials = denials or Denials()
        self._rules = rules or (lambda: kit.local.site_policy)

    @property
    def site(self) -> str:
        """The name of the site whose policy this is."""
        return self._kit.identity.name

    def check_job(
        self,
        submitter: Identity,
        author: Identity,
        *,
        has_code: bool,
        data: Sequence[str],
        environment: str,
        processes: int = 1,
        purpose: Purpose = "train",
    ) -> Plan:
        """Return what the job would get, or refuse it.

        Raises:
            PermissionDeniedError: names the rule and the file it stands in.
        """
        local = self._kit.local
        policy = self._rules()
        for actor in dict.fromkeys((submitter, author)):
            self._denials.demand(actor)
            if purpose == "train":
                request = self._request(actor, "submit_job", "train", submitter)
                demand(decide_job(policy, request, has_code), request)
        if purpose == "validate":
            request = self._request(submitter, "validate", "validate", submitter)
            demand(decide_validation(policy, request, author, has_code), request)
        foreign = has_code and author.organisation != self._kit.identity.organisation
        if self._isolation == "none":
            if policy.minimum_isolation != "none":
                raise PermissionDeniedError(
                    "this host can only isolate at level none",
                    rule=f"policy minimum_isolation = {policy.minimum_isolation}",
                )
            if foreign and not policy.allow_foreign_code_unsandboxed:
                raise PermissionDeniedError(
                    f"code of {author.organisation} would run without a sandbox",
                    rule="policy allow_foreign_code_unsandboxed = false",
                )
        found = local.environments.environments.get(environment)
        if found is None:
            raise PermissionDeniedError(
                f"there is no environment {environment!r} here",
                rule="environments.yml",
                hint=f"known: {', '.join(sorted(local.environments.environments))}",
            )
        _check_processes(processes, found, environment)
        request = self._request(submitter, "submit_job", "train", submitter)
        paths = {name: self._dataset(name, request) for name in data}
        return Plan(paths, found, self._isolation, processes, purpose)

    def _dataset(self, name: str, request: Request) -> Path:
        dataset = self._kit.local.datasets.datasets.get(name)
        if dataset is None:
            raise PermissionDeniedError(
                f"dataset {name!r} is not mapped here", rule=f"datasets.yml: {name} is missing"
            )
        demand(decide_dataset(name, dataset.allow, request), request)
        path = (self._kit.folder / dataset.path).resolve()
        if not path.exists():
            raise DatasetAbsentError(
                f"dataset {name!r} is mapped to a path that does not exist",
                rule=f"datasets.yml: {name}",
            )
        return path

    def check_command(self, actor: Identity, argv: Sequence[str], verb: SiteVerb) -> None:
        """Refuse a command that does not target this site, or is not the actor's to give.

        Raises:
            PermissionDeniedError: names the rule.
        """
        self._denials.demand(actor)
        if not verb.reaches(argv, self._kit.identity.name):
            raise PermissionDeniedError(
                f"{' '.join(argv)[:200]!r} does not target this site", rule="signed targets"
            )
        submitter, organisation = verb.submitter(actor, argv)
        request = Request(
            actor=actor,
            command=verb.name,
            permission=verb.permission,
            site_organisation=self._kit.identity.organisation,
            submitter=submitter,
            submitter_organisation=organisation,
        )
        demand(decide_at_site(self._rules(), request), request)

    def would(self, request: Request) -> Decision:
        """Decide about somebody's command or submission without anybody asking for it.

        Args:
            request: `submit_job` and `byoc` are judged as a job, all others as commands.
        """
        if denial := self._denials.find("admin", request.actor.name, request.actor.organisation):
            return Decision(False, f"revoked by {denial.by}")
        if request.command in ("submit_job", "byoc"):
            code = request.command == "byoc"
            job = replace(request, command="submit_job", permission="train")
            return decide_job(self._rules(), job, code)
        if request.command == "validate":
            return decide_validation(self._rules(), request, request.actor, False)
        return decide_at_site(self._rules(), request)

    def _request(
        self,
        actor: Identity,
        command: str,
        permission: Permission,
        submitter: Identity,
    ) -> Request:
        return Request(
            actor=actor,
            command=command,
            permission=permission,
            site_organisation=self._kit.identity.organisation,
            submitter=submitter.name,
            submitter_organisation=submitter.organisation,
        )


def _check_processes(processes: int, environment: Environment, name: str) -> None:
    gpus, most = len(environment.gpus), environment.max_processes
    if gpus and processes > gpus:
        count = f"{gpus} GPU{'s' if gpus > 1 else ''}"
        raise PermissionDeniedError(
            f"{processes} processes, one per GPU, do not fit: environment {name!r} has {count}",
            rule="environments.yml: gpus",
        )
    if not gpus and processes > most:
        raise PermissionDeniedError(
            f"environment {name!r} allows {most} processes for a run, not {processes}",
            rule=f"environments.yml: max_processes = {most}",
        )
