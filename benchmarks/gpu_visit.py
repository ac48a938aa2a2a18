"""Runs all tests and measurements that need a GPU, in a few minutes, the most valuable first.

    PYTHONPATH=$SITE:. python3 benchmarks/gpu_visit.py --budget=420 --out=DIR       # on the machine with a GPU
    make gpu-visit ARGS=--dry-run                                                   # the same on a CPU, in miniature

Each part is a process of its own with a time limit (`visit/parts.py`); a part that fails is reported, and the others
run. DIR then holds `visit.json`, which is complete after every part, `visit.md`, `log.txt`, the compiled programs for a
second visit, and the trace of ten steps. README.md describes what the machine needs and how to start a visit.
"""

import argparse
import json
import math
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from visit import parts
from visit.job import GPU
from visit.runner import NoArchive, Part, Stopped, Visit

DONE, FAILED, MISTAKE = 0, 1, 2
_ENDING = (signal.SIGTERM, signal.SIGINT)
_ENOUGH = 3600.0  # seconds for a dry run, which has no budget


class Mistake(Exception):
    """A usage error, described in one line."""


def main(argv: list[str] | None = None) -> int:
    """Runs a visit; returns 0 if all parts succeeded, 1 if a part failed, 2 for a usage error.

    SIGTERM and Ctrl-C end the visit and its current part, and keep the results so far; it then returns 128 + the number
    of the signal.
    """
    options = parser().parse_args(argv)
    signals: list[int] = []
    previous = {ending: signal.signal(ending, lambda number, _: signals.append(number)) for ending in _ENDING}
    try:
        return _visit(options, signals)
    except Mistake as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return MISTAKE
    except Stopped as stopped:
        print(f"ended by {stopped}", file=sys.stderr)
        return 128 + signals[0]
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--out", type=Path, required=True, help="a folder for the results")
    options.add_argument("--budget", type=float, default=420.0, help="seconds for all of it (420)")
    options.add_argument("--kit", type=Path, default=Path(".visit"), help="what make visit-kit made (.visit)")
    options.add_argument("--parts", help=f"some alone, of {','.join(parts.BY_NAME)} (all but loader)")
    options.add_argument("--cache", type=Path, help="an earlier visit's cache.tar.gz, to compile nothing twice")
    options.add_argument("--earlier", type=Path, help="an earlier visit's visit.json, to do what it left or failed")
    options.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny sizes; the loader too")
    return options


def _visit(options: argparse.Namespace, signals: list[int]) -> int:
    chosen = _chosen(options)
    if not 0 < options.budget < math.inf:
        raise Mistake(f"--budget: {options.budget} is no number of seconds above 0")
    earlier = None if options.earlier is None else _record(options.earlier)
    with tempfile.TemporaryDirectory(prefix="gpu-visit-", ignore_cleanup_errors=True) as scratch:
        try:
            visit = Visit(
                options.out,
                scratch=Path(scratch),
                kit=options.kit,
                budget=_ENOUGH if options.dry_run else options.budget,
                dry_run=options.dry_run,
                cache=options.cache,
                signals=signals,
            )
        except NoArchive as error:
            raise Mistake(f"--cache: {error}") from error
        _check_folder(options.out)
        return _run(visit, chosen, earlier)


def _chosen(options: argparse.Namespace) -> list[Part]:
    if options.parts is None:
        return [*parts.PARTS, *([parts.LOADER] if options.dry_run else [])]
    names = options.parts.split(",")
    if unknown := [name for name in names if name not in parts.BY_NAME]:
        raise Mistake(f"--parts: {unknown[0]!r} is none of {', '.join(parts.BY_NAME)}")
    return [parts.BY_NAME[name] for name in names]


def _record(file: Path) -> dict[str, Any]:
    """Returns the record of an earlier visit."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Mistake(f"--earlier: {file} cannot be read: {error}") from error
    results = record.get("parts") if isinstance(record, dict) and {"time", "dry_run"} <= record.keys() else None
    if not isinstance(results, dict) or not all(isinstance(part, dict) for part in results.values()):
        raise Mistake(f"--earlier: {file} is not the visit.json of a visit")
    return record


def _check_folder(out: Path) -> None:
    """Makes the folder if it is missing, and tries to write a file in it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise Mistake(f"--out: {out} is no folder that can be written to: {error}") from error


def _run(visit: Visit, chosen: list[Part], earlier: dict[str, Any] | None) -> int:
    machine = visit.run(parts.MACHINE)
    if machine["status"] == "left out":
        raise Mistake(f"--budget: too little for the first part, {parts.MACHINE.name}: {machine['reason']}")
    if machine["status"] != "ok":
        print("\n".join(machine.get("log", [])), file=sys.stderr)
        raise Mistake(f"jax cannot be used here: {machine['reason']}")
    needs_gpu = any(part is not parts.LOADER for part in chosen)
    if machine["result"]["platform"] not in GPU and needs_gpu and not visit.dry_run:
        raise Mistake(f"jax sees no GPU here, but a {machine['result']['device_kind']}; see --dry-run")
    if earlier is not None:
        visit.take_over(earlier, parts.BY_NAME.values())
    visit.begin()
    visit.run_all(chosen)
    failed = [name for name, part in visit.parts.items() if part["status"] == "failed"]
    if visit.page_is_whole:
        print((visit.out / "visit.md").read_text(encoding="utf-8"))
    print(f"failed: {', '.join(failed) or 'none'}; the results are in {visit.out}", file=sys.stderr)
    return FAILED if failed or not visit.page_is_whole else DONE


if __name__ == "__main__":
    sys.exit(main())
