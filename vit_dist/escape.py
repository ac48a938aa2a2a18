"""Escapes text that comes from outside, such as names of files, classes and hosts, before it is shown or kept.

Raw, it could move a terminal's cursor, erase lines, or look like a line that this program has printed.
"""

import logging
import re

# Control characters (C0, DEL, C1), line and paragraph separators, marks that reorder the text after them, and halves of
# surrogate pairs, which stand for bytes of a file name that are no UTF-8.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_BYTES = range(0xDC80, 0xDD00)  # how Python decodes the bytes 0x80 to 0xff of a name that is no UTF-8


def printable(text: str) -> str:
    r"""Returns a text in one line, in which characters that a terminal would obey are written as `\n` or `\x1b`."""
    return _UNSAFE.sub(_escaped, text)


def printable_lines(text: str) -> str:
    """Returns a text of several lines with each made printable; lines after the first are indented.

    So none of them looks like a line of its own, such as `error: ...`.
    """
    return "\n    ".join(map(printable, text.split("\n")))


class PrintableFormatter(logging.Formatter):
    """Formats log records for a terminal: each value in a message as one line, and the whole as `printable_lines`."""

    def format(self, record: logging.LogRecord) -> str:
        values = record.args
        if isinstance(values, tuple):
            record = logging.makeLogRecord(vars(record) | {"args": tuple(map(_printable_value, values))})
        return printable_lines(super().format(record))


def _printable_value(value: object) -> object:
    """Returns a value as `%s` would show it, escaped; numbers stay as they are, for `%d` and `%.1f`."""
    return value if hasattr(value, "__float__") else printable(str(value))


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code in _BYTES:
        return f"\\x{code - 0xDC00:02x}"
    return match[0].encode("unicode_escape", "surrogatepass").decode()
