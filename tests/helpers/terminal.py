"""Runs Python code on a terminal, and reads what the terminal shows."""

import os
import pty
import re
import subprocess
import sys


def screen_of(code):
    """Returns the lines, without those that are blank, that a terminal shows after `code` wrote to it as stderr."""
    ours, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=terminal, env=environment)
    os.close(terminal)
    data = b""
    try:
        while chunk := os.read(ours, 4096):
            data += chunk
    except OSError:  # how Linux reports that the terminal has no other end any more
        pass
    os.close(ours)
    assert process.wait(60) == 0
    return [line.rstrip() for line in _screen(data) if line.strip()]


def _screen(data):
    """Returns the lines that a terminal shows after these bytes; knows the sequences of rich's bar."""
    lines, row, column = [""], 0, 0
    for sequence, text in re.findall(r"(\x1b\[[0-9;?]*[A-Za-z]|\r|\n)|([^\x1b\r\n]+)", data.decode()):
        if text:
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
            column += len(text)
        elif sequence == "\r":
            column = 0
        elif sequence == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif sequence == "\x1b[2K":
            lines[row] = ""
        elif sequence.endswith("A"):
            row -= int(sequence[2:-1])
    return lines
