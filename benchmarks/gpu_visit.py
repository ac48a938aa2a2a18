"""All that is to be learnt from a GPU in a few minutes, most valuable first, by one command.

    PYTHONPATH=$SITE:. python3 benchmarks/gpu_visit.py --budget=420 --out=DIR       # on the machine that has one
    make gpu-visit ARGS=--dry-run                                                   # the same on a CPU, in miniature

Each part is a process of its own with a limit of time (`visit/parts.py`): one that fails is reported, and the rest goes
on. DIR then holds `visit.json`, which is whole after every part, `visit.md`, `log.txt`, the compiled programs for a
second visit, and the trace of ten steps. README.md says what to take along and how to go there.
"""

import argparse
import json
import sys
import tarfile
import tempfile
from pathlib import Path

from visit import parts
from visit.job import GPU
from visit.runner import Part, Visit

DONE, FAILED, MISTAKE = 0, 1, 2
_ENOUGH = 3600.0  # seconds of a dry run, which has no budget to keep


def main(argv: list[str] | None = None) -> int:
    """Runs a visit; returns 0 where all parts went well, 1 where one failed, 2 for what was asked wrongly."""
    options = parser().parse_args(argv)
    chosen = [*parts.PARTS, *([parts.LOADER] if options.dry_run else [])]
    if options.parts is not None:
        unknown = [name for name in options.parts.split(",") if name not in parts.BY_NAME]
        if unknown:
            return _mistake(f"--parts: {unknown[0]!r} is none of {', '.join(parts.BY_NAME)}")
        chosen = [parts.BY_NAME[name] for name in options.parts.split(",")]
    if options.cache is not None and not (options.cache.is_file() and tarfile.is_tarfile(options.cache)):
        return _mistake(f"--cache: no archive: {options.cache}")
    if options.earlier is not None and not options.earlier.is_file():
        return _mistake(f"--earlier: no such file: {options.earlier}")
    with tempfile.TemporaryDirectory(prefix="gpu-visit-") as scratch:
        visit = Visit(
            options.out,
            scratch=Path(scratch),
            kit=options.kit,
            budget=_ENOUGH if options.dry_run else options.budget,
            dry_run=options.dry_run,
            cache=options.cache,
        )
        return _run(visit, chosen, options.earlier)


def parser() -> argparse.ArgumentParser:
    """What can be asked for."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--out", type=Path, required=True, help="a folder for the results")
    options.add_argument("--budget", type=float, default=420.0, help="seconds for all of it (420)")
    options.add_argument("--kit", type=Path, default=Path(".visit"), help="what make visit-kit made (.visit)")
    options.add_argument("--parts", help=f"some alone, of {','.join(parts.BY_NAME)} (all but loader)")
    options.add_argument("--cache", type=Path, help="an earlier visit's cache.tar.gz, to compile nothing twice")
    options.add_argument("--earlier", type=Path, help="an earlier visit's visit.json, to do what it left or failed")
    options.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny sizes; the loader too")
    return options


def _run(visit: Visit, chosen: list[Part], earlier: Path | None) -> int:
    machine = visit.run(parts.MACHINE)
    if machine["status"] != "ok":
        return _mistake(f"jax cannot be used here: {machine['reason']}")
    needs_gpu = any(part is not parts.LOADER for part in chosen)
    if machine["result"]["platform"] not in GPU and needs_gpu and not visit.dry_run:
        return _mistake(f"jax sees no GPU here, but a {machine['result']['device_kind']}; see --dry-run")
    if earlier is not None:
        visit.take_over(json.loads(earlier.read_text(encoding="utf-8")), parts.BY_NAME.values())
    visit.run_all(chosen)
    failed = [name for name, part in visit.parts.items() if part["status"] == "failed"]
    if visit.page_is_whole:
        print((visit.out / "visit.md").read_text(encoding="utf-8"))
    print(f"failed: {', '.join(failed) or 'none'}; the results are in {visit.out}", file=sys.stderr)
    return FAILED if failed or not visit.page_is_whole else DONE


def _mistake(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return MISTAKE


if __name__ == "__main__":
    sys.exit(main())
