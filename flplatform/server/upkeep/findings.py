"""What a check says: one line per finding, and what to do about it."""

from dataclasses import dataclass

RESTORE = "stop the server and restore a backup"
RELEASE = "use the release that wrote it"


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem, or a piece of information.

    Attributes:
        where: the stream, file or blob.
        rule: what does not hold, beginning with the invariant if it is one of I1 to I7.
        text: what is wrong.
        advice: what to do.
        seq: number of the event in its stream; 0 for none.
        problem: whether something is wrong; else it is good to know.
    """

    where: str
    rule: str
    text: str
    advice: str = RESTORE
    seq: int = 0
    problem: bool = True

    @property
    def what(self) -> str:
        """Where something is wrong, and what, without the advice."""
        place = f"{self.where} #{self.seq}" if self.seq else self.where
        return f"{place}: {self.rule}: {self.text}"

    def __str__(self) -> str:
        return f"{self.what}; {self.advice}"


def note(where: str, rule: str, text: str, advice: str) -> Finding:
    """Return a piece of information."""
    return Finding(where, rule, text, advice, problem=False)
