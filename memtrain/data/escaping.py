"""What strangers wrote, shown: keys, captions, URLs and file names in logs, on terminals and in tables."""

from __future__ import annotations

import logging
from types import TracebackType

ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what spreadsheets take for one at a cell's start


def as_text(name: str) -> str:
    """A sample's key as a table can hold it: bytes that are not UTF-8 are spelt out."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def printable(text: str) -> str:
    """On one line, and safe on a terminal: what is not printable is spelt out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class PrintableFormatter(logging.Formatter):
    """A record is one line, whatever its arguments hold; a traceback below it keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))

    def formatException(self, ei: ExcInfo) -> str:
        return "\n".join(map(printable, super().formatException(ei).split("\n")))


def as_cell(value: object) -> object:
    """What a cell of a csv may hold: text that a spreadsheet would take for a formula begins with an apostrophe."""
    if not isinstance(value, str):
        return value
    text = as_text(value)
    return f"'{text}" if _is_formula(text) else text


def of_cell(value: object) -> object:
    """The text that `as_cell` was given; what is no text, as for a cell that is not there, stays."""
    return value[1:] if isinstance(value, str) and value.startswith("'") and _is_formula(value) else value


def _is_formula(text: str) -> bool:
    """Also behind apostrophes: so that each text has a cell of its own."""
    return text.lstrip("'").startswith(_FORMULA)
