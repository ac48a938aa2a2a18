"""Small wrong edits of the source, each with the test that must fail for it: `make mutants`.

A test that passes whatever the code does holds no claim. Every row of `mutant_table` is a slip that somebody could
make. It is made in a copy of the checkout and its test is run there. Where the test still passes, the mutant has
survived, and the suite has a hole. First the same tests run on an untouched copy, where they must pass.

    .venv/bin/python tests/mutants.py [WORD ...]     # those whose file or slip contains one of the words; none: all

The last line reads `45 tried, 45 killed`; the exit code is 1 where one survives or cannot be judged.
"""

import concurrent.futures
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from mutant_table import TABLE

ROOT = Path(__file__).resolve().parents[1]
WORKERS = 2  # mutants that are judged at a time
LIMIT_S = 240  # for the test of one mutant; one that takes longer is not judged
_LEFT_BEHIND = shutil.ignore_patterns(".*", "__pycache__", "runs", "*.egg-info")
_TESTS_FAILED = 1  # pytest's exit code; others say that no test could be run


@dataclasses.dataclass(frozen=True)
class Mutant:
    """An edit of `file`, below `vit_dist/`: `old`, which stands there once, becomes `new`."""

    file: str
    slip: str  # what is wrong then, in words
    old: str
    new: str
    test: str  # pytest's name of what must fail, below `tests/`


MUTANTS = [Mutant(file, slip, old, new, test) for file, rows in TABLE.items() for slip, old, new, test in rows]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a mutant: "killed", "SURVIVED" or why it could not be judged, and what pytest printed."""

    mutant: Mutant
    word: str
    seconds: float
    output: str


def judge(mutant: Mutant) -> Verdict:
    """Runs a mutant's test in a copy of its own."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = copied(Path(folder))
        file = copy / "vit_dist" / mutant.file
        text = file.read_text()
        count = text.count(mutant.old)
        if count != 1:
            return Verdict(mutant, f"NOT JUDGED: its text stands {count} times in {mutant.file}", 0.0, "")
        file.write_text(text.replace(mutant.old, mutant.new))
        code, output = run(copy, [mutant.test])
    words = {_TESTS_FAILED: "killed", 0: "SURVIVED", None: f"NOT JUDGED: more than {LIMIT_S} s"}
    word = words.get(code, f"NOT JUDGED: pytest ended with {code}")
    return Verdict(mutant, word, time.monotonic() - begun, output)


def copied(folder: Path) -> Path:
    """A copy of the checkout below `folder`, with the shared data beside it where they are here."""
    copy = folder / "checkout"
    shutil.copytree(ROOT, copy, ignore=_LEFT_BEHIND)
    if (ROOT.parent / "shared").is_dir():
        (folder / "shared").symlink_to(ROOT.parent / "shared")
    return copy


def run(copy: Path, tests: Sequence[str]) -> tuple[int | None, str]:
    """pytest's exit code (None: it took too long) and output, of tests in a copy of the checkout."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(copy),  # before what is installed
        "PYTHONDONTWRITEBYTECODE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "slow or not slow"]
    try:
        done = subprocess.run(
            [*command, *(f"tests/{test}" for test in tests)],
            cwd=copy, env=environment, capture_output=True, text=True, timeout=LIMIT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stdout + done.stderr


def main(words: Sequence[str]) -> int:
    """Judges all mutants, or those of which a word is told; returns the exit code."""
    chosen = [one for one in MUTANTS if not words or any(word in f"{one.file} {one.slip}" for word in words)]
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tests = sorted({mutant.test for mutant in chosen})
        code, output = run(copied(Path(folder)), tests)
    if code != 0:
        print(output, f"error: the tests do not pass without a mutant (pytest ended with {code})", sep="\n")
        return 1
    print(f"{len(tests)} tests pass without a mutant ({time.monotonic() - begun:.0f} s)", flush=True)
    killed = 0
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        for verdict in pool.map(judge, chosen):
            mutant = verdict.mutant
            print(f"{verdict.word:10} {verdict.seconds:5.1f} s  {mutant.file}: {mutant.slip}", flush=True)
            killed += verdict.word == "killed"
            if verdict.word != "killed":
                print(verdict.output[-2000:], flush=True)
    print(f"{time.monotonic() - begun:.0f} s")
    print(f"{len(chosen)} tried, {killed} killed")
    return 0 if killed == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
