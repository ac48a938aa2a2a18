"""The command line's options: what each verb takes, and the checks that need no config.

A mistake ends the process with exit code 2 and one line that begins like every other error.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vit_dist import config
from vit_dist.escape import printable
from vit_dist.job import launcher
from vit_dist.paths import expanded
from vit_dist.schema import ConfigError, elsewhere

Verbs = Mapping[str, Callable[[argparse.Namespace], Any]]
_KEYS = "--config.KEY=VALUE changes a key of the recipe; `vit-dist configs --keys` lists all keys"
_KEYS_OF_A_RUN = "--config.KEY=VALUE changes a key that does not define the run, such as mesh.data or data.path"


def parse(words: Sequence[str], verbs: Verbs) -> argparse.Namespace:
    """Returns the options of the verb in `words`, and as `run` its function in the table `verbs`.

    Every verb also has `overrides`, its `--config.a.b=value` as `a.b=value`, and `launched`, the words after `--`. A
    mistake ends the process with a line on stderr.
    """
    words, launched = _split_launched(list(words))
    arguments, overrides = _split_overrides(words)
    options = _parse(arguments, verbs)
    options.overrides, options.launched = overrides, launched
    if options.run is verbs["plan"] and not options.targets and None in (options.config, options.target):
        options.parser.error("--config and --target are both required, or --targets alone")
    if options.run is verbs["inspect"] and options.config is None is options.weights:
        options.parser.error("--config or --weights is required")
    if options.run is verbs["predict"] and options.json and options.out is not None:
        options.parser.error("--json prints and --out writes the result; give one of them")
    if overrides and hasattr(options, "config") and options.config is None and not getattr(options, "targets", False):
        options.parser.error(f"--config.{overrides[0].partition('=')[0]} changes a recipe; name one by --config")
    return options


def _parse(arguments: Sequence[str], verbs: Verbs) -> argparse.Namespace:
    """Returns the options of a verb. They may stand between its paths, where argparse would end the list of paths."""
    parser = _parser(verbs)
    options, left = parser.parse_known_args(arguments)
    if options.run is None:
        parser.error("the following arguments are required: VERB")
    unknown = [word for word in left if word.startswith("-") or not hasattr(options, "paths")]
    if unknown:
        key = unknown[0].lstrip("-").partition("=")[0]
        meant = elsewhere(key, config.Config, "--config.") if hasattr(options, "config") else ""
        getattr(options, "parser", parser).error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
    if left:
        options.paths += left
    return options


def _parser(functions: Verbs) -> argparse.ArgumentParser:
    parser = _Parser(prog="vit-dist", description="Train, evaluate and use Vision Transformers on any device mesh.")
    parser.add_argument(
        "--version", action="store_const", dest="run", const=functions["version"], help="versions, devices and commit"
    )
    subparsers = parser.add_subparsers(title="verbs", metavar="VERB")

    def verb(name: str, *options: str, help: str) -> argparse.ArgumentParser:
        keys = {"config": _KEYS, "workdir": _KEYS_OF_A_RUN, "model": _KEYS_OF_A_RUN}
        epilog = next((text for option, text in keys.items() if option in options), None)
        subparser = subparsers.add_parser(name, help=help, description=help, epilog=epilog, allow_abbrev=False)
        subparser.set_defaults(run=functions[name], parser=subparser)
        if "config" in options:
            subparser.add_argument(
                "--config", required=name not in ("plan", "inspect"), metavar="RECIPE", help="a recipe's name or file"
            )
        if "workdir" in options:
            subparser.add_argument(
                "--workdir", required=True, metavar="DIR", type=_path, help="the directory of the run"
            )
        if "model" in options:
            model = subparser.add_mutually_exclusive_group(required=True)
            model.add_argument("--workdir", metavar="DIR", type=_path, help="the directory of a run")
            model.add_argument(
                "--weights", metavar="PATH", help="weights: a folder, a file, a name on the hub, or a run"
            )
            if "files" in options:
                model.add_argument(
                    "--features",
                    nargs=2,
                    metavar=("TRAIN", "TEST"),
                    type=_path,
                    help="two files that `vit-dist features` wrote",
                )
        if "checkpoint" in options:
            checkpoint = subparser.add_mutually_exclusive_group()
            checkpoint.add_argument("--step", type=int, help="the checkpoint of this step; else the newest")
            checkpoint.add_argument("--best", action="store_true", help="the checkpoint of the highest top-1")
        if "json" in options:
            subparser.add_argument("--json", action="store_true", help="JSON instead of a table")
        return subparser

    verb("train", "config", "workdir", help="train; resumes where the workdir holds the run")
    evaluate = verb("eval", "workdir", "checkpoint", help="evaluate a checkpoint exactly")
    evaluate.add_argument("--split", default="test", help="the split to evaluate (test)")
    predict = verb("predict", "model", "checkpoint", "json", help="classify image files")
    predict.add_argument(
        "paths", nargs="+", metavar="IMAGE", type=_path, help="a file, a folder, or a pattern in quotes"
    )
    predict.add_argument("--top", type=int, default=5, help="how many classes to show (5)")
    predict.add_argument("--out", metavar="FILE", type=_path, help="write .csv, .jsonl or .parquet instead of a table")
    predict.add_argument("--attention", metavar="DIR", type=_path, help="draw where the model looks into a new folder")
    features = verb("features", "model", "checkpoint", help="write features of every example of a split")
    features.add_argument("out", metavar="OUT", type=_path, help="a file, .parquet or .npz")
    features.add_argument("--data.path", dest="data_path", metavar="PATH", help="the data; else those of the run")
    features.add_argument("--split", default="train", help="the split (train)")
    features.add_argument(
        "--what",
        default="pooled",
        metavar="KIND",
        help="pooled (what the head classifies), cls, mean or tokens (pooled)",
    )
    features.add_argument("--block", type=int, metavar="N", help="of the output of block N, from 0; else of the last")
    probe = verb("probe", "model", "files", "checkpoint", help="classify by features: neighbours, linear classifiers")
    probe.add_argument("--data.path", dest="data_path", metavar="PATH", help="the data; else those of the run")
    probe.add_argument("--split", help="the split to classify (test), after learning from train")
    probe.add_argument(
        "--probes", default="knn,few_shot,linear", metavar="NAMES", help="which (knn,few_shot,linear: all there are)"
    )
    probe.add_argument("--k", metavar="N,...", help="how many neighbours vote (20); probe.k")
    probe.add_argument("--shots", metavar="N,...", help="examples a class of few_shot (10); probe.shots")
    probe.add_argument("--l2", metavar="X,...", help="penalties of few_shot and linear to choose from; probe.l2")
    probe.add_argument("--what", metavar="KIND", help="pooled (what the head classifies), cls or mean (pooled)")
    probe.add_argument("--block", type=int, metavar="N", help="of the output of block N, from 0; else of the last")
    inspect = verb("inspect", "config", "json", help="parameters, layout, FLOPs and memory of a config; or weights")
    inspect.add_argument("--weights", metavar="PATH", help="what weights are; with --config, what a run takes of them")
    plan = verb("plan", "config", "json", help="compile a config for hardware that is not attached: memory and speed")
    plan.add_argument("--target", metavar="KIND:SHAPE", help="such as v5e:16x16, h200:8x4 (4 nodes of 8), cpu:8")
    plan.add_argument("--targets", action="store_true", help="list the kinds of targets, and nothing else")
    plan.add_argument("--slices", type=_count, default=1, help="of a TPU, joined by the data-centre network (1)")
    plan.add_argument("--search", action="store_true", help="look for the quickest layout that fits")
    plan.add_argument("--batch-size", type=_max_only, metavar="max", help="look for the largest batch that fits")
    plan.add_argument("--examples", type=_count, help="of the training split, for the length of a run in epochs")
    plan.add_argument("--html", metavar="FILE", type=_path, help="also write the plan as a page")
    bench = verb("bench", "config", help="measure how fast a config trains here")
    bench.add_argument("--steps", type=int, default=30, help="how many steps to measure (30)")
    prepare = verb("prepare", help="convert a data set into sharded records")
    prepare.add_argument("paths", nargs="+", metavar="PATH", help="SOURCE DEST; DEST alone with --merge, --verify")
    prepare.add_argument("--source", help="what SOURCE is, as data.source; else recognised by its files")
    prepare.add_argument("--split", action="append", default=[], help="a split to prepare, may be repeated; else all")
    prepare.add_argument("--resize", type=_count, help="pixels of the short side, for images whose own is longer")
    prepare.add_argument(
        "--encode", choices=("jpeg", "raw"), help="how images are stored; else as they are, or as jpeg with --resize"
    )
    prepare.add_argument(
        "--shards", type=_count, help="files of the largest split; else one for 2048 images, 16 to 512"
    )
    prepare.add_argument("--shard-range", type=_range, metavar="A:B", help="make only these; other hosts make the rest")
    prepare.add_argument("--workers", type=_count, help="threads; else one per core")
    prepare.add_argument(
        "--on-bad",
        choices=("error", "skip"),
        help="for an image that must be decoded and cannot be: stop, or store it as it is",
    )
    finish = prepare.add_mutually_exclusive_group()
    finish.add_argument("--merge", action="store_true", help="finish what several hosts have made in DEST")
    finish.add_argument("--verify", action="store_true", help="check every byte of DEST")
    export = verb("export", "checkpoint", help="write a run, or weights, for other libraries")
    model = export.add_mutually_exclusive_group(required=True)
    model.add_argument("--workdir", metavar="DIR", type=_path, help="the directory of the run")
    model.add_argument("--weights", metavar="PATH", help="weights, as for init.weights")
    export.add_argument("--format", required=True, help="timm, huggingface, safetensors, npz, stablehlo or onnx")
    export.add_argument("--input", default="float", help="of a program: float, normalised images; or uint8, pixels")
    export.add_argument("--converter", metavar="PYTHON", type=_path, help="for onnx: a Python that has jax2onnx")
    export.add_argument("out", metavar="OUT", type=_path, help="the folder to make")
    saved = verb("checkpoints", "json", help="list the checkpoints of a run, and tell whether they are whole")
    saved.add_argument("--workdir", required=True, metavar="DIR", type=_path, help="the directory of the run")
    saved.add_argument("--verify", action="store_true", help="read them all, and compare them with their digests")
    saved.add_argument("--prune", action="store_true", help="remove what was set aside or left by interrupted saves")
    launch = verb("launch", help="start several processes of a verb as one job: launch [OPTION ...] -- VERB ...")
    launch.add_argument("--processes", type=_count, help="how many on this host; else one per GPU")
    launch.add_argument(
        "--devices-per-process", type=_count, help="fake CPU devices of each; else real ones, a GPU each"
    )
    launch.add_argument(
        "--restarts", type=_number, default=0, help="how often to restart after a crash or a preemption"
    )
    launch.add_argument("--nodes", type=_count, help="how many hosts, each with a launch of as many processes (1)")
    launch.add_argument("--node-rank", type=_number, help="which of the hosts this is, from 0")
    launch.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="the address of process 0 of all hosts; on one host, chosen if not given",
    )
    configs = verb("configs", "json", help="list the recipes, or with --keys what can be set in one")
    configs.add_argument("folder", nargs="?", help="of this folder; else those that are found by name")
    configs.add_argument(
        "--keys",
        nargs="?",
        const="",
        metavar="PATTERN",
        help="list the keys with type, default and meaning: all, or those that hold PATTERN",
    )
    return parser


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line that begins like every other error."""

    def error(self, message: str) -> Any:
        self.exit(2, f"error: {printable(message)}; see {self.prog} --help\n")


def _path(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    try:
        return str(expanded(text, "path"))
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("path: ")) from error


def _max_only(text: str) -> str:
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
    """Returns the words of `launch` itself, and the launched verb with its own words, which the child reads.

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
    """Returns the words without `--config.a.b=value` and `--config.a.b value`, and these as `a.b=value`."""
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
