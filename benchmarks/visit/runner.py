"""Runs the parts of a visit one after another, each as a process of its own, within a budget of seconds.

A part that crashes, hangs, runs out of memory or takes the whole process down is noted, and the next one begins with a
free device. Everything found so far lies in `visit.json`, which is written anew when a part begins and when it ends.
Nothing here imports more than the standard library: whatever is broken on the machine, there is a report. A full disk
or a file that has vanished is reported too, and the visit goes on.
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
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

BENCHMARKS = Path(__file__).resolve().parents[1]
MOST_FILE = 15 * 2**20  # bytes of one file that comes back; 16 MiB are allowed
_MOST_LOG = 2**20  # bytes of each part's log that are kept, its end
_TAIL = 25  # lines of it that the record of a failure holds
_SLACK = 2.5  # times the expected seconds, after which a part is stopped
_LEAST_LIMIT = 90.0  # a first start reads gigabytes of libraries from the disk
_GLANCE = 0.5  # seconds between two looks for a signal


class NoArchive(Exception):
    """An earlier visit's compiled programs cannot be unpacked; says why."""


class Stopped(Exception):
    """A signal has ended the visit; says which."""


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

    def __init__(
        self,
        out: Path,
        *,
        scratch: Path,
        kit: Path,
        budget: float,
        dry_run: bool,
        cache: Path | None = None,
        signals: Sequence[int] = (),
    ):
        """Nothing is written to `out` before `begin`.

        Args:
          out: a folder for the results.
          scratch: an empty folder for temporary files.
          kit: the folder that travelled along.
          budget: seconds for all of the visit.
          dry_run: whether the parts take their tiny sizes, and the time that they need.
          cache: an archive of an earlier visit's compiled programs.
          signals: where the numbers of those appear that ask the visit to end.

        Raises:
          NoArchive: `cache` cannot be unpacked.
        """
        self.out, self.scratch, self.kit = out.resolve(), scratch.resolve(), kit.resolve()
        self.budget, self.dry_run = budget, dry_run
        self._signals = signals
        self._started = time.monotonic()
        self._logs: list[str] = []  # of all parts so far
        self._begun = False
        self._packed: tuple[int, int] | None = None  # files and bytes of the cache that is in the archive
        self.page_is_whole = False  # whether `visit.md` says what was found
        (self.scratch / "cache").mkdir()
        if cache is not None:
            _unpack(cache, self.scratch / "cache")
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
        return time.monotonic() - self._started

    def begin(self) -> None:
        """From here on what is found is written to `out`, beginning with what was found so far."""
        self.out.mkdir(parents=True, exist_ok=True)
        self._begun = True
        self._write()
        self._pack_cache()

    def take_over(self, earlier: dict[str, Any], parts: Iterable[Part]) -> None:
        """Takes what went well in an earlier visit to the same kind of device, so that it is not done again.

        earlier: its record. A part whose arguments have changed since is not taken.
        """
        kinds = [one["parts"].get("machine", {}).get("result", {}).get("device_kind") for one in (self.record, earlier)]
        if kinds[0] != kinds[1] or earlier["dry_run"] != self.dry_run:
            _say(f"the earlier visit was to {kinds[1]}, and this is {kinds[0]}: all is done again")
            return
        for part in parts:
            before = earlier["parts"].get(part.name, {})
            if before.get("status") in ("ok", "earlier") and before.get("arguments") == part.sizes(self.dry_run):
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
        """Runs one part, unless it does not fit in what is left of the budget; returns what is noted of it.

        Raises `Stopped` once a signal asks for the visit's end; what the part had found is noted all the same.
        """
        self._end_if_asked()
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
        try:
            noted |= self._in_a_process(part, limit)
        except OSError as error:
            noted |= {"status": "failed", "reason": f"it could not be run: {error}"}
        noted["seconds"] = round(time.monotonic() - begun, 1)
        self._write()
        self._pack_cache()
        reason = f": {noted['reason']}" if noted["reason"] else ""
        _say(f"{part.name}: {noted['status']} after {noted['seconds']:.0f} s{reason}")
        self._end_if_asked()
        return noted

    def _end_if_asked(self) -> None:
        if self._signals:
            raise Stopped(_signal_name(self._signals[0]))

    def _in_a_process(self, part: Part, limit: float) -> dict[str, Any]:
        result, log = self.scratch / f"{part.name}.json", self.scratch / f"{part.name}.log"
        orders = {
            "arguments": part.sizes(self.dry_run),
            "dry_run": self.dry_run,
            **{name: str(getattr(self, name)) for name in ("kit", "scratch", "out")},
        }
        command = [sys.executable, "-m", "visit.job", part.function, json.dumps(orders), str(result)]
        with log.open("w", encoding="utf-8") as output:
            code = _wait(command, self._environment(), output, limit, self._signals)
        text = ""
        with _reported(f"the log of {part.name}"):
            text = log.read_bytes()[-_MOST_LOG:].decode("utf-8", "replace")
        self._logs.append(f"===== {part.name}\n{text}\n")
        lines = [line for line in text.splitlines() if line.strip()]
        found = _read(result) or {"result": {}, "checks": [], "reason": None, "status": "running"}
        if code is None:
            why = f"by {_signal_name(self._signals[0])}" if self._signals else f"after {limit:.0f} s"
            found |= {"status": "failed", "reason": f"stopped {why}"}
        elif code < 0:
            found |= {"status": "failed", "reason": f"ended by {_signal_name(-code)}"}
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
            # XLA's own caches would put the path of this folder into the name of every program.
            "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none",
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "torch"),
            "TRITON_CACHE_DIR": str(cache / "triton"),
            "HF_HUB_OFFLINE": "1",
            **({"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""} if self.dry_run else {}),
        }

    def _write(self) -> None:
        if not self._begun:
            return
        self.page_is_whole = False
        self.record["seconds"] = round(self.seconds(), 1)
        with _reported("the results"):
            _put(self.out / "visit.json", json.dumps(self.record, indent=1).encode())
            _put(self.out / "log.txt", "".join(self._logs).encode())
            self.page_is_whole = self._write_page()

    def _write_page(self) -> bool:
        """By a process of its own too: a figure that the page stumbles over must not end the visit."""
        page, command = self.scratch / "visit.md", [sys.executable, "-m", "visit.report", str(self.out / "visit.json")]
        with page.open("w", encoding="utf-8") as output:
            code = _wait(command, self._environment(), output, 60.0)
        if code == 0:
            _put(self.out / "visit.md", page.read_bytes())
        else:
            _say(f"the page could not be written: {page.read_text(encoding='utf-8', errors='replace')[-500:]}")
        return code == 0

    def _pack_cache(self) -> None:
        """Puts the compiled programs into `cache.tar.gz`, the oldest first, as far as they fit into one file."""
        if self._begun:
            with _reported("the compiled programs"):  # a process that a part left behind may remove some meanwhile
                self._pack(self.scratch / "cache")

    def _pack(self, folder: Path) -> None:
        files = sorted((one for one in folder.rglob("*") if one.is_file()), key=lambda one: one.stat().st_mtime)
        files.sort(key=lambda one: one.relative_to(folder).parts[0] != "jax")  # a stable sort: jax's own first
        sizes = {file: file.stat().st_size for file in files}
        if not sizes or self._packed == (len(sizes), sum(sizes.values())):
            return
        partial, packed, left_out = self.scratch / "cache.tar.gz", 0, 0
        with tarfile.open(partial, "w:gz", compresslevel=1) as archive:
            for file, size in sizes.items():
                if packed + size + 1024 <= MOST_FILE:  # with its header
                    archive.add(file, file.relative_to(folder))
                    packed += size + 1024
                else:
                    left_out += 1
        _put(self.out / "cache.tar.gz", partial.read_bytes())
        self._packed = len(sizes), sum(sizes.values())
        self.record["cache"] = {"bytes": packed, "files": len(sizes) - left_out, "left_out": left_out}


def _wait(
    command: list[str], environment: dict[str, str], output: TextIO, limit: float, signals: Sequence[int] = ()
) -> int | None:
    """Runs a command to its end: its exit code, None where it was stopped. All that it started ends with it.

    Args:
      command: the words of it.
      environment: all of its variables.
      output: gets what it prints.
      limit: seconds after which it is stopped.
      signals: stop it too, as soon as there is one.
    """
    process = subprocess.Popen(
        command,
        cwd=BENCHMARKS.parent,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    end = time.monotonic() + limit
    try:
        while not signals and (left := end - time.monotonic()) > 0:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(min(left, _GLANCE))
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _unpack(cache: Path, folder: Path) -> None:
    try:
        with tarfile.open(cache, "r:gz") as archive:
            safely: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from 3.11.4 on
            archive.extractall(folder, **safely)
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise NoArchive(f"{cache} cannot be unpacked: {error}") from error


def _read(file: Path) -> Any:
    """What a JSON file holds, None where there is none or it cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    except (OSError, ValueError) as error:
        _say(f"{file} cannot be read: {error}")
        return None


def _put(file: Path, content: bytes) -> None:
    """Writes a file, whole or not at all."""
    beside = file.with_name(f".{file.name}.tmp")
    try:
        beside.write_bytes(content)
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def _reported(what: str) -> Iterator[None]:
    """A full disk or a file that has vanished is said, and ends no more than this block."""
    try:
        yield
    except OSError as error:
        _say(f"{what} could not be kept: {error}")


def _signal_name(number: int) -> str:
    return next((one.name for one in signal.Signals if one == number), f"signal {number}")


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # what reads it may be gone
        print(line, file=sys.stderr, flush=True)
