"""Fits loaded tensors to another image size, patch size or number of channels, as timm does.

Positions are resized like an image whose pixels are vectors. A patch kernel is changed so that it answers to a resized
patch as the old kernel does to the patch itself (FlexiViT, Beyer et al. 2023, arXiv:2212.08013): where B resizes a
patch from the old size to the new one, the new kernel is the pseudo-inverse of B, transposed, times the old kernel.
Every resize here is bicubic and antialiased, one matrix down and one across, in float64; results are in float32.
"""

import math

import numpy as np

from vit_dist.data.pictures.resample import resize_matrix
from vit_dist.schema import ConfigError

Grid = tuple[int, int]  # rows and columns


def resample_positions(position: np.ndarray, old: Grid, new: Grid, prefix: int) -> np.ndarray:
    """Resizes learned positions to another grid of patches, as timm's `resample_abs_pos_embed`.

    Args:
      position: `[prefix + old rows * old columns, D]`.
      old: the grid that they were learned for.
      new: the grid that is wanted.
      prefix: how many tokens, such as the class token and registers, stand before the patches; theirs are kept.

    Returns:
      `float32 [prefix + new rows * new columns, D]`.

    Raises:
      ConfigError: the positions are not those of the old grid.
    """
    if position.ndim != 2 or len(position) != prefix + math.prod(old):
        raise ConfigError(
            f"position: its shape is {position.shape}, expected {prefix} + {old[0]}x{old[1]} tokens; "
            "set model.image_size and model.patch_size to those of the weights"
        )
    if old == new:
        return position.astype(np.float32)
    kept, patches = position[:prefix], position[prefix:].reshape(*old, -1)
    down, across = (resize_matrix(*sides, "bicubic") for sides in zip(old, new, strict=True))
    resized = _apply(down, across, patches)
    return np.concatenate([kept, resized.reshape(-1, position.shape[1])]).astype(np.float32)


def resample_patch_kernel(kernel: np.ndarray, new: Grid) -> np.ndarray:
    """Fits a patch kernel to another patch size, as timm's `resample_patch_embed`.

    Args:
      kernel: `[h, w, C, D]`.
      new: (height, width) of the patches that are wanted, in pixels.

    Returns:
      `float32 [*new, C, D]`.
    """
    old = kernel.shape[:2]
    if old == new:
        return kernel.astype(np.float32)
    # The map of a whole patch is the Kronecker product of these two, and so is its pseudo-inverse.
    down, across = (np.linalg.pinv(resize_matrix(*sides, "bicubic")).T for sides in zip(old, new, strict=True))
    return _apply(down, across, kernel).astype(np.float32)


def adapt_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """Fits a patch kernel to images of another number of channels, as timm's `adapt_input_conv`.

    Args:
      kernel: `[h, w, C, D]`.
      channels: the number wanted.

    Returns:
      `float32 [h, w, channels, D]`: the sum over C if `channels` is 1; otherwise the old channels, repeated in turn and
      scaled by C / `channels`, so that an image of equal channels is embedded as before.
    """
    old = kernel.shape[2]
    if channels == old:
        return kernel.astype(np.float32)
    if channels == 1:
        return kernel.sum(axis=2, keepdims=True, dtype=np.float64).astype(np.float32)
    return (kernel[:, :, np.arange(channels) % old].astype(np.float64) * (old / channels)).astype(np.float32)


def _apply(down: np.ndarray, across: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Returns `down` times `image` `[h, w, ...]` times `across` transposed, `float64 [H, W, ...]`."""
    rows = np.tensordot(down, image.astype(np.float64), axes=1)
    return np.moveaxis(np.tensordot(across, rows, axes=(1, 1)), 0, 1)
