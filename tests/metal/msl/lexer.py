"""Tokens of a preprocessed Metal source, editable in place: the text in between (and so every
line) stays."""

from __future__ import annotations

import re
from dataclasses import dataclass

_TOKEN = re.compile(
    r"""
    (?P<space>\s+)
  | (?P<comment>//[^\n]*|/\*.*?\*/)
  | (?P<directive>^[ \t]*\#[^\n]*)
  | (?P<string>"(?:\\.|[^"\\])*")
  | (?P<char>'(?:\\.|[^'\\])*')
  | (?P<name>[A-Za-z_]\w*)
  | (?P<number>\.?\d(?:[eEpP][+-]|[\w.])*)
  | (?P<op>\.\.\.|<<=|::|->|\+\+|--|<<|&&|\|\||[-+*/%&|^!=<>]=|.)
    """,
    re.X | re.S | re.M,
)
_TRIVIA = frozenset(("space", "comment", "directive"))
_OPEN = {"(": ")", "[": "]", "{": "}"}
_CLOSE = {close: open_ for open_, close in _OPEN.items()}


class TranslationError(Exception):
    """The source is not understood. The message names the place."""


@dataclass(slots=True, eq=False)
class Token:
    """One token. Edits go to `prefix`, `text` and `suffix`; `line` is that of the source the user
    sees."""

    kind: str
    text: str
    where: str
    prefix: str = ""
    suffix: str = ""

    def render(self) -> str:
        return self.prefix + self.text + self.suffix


class Source:
    """All tokens of a file, and in `code` those that mean something (no white space, comments or
    directives)."""

    def __init__(self, text: str) -> None:
        self.tokens: list[Token] = []
        file, line = "source", 1
        for match in _TOKEN.finditer(text):
            kind, piece = match.lastgroup or "op", match.group()
            self.tokens.append(Token(kind, piece, f"{file}:{line}"))
            if kind == "directive":
                marker = re.match(r'\s*#\s*(?:line\s+)?(\d+)(?:\s+"([^"]*)")?', piece)
                if marker:
                    line = int(marker.group(1)) - 1
                    file = marker.group(2) or file
            line += piece.count("\n")
        self.code = [t for t in self.tokens if t.kind not in _TRIVIA]

    def render(self) -> str:
        return "".join(t.render() for t in self.tokens)

    def text(self, start: int, stop: int) -> str:
        """Tokens start..stop-1 as one line, with the edits made so far."""
        return " ".join(t.render() for t in self.code[start:stop] if t.render())

    def erase(self, start: int, stop: int) -> None:
        """Blanks tokens start..stop-1; `compact` then drops them from `code`."""
        for token in self.code[start:stop]:
            token.prefix = token.text = token.suffix = ""

    def compact(self) -> None:
        self.code = [t for t in self.code if t.text]

    def is_(self, i: int, *texts: str) -> bool:
        return 0 <= i < len(self.code) and self.code[i].text in texts

    def is_name(self, i: int) -> bool:
        return 0 <= i < len(self.code) and self.code[i].kind == "name"

    def fail(self, i: int, message: str) -> TranslationError:
        return TranslationError(f"{self.code[min(i, len(self.code) - 1)].where}: {message}")

    def closing(self, i: int) -> int:
        """Index of the bracket that closes the one at i."""
        open_ = self.code[i].text
        close, depth = _OPEN[open_], 0
        for j in range(i, len(self.code)):
            if self.code[j].text == open_:
                depth += 1
            elif self.code[j].text == close:
                depth -= 1
                if depth == 0:
                    return j
        raise self.fail(i, f"unbalanced {open_}")

    def opening(self, i: int) -> int:
        """Index of the bracket that the one at i closes."""
        close = self.code[i].text
        open_, depth = _CLOSE[close], 0
        for j in range(i, -1, -1):
            if self.code[j].text == close:
                depth += 1
            elif self.code[j].text == open_:
                depth -= 1
                if depth == 0:
                    return j
        raise self.fail(i, f"unbalanced {close}")

    def closing_angle(self, i: int) -> int | None:
        """Index of the > that closes the template arguments opened at i, or None where < is a
        comparison."""
        depth = 0
        j = i
        while j < len(self.code):
            text = self.code[j].text
            if text == "<":
                depth += 1
            elif text == ">":
                depth -= 1
                if depth == 0:
                    return j
            elif text in _OPEN:
                j = self.closing(j)
            elif text in (";", "{", "}", ")", "]", "&&", "||", "=") and text != "=":
                return None
            j += 1
        return None

    def opening_angle(self, i: int) -> int | None:
        """Index of the < whose template arguments end at i, or None."""
        depth = 0
        j = i
        while j >= 0:
            text = self.code[j].text
            if text == ">":
                depth += 1
            elif text == "<":
                depth -= 1
                if depth == 0:
                    return j
            elif text in _CLOSE:
                j = self.opening(j)
            elif text in (";", "{", "(", "["):
                return None
            j -= 1
        return None

    def is_attribute(self, i: int) -> bool:
        return self.is_(i, "[") and self.is_(i + 1, "[")

    def split(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Ranges between the commas of start..stop-1 that are outside brackets and template
        arguments."""
        parts, begin, i = [], start, start
        while i < stop:
            text = self.code[i].text
            if text in _OPEN:
                i = self.closing(i)
            elif text == "<" and i > start and self.is_name(i - 1):
                end = self.closing_angle(i)
                if end is not None and end < stop:
                    i = end
            elif text == ",":
                parts.append((begin, i))
                begin = i + 1
            i += 1
        if begin < stop:
            parts.append((begin, stop))
        return parts


def string_value(text: str) -> str:
    """The value of adjacent string literals."""
    return "".join(re.findall(r'"((?:\\.|[^"\\])*)"', text))
