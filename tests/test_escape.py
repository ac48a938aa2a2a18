"""Text from outside moves no cursor and forges no line, wherever it is printed."""

import io
import logging
import subprocess
import sys

import numpy as np
import pytest

from vit_dist import cli, printing
from vit_dist.config import ConfigError
from vit_dist.data.progress_bar import bar
from vit_dist.escape import PrintableFormatter, printable, printable_lines
from vit_dist.job import child
from vit_dist.run.progress import Progress

HOSTILE = "a\x1b[2J\nerror: forged\r\x9b\x7f\u2028\u202e\udce9"
ESCAPED = r"a\x1b[2J\nerror: forged\r\x9b\x7f\u2028\u202e\xe9"


def harmless(text: str) -> bool:
    """Whether a terminal shows a text as it is, and no line of it is forged."""
    characters = set(text) - {"\n"}
    return all(map(str.isprintable, characters)) and "\nerror: forged" not in text


def test_what_a_terminal_obeys_is_written_as_an_escape():
    assert printable(HOSTILE) == ESCAPED
    assert printable(ESCAPED) == ESCAPED
    kept = "naïve 猫 🐈 e\u0301 \u200f עברית $x \\n"
    assert printable(kept) == kept
    for code in (*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xD800, 0xDFFF):
        assert printable(chr(code)).isascii() and printable(chr(code)).isprintable()


def test_a_message_of_several_lines_has_none_that_looks_like_its_own():
    assert printable_lines("one\nerror: two\x1b") == "one\n    error: two\\x1b"


def test_log_records_are_escaped_and_numbers_in_them_formatted():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(PrintableFormatter("%(message)s"))
    log = logging.Logger("test")
    log.addHandler(handler)
    log.warning("%s: %d of %.1f, %r", HOSTILE, np.int64(3), 2.5, ConfigError(HOSTILE))
    log.warning("a library's %(name)s", {"name": HOSTILE})
    log.warning("a library's\nerror: forged")
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        log.exception("a traceback")
    lines = stream.getvalue()
    assert lines.startswith(f"{ESCAPED}: 3 of 2.5, ")
    assert harmless(lines) and "\n    Traceback" in lines


def test_results_and_messages_are_escaped(capsys):
    printing.print_table(("name",), [(HOSTILE,), ("b",)])
    printing.print_lines([HOSTILE])
    printing.print_json({"name": HOSTILE})
    printing.print_message(f"error: {HOSTILE}")
    out, err = capsys.readouterr()
    assert harmless(out) and harmless(err)
    assert out.splitlines()[1:3] == [ESCAPED, "b"] and out.count("\n") == 5
    assert err == "error: a\\x1b[2J\n    error: forged\\r\\x9b\\x7f\\u2028\\u202e\\xe9\n"


def test_progress_is_escaped():
    stream = io.StringIO()
    progress = Progress(9, stream=stream)
    progress.line(HOSTILE)
    progress.close()
    assert stream.getvalue() == f"{ESCAPED}\n"
    with bar() as shown:
        task = shown.add_task(HOSTILE)
        assert [each.description for each in shown.tasks if each.id == task] == [ESCAPED]


def test_the_output_of_a_launched_process_is_escaped():
    assert child._text(f"{HOSTILE}\n".encode("utf-8", "surrogateescape")) == ESCAPED


@pytest.mark.parametrize("error", [ConfigError(HOSTILE), OSError(20, HOSTILE, HOSTILE)])
def test_an_error_of_a_verb_is_one_that_cannot_be_forged(monkeypatch, capsys, error):
    def fail(options):
        raise error

    monkeypatch.setitem(cli._VERBS, "eval", fail)
    assert cli.main(["eval", "--workdir=x"]) == 2
    err = capsys.readouterr().err
    assert harmless(err) and err.startswith("error: a")


def test_words_of_the_command_line_are_escaped(capsys):
    with pytest.raises(SystemExit):
        cli.main(["eval", "--workdir=x", f"--{HOSTILE}"])
    assert harmless(capsys.readouterr().err)


COMMAND = """
import logging, sys, warnings
from vit_dist import cli

def run(options):
    logging.warning("%s", {0!r})
    warnings.warn({0!r})
    raise RuntimeError({0!r})

cli._VERBS["configs"] = run
sys.argv = ["vit-dist", "configs"]
sys.exit(cli.main())
"""


def test_what_the_command_logs_warns_of_and_did_not_expect_is_escaped(tmp_path):
    command = [sys.executable, "-c", COMMAND.format(HOSTILE)]
    done = subprocess.run(command, capture_output=True, text=True, errors="surrogateescape", cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == "" and harmless(done.stderr)
    first, second, *_ = done.stderr.splitlines()
    assert first == ESCAPED and r"UserWarning: a\x1b[2J" in second and "Traceback" in done.stderr
    assert done.stderr.splitlines()[-2].startswith(r"    RuntimeError: a\x1b[2J")
