"""The command line: runs a verb, prints its result on stdout and returns an exit code. `arguments` reads the options.

The codes are those of `job.exit_codes`. A usage, config or input error is one line on stderr. A verb is imported when
it runs: it imports jax, and `--help` or a mistyped key need not wait for that.
"""

import argparse
import ast
import errno
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from vit_dist import arguments, commands, config, keys, recipes
from vit_dist.config import ConfigError
from vit_dist.escape import PrintableFormatter
from vit_dist.job import signals
from vit_dist.job.blame import Blame
from vit_dist.job.exit_codes import DONE, FAILED, INTERRUPTED, MISTAKE, PREEMPTED
from vit_dist.job.rendezvous import JobError
from vit_dist.paths import expanded
from vit_dist.printing import print_exception, print_json, print_lines, print_message, print_table

# Errors that the user can mend: permissions, a full disk, a wrong path, too many open files.
FILE_ERRORS = {
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EIO, errno.EISDIR, errno.ELOOP, errno.EMFILE,
    errno.ENAMETOOLONG, errno.ENOSPC, errno.ENOTDIR, errno.EROFS,
}  # fmt: skip
_DEVICE_MEMORY = "RESOURCE_EXHAUSTED: "  # how jax's error begins where a device has too little memory
_SPARES_MEMORY = (
    "lower batch_size, evaluate.batch_size or the model's size, set model.remat=block, or split over more devices"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code. Without `argv` it reads the command line and owns the process."""
    if argv is None:
        signals.answer()
        _keep_stdout_for_results()
        sys.excepthook = print_exception
        logging.captureWarnings(True)
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setFormatter(PrintableFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[terminal])
    for library in ("absl", "jax"):  # orbax and grain log as absl
        logging.getLogger(library).setLevel(logging.WARNING)
    code, together, stopped = FAILED, False, False
    message: str | None = "an unexpected error; see the log of that process"
    try:
        code, message = _run(sys.argv[1:] if argv is None else argv, own_process=argv is None)
        together = code != FAILED and message is None
    except KeyboardInterrupt:  # wherever it was raised above
        code, message, stopped = signals.exit_code(), signals.describe(), True
        print_message(message)
    finally:
        signals.end(code)
        _leave(code, message or "", together)
    if stopped and argv is None:
        signals.end_now(code)  # without waiting for threads, such as a save
    return code


def _run(words: Sequence[str], *, own_process: bool) -> tuple[int, str | None]:
    """Runs a verb; returns the exit code, and the error that it has printed, if any."""
    options = argparse.Namespace()
    try:
        options = arguments.parse(words, _VERBS)
        options.own_process = own_process
        return options.run(options) or DONE, None
    except ConfigError as error:
        code, message = MISTAKE, str(error)
    except JobError as error:
        code, message = FAILED, str(error)
        if error.blamed is not None:
            Blame(error.blamed, message).report()
    except OSError as error:
        if error.errno not in FILE_ERRORS:
            raise
        where = error.filename2 or error.filename or getattr(options, "workdir", "the disk")
        code, message = MISTAKE, f"{where}: {error.strerror}"
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not str(error).startswith(_DEVICE_MEMORY):
            raise
        text = (str(error).splitlines() or ["the host's memory is full"])[0].removeprefix(_DEVICE_MEMORY)
        code, message = MISTAKE, f"out of memory: {text}; {_SPARES_MEMORY}"
    print_message(f"error: {message}")
    return code, message


def _keep_stdout_for_results() -> None:
    """Sends to stderr what C++ libraries, such as gloo, write to the process's stdout behind Python's back."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
    os.dup2(2, 1)


def _leave(code: int, message: str, together: bool) -> None:
    """Leaves the other processes of a job, if the verb joined one; see `processes.leave`."""
    if "jax" in sys.modules:
        from vit_dist.job import processes

        processes.leave(code, message, together=together)


def _train(options: argparse.Namespace) -> int:
    settings = recipes.load(options.config, options.overrides)
    from vit_dist.train import Diverged, Interrupted, Preempted, train

    try:
        print_json(train(settings, options.workdir, own_process=options.own_process))
    except Preempted as stopped:
        print_message(f"preempted: {stopped}")
        return PREEMPTED
    except Interrupted as stopped:
        print_message(f"interrupted: {stopped}")
        return INTERRUPTED
    except Diverged as error:
        print_message(f"error: {error}")
        return FAILED
    return DONE


def _inspect(options: argparse.Namespace) -> None:
    if options.weights is not None:
        _inspect_weights(options)
        return
    settings = recipes.load(options.config, options.overrides)
    from vit_dist.describe import inspect, spec_text

    description = inspect(settings)
    if options.json:
        print_json(description)
        return
    rows = [
        (
            tensor["name"],
            " x ".join(map(str, tensor["shape"])),
            tensor["dtype"],
            spec_text(tensor["sharding"]),
            f"{tensor['bytes_per_device']:,}",
        )
        for tensor in description["tensors"]
    ]
    print_table(("parameter", "shape", "dtype", "sharding", "bytes per device"), rows)
    sums = {"parameters": description["parameters"], "FLOPs of training on an image": description["flops_per_image"]}
    sums |= {f"bytes per device, {tree}": size for tree, size in description["bytes_per_device"].items()}
    print_table(("", ""), [(name, f"{number:,}") for name, number in sums.items()])


def _inspect_weights(options: argparse.Namespace) -> None:
    from vit_dist.describe import inspect_weights

    described = inspect_weights(options.weights, options.config, options.overrides)
    if options.json:
        print_json(described)
        return
    rows = [
        (
            tensor["name"],
            " x ".join(map(str, tensor["shape"])),
            tensor["dtype"],
            ", ".join(tensor["becomes"]) or "not used",
        )
        for tensor in described["tensors"]
    ]
    print_table(("tensor", "shape", "dtype", "becomes"), rows)
    values = {
        "family": described["family"],
        "parameters": f"{described['parameters']:,}",
        "digest": described["digest"],
    }
    for section in ("model", "data"):
        values |= {f"{section}.{key}": str(value) for key, value in described[section].items()}
    classes = described["classes"]
    values["classes"] = "no names" if not classes else f"{len(classes):,}, from {classes[0]} to {classes[-1]}"
    print_table(("", ""), list(values.items()))
    print_lines(described["changes"])


def _plan(options: argparse.Namespace) -> None:
    if options.targets:
        from vit_dist.plan import targets

        kinds = targets.listing()
        if options.json:
            print_json(kinds)
        else:
            print_table(tuple(kinds[0]), [tuple(str(value) for value in kind.values()) for kind in kinds])
        return
    settings = recipes.load(options.config, options.overrides)
    page = Path(options.html) if options.html else None
    if page is not None and (page.is_dir() or not page.parent.is_dir()):
        reason = "is a folder" if page.is_dir() else f"cannot be written: there is no folder {page.parent}"
        raise ConfigError(f"--html: {page} {reason}; name the file to write")
    from vit_dist.plan import html, report
    from vit_dist.plan.verb import plan

    planned = plan(
        settings,
        options.target,
        slices=options.slices,
        search=options.search,
        largest_batch=options.batch_size == "max",
        examples=options.examples,
    )
    if options.json:
        print_json(planned)
    else:
        for header, rows in report.tables(planned):
            print_table(header, rows)
            print_table((), [])  # an empty line
    if page is not None:
        page.write_text(html.page(planned), encoding="utf-8")


def _bench(options: argparse.Namespace) -> None:
    settings = recipes.load(options.config, options.overrides)
    from vit_dist.bench import bench

    print_json(bench(settings, steps=options.steps))


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
        print_json(convert.merge(dest) if options.merge else convert.verify(dest, options.workers))
        return
    if len(options.paths) > 2:
        raise ConfigError(f"prepare: expected SOURCE and DEST, found {len(options.paths)} paths")
    *source, dest = options.paths
    for override in options.overrides:
        if (key := override.partition("=")[0]) not in _OF_SOURCES:
            raise ConfigError(f"prepare --config.{key}: has no effect here; only {', '.join(_OF_SOURCES)} can be set")
    settings = config.resolve(recipes.override(config.to_dict(config.Config(total_steps=1)), options.overrides))
    summary = convert.prepare(
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
    print_json(summary)


# Options of `prepare` that --merge and --verify do not take, and config keys that say how a source is read.
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
        raise ConfigError(f"--config.{options.overrides[0]}: configs only lists, and takes no keys")
    if options.keys is not None:
        rows = keys.rows(options.keys)
        if not rows:
            raise ConfigError(f"--keys: no key or meaning holds {options.keys!r}; leave it out to list all")
    else:
        folder = expanded(options.folder, "folder") if options.folder else None
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder; give one that holds recipes")
        files = [file for path in ([folder] if folder else recipes.folders()) for file in sorted(path.glob("*.py"))]
        rows = [{"name": file.stem, "config": str(file), "summary": _summary(file)} for file in files]
    if options.json:
        print_json(rows)
    elif rows:
        print_table(tuple(rows[0]), [tuple(row.values()) for row in rows])


def _version(options: argparse.Namespace) -> None:
    from vit_dist.run.environment import describe

    environment = describe(None, {})
    versions = [f"{name} {version or 'not installed'}" for name, version in environment["versions"].items()]
    git, devices = environment["git"], environment["devices"]
    commit = f"commit {git['commit']}{', changed' if git['dirty'] else ''}" if git else "no checkout"
    print_lines([*versions, f"python {environment['python']}", f"{devices['count']} x {devices['kind']}", commit])


def _summary(recipe: Path) -> str:
    """Returns the first paragraph of a recipe's docstring in one line."""
    try:
        text = ast.get_docstring(ast.parse(recipe.read_bytes())) or ""
    except (SyntaxError, ValueError) as error:  # a ValueError for bytes that are no text
        return f"(cannot be read: {error})"
    return " ".join(text.split("\n\n")[0].split())


_VERBS = {
    "train": _train,
    "eval": commands.evaluate,
    "predict": commands.predict,
    "features": commands.features,
    "probe": commands.probe,
    "inspect": _inspect,
    "plan": _plan,
    "bench": _bench,
    "prepare": _prepare,
    "export": commands.export,
    "checkpoints": commands.checkpoints,
    "launch": _launch,
    "configs": _configs,
    "version": _version,
}
