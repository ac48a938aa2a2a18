"""Small wrong edits of the source, each with the test that must fail for it: `make mutants`.

A test that passes whatever the code does holds no claim. Every row of `mutant_table` is a slip that somebody could
make. It is made in a copy of the checkout and its test is run there. Where the test still passes, the mutant has
survived, and the suite has a hole. Where the test fails by another exception than that of an assertion, such as a
NameError, the mutant says nothing of the test's claim and is not judged, unless its row names that exception. First the
same tests run on an untouched copy, where they must pass.

    .venv/bin/python tests/mutants.py [WORD ...]     # those whose file or slip contains one of the words; none: all

The last line reads `45 tried, 45 killed`; those that were not killed stand once more before it. The exit code is 1
where one survives or cannot be judged, and 2 where a word matches no mutant.
"""

import concurrent.futures
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Sequence
from pathlib import Path

from mutant_table import TABLE

ROOT = Path(__file__).resolve().parents[1]
WORKERS = 2  # mutants that are judged at a time
LIMIT_S = 240  # for the test of one mutant; one that takes longer is not judged
UNTOUCHED_LIMIT_S = 1800  # for all tests of the chosen mutants, one after another, without a mutant
_LEFT_BEHIND = shutil.ignore_patterns(".*", "__pycache__", "runs", "*.egg-info")
_TESTS_FAILED = 1  # pytest's exit code; others say that no test could be run
_ASSERTIONS = ("assert", "AssertionError", "Failed")  # the last is that of `pytest.raises` and `pytest.fail`
# As pytest reports a failure: `assert 1 == 2`, `Failed: DID NOT RAISE ...`, `failed on setup with "NameError: ..."`.
_ERROR_NAME = re.compile(r'(?:failed on \w+ with ")?(?:\w+\.)*(\w+)')


@dataclasses.dataclass(frozen=True)
class Mutant:
    """An edit of `file`, below `vit_dist/`: `old`, which stands there once, becomes `new`."""

    file: str
    slip: str  # what is wrong then, in words
    old: str
    new: str
    test: str  # pytest's name of what must fail, below `tests/`
    error: str = "AssertionError"  # or the name of another exception that is the right way to fail


MUTANTS = [Mutant(file, *row) for file, rows in TABLE.items() for row in rows]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What pytest did: its exit code (None: it took too long), what it printed, and how the first test failed."""

    code: int | None = None
    output: str = ""
    failure: str = ""

    def error(self) -> str:
        """The name of the failure's exception, one of `_ASSERTIONS` where an assertion fails."""
        name = _ERROR_NAME.match(self.failure)
        return name[1] if name else ""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a mutant: "killed", "SURVIVED" or why it could not be judged."""

    mutant: Mutant
    word: str
    seconds: float = 0.0
    outcome: Outcome = Outcome()


def judge(mutant: Mutant) -> Verdict:
    """Runs a mutant's test in a copy of its own."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = copied(Path(folder))
        file = copy / "vit_dist" / mutant.file
        text = file.read_text()
        count = text.count(mutant.old)
        if count != 1:
            return Verdict(mutant, f"NOT JUDGED: its text stands {count} times in {mutant.file}")
        file.write_text(text.replace(mutant.old, mutant.new))
        outcome = run(copy, [mutant.test], LIMIT_S)
    return Verdict(mutant, judgement(mutant, outcome), time.monotonic() - begun, outcome)


def judgement(mutant: Mutant, outcome: Outcome) -> str:
    """The word of a verdict."""
    if outcome.code is None:
        return f"NOT JUDGED: more than {LIMIT_S} s"
    if outcome.code == 0:
        return "SURVIVED"
    if outcome.code != _TESTS_FAILED:
        return f"NOT JUDGED: pytest ended with {outcome.code}"
    error = outcome.error()
    if error not in (*_ASSERTIONS, mutant.error):
        return f"NOT JUDGED: its test fails by {error}, not by an assertion"
    return "killed"


def copied(folder: Path) -> Path:
    """A copy of the checkout below `folder`, with the shared data beside it where they are here."""
    copy = folder / "checkout"
    shutil.copytree(ROOT, copy, ignore=_LEFT_BEHIND)
    if (ROOT.parent / "shared").is_dir():
        (folder / "shared").symlink_to(ROOT.parent / "shared")
    return copy


def run(copy: Path, tests: Sequence[str], limit_s: float) -> Outcome:
    """Runs tests in a copy of the checkout up to the first that fails, for `limit_s` seconds at most."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(copy),  # before what is installed
        "PYTHONDONTWRITEBYTECODE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
    }
    report = copy.with_name("report.xml")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "slow or not slow"]
    command += [f"--junit-xml={report}", "-o", "junit_family=xunit1"]  # which takes what a test records
    try:
        done = subprocess.run(
            [*command, *(f"tests/{test}" for test in tests)],
            cwd=copy, env=environment, capture_output=True, text=True, timeout=limit_s,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Outcome()
    return Outcome(done.returncode, done.stdout + done.stderr, first_failure(report))


def first_failure(report: Path) -> str:
    """What pytest's XML report says of the first failure or error, in one line; "" where there is none."""
    if not report.exists():  # pytest did not come that far
        return ""
    tests = xml.etree.ElementTree.parse(report).iter("testcase")
    failures = [one.get("message", "") for test in tests for one in test if one.tag in ("failure", "error")]
    return " ".join(failures[0].split()) if failures else ""


def matches(mutant: Mutant, word: str) -> bool:
    return word in f"{mutant.file} {mutant.slip}"


def main(words: Sequence[str]) -> int:
    """Judges all mutants, or those of which a word is told; returns the exit code."""
    unknown = [word for word in words if not any(matches(one, word) for one in MUTANTS)]
    if unknown:
        print(f"error: no mutant matches {' '.join(unknown)}", file=sys.stderr)
        return 2
    chosen = [one for one in MUTANTS if not words or any(matches(one, word) for word in words)]
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tests = sorted({mutant.test for mutant in chosen})
        outcome = run(copied(Path(folder)), tests, UNTOUCHED_LIMIT_S)
    if outcome.code is None:
        print(f"error: the tests without a mutant took longer than their limit of {UNTOUCHED_LIMIT_S} s")
        return 1
    if outcome.code != 0:
        print(
            outcome.output,
            f"error: the tests do not pass without a mutant (pytest ended with {outcome.code})",
            sep="\n",
        )
        return 1
    print(f"{len(tests)} tests pass without a mutant ({time.monotonic() - begun:.0f} s)", flush=True)
    left: list[str] = []
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        for verdict in pool.map(judge, chosen):
            mutant, outcome = verdict.mutant, verdict.outcome
            how = f" [{outcome.failure[:80]}]" if outcome.failure else ""
            line = f"{verdict.word:10} {verdict.seconds:5.1f} s  {mutant.file}: {mutant.slip}{how}"
            print(line, flush=True)
            if verdict.word != "killed":
                left.append(line)
                print(outcome.output[-2000:], flush=True)
    print(f"{time.monotonic() - begun:.0f} s")
    print(*left, f"{len(chosen)} tried, {len(chosen) - len(left)} killed", sep="\n")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
