"""Class token, registers and learned positions: which rows of a library's tensors are which rows of ours.

Libraries differ in what stands before the patches and in which of these tokens have a position. We add a position that
ours has no row for to its token.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from vit_dist.weights.lazy import Lazy, computed
from vit_dist.weights.naming import Naming, Shape, Tensors


def tokens(
    naming: Naming,
    tensors: Tensors,
    names: tuple[str | None, str | None, Sequence[str]],
    shapes: Mapping[str, Shape],
    patches: int,
) -> dict[str, Lazy]:
    """Returns our tokens and learned positions by path.

    The positions of a file begin with that of the class token if ours do, and with those of the registers or without. A
    position for which we have no row is added to its token.

    Args:
      naming: the family's.
      tensors: those of the file.
      names: of the positions, of the class token, and of the other special tokens; None or nothing: there are none.
      shapes: those of our parameters by path.
      patches: the number of patches.

    Raises:
      ConfigError: names a tensor that is missing or has another shape.
    """
    (width,), registers = shapes["patch/bias"], shapes.get("registers", (0,))[0]

    def take(name: str, path: str, *counts: int) -> Lazy:
        """Returns tokens [N, D], of which there may be so many."""
        lead = (1,) if naming.batched_tokens else ()
        allowed = [(*lead, count, width) for count in counts]
        if path == "cls" and not lead:
            allowed = [(width,)]
        token = tensors.take(name, path, allowed, naming.told_by)
        return token.shaped(math.prod(token.shape) // width, width)

    position, cls, others = names
    special = [take(cls, "cls", 1)] if cls else []
    special += [take(name, "registers", registers // len(others)) for name in others]
    counts = [token.shape[0] for token in special]
    found: dict[str, Lazy] = {}
    if position:
        own = shapes["position"][0] - patches  # 1: the class token has a position
        possible = {own, own if cls and not own else sum(counts)}
        rows = take(position, "position", *(patches + before for before in sorted(possible)))
        before = rows.shape[0] - patches
        # What ours keeps: the class token's row, if it has one, and those of the patches.
        added, place = [], 0
        for token, count in zip(special, counts, strict=True):
            keeps = place == 0 and own == 1
            extra = rows.part(0, place, place + count) if place + count <= before and not keeps else None
            added.append(token if extra is None else computed(token.shape, lambda a, b: a + b, token, extra))
            place += count
        special = added
        found["position"] = rows.part(0, before, rows.shape[0])
        if own:
            found["position"] = joined([rows.part(0, 0, 1), found["position"]])
    if cls:
        found["cls"] = special.pop(0).shaped(width)
    if registers:
        found["registers"] = joined(special)
    return found


def stored_tokens(
    naming: Naming,
    names: tuple[str | None, str | None, Sequence[str]],
    ours: Mapping[str, np.ndarray],
    before: int,
) -> dict[str, np.ndarray]:
    """Returns the tensors by name of which `tokens` would make our tokens and learned positions.

    Args:
      naming: the family's.
      names: as for `tokens`.
      ours: our parameters by path.
      before: how many positions the family has before those of the patches; for those that we do not have, zeros.
    """
    position, cls, others = names
    found: dict[str, np.ndarray] = {}
    if position:
        rows = ours["position"]
        own = int("cls" in ours) if before else 0  # a class token has a position of its own where any token has
        unused = np.zeros((before - own, rows.shape[1]), np.float32)
        found[position] = np.concatenate([rows[:own], unused, rows[own:]])
    if cls:
        found[cls] = ours["cls"][None] if naming.batched_tokens else ours["cls"]
    if others:
        found |= dict(zip(others, np.split(ours["registers"], len(others)), strict=True))
    return {name: array[None] if naming.batched_tokens else array for name, array in found.items()}


def joined(parts: list[Lazy]) -> Lazy:
    """Returns small arrays joined along their first axis."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return computed(shape, lambda *arrays: np.concatenate(arrays), *parts)
