"""A transcript: a talk with the console, as text.

# stage: training          what the federation is doing; see `stage.STAGES`
! stop slow                what happens to the federation; see `stage.Stage.act`
> shutdown client slow     what is typed
  shut down …? [y/N]       what is shown, indented; see `matching`
< n                        what is answered
  nothing was done
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).parent / "transcripts"
DEFAULT_STAGE = "idle"


@dataclass
class Step:
    """One command, or one thing that happens.

    Attributes:
        kind: `>` or `!`.
        text: the command, or what happens.
        reply: lines that are shown, and answers as `< ANSWER`.
    """

    kind: str
    text: str
    reply: list[str] = field(default_factory=list)

    @property
    def answers(self) -> list[str]:
        """What is answered to its questions."""
        return [line[2:] for line in self.reply if line.startswith("< ")]


@dataclass
class Transcript:
    """Of one command, or of several that belong together."""

    name: str
    steps: list[Step]
    comments: list[str] = field(default_factory=list)

    @property
    def stage(self) -> str:
        """What the federation is doing meanwhile."""
        stages = [line.removeprefix("# stage:").strip() for line in self.comments]
        marked = [line.startswith("# stage:") for line in self.comments]
        return next((s for s, m in zip(stages, marked, strict=True) if m), DEFAULT_STAGE)

    @property
    def lines(self) -> list[str]:
        """What is typed."""
        return [step.text for step in self.steps if step.kind == ">"]

    @classmethod
    def load(cls, path: Path) -> "Transcript":
        """Read a transcript.

        Raises:
            ValueError: a line is none of those that a transcript has.
        """
        transcript = cls(path.stem, [])
        for number, line in enumerate(path.read_text().splitlines(), 1):
            kind, text = line[:1], line[2:]
            if kind == "#":
                transcript.comments.append(line)
            elif line[:2] in ("> ", "! "):
                transcript.steps.append(Step(kind, text))
            elif line and (line[:2] in ("  ", "< ") and transcript.steps):
                transcript.steps[-1].reply.append(line if kind == "<" else text)
            elif line:
                raise ValueError(f"{path}:{number}: {line!r}")
            elif transcript.steps:
                transcript.steps[-1].reply.append("")
        for step in transcript.steps:
            while step.reply and not step.reply[-1]:
                step.reply.pop()
        return transcript

    def save(self, folder: Path = FOLDER) -> None:
        """Write the transcript."""
        lines = [*self.comments]
        for step in self.steps:
            lines.append(f"{step.kind} {step.text}")
            shown = (line if line.startswith("< ") else f"  {line}" for line in step.reply)
            lines += [line.rstrip() for line in shown]
        (folder / f"{self.name}.txt").write_text("\n".join(lines) + "\n")


def load_all(names: Iterable[str] = ()) -> list[Transcript]:
    """Read transcripts; all of them if none is named."""
    wanted = set(names)
    return [
        Transcript.load(path)
        for path in sorted(FOLDER.glob("*.txt"))
        if not wanted or path.stem in wanted
    ]
