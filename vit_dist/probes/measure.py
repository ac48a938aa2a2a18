"""Measures how well the features of a training split classify another one: by neighbours and by linear classifiers.

Only features that a probe needs are computed: for a few-shot probe alone, those of its shots.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.data.sets.examples import Source, distinct_names
from vit_dist.data.sets.subset import take
from vit_dist.data.stream.bad_examples import BadExample
from vit_dist.extraction import Extractor, Rows, warn
from vit_dist.job import processes
from vit_dist.probes import knn, linear, shots
from vit_dist.program import Program
from vit_dist.step.state import Parameters

Row = dict[str, Any]
NAMES = ("knn", "few_shot", "linear")


def check(names: Sequence[str], settings: config.Probe, labels: np.ndarray, class_names: Sequence[str]) -> None:
    """Raises `ConfigError` where training examples with these labels are too few for the probes of these names."""
    for key in ("k", "shots", "l2"):
        if not getattr(settings, key):
            raise ConfigError(f"probe.{key}: is empty; give at least one number")
    counts = np.bincount(labels, minlength=len(class_names))
    if (counts > 0).sum() < 2:
        raise ConfigError(
            f"probe: the {len(labels)} training examples are all of class "
            f"{distinct_names(class_names)[counts.argmax()]!r}; a probe needs two classes or more"
        )
    if "knn" in names and max(settings.k) > len(labels):
        raise ConfigError(
            f"probe.k: {_told(settings, 'k')}, but there are {len(labels)} training examples; take {len(labels)} at "
            "most"
        )
    fewest = int(np.where(counts > 0, counts, counts.max()).argmin())
    if "few_shot" in names and max(settings.shots) > counts[fewest]:
        raise ConfigError(
            f"probe.shots: {_told(settings, 'shots')}, but class {distinct_names(class_names)[fewest]!r} has "
            f"{counts[fewest]} training examples; take {counts[fewest]} at most"
        )


def _told(settings: config.Probe, key: str) -> str:
    """Returns the largest number of a key, and that it is the default where nobody set it."""
    value = getattr(settings, key)
    return f"{max(value)}{' by default' if value == getattr(config.Probe(), key) else ''}"


def measure(
    names: Sequence[str],
    settings: config.Probe,
    train: Rows,
    chosen: Mapping[int, np.ndarray],
    tested: Rows,
    devices: Sequence[jax.Device],
) -> dict[str, Row]:
    """Measures features, on all processes of a job together; each gets the same.

    Args:
      names: the probes, of `NAMES`.
      settings: their numbers.
      train: the training examples.
      chosen: for each number of shots, the ids in `train` of the examples that a few-shot probe learns from.
      tested: the examples to classify.
      devices: all that may be used, of any process.

    Returns:
      A row for each `knn/K`, `few_shot/SHOTS` and `linear`. It has `count`, the number of examples that were
      classified, `top1`, the share that was right, and `examples`, how many training examples that took. Those of
      linear classifiers also have `l2`, the strength of the penalty (see `linear.strength`), and `top1_by_l2`, with
      each of `probe.l2`.
    """

    for rows_of, features in (("training", train.features), ("other", tested.features)):
        wrong = int((~np.isfinite(features).all(axis=1)).sum())
        if wrong:
            raise ConfigError(
                f"probe: the features of {wrong} of {len(features)} {rows_of} examples are not finite; the parameters "
                "have diverged, or model.dtype cannot hold their values"
            )

    def row(used: Rows, top1: float) -> Row:
        return {"count": len(tested.ids), "top1": top1, "examples": len(used.ids)}

    def share(predicted: np.ndarray) -> float:
        return float((predicted == tested.labels).mean())

    def linear_row(used: Rows) -> Row:
        best = linear.strength(used.features, used.labels, settings.l2)
        found = linear.predictions(used.features, used.labels, tested.features, settings.l2)
        shares = [share(predicted) for predicted in found]
        return {**row(used, shares[settings.l2.index(best)]), "l2": best, "top1_by_l2": shares}

    processes.stop_clock()  # the others wait while process 0 computes, which may take any time
    rows: dict[str, Row] = {}
    if "knn" in names:
        predicted = knn.predictions(
            train.features,
            train.labels,
            tested.features,
            [min(k, len(train.ids)) for k in settings.k],  # a file that was skipped may leave fewer
            metric=settings.metric,
            temperature=settings.temperature,
            devices=[device for device in devices if device.process_index == jax.process_index()],
        )
        rows = {f"knn/{k}": row(train, share(each)) for k, each in zip(settings.k, predicted, strict=True)}
    if processes.index() == 0:
        for count, ids in chosen.items() if "few_shot" in names else ():
            kept = np.isin(train.ids, ids)
            rows[f"few_shot/{count}"] = linear_row(Rows(*(column[kept] for column in train)))
        if "linear" in names:
            rows["linear"] = linear_row(train)
    return processes.gather(rows)[0]


class Probes:
    """The probes of one training split, for any parameters and any other splits."""

    def __init__(self, names: Sequence[str], settings: config.Probe, extractor: Extractor, train: Source):
        """Chooses the examples whose features are needed; raises `ConfigError` as `check`."""
        check(names, settings, train.labels, train.class_names)
        self.names, self.settings, self.extractor = names, settings, extractor
        self.chosen = {count: shots.choose(train.labels, count, settings.seed) for count in settings.shots}
        self.ids, self.train = np.arange(len(train)), train
        if set(names) == {"few_shot"}:
            self.ids = self.chosen[max(settings.shots)]
            self.train = dataclasses.replace(take(train, self.ids), mixture=())

    def measure(
        self,
        parameters: Parameters,
        splits: Mapping[str, Source],
        note: Callable[[str, Sequence[BadExample]], object] = lambda split, bad: warn(bad),
    ) -> dict[str, Row]:
        """Measures the features of every split but train.

        The mesh must be in use. All processes call this together and get the same.

        Args:
          parameters: those of the model, on the mesh.
          splits: split -> its examples.
          note: is told the split and the examples of it that were skipped.

        Returns:
          The rows, as `measure`, each by a name such as `test/knn/20`.
        """

        def note_train(bad: Sequence[BadExample]) -> None:
            note("train", [example._replace(id=int(self.ids[example.id])) for example in bad])

        train = self.extractor.all(parameters, self.train, note_train)
        train = train._replace(ids=self.ids[train.ids])
        devices, rows = list(self.extractor.mesh.devices.flat), dict[str, Row]()
        for split, source in splits.items():
            if split != "train":  # whose examples would find themselves
                tested = self.extractor.all(parameters, source, functools.partial(note, split))
                found = measure(self.names, self.settings, train, self.chosen, tested, devices)
                rows |= {f"{split}/{name}": row for name, row in found.items()}
        return rows


def of_run(program: Program, train: Source, splits: Mapping[str, Source]) -> Probes | None:
    """Returns what `evaluate.probes` asks for, None if that is nothing.

    Raises `ConfigError` as `check`, and where no split but train is evaluated.
    """
    settings, names = program.settings, program.settings.evaluate.probes
    if not names:
        return None
    if not splits:
        raise ConfigError("evaluate.probes: nothing is evaluated; set evaluate.every_steps or evaluate.every_epochs")
    if set(splits) == {"train"}:
        raise ConfigError("evaluate.probes: the only split of evaluate.splits is train; add another, such as test")
    return Probes(names, settings.probe, Extractor(settings, program.model, program.mesh), train)
