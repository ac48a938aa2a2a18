"""What can be typed: every verb's options, and what is told from their form alone.

A mistake is said in one line that begins as every other error does, with exit code 2.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vit_dist.job import launcher

Verbs = Mapping[str, Callable[[argparse.Namespace], Any]]


def parse(words: Sequence[str], verbs: Verbs) -> argparse.Namespace:
    """The options of the verb that the words name, and `run`, what the table of verbs has for it.

    Beside those of its own every verb has `overrides`, the `--config.a.b=value` as `a.b=value`, and `launched`, what
    comes after `--`. A mistake ends the process with a line on stderr.
    """
    words, launched = _split_launched(list(words))
    arguments, overrides = _split_overrides(words)
    options = _parse(arguments, verbs)
    options.overrides, options.launched = overrides, launched
    if options.run is verbs["plan"] and not options.targets and None in (options.config, options.target):
        options.parser.error("--config and --target are both required, or --targets alone")
    return options


def _parse(arguments: Sequence[str], verbs: Verbs) -> argparse.Namespace:
    """The options of a verb. Its paths may have options between them, which argparse takes for the end of the paths."""
    parser = _parser(verbs)
    options, left = parser.parse_known_args(arguments)
    if options.run is None:
        parser.error("the following arguments are required: VERB")
    unknown = [word for word in left if word.startswith("-") or not hasattr(options, "paths")]
    if unknown:
        getattr(options, "parser", parser).error(f"unrecognized arguments: {' '.join(unknown)}")
    if left:
        options.paths += left
    return options


def _parser(runs: Verbs) -> argparse.ArgumentParser:
    parser = _Parser(prog="vit-dist", description="Train, evaluate and use Vision Transformers on any device mesh.")
    parser.add_argument(
        "--version", action="store_const", dest="run", const=runs["version"], help="versions, devices and commit"
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")

    def verb(name: str, *needs: str, help: str) -> argparse.ArgumentParser:
        one = verbs.add_parser(name, help=help, description=help, allow_abbrev=False)
        one.set_defaults(run=runs[name], parser=one)
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

    verb("train", "config", "workdir", help="train; goes on by itself where the workdir holds the run")
    one = verb("eval", "workdir", "checkpoint", help="evaluate a checkpoint exactly")
    one.add_argument("--split", default="test", help="the split to evaluate (test)")
    one = verb("predict", "workdir", "checkpoint", "json", help="classify image files")
    one.add_argument("paths", nargs="+", metavar="IMAGE")
    one.add_argument("--top", type=int, default=5, help="how many classes to show (5)")
    verb("inspect", "config", "json", help="parameters, layout, FLOPs and memory of a config")
    one = verb("plan", "json", help="compile a config for hardware that is not here: does it fit, how fast is it")
    one.add_argument("--config", metavar="FILE", help="a recipe; --config.a.b=value overrides a key")
    one.add_argument("--target", metavar="KIND:SHAPE", help="such as v5e:16x16, h200:8x4 (4 nodes of 8), cpu:8")
    one.add_argument("--targets", action="store_true", help="list the kinds of targets, and nothing else")
    one.add_argument("--slices", type=_count, default=1, help="of a TPU, joined by the data-centre network (1)")
    one.add_argument("--search", action="store_true", help="look for the quickest layout that fits")
    one.add_argument("--batch-size", type=_largest, metavar="max", help="look for the largest batch that fits")
    one.add_argument("--examples", type=_count, help="how many the data have, for the length of a run in epochs")
    one.add_argument("--html", metavar="FILE", type=_path, help="write the plan as a page, too")
    one = verb("bench", "config", help="measure how fast a config trains here")
    one.add_argument("--steps", type=int, default=30, help="how many steps to measure (30)")
    one = verb("prepare", help="convert a data set into sharded records")
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
    one = verb("launch", help="start several processes of a verb as one job: launch [OPTION ...] -- VERB ...")
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
    one = verb("configs", "json", help="list the recipes")
    one.add_argument("folder", nargs="?", help="of this folder; else those that are found by name")
    return parser


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line that begins as every other error does."""

    def error(self, message: str) -> Any:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def _path(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("no directory is given")
    try:
        return str(Path(text).expanduser())
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text}: no home folder of that user is known; write it out") from error


def _largest(text: str) -> str:
    if text != "max":
        raise argparse.ArgumentTypeError(f"expected max, found {text!r}; a size is given by --config.batch_size={text}")
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
    """What `launch` is told, and the verb with its own arguments, which are not looked at here.

    The verb comes after `--`, or is the first word that names one.
    """
    if words[:1] != ["launch"]:
        return words, []
    for number, word in enumerate(words):
        if word == "--":
            return words[:number], words[number + 1 :]
        if word in launcher.VERBS:
            return words[:number], words[number:]
    return words, []


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
