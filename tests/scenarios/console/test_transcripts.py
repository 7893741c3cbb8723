"""Every command, typed at a real console, against real processes. See `record` to renew them."""

from itertools import chain

import pytest

from flplatform.core.errors import InvalidArgumentError
from flplatform.hci import parse, tokenise
from tests.scenarios.console.matching import draft, normal
from tests.scenarios.console.record import difference, played
from tests.scenarios.console.stage import DEAD, GOOD, SLOW, STRICT
from tests.scenarios.console.transcript import load_all
from tools.commands import advertised, register

pytestmark = pytest.mark.scenario

UNFINISHED: frozenset[str] = frozenset()
"""Commands that need no transcript yet."""

PATIENT = frozenset({"cat", "head", "tail", "grep", "ls"})
"""Commands that wait longer than 2 s for a silent site."""

OF_RUNS = frozenset({"abort", "deploy", "start"})
"""Commands whose targets are those of a run."""

TRANSCRIPTS = {transcript.name: transcript for transcript in load_all()}


def test_every_command_has_a_transcript():
    names = {view.name for view in advertised()}
    assert names - UNFINISHED - set(TRANSCRIPTS) == set(), "record them, see record.py"
    assert set(TRANSCRIPTS) - names == set(), "transcripts of commands that do not exist"
    assert set(TRANSCRIPTS) & UNFINISHED == set(), "they have a transcript"


def parses(name: str, line: str) -> bool:
    try:
        parse(tokenise(line)[1:], register().find(name))
    except InvalidArgumentError:
        return False
    return True


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_a_transcript_shows_help_a_mistake_and_every_kind_of_target(name):
    lines = TRANSCRIPTS[name].lines
    spec, view = register().find(name), register().view(name)
    assert f"help {name}" in lines
    own = [line for line in lines if tokenise(line)[0] in (name, *spec.aliases)]
    well_formed = [line for line in own if parses(name, line)]
    assert well_formed
    assert set(own) - set(well_formed), "no usage error is shown"
    targets = any(parameter.complete == "target" for parameter in view.parameters)
    if targets and name not in OF_RUNS:
        words = {word for line in well_formed for word in tokenise(line)[1:]}
        wanted = {STRICT} if name in PATIENT else {"server", STRICT, DEAD, SLOW}
        assert wanted <= words
        assert words & set(GOOD)


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_a_transcript_holds_nothing_that_differs_next_time(name):
    shown = (step.reply for step in TRANSCRIPTS[name].steps if not step.text.startswith("help "))
    for line in chain.from_iterable(shown):
        assert normal(draft(line)) == normal(line), "write the placeholder, or record it anew"


@pytest.mark.timeout(600)
def test_every_command_at_a_real_console():
    found = [text for old, new in played(TRANSCRIPTS.values()) if (text := difference(old, new))]
    assert not found, "\n".join(
        [*found, "", "if this is as it should be: make transcripts, and review the difference"]
    )
