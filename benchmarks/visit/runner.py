"""Runs the parts of a visit one after another, each as a process of its own, within a budget of seconds.

A part that crashes, hangs, runs out of memory or takes the whole process down is noted, and the next one begins with a
free device. Everything found so far lies in `visit.json`, which is written anew when a part begins and when it ends.
Nothing here imports more than the standard library: whatever is broken on the machine, there is a report.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

BENCHMARKS = Path(__file__).resolve().parents[1]
MOST_FILE = 15 * 2**20  # bytes of one file that comes back; 16 MiB are allowed
_MOST_LOG = 2**20  # bytes of each part's log that are kept, its end
_TAIL = 25  # lines of it that the record of a failure holds
_SLACK = 2.5  # times the expected seconds, after which a part is stopped
_LEAST_LIMIT = 90.0  # a first start reads gigabytes of libraries from the disk


@dataclasses.dataclass(frozen=True)
class Part:
    """One thing to measure.

    function: `module:function`, called with a `Job`. seconds: that it is expected to take. arguments: of the function;
    tiny: those that differ in a dry run.
    """

    name: str
    function: str
    seconds: float
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    tiny: dict[str, Any] = dataclasses.field(default_factory=dict)

    def sizes(self, dry_run: bool) -> dict[str, Any]:
        """The arguments of a real visit or of a dry run."""
        return self.arguments | self.tiny if dry_run else self.arguments


class Visit:
    """What a visit has found so far, and the folder where that lies: `visit.json`, `visit.md`, `log.txt`, the cache."""

    def __init__(self, out: Path, *, scratch: Path, kit: Path, budget: float, dry_run: bool, cache: Path | None = None):
        """scratch: an empty folder for temporary files. cache: an archive of an earlier visit's compiled programs."""
        self.out, self.scratch, self.kit = out.resolve(), scratch.resolve(), kit.resolve()
        self.budget, self.dry_run = budget, dry_run
        self._begun = time.monotonic()
        self._packed: tuple[int, int] | None = None  # files and bytes of the cache that is in the archive
        self.page_is_whole = False  # whether `visit.md` says what `visit.json` does
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "log.txt").write_text("", encoding="utf-8")
        (self.scratch / "cache").mkdir()
        if cache is not None:
            with tarfile.open(cache) as archive:
                archive.extractall(self.scratch / "cache", filter="data")
        self.record: dict[str, Any] = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "dry_run": dry_run,
            "budget_seconds": budget,
            "cache_was_given": cache is not None,
            "kit": _read(kit / "kit.json"),
            "plans": _read(kit / "plans.json"),
            "parts": {},
        }

    @property
    def parts(self) -> dict[str, dict[str, Any]]:
        """By name: `status` (ok, failed, skipped, left out, running, not begun, earlier), and what was found."""
        return self.record["parts"]

    def seconds(self) -> float:
        """Since the visit began."""
        return time.monotonic() - self._begun

    def take_over(self, earlier: dict[str, Any], parts: Iterable[Part]) -> None:
        """Takes what went well in an earlier visit to the same kind of device, so that it is not done again.

        earlier: its record. A part whose arguments have changed since is not taken.
        """
        kinds = [one["parts"].get("machine", {}).get("result", {}).get("device_kind") for one in (self.record, earlier)]
        if kinds[0] != kinds[1] or earlier["dry_run"] != self.dry_run:
            _say(f"the earlier visit was to {kinds[1]}, and this is {kinds[0]}: all is done again")
            return
        for part in parts:
            before = earlier["parts"].get(part.name, {"status": "not begun"})
            if before["status"] in ("ok", "earlier") and before["arguments"] == part.sizes(self.dry_run):
                when = before["reason"] if before["status"] == "earlier" else f"in the visit of {earlier['time']}"
                self.parts[part.name] = before | {"status": "earlier", "reason": when}

    def run_all(self, parts: Iterable[Part]) -> None:
        """Runs those for which the budget has room, in their order; the others are noted as left out."""
        parts = [part for part in parts if part.name not in self.parts]
        for part in parts:
            self.parts[part.name] = {"status": "not begun", "expected_seconds": part.seconds}
        for part in parts:
            self.run(part)
        self._write()

    def run(self, part: Part) -> dict[str, Any]:
        """Runs one part, unless it does not fit in what is left of the budget; returns what is noted of it."""
        left = self.budget - self.seconds()
        noted = self.parts[part.name] = {"status": "running", "expected_seconds": part.seconds, "seconds": None}
        noted["arguments"] = part.sizes(self.dry_run)
        if part.seconds > left and not self.dry_run:
            reason = f"it should take {part.seconds:.0f} s, and {max(left, 0):.0f} s were left"
            noted |= {"status": "left out", "reason": reason}
            self._write()
            return noted
        self._write()
        limit = 300.0 if self.dry_run else min(left, max(_LEAST_LIMIT, _SLACK * part.seconds))
        _say(f"{part.name}: up to {limit:.0f} s ...")
        begun = time.monotonic()
        noted |= self._in_a_process(part, limit)
        noted["seconds"] = round(time.monotonic() - begun, 1)
        self._write()
        self._pack_cache()
        reason = f": {noted['reason']}" if noted["reason"] else ""
        _say(f"{part.name}: {noted['status']} after {noted['seconds']:.0f} s{reason}")
        return noted

    def _in_a_process(self, part: Part, limit: float) -> dict[str, Any]:
        result, log = self.scratch / f"{part.name}.json", self.scratch / f"{part.name}.log"
        orders = {
            "arguments": part.sizes(self.dry_run),
            "dry_run": self.dry_run,
            **{name: str(getattr(self, name)) for name in ("kit", "scratch", "out")},
        }
        command = [sys.executable, "-m", "visit.job", part.function, json.dumps(orders), str(result)]
        with log.open("w", encoding="utf-8") as output:
            code = _wait(command, self._environment(), output, limit)
        text = log.read_bytes()[-_MOST_LOG:].decode("utf-8", "replace")
        with (self.out / "log.txt").open("a", encoding="utf-8") as all_logs:
            all_logs.write(f"===== {part.name}\n{text}\n")
        lines = [line for line in text.splitlines() if line.strip()]
        found = _read(result) or {"result": {}, "checks": [], "reason": None, "status": "running"}
        if code is None:
            found |= {"status": "failed", "reason": f"stopped after {limit:.0f} s"}
        elif code < 0:
            found |= {"status": "failed", "reason": f"ended by {signal.Signals(-code).name}"}
        elif code > 0:
            found |= {"status": "failed", "reason": f"exit code {code}: {lines[-1] if lines else 'it said nothing'}"}
        elif found["status"] == "running":
            found |= {"status": "failed", "reason": "it ended without a word"}
        if found["status"] == "failed":
            found["log"] = lines[-_TAIL:]
        return found

    def _environment(self) -> dict[str, str]:
        """Of a part: the benchmarks and the package can be imported, compiled programs are kept, nothing is fetched."""
        cache = self.scratch / "cache"
        path = [str(BENCHMARKS), str(BENCHMARKS.parent), *filter(None, os.environ.get("PYTHONPATH", "").split(":"))]
        return {
            **os.environ,
            "PYTHONPATH": ":".join(os.path.abspath(one) for one in path),
            "PYTHONUNBUFFERED": "1",
            "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "torch"),
            "TRITON_CACHE_DIR": str(cache / "triton"),
            "HF_HUB_OFFLINE": "1",
            **({"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""} if self.dry_run else {}),
        }

    def _write(self) -> None:
        self.record["seconds"] = round(self.seconds(), 1)
        file, page = self.scratch / "visit.json", self.scratch / "visit.md"
        file.write_text(json.dumps(self.record, indent=1), encoding="utf-8")
        _replace(file, self.out / file.name)
        # The page too is made by a process of its own: a figure that it stumbles over must not end the visit.
        with page.open("w", encoding="utf-8") as output:
            code = _wait([sys.executable, "-m", "visit.report", str(file)], self._environment(), output, 60.0)
        self.page_is_whole = code == 0
        if self.page_is_whole:
            _replace(page, self.out / page.name)
        else:
            _say(f"the page could not be written: {page.read_text(encoding='utf-8')[-500:]}")

    def _pack_cache(self) -> None:
        """Puts the compiled programs into `cache.tar.gz`, the oldest first, as far as they fit into one file."""
        folder = self.scratch / "cache"
        files = sorted((one for one in folder.rglob("*") if one.is_file()), key=lambda one: one.stat().st_mtime)
        files.sort(key=lambda one: one.relative_to(folder).parts[0] != "jax")  # a stable sort: jax's own first
        sizes = {file: file.stat().st_size for file in files}
        if not sizes or self._packed == (len(sizes), sum(sizes.values())):
            return
        self._packed = len(sizes), sum(sizes.values())
        partial, packed, left_out = self.scratch / "cache.tar.gz", 0, 0
        with tarfile.open(partial, "w:gz", compresslevel=1) as archive:
            for file, size in sizes.items():
                if packed + size + 1024 <= MOST_FILE:  # with its header
                    archive.add(file, file.relative_to(folder))
                    packed += size + 1024
                else:
                    left_out += 1
        _replace(partial, self.out / "cache.tar.gz")
        self.record["cache"] = {"bytes": packed, "files": len(sizes) - left_out, "left_out": left_out}


def _wait(command: list[str], environment: dict[str, str], output: TextIO, limit: float) -> int | None:
    """Runs a command to its end: its exit code, None where it was stopped. All that it started ends with it."""
    process = subprocess.Popen(
        command,
        cwd=BENCHMARKS.parent,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read(file: Path) -> Any:
    """What a JSON file holds, None where there is none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _replace(partial: Path, file: Path) -> None:
    """Moves a finished file to another folder, perhaps of another disk, whole or not at all."""
    beside = file.with_name(f".{file.name}.tmp")
    beside.write_bytes(partial.read_bytes())
    os.replace(beside, file)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
