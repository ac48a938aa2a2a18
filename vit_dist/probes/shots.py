"""Chooses the examples of a few-shot probe: so many of each class, the same on every host and in every container.

Which ones depends on the seed, the class and its ids. Those of fewer shots are among those of more.
"""

import numpy as np

from vit_dist.data.shuffle import shuffled

_KEY = 0x5407  # tells these shuffles from others of the same seed


def choose(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Returns the ids, ascending, of `shots` examples of each class, of all where a class has fewer; int64.

    Args:
      labels: the classes of the examples with ids 0, 1, ...
      shots: how many of each class.
      seed: of the choice.
    """
    by_class = np.argsort(labels, kind="stable")
    classes, starts = np.unique(labels[by_class], return_index=True)
    chosen = []
    for label, members in zip(classes, np.split(by_class, starts[1:]), strict=True):
        ranks = np.arange(min(shots, len(members)))
        chosen.append(members[shuffled(seed, (_KEY, int(label)), np.zeros_like(ranks), len(members), ranks)])
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)
