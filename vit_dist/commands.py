"""The verbs that use a trained model, as functions of the command line's options; each prints its result."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vit_dist.config import ConfigError
from vit_dist.job.exit_codes import DONE, MISTAKE
from vit_dist.printing import print_json, print_message, print_table


def evaluate(options: argparse.Namespace) -> None:
    from vit_dist.evaluate import evaluate

    print_json(evaluate(options.workdir, split=options.split, step=_step(options), overrides=options.overrides))


def predict(options: argparse.Namespace) -> int:
    from vit_dist import answers
    from vit_dist.predict import predictions

    out = None if options.out is None else answers.check_out(options.out)
    counts = {"images": 0, "errors": 0}

    def counted() -> Iterator[dict[str, Any]]:
        found = predictions(
            _model(options),
            options.paths,
            top=options.top,
            step=_step(options),
            attention=options.attention,
            overrides=options.overrides,
        )
        for prediction in found:
            counts["images"] += 1
            counts["errors"] += "error" in prediction
            yield prediction

    if out is not None:
        answers.write(out, counted())
        print_json({"out": str(out), **counts})
    elif options.json:
        for prediction in counted():
            print_json(prediction)
    else:
        print_table(("image", "class", "probability"), [row for one in counted() for row in answers.table_rows(one)])
    if counts["errors"]:
        print_message(f"error: {counts['errors']} of {counts['images']} files did not decode")
        return MISTAKE
    return DONE


def features(options: argparse.Namespace) -> None:
    from vit_dist.features import features

    print_json(
        features(
            _model(options),
            options.out,
            path=options.data_path,
            split=options.split,
            what=options.what,
            block=options.block,
            step=_step(options),
            overrides=options.overrides,
        )
    )


def probe(options: argparse.Namespace) -> None:
    from vit_dist.probe import probe, probe_files

    names = [name for name in options.probes.split(",") if name]
    uses = {"k": {"knn"}, "shots": {"few_shot"}, "l2": {"few_shot", "linear"}}
    given = {key: getattr(options, key) for key in uses if getattr(options, key) is not None}
    for key in given:
        if uses[key].isdisjoint(names):
            raise ConfigError(f"--{key}: is of {' and '.join(sorted(uses[key]))}, but --probes={options.probes}")
    overrides = [*options.overrides, *(f"probe.{key}=[{value}]" for key, value in given.items())]
    if options.features is not None:
        ignored = ("data_path", "split", "what", "block", "step", "best")
        for name in ignored:
            if (value := getattr(options, name)) is not None and value is not False:
                raise ConfigError(f"--{name.replace('_', '.')}: has no effect with --features; leave it out")
        print_json(probe_files(*options.features, probes=names, overrides=overrides))
        return
    print_json(
        probe(
            _model(options),
            path=options.data_path,
            probes=names,
            split=options.split or "test",
            what=options.what or "pooled",
            block=options.block,
            step=_step(options),
            overrides=overrides,
        )
    )


def export(options: argparse.Namespace) -> None:
    from vit_dist.exporting.verb import export
    from vit_dist.run.workdir import holds_run

    if options.workdir is not None and not holds_run(Path(options.workdir)):
        raise ConfigError(f"{options.workdir}: holds no run; --weights=PATH is for weights of others")
    given = {key: getattr(options, key) for key in ("input", "converter", "overrides")}
    print_json(export(options.workdir or options.weights, options.out, options.format, step=_step(options), **given))


def checkpoints(options: argparse.Namespace) -> int:
    from vit_dist.checkpoint_list import checkpoints

    if options.overrides:
        raise ConfigError(f"--config.{options.overrides[0]}: checkpoints are listed as they are, without keys")
    rows = checkpoints(options.workdir, verify=options.verify, prune=options.prune)
    if options.json:
        print_json(rows)
    else:
        columns = ("checkpoint", "bytes", "metrics", "digests", "state")
        print_table(columns, [_checkpoint_line(row) for row in rows])
    damaged = [row["name"] for row in rows if row["state"] == "damaged"]
    if damaged:
        print_message(f"error: {options.workdir}/checkpoints: damaged: {', '.join(damaged)}")
        return MISTAKE
    return DONE


def _checkpoint_line(row: dict[str, Any]) -> tuple[str, ...]:
    metrics = " ".join(f"{name}={value:.4f}" for name, value in row["metrics"].items())
    digests = {True: "yes", False: "no", None: ""}[row["digests"]]
    state = row["state"] if row["damage"] is None else f"{row['state']}: {row['damage']}"
    return row["name"], f"{row['bytes']:,}", metrics, digests, state


def _step(options: argparse.Namespace) -> Any:
    return "best" if options.best else "newest" if options.step is None else options.step


def _model(options: argparse.Namespace) -> str | Path:
    """Returns what `--weights` or `--workdir` names; raises `ConfigError` where the second holds no run."""
    if options.weights is not None:
        return options.weights
    from vit_dist.load import check_run

    own_data = getattr(options, "data_path", None) is None  # of other data, classes may be chosen
    return check_run(options.workdir, options.step, options.overrides if own_data else ())
