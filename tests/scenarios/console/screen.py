"""What a terminal shows after the bytes that a program sent to it: lines of text, without colour.

It has no bounds: lines neither wrap nor scroll away, so each line is what the program meant. To go
to the top of the screen means to begin a new page below.
"""

import re

_TOKEN = re.compile(
    r"(?P<csi>\x1b\[(?P<args>[^@-~]*)(?P<verb>[@-~]))"
    r"|(?P<other>\x1b\][^\x07]*?(?:\x07|\x1b\\)|\x1b[()#%].|\x1b[^\[\]()#%])"
    r"|(?P<control>[\x00-\x1a\x1c-\x1f\x7f])"
    r"|(?P<text>[^\x00-\x1f\x7f]+)",
    re.DOTALL,
)


class Screen:
    """Lines and a cursor.

    Attributes:
        lines: what is shown.
        row: of the cursor, from 0.
        column: of the cursor, from 0.
    """

    def __init__(self) -> None:
        self.lines: list[str] = [""]
        self.row = self.column = 0
        self._rest = ""  # an escape sequence whose end has not come yet

    @property
    def line(self) -> str:
        """The line up to the cursor."""
        return self.lines[self.row][: self.column].ljust(self.column)

    def feed(self, text: str) -> None:
        """Take what a program has written."""
        text, at = self._rest + text, 0
        while at < len(text):
            token = _TOKEN.match(text, at)
            if token is None:
                break
            at = token.end()
            if token["csi"]:
                self._sequence(token["args"], token["verb"])
            elif token["control"]:
                self._control(token["control"])
            elif token["text"]:
                self._write(token["text"])
        self._rest = text[at:]

    def _write(self, text: str) -> None:
        line = self.lines[self.row].ljust(self.column)
        self.column += len(text)
        self.lines[self.row] = line[: self.column - len(text)] + text + line[self.column :]

    def _control(self, char: str) -> None:
        if char == "\n":
            self._down(1)
        elif char == "\r":
            self.column = 0
        elif char == "\b":
            self.column = max(self.column - 1, 0)
        elif char == "\t":
            self.column += 8 - self.column % 8

    def _down(self, rows: int) -> None:
        self.row += rows
        self.lines += [""] * (self.row + 1 - len(self.lines))

    def _sequence(self, args: str, verb: str) -> None:
        first = args.split(";")[0]
        count = int(first) if first.isdecimal() else 0
        line = self.lines[self.row]
        match verb:
            case "A":
                self.row = max(self.row - max(count, 1), 0)
            case "B":
                self._down(max(count, 1))
            case "C":
                self.column += max(count, 1)
            case "D":
                self.column = max(self.column - max(count, 1), 0)
            case "G":
                self.column = max(count, 1) - 1
            case "H" | "f":
                self.column = 0
                if any(self.lines[self.row :]):
                    self.row = len(self.lines) - 1
                    self._down(1)
            case "J" if count == 0:
                self.lines[self.row :] = [line[: self.column]]
            case "K" if count == 0:
                self.lines[self.row] = line[: self.column]
            case "K" if count == 2:
                self.lines[self.row] = ""
            case "P":
                self.lines[self.row] = line[: self.column] + line[self.column + max(count, 1) :]
