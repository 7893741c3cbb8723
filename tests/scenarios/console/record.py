"""Record transcripts anew, so that the difference can be reviewed:

    python -m tests.scenarios.console.record [COMMAND…]            write them
    python -m tests.scenarios.console.record --check [COMMAND…]    only compare

Lines that still hold stay as they are, with their placeholders; other lines are written with
placeholders for times, sizes, digests and the like. A command that has no transcript gets a draft.
"""

import argparse
import difflib
import sys
import time
from collections.abc import Iterable, Iterator

from flplatform.hci import SpecView
from tests.scenarios.console import matching
from tests.scenarios.console.stage import DEAD, GOOD, SLOW, STAGES, STRICT, Stage, in_order
from tests.scenarios.console.transcript import FOLDER, Step, Transcript, load_all
from tools.commands import advertised


def played(transcripts: Iterable[Transcript]) -> Iterator[tuple[Transcript, Transcript]]:
    """Play transcripts in one federation; yield each as it was and as it would be now."""
    with Stage() as stage:
        for old in in_order(list(transcripts)):
            stage.reach(old.stage)
            yield (
                old,
                Transcript(old.name, [_again(step, stage) for step in old.steps], old.comments),
            )


def _again(step: Step, stage: Stage) -> Step:
    # Help says what is always so: nothing in it becomes a placeholder.
    draft = str.rstrip if step.text.startswith("help ") else matching.draft
    return Step(step.kind, step.text, matching.update(step.reply, stage.play(step), draft))


def difference(old: Transcript, new: Transcript) -> str:
    """Return what differs, as a text to read; empty if nothing does."""
    texts = [
        [f"{step.kind} {step.text}" if line is None else line for step in each.steps
         for line in (None, *step.reply)]
        for each in (old, new)
    ]  # fmt: skip
    name = f"{old.name}.txt"
    return "\n".join(difflib.unified_diff(*texts, name, f"{name}, now", lineterm=""))


def draft(view: SpecView) -> Transcript:
    """Return what to type to try a command: at every kind of site, if it has targets."""
    name = view.name
    lines = [f"help {name}", f"{name} --no-such-option"]
    kinds = {parameter.complete for parameter in view.parameters}
    steps = [Step(">", line) for line in lines]
    if "target" in kinds:
        steps += [
            Step(">", f"{name} server"),
            Step(">", f"{name} client {' '.join(GOOD)}"),
            Step("!", f"stop {SLOW}"),
            Step(">", f"{name} client {DEAD} {STRICT} {SLOW} nowhere"),
            Step("!", f"continue {SLOW}"),
        ]
    else:
        steps += [Step(">", example) for example in view.examples]
    return Transcript(name, steps, [f"# stage: {STAGES[1]}"])


def main() -> int:
    """Carry out the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", nargs="*", help="default: every command that has a transcript")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    views = {view.name: view for view in advertised()}
    if unknown := sorted(set(options.command) - set(views)):
        parser.error(f"no such command: {', '.join(unknown)}")
    transcripts = load_all(options.command)
    there = {transcript.name for transcript in transcripts}
    missing = [name for name in options.command or views if name not in there]
    transcripts += [draft(views[name]) for name in missing if options.command]
    started, changed = time.monotonic(), 0
    for old, new in played(transcripts):
        if text := difference(old, new):
            changed += 1
            print(text)
            if not options.check:
                new.save()
    print(f"{len(transcripts)} transcripts in {time.monotonic() - started:.0f} s: "
          f"{changed} differ{'' if options.check else f', written to {FOLDER}'}")  # fmt: skip
    if missing and not options.command:
        print(f"without a transcript: {', '.join(missing)}")
    return bool(changed and options.check)


if __name__ == "__main__":
    sys.exit(main())
