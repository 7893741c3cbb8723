r"""Regular expressions whose cost grows with the text and the pattern, and never beyond.

Literals, `.`, `[a-z]`, `[^a-z]`, `\d \w \s` and their opposites, `( )`, `|`, `*`, `+`, `?`, and
the anchors `^` and `$`. No counts, no back-references, nothing that looks around: those are what
makes a pattern from elsewhere able to stop a process.

The pattern becomes an automaton whose states are followed all at once (K. Thompson, "Regular
expression search algorithm", CACM 11(6), 1968); the sets of states that were met are remembered.
"""

from collections.abc import Callable, Iterable
from typing import TypeAlias

from flplatform.core.errors import InvalidArgumentError

MAX_PATTERN = 200
MAX_DEPTH = 20
_MAX_REMEMBERED = 10_000
_SPECIAL = frozenset("\\.[]()|*+?^${}-/\"' #=:,<>!@%&;~`")
"""What a backslash may stand before to mean the character itself."""

Test: TypeAlias = Callable[[str], bool]
Build: TypeAlias = Callable[[int], int]
"""Adds a piece of the automaton that leads to a node; returns the node where it begins."""

_CLASSES: dict[str, Test] = {
    "d": str.isdecimal,
    "w": lambda char: char.isalnum() or char == "_",
    "s": str.isspace,
}
_CHAR, _FORK, _BEGIN, _END, _MATCH = range(5)
_MATCHED = 0
"""The node that is made first: who reaches it has matched."""


def _opposite(test: Test) -> Test:
    return lambda char: not test(char)


def _always(_char: str) -> bool:
    return True


class LinearPattern:
    """A compiled pattern.

    Args:
        pattern: at most 200 characters.
        ignore_case: whether `A` matches `a`.

    Raises:
        InvalidArgumentError: it is too long, or says something that is not supported.
    """

    def __init__(self, pattern: str, ignore_case: bool = False) -> None:
        if len(pattern) > MAX_PATTERN:
            raise InvalidArgumentError(f"is longer than {MAX_PATTERN}", field="PATTERN")
        self._pattern = pattern
        self._ignore_case = ignore_case
        self._at = 0
        self._nodes: list[tuple[int, Test, list[int]]] = []
        build = self._alternatives(0)
        if self._at < len(pattern):
            raise self._error("has a ')' that nothing opens")
        start = build(self._node(_MATCH))
        self._first = self._closure([start], begin=True)
        self._later = self._closure([start])
        self._steps: dict[tuple[frozenset[int], str], frozenset[int]] = {}

    def search(self, text: str) -> bool:
        """Return whether the pattern matches anywhere in a line."""
        states = self._first
        for char in text.lower() if self._ignore_case else text:
            if _MATCHED in states:
                return True
            key = states, char
            known = self._steps.get(key)
            if known is None:
                if len(self._steps) >= _MAX_REMEMBERED:
                    self._steps.clear()
                known = self._steps[key] = self._step(states, char)
            states = known
        return _MATCHED in states or _MATCHED in self._closure(states, begin=not text, end=True)

    # ---- following ----

    def _step(self, states: frozenset[int], char: str) -> frozenset[int]:
        found = [
            after
            for state in states
            if self._nodes[state][0] == _CHAR and self._nodes[state][1](char)
            for after in self._nodes[state][2]
        ]
        return self._closure(found) | self._later

    def _closure(
        self, states: Iterable[int], begin: bool = False, end: bool = False
    ) -> frozenset[int]:
        """Return all states that can be reached without a character."""
        passable = {_FORK} | ({_BEGIN} if begin else set()) | ({_END} if end else set())
        reached, waiting = set[int](), list(states)
        while waiting:
            state = waiting.pop()
            if state not in reached:
                reached.add(state)
                kind, _, after = self._nodes[state]
                if kind in passable:
                    waiting.extend(after)
        return frozenset(reached)

    # ---- building ----

    def _node(self, kind: int, after: Iterable[int] = (), test: Test = _always) -> int:
        self._nodes.append((kind, test, list(after)))
        return len(self._nodes) - 1

    def _error(self, what: str) -> InvalidArgumentError:
        return InvalidArgumentError(
            f"{self._pattern[:80]!r} {what}",
            field="PATTERN",
            hint="known: . [a-z] \\d \\w \\s ( | ) * + ? ^ $; a backslash takes a meaning away",
        )

    def _peek(self) -> str:
        return self._pattern[self._at : self._at + 1]

    def _take(self) -> str:
        char = self._peek()
        self._at += 1
        if not char:
            raise self._error("ends too early")
        return char

    def _alternatives(self, depth: int) -> Build:
        if depth > MAX_DEPTH:
            raise self._error(f"is nested deeper than {MAX_DEPTH}")
        options = [self._sequence(depth)]
        while self._peek() == "|":
            self._at += 1
            options.append(self._sequence(depth))
        if len(options) == 1:
            return options[0]
        return lambda after: self._node(_FORK, [option(after) for option in options])

    def _sequence(self, depth: int) -> Build:
        pieces: list[Build] = []
        while self._peek() not in ("", "|", ")"):
            pieces.append(self._repeated(self._piece(depth)))

        def build(after: int) -> int:
            for piece in reversed(pieces):
                after = piece(after)
            return after

        return build

    def _repeated(self, piece: Build) -> Build:
        sign = self._peek()
        if sign not in ("*", "+", "?"):
            return piece
        self._at += 1
        if self._peek() in ("*", "+", "?"):
            raise self._error("repeats a repetition")

        def build(after: int) -> int:
            fork = self._node(_FORK, [after])
            begin = piece(after if sign == "?" else fork)
            self._nodes[fork][2].append(begin)
            return begin if sign == "+" else fork

        return build

    def _piece(self, depth: int) -> Build:
        char = self._take()
        match char:
            case "(":
                if self._peek() == "?":
                    raise self._error("has a group of a kind that is not known")
                group = self._alternatives(depth + 1)
                if self._take() != ")":
                    raise self._error("has a '(' that nothing closes")
                return group
            case "^" | "$":
                kind = _BEGIN if char == "^" else _END
                return lambda after: self._node(kind, [after])
            case "*" | "+" | "?":
                raise self._error(f"has nothing for {char!r} to repeat")
            case "{" | "}":
                raise self._error("has a count, or a brace without a backslash")
        test = self._set() if char == "[" else self._single(char)
        return lambda after: self._node(_CHAR, [after], test)

    def _single(self, char: str) -> Test:
        """Return what one character outside of brackets means."""
        if char == ".":
            return _always
        if char == "\\":
            char = self._take()
            if char.lower() in _CLASSES:
                test = _CLASSES[char.lower()]
                return test if char.islower() else _opposite(test)
            if char not in _SPECIAL:
                raise self._error(f"has an escape, \\{char}, that is not known")
        wanted = self._case(char)
        return lambda found: found == wanted

    def _set(self) -> Test:
        """Read `[...]`, after its first bracket."""
        inverted = self._peek() == "^"
        self._at += inverted
        ranges: list[tuple[str, str]] = []
        tests: list[Test] = []
        first = True
        while first or self._peek() != "]":
            first = False
            char = self._take()
            if char == "\\":
                char = self._take()
                if char.lower() in _CLASSES:
                    test = _CLASSES[char.lower()]
                    tests.append(test if char.islower() else _opposite(test))
                    continue
            last = char
            if self._peek() == "-" and self._pattern[self._at + 1 : self._at + 2] not in ("", "]"):
                self._at += 1
                last = self._take()
            if last < char:
                raise self._error(f"has a range that ends before it begins: {char}-{last}")
            ranges.append((char, last))
        self._at += 1

        def within(char: str) -> bool:
            spellings = (char, char.upper()) if self._ignore_case else (char,)
            return any(low <= each <= high for each in spellings for low, high in ranges) or any(
                test(char) for test in tests
            )

        return _opposite(within) if inverted else within

    def _case(self, char: str) -> str:
        return char.lower() if self._ignore_case else char
