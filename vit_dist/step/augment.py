"""Augmentation on the device, inside the jitted step: warp, resize, mix, normalise.

Random numbers are drawn as global arrays under the mesh, so the augmentation of row i of the global batch depends on
the key and on i, never on the devices. Each device processes single images on the rows that it holds.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from vit_dist import config
from vit_dist.data.pictures import crop
from vit_dist.mesh import layout

Affine = tuple[jax.Array, jax.Array]
_AFFINE_DRAWS = 6  # random numbers of an image's affine map: angle, slant, zoom, two shifts, flip
_CROP_DRAWS = 2 * crop.TRIES + 2  # random numbers of an image's crop: area and aspect of each try, then its corner


def normalise(
    images: jax.Array, mean: float | tuple[float, ...], std: float | tuple[float, ...], dtype: str = "float32"
) -> jax.Array:
    """Returns (x / 255 - mean) / std.

    Args:
      images: [B, H, W, C] in 0..255, any dtype.
      mean: one number, or one for each channel.
      std: one number, or one for each channel.
      dtype: the result's; the arithmetic is in float32.

    Returns:
      [B, H, W, C] of `dtype`.
    """
    pixels = images.astype(jnp.float32) / 255.0
    return ((pixels - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)).astype(dtype)


def resize(images: jax.Array, size: tuple[int, int], interpolation: str) -> jax.Array:
    """Resizes images [B, H, W, C] to `size` (height, width), without a crop; float32, or unchanged if they have it.

    `interpolation` is "bilinear" or "bicubic", antialiased when shrinking.
    """
    if images.shape[1:3] == size:
        return images

    def resize_rows(rows: jax.Array) -> jax.Array:
        return jax.image.resize(rows.astype(jnp.float32), (rows.shape[0], *size, rows.shape[3]), interpolation)

    return _on_local_rows(resize_rows, images)


def warp(images: jax.Array, key: jax.Array, settings: config.Data) -> jax.Array:
    """Crops, flips, shifts, rotates, scales and shears each image of [B, H, W, C] at random; float32.

    Each image is sampled once, bilinearly, under one affine map. Outside the image the nearest edge pixel is taken.
    With every augmentation off the images are returned unchanged, in their own dtype, at no cost.
    """
    batch, height, width, _ = images.shape
    maps = draw(key, (batch, height, width), settings)
    return images if maps is None else sample(images, *maps)


def draw(key: jax.Array, shape: tuple[int, int, int], settings: config.Data) -> Affine | None:
    """Draws the affine maps of `warp`.

    A map goes from the output back to the input: it undoes the shift, then rotation, shear and scale about the centre,
    then the flip, and then moves into the crop box, which is stretched over the full output.

    Args:
      key: the randomness.
      shape: (B, H, W) of the batch.
      settings: which augmentations to apply, and how much.

    Returns:
      The arguments `matrix` [B, 2, 2] and `offset` [B, 2] of `sample`; None if every augmentation is off.
    """
    enabled = (settings.flip, settings.shift, settings.rotate, settings.scale, settings.shear)
    if settings.crop_area is None and not any(enabled):
        return None
    batch, height, width = shape
    # All random numbers come from one draw: XLA takes a tenth of a second to compile each draw.
    count = _AFFINE_DRAWS + (_CROP_DRAWS if settings.crop_area is not None else 0)
    drawn = jax.random.uniform(key, (count, batch), jnp.float32, out_sharding=layout.spec(None, "batch"))
    rows = iter(drawn[:_AFFINE_DRAWS])

    def uniform(low: float, high: float) -> jax.Array:
        return low + (high - low) * next(rows)

    angle = uniform(-1, 1) * jnp.deg2rad(settings.rotate)
    slant = jnp.tan(uniform(-1, 1) * jnp.deg2rad(settings.shear))
    zoom = jnp.exp(uniform(-1, 1) * jnp.log1p(settings.scale))
    shift_x, shift_y = uniform(-1, 1) * settings.shift * width, uniform(-1, 1) * settings.shift * height
    mirror = jnp.where(uniform(0, 1) < 0.5, -1.0, 1.0) if settings.flip else jnp.ones_like(angle)
    box_x, box_y = jnp.ones_like(angle), jnp.ones_like(angle)  # sides of the box over those of the image
    middle_x, middle_y = jnp.zeros_like(angle), jnp.zeros_like(angle)  # centre of the box, relative to the image's
    if settings.crop_area is not None:
        top, left, box_height, box_width = _random_crops(
            drawn[_AFFINE_DRAWS:], height, width, settings.crop_area, settings.crop_aspect
        )
        box_x, box_y = box_width / width, box_height / height
        middle_x, middle_y = left + (box_width - width) / 2, top + (box_height - height) / 2
    # x_in = a x + b y and y_in = c x + d y: rotation by -angle, shear along x, scale; then the flip and the box
    cos, sin = jnp.cos(angle) / zoom, jnp.sin(angle) / zoom
    a, b = (cos + slant * sin) * mirror * box_x, (sin - slant * cos) * mirror * box_x
    c, d = -sin * box_y, cos * box_y
    matrix = jnp.stack([jnp.stack([a, b], -1), jnp.stack([c, d], -1)], -2)
    offset = jnp.stack([middle_x - a * shift_x - b * shift_y, middle_y - c * shift_x - d * shift_y], -1)
    return matrix, offset


def _random_crops(
    draws: jax.Array, height: int, width: int, area: config.Interval, aspect: config.Interval
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Chooses a crop box for each image by the distribution of `crop.random_crop`.

    Args:
      draws: float32 [`_CROP_DRAWS`, B], uniform in [0, 1).
      height: of the images, in pixels.
      width: likewise.
      area: the range of the box's area over the image's.
      aspect: the range of the box's width over its height.

    Returns:
      Top, left, height and width of the boxes in whole pixels, float32 [B] each.
    """
    areas, ratios, corners = draws[: crop.TRIES], draws[crop.TRIES : 2 * crop.TRIES], draws[2 * crop.TRIES :]
    low, high = math.log(aspect[0]), math.log(aspect[1])
    areas = height * width * (area[0] + (area[1] - area[0]) * areas)
    ratios = jnp.exp(low + (high - low) * ratios)
    widths, heights = jnp.round(jnp.sqrt(areas * ratios)), jnp.round(jnp.sqrt(areas / ratios))
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits & (jnp.cumsum(fits, axis=0) == 1)
    _, _, largest_height, largest_width = crop.largest_box(height, width, aspect)
    any_fits = fits.any(axis=0)
    box_height = jnp.where(any_fits, jnp.sum(heights * first, axis=0), largest_height)
    box_width = jnp.where(any_fits, jnp.sum(widths * first, axis=0), largest_width)

    def start(corner: jax.Array, side: int, box_side: jax.Array) -> jax.Array:
        free = side - box_side
        return jnp.where(any_fits, jnp.minimum(jnp.floor(corner * (free + 1)), free), free // 2)

    return start(corners[0], height, box_height), start(corners[1], width, box_width), box_height, box_width


def sample(images: jax.Array, matrix: jax.Array, offset: jax.Array) -> jax.Array:
    """Samples images [B, H, W, C] bilinearly under affine maps: out(p) = in(matrix @ p + offset); float32.

    matrix [B, 2, 2] and offset [B, 2] act on p = (x, y) in pixels from the image's centre, x to the right and y down.
    """
    return _on_local_rows(_sample, images, matrix, offset)


def mix(
    images: jax.Array,
    targets: jax.Array,
    key: jax.Array,
    *,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    repeats: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Blends each example of the global batch with its partner (`partners`), and their targets likewise.

    Each step draws one lambda ~ Beta(alpha, alpha). Mixup (Zhang et al. 2018, arXiv:1710.09412) makes
    lambda * x + (1 - lambda) * partner. Cutmix (Yun et al. 2019, arXiv:1905.04899) takes from the partner a box with
    1 - lambda of the area, around a random point and cut at the image's edge; lambda is then set to the area that was
    kept. If both are above 0, each step applies one of them, either with probability 1/2.

    Args:
      images: [B, H, W, C]. Bytes are read as bytes, also where devices exchange them.
      targets: [B, C'].
      key: the randomness.
      mixup: mixup's alpha; 0 turns it off.
      cutmix: cutmix's alpha; 0 turns it off.
      repeats: how often in a row each example comes in the batch.

    Returns:
      Images, float32, and targets; unchanged if both are off.
    """
    if not mixup and not cutmix:
        return images, targets
    height, width = images.shape[1:3]
    kind_key, share_key, box_key = jax.random.split(key, 3)
    cut = jax.random.bernoulli(kind_key) if mixup and cutmix else bool(cutmix)
    alpha = jnp.where(cut, cutmix, mixup)
    share = symmetric_beta(share_key, alpha)
    # Both weight each pixel: cutmix by 1 outside the box and 0 inside, mixup by the same number everywhere.
    weights = jnp.where(cut, _outside_box(box_key, share, height, width), share)
    share = jnp.where(cut, weights.mean(), share)
    weights = weights[None, :, :, None]
    images = images * weights + _of_partners(images, repeats) * (1 - weights)
    return images, targets * share + _of_partners(targets, repeats) * (1 - share)


def symmetric_beta(key: jax.Array, alpha: jax.Array | float) -> jax.Array:
    """Draws a number of Beta(alpha, alpha), float32, from two uniform numbers.

    (1 + t / sqrt(2 alpha + t^2)) / 2 has this distribution if t has Student's with 2 alpha degrees of freedom, which
    Bailey 1994 ("Polar generation of random variates with the t-distribution") makes without rejecting a draw.
    `jax.random.beta` rejects some in a loop, and a GPU's host must wait for every turn of it before it goes on.
    """
    radius, turn = jax.random.uniform(key, (2,), jnp.float32)
    power, cosine = radius ** (1 / alpha), jnp.cos(2 * jnp.pi * turn)
    return jnp.clip((1 + cosine / jnp.sqrt(jnp.square(cosine) + power / (1 - power))) / 2, 0, 1)  # against rounding


def partners(batch: int, repeats: int) -> np.ndarray:
    """Returns the row of each row's partner in `mix`, int64 [B]: a swap of rows, by their position only.

    Partners are s rows apart, inside groups of 2s rows: row i < s of a group has row i + s. s is the smallest power of
    two that is at least `repeats`, so that no example meets its own repetition; and a device that holds a multiple of
    2s rows, as powers of two usually are, holds all partners of its rows. A last group of fewer rows is reversed; in it
    alone, repetitions may meet.
    """
    distance = _partner_distance(repeats)
    rows = np.arange(batch)
    grouped = batch - batch % (2 * distance)
    return np.concatenate([rows[:grouped] ^ distance, rows[grouped:][::-1]])


def partners_are_local(batch: int, repeats: int, devices: int) -> bool:
    """Returns whether each of so many devices, which share the rows of a batch, holds the partners of all its rows."""
    return batch % (2 * _partner_distance(repeats) * devices) == 0


def _partner_distance(repeats: int) -> int:
    return 1 << (repeats - 1).bit_length()


def _of_partners(array: jax.Array, repeats: int) -> jax.Array:
    """Returns [B, ...] with each row replaced by its partner's. Without communication if devices hold whole groups."""
    distance = _partner_distance(repeats)

    def swap(rows: jax.Array) -> jax.Array:
        return rows.reshape(-1, 2, distance, *rows.shape[1:])[:, ::-1].reshape(rows.shape)

    if partners_are_local(array.shape[0], repeats, layout.shard_count("batch")):
        return _on_local_rows(swap, array)
    return jnp.asarray(array).at[partners(array.shape[0], repeats)].get(out_sharding=layout.spec_of(array))


def _outside_box(key: jax.Array, share: jax.Array, height: int, width: int) -> jax.Array:
    """Returns float32 [H, W] that is 0 inside a random box and 1 outside.

    The box has the image's shape and, before the edges cut it, 1 - share of its area.
    """
    centre_y, centre_x = jax.random.uniform(key, (2,), jnp.float32) * jnp.asarray([height, width])

    def within(side: int, centre: jax.Array) -> jax.Array:
        half = side * jnp.sqrt(1 - share) / 2
        low, high = jnp.round(centre - half), jnp.round(centre + half)
        index = jnp.arange(side)
        return (index >= low) & (index < high)

    return 1.0 - (within(height, centre_y)[:, None] & within(width, centre_x)).astype(jnp.float32)


def _sample(images: jax.Array, matrix: jax.Array, offset: jax.Array) -> jax.Array:
    """Samples one device's rows by four gathers of pixels: 10 times as fast on a CPU as products with dense weights."""
    batch, height, width, channels = images.shape
    x = (jnp.arange(width) - (width - 1) / 2)[None, None, :]
    y = (jnp.arange(height) - (height - 1) / 2)[None, :, None]

    def neighbours(row: int, side: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns each output pixel's two neighbours along one axis of the input, and the second one's weight."""
        (a, b), move = matrix[:, row, :].T[:, :, None, None], offset[:, row, None, None]
        position = jnp.clip(a * x + b * y + move + (side - 1) / 2, 0, side - 1)
        first = jnp.floor(position).astype(jnp.int32)
        return first, jnp.minimum(first + 1, side - 1), (position - first)[..., None]

    (left, right, right_weight), (top, bottom, bottom_weight) = neighbours(0, width), neighbours(1, height)
    pixels = images.astype(jnp.float32).reshape(batch, height * width, channels)

    def gather(rows: jax.Array, columns: jax.Array) -> jax.Array:
        index = (rows * width + columns).reshape(batch, height * width, 1)
        return jnp.take_along_axis(pixels, index, axis=1, mode="clip").reshape(images.shape)

    upper = gather(top, left) * (1 - right_weight) + gather(top, right) * right_weight
    lower = gather(bottom, left) * (1 - right_weight) + gather(bottom, right) * right_weight
    return upper * (1 - bottom_weight) + lower * bottom_weight


def _on_local_rows(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """Calls a function of arrays split alike along their first axis, on each device with the rows that it holds."""
    rows = layout.spec_of(arrays[0], 1)
    return function(*arrays) if rows is None else jax.shard_map(function, in_specs=rows, out_specs=rows)(*arrays)
