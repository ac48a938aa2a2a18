"""The command line: parses arguments, prints results on stdout, sets exit codes. Nothing else does any of the three.

The codes are those of `exit_codes`; a usage, config or input error is said in one line. The verbs are imported when
they run: they bring jax, which `--help` and a mistyped key need not wait for.
"""

import argparse
import ast
import errno
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vit_dist import config, recipes
from vit_dist.config import ConfigError
from vit_dist.exit_codes import DONE, FAILED, INTERRUPTED, MISTAKE, PREEMPTED
from vit_dist.mesh.peers import JobError

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
        _keep_stdout_for_results()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("absl").setLevel(logging.WARNING)  # orbax and grain say a great deal
    words, launched = _split_launched(list(sys.argv[1:] if argv is None else argv))
    arguments, overrides = _split_overrides(words)
    options = _parse(arguments)
    options.overrides, options.launched = overrides, launched
    code, said = FAILED, "an error of the program; see what it has said itself"
    try:
        code = options.run(options) or DONE
    except ConfigError as error:
        code, said = MISTAKE, str(error)
        print(f"error: {said}", file=sys.stderr)
    except JobError as error:
        said = str(error)
        print(f"error: {said}", file=sys.stderr)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        code, said = MISTAKE, f"{error.filename or getattr(options, 'workdir', 'the disk')}: {error.strerror}"
        print(f"error: {said}", file=sys.stderr)
    except KeyboardInterrupt:
        code, said = INTERRUPTED, "interrupted"
        print(said, file=sys.stderr)
    finally:
        _leave(code, said)
    return code


def _keep_stdout_for_results() -> None:
    """Sends to stderr what C++ libraries, such as gloo, write to the process's stdout behind Python's back."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
    os.dup2(2, 1)


def _leave(code: int, said: str) -> None:
    """Leaves the other processes of a job, if the verb joined any."""
    if "jax" in sys.modules:
        from vit_dist.mesh import processes

        processes.leave(code, said)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a verb. Its paths may have options between them, which argparse takes for the end of the paths."""
    options, left = _parser().parse_known_args(arguments)
    unknown = [word for word in left if word.startswith("-") or not hasattr(options, "paths")]
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if left:
        options.paths += left
    return options


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vit-dist", description="Train, evaluate and use Vision Transformers on any device mesh.")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    def verb(name: str, run: Any, *needs: str, **extra: Any) -> argparse.ArgumentParser:
        one = verbs.add_parser(name, help=extra["help"], description=extra["help"], allow_abbrev=False)
        one.set_defaults(run=run, parser=one)
        if "config" in needs:
            one.add_argument(
                "--config", required=True, metavar="FILE", help="a recipe; --config.a.b=value overrides a key"
            )
        if "workdir" in needs:
            one.add_argument("--workdir", required=True, metavar="DIR", type=_path, help="the directory of the run")
        if "checkpoint" in needs:
            which = one.add_mutually_exclusive_group()
            which.add_argument("--step", type=int, help="the checkpoint of this step; else the newest")
            which.add_argument("--best", action="store_true", help="the checkpoint of the highest top-1")
        if "json" in needs:
            one.add_argument("--json", action="store_true", help="JSON instead of a table")
        return one

    verb("train", _train, "config", "workdir", help="train; goes on by itself where the workdir holds the run")
    one = verb("eval", _eval, "workdir", "checkpoint", help="evaluate a checkpoint exactly")
    one.add_argument("--split", default="test", help="the split to evaluate (test)")
    one = verb("predict", _predict, "workdir", "checkpoint", "json", help="classify image files")
    one.add_argument("paths", nargs="+", metavar="IMAGE")
    one.add_argument("--top", type=int, default=5, help="how many classes to show (5)")
    verb("inspect", _inspect, "config", "json", help="parameters, layout, FLOPs and memory of a config")
    one = verb("bench", _bench, "config", help="measure how fast a config trains here")
    one.add_argument("--steps", type=int, default=30, help="how many steps to measure (30)")
    one = verb("prepare", _prepare, help="convert a data set into sharded records")
    one.add_argument("paths", nargs="+", metavar="PATH", help="SOURCE DEST; DEST alone with --merge, --verify")
    one.add_argument("--source", help="what SOURCE is, as data.source; else told from its files")
    one.add_argument("--split", action="append", default=[], help="a split to prepare, may be repeated; else all")
    one.add_argument("--resize", type=_count, help="pixels that a longer short side is brought to")
    one.add_argument("--encode", choices=("jpeg", "raw"), help="how images are stored; else untouched, jpeg if resized")
    one.add_argument("--shards", type=_count, help="files of the largest split; else one for 2048 images, 16 to 512")
    one.add_argument("--shard-range", type=_range, metavar="A:B", help="make these alone, other hosts make the others")
    one.add_argument("--workers", type=_count, help="threads; else one a core")
    one.add_argument(
        "--on-bad", choices=("error", "skip"), help="where one is to be decoded and cannot be: stop, or store as is"
    )
    which = one.add_mutually_exclusive_group()
    which.add_argument("--merge", action="store_true", help="finish what several hosts have made in DEST")
    which.add_argument("--verify", action="store_true", help="check every byte of DEST")
    one = verb("launch", _launch, help="start several processes of a verb as one job: launch [OPTION ...] -- VERB ...")
    one.add_argument("--processes", type=_count, help="how many on this host; else one a GPU")
    one.add_argument("--devices-per-process", type=_count, help="fake CPU devices of each; else real ones, a GPU each")
    one.add_argument(
        "--restarts", type=_number, default=0, help="how often to start again what crashed or was preempted"
    )
    one.add_argument("--nodes", type=_count, help="how many hosts, each with a launch of as many processes (1)")
    one.add_argument("--node-rank", type=_number, help="which of the hosts this is, from 0")
    one.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where process 0 of all can be reached; of one host, any"
    )
    one = verb("configs", _configs, "json", help="list the recipes")
    one.add_argument("folder", nargs="?", default="configs", help="where they are (configs)")
    return parser


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line that begins as every other error does."""

    def error(self, message: str) -> Any:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def _path(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("no directory is given")
    return text


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text!r}")
    return int(text)


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, found {text!r}")
    return int(text)


def _range(text: str) -> tuple[int, int]:
    first, _, end = text.partition(":")
    if not (first.isdecimal() and end.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected A:B, such as 0:8, found {text!r}")
    return int(first), int(end)


def _split_launched(words: list[str]) -> tuple[list[str], list[str]]:
    """What `launch` is told, and the verb after `--` with its own arguments, which are not looked at here."""
    if words[:1] != ["launch"] or "--" not in words:
        return words, []
    end = words.index("--")
    return words[:end], words[end + 1 :]


def _split_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Takes the `--config.a.b=value` and `--config.a.b value` out of the arguments, as `a.b=value`."""
    rest, overrides = [], []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--config."):
            rest.append(word)
        elif "=" in word:
            overrides.append(word.removeprefix("--config."))
        else:
            value = words.pop(0) if words and not words[0].startswith("--") else ""
            overrides.append(f"{word.removeprefix('--config.')}={value}")
    return rest, overrides


def _train(options: argparse.Namespace) -> int:
    settings = recipes.load(options.config, options.overrides)
    from vit_dist.train import Diverged, Preempted, train

    try:
        _print_json(train(settings, options.workdir))
    except Preempted as stopped:
        print(f"preempted: {stopped}", file=sys.stderr)
        return PREEMPTED
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


def _bench(options: argparse.Namespace) -> None:
    settings = recipes.load(options.config, options.overrides)
    from vit_dist.bench import bench

    _print_json(bench(settings, steps=options.steps))


def _prepare(options: argparse.Namespace) -> None:
    from vit_dist.data import prepare

    if options.merge or options.verify:
        meaningless = [*_PREPARING, "workers"] if options.merge else _PREPARING
        given = [name for name in meaningless if getattr(options, name)]
        if given or len(options.paths) != 1 or options.overrides:
            which = "--merge" if options.merge else "--verify"
            extra = f"--{given[0].replace('_', '-')}" if given else "more than one path or --config"
            raise ConfigError(f"prepare {which}: takes DEST alone, found {extra}")
        dest = options.paths[0]
        _print_json(prepare.merge(dest) if options.merge else prepare.verify(dest, options.workers))
        return
    if len(options.paths) > 2:
        raise ConfigError(f"prepare: expected SOURCE and DEST, found {len(options.paths)} paths")
    *source, dest = options.paths
    for key in options.overrides:
        config.one_of("prepare --config", key.partition("=")[0], _OF_SOURCES)
    settings = config.resolve(recipes.override(config.to_dict(config.Config(total_steps=1)), options.overrides))
    found = prepare.prepare(
        source[0] if source else None,
        dest,
        kind=options.source,
        splits=options.split,
        resize=options.resize,
        encode=options.encode,
        shards=options.shards,
        shard_range=options.shard_range,
        workers=options.workers,
        keep_bad=options.on_bad == "skip",
        data=settings.data,
    )
    _print_json(found)


# Options of `prepare` that mean nothing to what is finished, and keys that say how a source is read.
_PREPARING = ("source", "split", "resize", "encode", "shards", "shard_range", "on_bad")
_OF_SOURCES = ("data.cache_dir", "data.download", "data.memory_limit_gb")


def _launch(options: argparse.Namespace) -> int:
    if options.overrides:
        raise ConfigError(f"launch --config.{options.overrides[0]}: the verb's own arguments come after --")
    if (options.nodes is None) != (options.node_rank is None):
        raise ConfigError("launch: --nodes and --node-rank are given together or not at all")
    from vit_dist import launch

    job = launch.Job(
        launch.verb_command(options.launched),
        options.processes or launch.count_gpus(),
        devices_per_process=options.devices_per_process,
        restarts=options.restarts,
        nodes=options.nodes or 1,
        node_rank=options.node_rank or 0,
        coordinator=options.coordinator,
    )
    return launch.launch(job)


def _configs(options: argparse.Namespace) -> None:
    if options.overrides:
        raise ConfigError(f"--config.{options.overrides[0]}: configs only lists the recipes and takes no keys")
    folder = Path(options.folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; give the one that holds the recipes")
    rows = []
    for file in sorted(folder.glob("*.py")):
        rows.append({"config": str(file), "summary": _summary(file)})
    if options.json:
        _print_json(rows)
    else:
        _print_table(("config", "summary"), [tuple(row.values()) for row in rows])


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
    from vit_dist.mesh import processes

    return processes.index() == 0
