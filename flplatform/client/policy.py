"""The site decides: what may run here, on which data, for whom. Pure; every refusal has a rule."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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
    demand,
)
from flplatform.security.denials import Denials
from flplatform.security.identity import Identity
from flplatform.security.kit import Kit


@dataclass(frozen=True, slots=True)
class Plan:
    """What a job gets at this site.

    Attributes:
        data: dataset name → path.
        environment: interpreter and limits.
        isolation: the level it will run under.
    """

    data: Mapping[str, Path]
    environment: Environment
    isolation: Isolation


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

    def check_job(
        self,
        submitter: Identity,
        author: Identity,
        *,
        has_code: bool,
        data: Sequence[str],
        environment: str,
    ) -> Plan:
        """Return what the job would get, or refuse it.

        Raises:
            PermissionDeniedError: names the rule and the file it stands in.
        """
        local = self._kit.local
        policy = self._rules()
        for actor in dict.fromkeys((submitter, author)):
            self._denials.demand(actor)
            request = self._request(actor, "submit_job", "train", submitter)
            demand(decide_job(policy, request, has_code), request)
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
        request = self._request(submitter, "submit_job", "train", submitter)
        paths = {name: self._dataset(name, request) for name in data}
        return Plan(paths, found, self._isolation)

    def _dataset(self, name: str, request: Request) -> Path:
        dataset = self._kit.local.datasets.datasets.get(name)
        if dataset is None:
            raise PermissionDeniedError(
                f"dataset {name!r} is not mapped here", rule=f"datasets.yml: {name} is missing"
            )
        demand(decide_dataset(name, dataset.allow, request), request)
        path = (self._kit.folder / dataset.path).resolve()
        if not path.exists():
            raise PermissionDeniedError(
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
