"""The one error tree.

Every error that a user, an operator or another process can meet is an `FLError`:

    FLError
    ├── InvalidArgumentError      malformed input; `field` names where
    │   ├── ConfigError           a file: path, key path, what to do
    │   └── ModelFormatError      a model file or update that does not fit
    ├── UnauthenticatedError      no identity, a bad one, or a dead token
    ├── PermissionDeniedError     known, but not allowed; `rule` names the rule
    ├── FailedPreconditionError   right request, wrong state (stale round, stopped run)
    ├── NotFoundError
    ├── AlreadyExistsError        a conflicting duplicate
    ├── ResourceExhaustedError    a limit, a quota, a full disk
    ├── DeadlineExceededError
    ├── UnavailableError          try again later
    ├── DataLossError             stored bytes are not what they were
    └── InternalError             a defect of ours

`rpc.errors` is the only place that translates them to and from gRPC statuses.
"""

from typing import ClassVar


class FLError(Exception):
    """Base of all errors shown to people.

    Args:
        message: what is wrong, in one sentence that names the value.
        field: path of the offending field (`participants[2].name`), if any.
        hint: what to do about it, if known.
        rule: the rule that refused, for refusals.
    """

    code: ClassVar[str] = "internal"

    def __init__(self, message: str, *, field: str = "", hint: str = "", rule: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.hint = hint
        self.rule = rule

    def __str__(self) -> str:
        text = f"{self.field}: {self.message}" if self.field else self.message
        if self.rule:
            text += f" (rule: {self.rule})"
        return f"{text}; {self.hint}" if self.hint else text


class InvalidArgumentError(FLError):
    """The input is malformed, whatever the state."""

    code = "invalid_argument"


class ConfigError(InvalidArgumentError):
    """A configuration file is wrong; `problems` lists all of them, one per line of the text."""

    code = "config"

    def __init__(self, message: str, *, problems: tuple[str, ...] = (), hint: str = "") -> None:
        super().__init__("\n  ".join((message, *problems)), hint=hint)
        self.problems = problems


class ModelFormatError(InvalidArgumentError):
    """A model file's header, size or values are not what they must be."""

    code = "model_format"


class UnauthenticatedError(FLError):
    """The caller has not proved who it is."""

    code = "unauthenticated"


class PermissionDeniedError(FLError):
    """The caller is known and may not do this; `rule` says by which rule."""

    code = "permission_denied"


class FailedPreconditionError(FLError):
    """The request is well formed but not legal in this state."""

    code = "failed_precondition"


class NotFoundError(FLError):
    """There is no such thing."""

    code = "not_found"


class AlreadyExistsError(FLError):
    """Something else already stands under this id."""

    code = "already_exists"


class ResourceExhaustedError(FLError):
    """A limit, a quota or the disk is exhausted."""

    code = "resource_exhausted"


class DeadlineExceededError(FLError):
    """The answer did not come in time."""

    code = "deadline_exceeded"


class UnavailableError(FLError):
    """The other side cannot answer now; the same request may succeed later."""

    code = "unavailable"


class DataLossError(FLError):
    """Stored bytes do not match their digest."""

    code = "data_loss"


class InternalError(FLError):
    """A defect of this program."""

    code = "internal"
