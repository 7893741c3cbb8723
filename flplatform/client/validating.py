"""The signed verb `validate_plan`: would this site take part in a validation?"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from flplatform.client.policy import Policy
from flplatform.client.verbs import Asked, Body, SiteVerb, everyone, own
from flplatform.core.config import Name, Role
from flplatform.core.errors import PermissionDeniedError
from flplatform.core.strict import FromNewer, parse_json


class ValidationBody(FromNewer):
    """What the server says of the run whose models are to be validated; unsigned."""

    has_code: bool
    data: tuple[str, ...]
    environment: str
    author: str
    author_organisation: Name
    author_role: Role


def validation_verb(policy: Policy, busy: Callable[[], Mapping[str, int]]) -> SiteVerb:
    """Return the verb.

    The answer binds nobody: the policy decides again about the package that a start order names.

    Args:
        policy: answers as it would answer a start for validation.
        busy: returns how many runs are at work in each environment.
    """

    async def validate_plan(asked: Asked) -> Body:
        question = parse_json(ValidationBody, asked.body, "validate_plan")
        author = replace(
            asked.signer,
            name=question.author,
            organisation=question.author_organisation,
            role=question.author_role,
        )
        plan = policy.check_job(
            asked.signer,
            author,
            has_code=question.has_code,
            data=question.data,
            environment=question.environment,
            purpose="validate",
        )
        running = busy().get(question.environment, 0)
        if running >= plan.environment.max_runs:
            raise PermissionDeniedError(
                f"{running} runs are at work in environment {question.environment!r}",
                rule=f"environments.yml: max_runs = {plan.environment.max_runs}",
            )
        return {"isolation": plan.isolation}

    return SiteVerb("validate_plan", "validate", validate_plan, reaches=everyone, submitter=own)
