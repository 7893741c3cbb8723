"""The signed verb `deploy`: would this site take a start of the job that lies on the server?"""

from collections.abc import Sequence

from flplatform.client.policy import Policy
from flplatform.client.requests import PreflightBody
from flplatform.client.verbs import Asked, Body, SiteVerb, own, targets
from flplatform.core.strict import parse_json

_WITH_VALUE = "--run"


def reaches(argv: Sequence[str], site: str) -> bool:
    """Return whether `deploy JOB TARGET… [--run N]` means this site."""
    words = list(argv[1:])
    while _WITH_VALUE in words:
        at = words.index(_WITH_VALUE)
        del words[at : at + 2]
    free = [word for word in words if not word.startswith("-")]
    return targets(("deploy", *free[1:]), site)


def deploy_verb(policy: Policy) -> SiteVerb:
    """Return the verb.

    The job's needs come from the server, unsigned: the answer binds nobody. What is started is
    what the start order names, and the policy decides about that package again.

    Args:
        policy: answers as it would answer a start.
    """

    async def deploy(asked: Asked) -> Body:
        question = parse_json(PreflightBody, asked.body, "deploy")
        plan = policy.check_job(
            asked.signer,
            asked.signer,
            has_code=question.has_code,
            data=question.data,
            environment=question.environment,
        )
        return {"isolation": plan.isolation}

    return SiteVerb("deploy", "train", deploy, reaches=reaches, submitter=own)
