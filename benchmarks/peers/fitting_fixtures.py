"""Writes `tests/weights/fitting.json`: what timm makes of tensors that are fitted to another shape, for `make test`.

    python benchmarks/peers/fitting_fixtures.py tests/weights/fitting.json

It runs where torch and timm are installed, and needs nothing of this project. A tensor is
`RandomState(seed).standard_normal(shape)`, in our layout. Of a result, which would be megabytes, the file keeps some
entries, and sums with random signs over all of them that a wrong entry anywhere would change.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models._manipulate import adapt_input_conv

ENTRIES, SUMS = 24, 4
POSITIONS = (  # prefix tokens, old grid, new grid
    (1, (14, 14), (24, 24)),  # 224 -> 384 at patch 16
    (1, (24, 24), (14, 14)),
    (1, (14, 14), (10, 23)),
    (0, (16, 16), (37, 11)),
    (5, (12, 20), (20, 12)),
    (5, (37, 37), (16, 16)),
)
PATCHES = (  # old patch, new patch
    ((16, 16), (14, 14)),
    ((16, 16), (32, 32)),
    ((32, 32), (16, 16)),
    ((14, 14), (16, 12)),
    ((8, 8), (20, 4)),
)
CHANNELS = (1, 2, 4, 7)


def main() -> None:
    cases = [positions(10 + number, *case) for number, case in enumerate(POSITIONS)]
    cases += [patches(30 + number, *case) for number, case in enumerate(PATCHES)]
    cases += [channels(50 + number, case) for number, case in enumerate(CHANNELS)]
    rows = ",\n".join(json.dumps(case) for case in cases)
    Path(sys.argv[1]).write_text(
        f'{{"timm": "{timm.__version__}", "torch": "{torch.__version__}", "cases": [\n{rows}\n]}}\n'
    )


def positions(seed: int, prefix: int, old: tuple[int, int], new: tuple[int, int]) -> dict[str, Any]:
    shape = (prefix + old[0] * old[1], 48)
    resized = resample_abs_pos_embed(tensor(seed, shape)[None], list(new), list(old), prefix)[0]
    arguments = {"old": old, "new": new, "prefix": prefix}
    return {"function": "resample_positions", "arguments": arguments, **summary(seed, shape, resized)}


def patches(seed: int, old: tuple[int, int], new: tuple[int, int]) -> dict[str, Any]:
    shape = (*old, 3, 16)
    resized = resample_patch_embed(as_conv(tensor(seed, shape)), list(new))
    arguments = {"new": new}
    return {"function": "resample_patch_kernel", "arguments": arguments, **summary(seed, shape, of_conv(resized))}


def channels(seed: int, number: int) -> dict[str, Any]:
    shape = (16, 16, 3, 16)
    adapted = adapt_input_conv(number, as_conv(tensor(seed, shape)))
    arguments = {"channels": number}
    return {"function": "adapt_channels", "arguments": arguments, **summary(seed, shape, of_conv(adapted))}


def tensor(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def as_conv(kernel: torch.Tensor) -> torch.Tensor:
    """[h, w, C, D] -> [D, C, h, w]"""
    return kernel.permute(3, 2, 0, 1)


def of_conv(kernel: torch.Tensor) -> torch.Tensor:
    """[D, C, h, w] -> [h, w, C, D]"""
    return kernel.permute(2, 3, 1, 0)


def summary(seed: int, shape: tuple[int, ...], result: torch.Tensor) -> dict[str, Any]:
    """Entries at `RandomState(seed).choice(size, ENTRIES)`, then sums with signs, over the root of the size."""
    values, rng = result.contiguous().numpy().astype(np.float64).ravel(), np.random.RandomState(seed)
    entries = values[rng.choice(values.size, ENTRIES)]
    sums = rng.choice([-1.0, 1.0], (SUMS, values.size)) @ values / np.sqrt(values.size)
    return {
        "seed": seed,
        "shape": shape,
        "result": list(result.shape),
        "spread": float(f"{values.std():.6g}"),
        "entries": [round(float(value), 6) for value in entries],
        "sums": [round(float(value), 6) for value in sums],
    }


if __name__ == "__main__":
    main()
