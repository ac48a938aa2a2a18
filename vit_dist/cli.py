"""The command line: runs verbs, prints results on stdout, sets exit codes. What can be typed is in `arguments`.

The codes are those of `job.exit_codes`; a usage, config or input error is said in one line. The verbs are imported when
they run: they bring jax, which `--help` and a mistyped key need not wait for.
"""

import argparse
import ast
import errno
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from vit_dist import arguments, config, recipes
from vit_dist.config import ConfigError
from vit_dist.job.blame import Blame
from vit_dist.job.exit_codes import DONE, FAILED, INTERRUPTED, MISTAKE, PREEMPTED
from vit_dist.job.rendezvous import JobError
from vit_dist.job.watchdog import end_now
from vit_dist.schema import one_of

LAST_SECONDS = 10.0  # for what is open to be closed after a Ctrl-C
# Of an `OSError`: what the disk or its owner refuses, which is nobody's mistake in here.
REFUSALS = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EISDIR,
    errno.ELOOP,
    errno.EMFILE,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EROFS,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code. Without `argv` this is the command itself, and the process its own."""
    if argv is None:
        _answer_ctrl_c()
        _keep_stdout_for_results()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for library in ("absl", "jax"):  # orbax and grain speak as absl
        logging.getLogger(library).setLevel(logging.WARNING)
    code, said, together = FAILED, "an error of the program; see what it has said itself", False
    options = argparse.Namespace()
    try:
        options = arguments.parse(sys.argv[1:] if argv is None else argv, _VERBS)
        options.own_process = argv is None
        code = options.run(options) or DONE
        together = code != FAILED
    except ConfigError as error:
        code, said = MISTAKE, str(error)
        print(f"error: {said}", file=sys.stderr)
    except JobError as error:
        said = str(error)
        print(f"error: {said}", file=sys.stderr)
        if error.blamed is not None:
            Blame(error.blamed, said).report()
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        code, said = MISTAKE, f"{error.filename or getattr(options, 'workdir', 'the disk')}: {error.strerror}"
        print(f"error: {said}", file=sys.stderr)
    except KeyboardInterrupt:
        code, said = INTERRUPTED, "interrupted"
        print(said, file=sys.stderr)
    finally:
        _leave(code, said, together)
    if code == INTERRUPTED and not together and argv is None:
        end_now(code)  # without waiting for what threads are doing, such as a save
    return code


def _answer_ctrl_c() -> None:
    """The first Ctrl-C ends the verb by `KeyboardInterrupt`, the second the process, whatever it is doing.

    Python loses an exception that is raised while it collects garbage, and what is closed on the way out may wait for
    a disk. So the process ends soon after the first in any case.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        last = threading.Timer(LAST_SECONDS, end_now, (INTERRUPTED,))
        last.daemon = True
        last.start()
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as in the background
        signal.signal(signal.SIGINT, interrupt)


def _keep_stdout_for_results() -> None:
    """Sends to stderr what C++ libraries, such as gloo, write to the process's stdout behind Python's back."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
    os.dup2(2, 1)


def _leave(code: int, said: str, together: bool) -> None:
    """Leaves the other processes of a job, if the verb joined any; see `processes.leave`."""
    if "jax" in sys.modules:
        from vit_dist.job import processes

        processes.leave(code, said, together=together)


def _train(options: argparse.Namespace) -> int:
    settings = recipes.load(options.config, options.overrides)
    from vit_dist.train import Diverged, Interrupted, Preempted, train

    try:
        _print_json(train(settings, options.workdir, own_process=options.own_process))
    except Preempted as stopped:
        print(f"preempted: {stopped}", file=sys.stderr)
        return PREEMPTED
    except Interrupted as stopped:
        print(f"interrupted: {stopped}", file=sys.stderr)
        return INTERRUPTED
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    return DONE


def _eval(options: argparse.Namespace) -> None:
    from vit_dist.evaluate import evaluate

    _print_json(
        evaluate(
            options.workdir, split=options.split, step=options.step, best=options.best, overrides=options.overrides
        )
    )


def _predict(options: argparse.Namespace) -> None:
    from vit_dist.predict import predict

    found = predict(
        options.workdir,
        options.paths,
        top=options.top,
        step=options.step,
        best=options.best,
        overrides=options.overrides,
    )
    if options.json:
        for one in found:
            _print_json(one)
        return
    rows = [
        ("" if place else one["file"], choice["name"], f"{choice['probability']:.1%}")
        for one in found
        for place, choice in enumerate(one["classes"])
    ]
    _print_table(("image", "class", "probability"), rows)


def _inspect(options: argparse.Namespace) -> None:
    settings = recipes.load(options.config, options.overrides)
    from vit_dist.describe import inspect

    found = inspect(settings)
    if options.json:
        _print_json(found)
        return
    rows = [
        (
            one["name"],
            " x ".join(map(str, one["shape"])),
            one["dtype"],
            _say_spec(one["sharding"]),
            f"{one['bytes_per_device']:,}",
        )
        for one in found["tensors"]
    ]
    _print_table(("parameter", "shape", "dtype", "sharding", "bytes a device"), rows)
    sums = {"parameters": found["parameters"], "FLOPs of training on an image": found["flops_per_image"]}
    sums |= {f"bytes a device, {part}": size for part, size in found["bytes_per_device"].items()}
    _print_table(("", ""), [(name, f"{number:,}") for name, number in sums.items()])


def _say_spec(axes: list[Any]) -> str:
    return ", ".join("x".join(axis) if isinstance(axis, list) else axis or "-" for axis in axes)


def _plan(options: argparse.Namespace) -> None:
    if options.targets:
        from vit_dist.plan import targets

        kinds = targets.listing()
        if options.json:
            _print_json(kinds)
        else:
            _print_table(tuple(kinds[0]), [tuple(str(value) for value in kind.values()) for kind in kinds])
        return
    settings = recipes.load(options.config, options.overrides)
    page = Path(options.html) if options.html else None
    if page is not None and (page.is_dir() or not page.parent.is_dir()):
        why = "is a folder" if page.is_dir() else "lies in no folder that there is"
        raise ConfigError(f"--html: {page} {why}; name the file to write")
    from vit_dist.plan import html, report
    from vit_dist.plan.verb import plan

    found = plan(
        settings,
        options.target,
        slices=options.slices,
        search=options.search,
        largest_batch=options.batch_size == "max",
        examples=options.examples,
    )
    if options.json:
        _print_json(found)
    else:
        for header, rows in report.tables(found):
            _print_table(header, rows)
            _print_table((), [])
    if page is not None:
        page.write_text(html.page(found), encoding="utf-8")


def _bench(options: argparse.Namespace) -> None:
    settings = recipes.load(options.config, options.overrides)
    from vit_dist.bench import bench

    _print_json(bench(settings, steps=options.steps))


def _prepare(options: argparse.Namespace) -> None:
    from vit_dist.data.prepare import convert

    if options.merge or options.verify:
        meaningless = [*_PREPARING, "workers"] if options.merge else _PREPARING
        given = [name for name in meaningless if getattr(options, name)]
        if given or len(options.paths) != 1 or options.overrides:
            which = "--merge" if options.merge else "--verify"
            extra = f"--{given[0].replace('_', '-')}" if given else "more than one path or --config"
            raise ConfigError(f"prepare {which}: takes DEST alone, found {extra}")
        dest = options.paths[0]
        _print_json(convert.merge(dest) if options.merge else convert.verify(dest, options.workers))
        return
    if len(options.paths) > 2:
        raise ConfigError(f"prepare: expected SOURCE and DEST, found {len(options.paths)} paths")
    *source, dest = options.paths
    for key in options.overrides:
        one_of("prepare --config", key.partition("=")[0], _OF_SOURCES)
    settings = config.resolve(recipes.override(config.to_dict(config.Config(total_steps=1)), options.overrides))
    found = convert.prepare(
        source[0] if source else None,
        dest,
        kind=options.source,
        splits=options.split,
        images=convert.ImageOptions(options.resize, options.encode, options.on_bad == "skip"),
        shards=options.shards,
        shard_range=options.shard_range,
        workers=options.workers,
        data=settings.data,
    )
    _print_json(found)


# Options of `prepare` that mean nothing to what is finished, and keys that say how a source is read.
_PREPARING = ("source", "split", "resize", "encode", "shards", "shard_range", "on_bad")
_OF_SOURCES = ("data.cache_dir", "data.name", "data.download", "data.memory_limit_gb")


def _launch(options: argparse.Namespace) -> int:
    if options.overrides:
        raise ConfigError(f"launch --config.{options.overrides[0]}: the verb's own arguments come after --")
    if (options.nodes is None) != (options.node_rank is None):
        raise ConfigError("launch: --nodes and --node-rank are given together or not at all")
    from vit_dist.job import launcher

    job = launcher.Job(
        launcher.verb_command(options.launched),
        options.processes or launcher.count_gpus(),
        devices_per_process=options.devices_per_process,
        restarts=options.restarts,
        nodes=options.nodes or 1,
        node_rank=options.node_rank or 0,
        coordinator=options.coordinator,
    )
    return launcher.launch(job)


def _configs(options: argparse.Namespace) -> None:
    if options.overrides:
        raise ConfigError(f"--config.{options.overrides[0]}: configs only lists the recipes and takes no keys")
    folder = Path(options.folder).expanduser() if options.folder else None
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; give one that holds recipes")
    files = [file for one in ([folder] if folder else recipes.folders()) for file in sorted(one.glob("*.py"))]
    rows = [{"name": file.stem, "config": str(file), "summary": _summary(file)} for file in files]
    if options.json:
        _print_json(rows)
    else:
        _print_table(("name", "config", "summary"), [tuple(row.values()) for row in rows])


def _version(options: argparse.Namespace) -> None:
    from vit_dist.run.environment import describe

    found = describe(None, {})
    versions = [f"{name} {version or 'not installed'}" for name, version in found["versions"].items()]
    git, devices = found["git"], found["devices"]
    commit = f"commit {git['commit']}{', changed' if git['dirty'] else ''}" if git else "no checkout"
    for line in (*versions, f"python {found['python']}", f"{devices['count']} x {devices['kind']}", commit):
        print(line)


def _summary(recipe: Path) -> str:
    """The first paragraph of its docstring, in one line."""
    try:
        text = ast.get_docstring(ast.parse(recipe.read_bytes())) or ""
    except (SyntaxError, ValueError) as error:  # a ValueError for bytes that are no text
        return f"(cannot be read: {error})"
    return " ".join(text.split("\n\n")[0].split())


def _print_json(value: Any) -> None:
    if _first_process():
        print(json.dumps(value), flush=True)


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns wide enough for their contents, so that the lines can be cut and searched by other tools."""
    if not _first_process():
        return
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _first_process() -> bool:
    if "jax" not in sys.modules:
        return True
    from vit_dist.job import processes

    return processes.index() == 0


_VERBS = {
    "train": _train,
    "eval": _eval,
    "predict": _predict,
    "inspect": _inspect,
    "plan": _plan,
    "bench": _bench,
    "prepare": _prepare,
    "launch": _launch,
    "configs": _configs,
    "version": _version,
}
