"""Validation on demand without a server behind it."""

from dataclasses import dataclass, field

from flplatform.core.errors import NotFoundError
from flplatform.core.events import SourceModel
from flplatform.core.messages import ModelRef
from flplatform.core.validation import ValidationPlan, Wanted

PLAN = ValidationPlan(
    run=3,
    status="finished",
    round=15,
    rounds=15,
    job_name="heart",
    package=ModelRef("blake3:" + "1" * 64, 1000),
    author="amy",
    author_organisation="hub",
    author_role="project_admin",
    has_code=True,
    models={
        "a": SourceModel(digest="blake3:" + "2" * 64, size=56, kind="local", round=15),
        "b": SourceModel(digest="blake3:" + "3" * 64, size=56, kind="update", round=12),
        "global": SourceModel(digest="blake3:" + "4" * 64, size=56, kind="best", round=9),
    },
    gaps={"c": "it handed none in, and no update of it is kept"},
    sites=("a", "b"),
    left_out={"c": "barred on the server"},
    data=("heart",),
    environment="default",
    deadline_s=600.0,
)


@dataclass
class FakeValidations:
    """Implements `core.validation.ValidationControl`.

    Attributes:
        plans: by source run.
        asked: (run, wanted) of every plan.
        opened: (run, order, submitter, wanted) of every opening.
    """

    plans: dict[int, ValidationPlan] = field(default_factory=dict)
    asked: list[tuple[int, Wanted]] = field(default_factory=list)
    opened: list[tuple[int, bytes, str, Wanted]] = field(default_factory=list)

    async def plan(self, number: int, wanted: Wanted) -> ValidationPlan:
        self.asked.append((number, wanted))
        if number not in self.plans:
            raise NotFoundError(f"there is no run {number}")
        return self.plans[number]

    async def open(self, number: int, order: bytes, submitter: str, wanted: Wanted) -> int:
        self.opened.append((number, order, submitter, wanted))
        return number + 6
