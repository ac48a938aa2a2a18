"""Compiles the training step for hardware that is not here, and compares its figures with those committed last.

    make bench-compiled                                        # exit code 1 if a figure is worse by more than 3 %
    make bench-compiled ARGS='--only=h100:8 model.remat=names'
    make bench-compiled ARGS=--update                          # writes results/compiled.json

Needs no accelerator, but the compilers of `make compilers` on PYTHONPATH. The cases are ViTs at 224 pixels in bfloat16
with AdamW, mean pooling and otherwise the defaults, which `key=value` changes for all of them. Each compiles in its own
process. Prints a table in Markdown: figure (committed figure, ratio).
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from vit_dist import plan
from vit_dist.config import default_config

COMMITTED = Path(__file__).parent / "results" / "compiled.json"
WORSE = 1.03  # a larger ratio is worse; less is better for every figure
# The figures and their decimals. All are of one device and one step.
FIGURES = {
    "temporaries GB": 3,
    "products GB": 2,  # moved to and from memory by matrix products
    "other GB": 2,  # by all other kernels
    "kernels": 0,
    "exposed": 0,  # collectives with no product to hide behind
    "exposed MB": 2,  # of their arrays
    "exposed ms": 2,  # their time at the full rate of the links
    "step ms": 1,  # the likely time, by plan
}
Figures = dict[str, float]


class Case(NamedTuple):
    """A step to compile."""

    target: str
    variant: str
    device_batch: int
    mesh: dict[str, int]

    @property
    def name(self) -> str:
        return f"{self.target} {self.variant}"


def _cases(target: str, mesh: dict[str, int], **batches: int) -> Iterator[Case]:
    return (Case(target, f"{size}/16", batch, mesh) for size, batch in batches.items())


CASES = {
    case.name: case
    for case in (
        *_cases("v5e:4x4", {"data": 1, "fsdp": 16}, S=128, B=64, L=32),
        *_cases("h100:8", {"data": 8}, S=512, B=256, L=128),
        *_cases("b200:8", {"data": 8}, S=512, B=256, L=128),
        *_cases("h100:8x2", {"dcn_data": 2, "data": 1, "fsdp": 8}, B=256, L=128),
    )
}


def main() -> int:
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.update and arguments.overrides and arguments.figures == COMMITTED:
        parser.error("--update: the committed figures are of the defaults; leave out key=value, or give --figures")
    if arguments.case:
        print(json.dumps(measured(CASES[arguments.case], arguments.overrides)))
        return 0
    committed = read(arguments.figures)
    print(f"| case | {' | '.join(FIGURES)} |\n|{'---|' * (1 + len(FIGURES))}", flush=True)
    found: dict[str, Figures] = {}
    problems = []
    for name in (name for name in CASES if arguments.only in name):
        before = committed.get(name, {})
        try:
            found[name] = in_a_process(name, arguments.overrides)
        except RuntimeError as error:
            print(f"| {name} | FAILED: {error} |", flush=True)
            problems.append(f"{name} failed")
            continue
        print(row(name, found[name], before), flush=True)
        if not arguments.update:
            problems += [f"worse: {name}: {problem}" for problem in worse(found[name], before)]
    if arguments.update:
        known = committed | found
        write(arguments.figures, {name: known[name] for name in CASES if name in known})
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def measured(case: Case, overrides: Sequence[str]) -> Figures:
    """Compiles a step and returns its figures; of one that does not fit into memory only the temporaries."""
    config = default_config()
    config.total_steps = 1000
    config.batch_size = case.device_batch * math.prod(case.mesh.values())
    config.mesh.update(case.mesh)
    config.model.update(variant=case.variant, num_classes=1000, dtype="bfloat16", pool="mean")
    config.optimizer.update(name="adamw", weight_decay=0.1)
    planned = plan(config, case.target, overrides)
    moved, collectives = planned["traffic"], planned["collectives"]
    figures = {"temporaries GB": planned["memory"]["temporaries"] / 1e9}
    if moved is not None:
        figures |= {
            "products GB": moved["product_bytes"] / 1e9,
            "other GB": moved["other_bytes"] / 1e9,
            "kernels": moved["kernels"],
            "exposed": sum(row["exposed"] for row in collectives),
            "exposed MB": sum(row["exposed"] * row["bytes"] for row in collectives) / 1e6,
            "exposed ms": sum(row["exposed"] / row["count"] * row["ms"] for row in collectives),
            "step ms": planned["step_ms"],
        }
    return {name: round(value, FIGURES[name]) for name, value in figures.items()}


def in_a_process(name: str, overrides: Sequence[str]) -> Figures:
    """Returns what `measured` does. Raises `RuntimeError` if its process fails or is killed."""
    done = subprocess.run([sys.executable, __file__, f"--case={name}", *overrides], capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"exit code {done.returncode}, {last[:200]}")
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def row(name: str, now: Figures, before: Figures) -> str:
    """Returns a row of the table."""
    cells = [name if now.keys() == FIGURES.keys() else f"{name}, does not fit"]
    for figure in FIGURES:
        if figure not in now:
            cells.append("-")
        elif figure not in before:
            cells.append(f"{now[figure]:,}")
        else:
            cells.append(f"{now[figure]:,} ({before[figure]:,}, {_ratio(now[figure], before[figure]):.2f})")
    return f"| {' | '.join(cells)} |"


def worse(now: Figures, before: Figures) -> list[str]:
    """Returns what is worse than before by more than the tolerance, one text for each figure."""
    if len(now) < len(before):
        return ["does not fit any more"]
    ratios = {figure: _ratio(now[figure], before[figure]) for figure in before}
    return [
        f"{figure} {now[figure]:,}, committed {before[figure]:,}" for figure, ratio in ratios.items() if ratio > WORSE
    ]


def read(path: Path) -> dict[str, Figures]:
    """Returns the figures of each case; none if there is no file. Says so if another jax made them."""
    if not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["jax"] != jax.__version__:
        print(f"warning: {path} is by jax {content['jax']}, this is {jax.__version__}", file=sys.stderr)
    cases: dict[str, Figures] = content["cases"]
    return cases


def write(path: Path, cases: dict[str, Figures]) -> None:
    """Writes the figures, one a line."""
    content = {"jax": jax.__version__, "cases": cases}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _ratio(now: float, before: float) -> float:
    return now / before if before else (math.inf if now else 1.0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes the config of every case")
    parser.add_argument("--only", default="", help="cases whose name contains this, such as L/16 or h100:8")
    parser.add_argument("--update", action="store_true", help="write the figures that were found")
    parser.add_argument("--figures", type=Path, default=COMMITTED, help="the file to compare with, and to update")
    parser.add_argument("--case", choices=CASES, help="compile this case here and print its figures as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
