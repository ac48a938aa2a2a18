"""What is done to images inside the jitted step: normalise, resize, warp, mix.

Every random number is drawn as one global array under the mesh, so what happens to row i of the global batch depends
on the key and on i, never on the devices (law 1). Work on single images is done by each device on its own rows.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vit_dist import config
from vit_dist.data.pictures import crop
from vit_dist.mesh import layout

Affine = tuple[jax.Array, jax.Array]
_AFFINE_DRAWS = 6  # numbers that an image's map takes: angle, slant, zoom, two shifts, flip
_CROP_DRAWS = 2 * crop.TRIES + 2  # and those that its crop takes: area and aspect of each try, then where it lies


def normalise(
    images: jax.Array, mean: float | tuple[float, ...], std: float | tuple[float, ...], dtype: str = "float32"
) -> jax.Array:
    """(x / 255 - mean) / std of images [B, H, W, C] in 0..255, of any dtype; mean, std: one number or one a channel."""
    pixels = images.astype(jnp.float32) / 255.0
    return ((pixels - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)).astype(dtype)


def resize(images: jax.Array, size: tuple[int, int], interpolation: str) -> jax.Array:
    """The whole of each image [B, H, W, C] at `size` (height, width); float.

    `interpolation` is "bilinear" or "bicubic", antialiased when shrinking.
    """
    if images.shape[1:3] == size:
        return images.astype(jnp.float32)

    def of_own(own: jax.Array) -> jax.Array:
        return jax.image.resize(own.astype(jnp.float32), (own.shape[0], *size, own.shape[3]), interpolation)

    return _on_own_rows(of_own, images)


def warp(images: jax.Array, key: jax.Array, settings: config.Data) -> jax.Array:
    """Each image [B, H, W, C] under its own random crop, flip, shift, rotation, scale and shear; float32.

    All of it is one affine map and one bilinear sampling. Where the map looks outside the image it sees the nearest
    edge. With all of it off, the images come back as they are, at no cost.
    """
    batch, height, width, _ = images.shape
    drawn = draw(key, (batch, height, width), settings)
    return images.astype(jnp.float32) if drawn is None else sample(images, *drawn)


def draw(key: jax.Array, shape: tuple[int, int, int], settings: config.Data) -> Affine | None:
    """The maps that `warp` applies to a batch of `shape` (B, H, W), as `sample` takes them; None: nothing is asked.

    From the output back to the input: undo the shift, then rotation, shear and scale about the centre, then the flip,
    then look into the crop box, which is stretched over the whole output.
    """
    asked = (settings.flip, settings.shift, settings.rotate, settings.scale, settings.shear)
    if settings.crop_area is None and not any(asked):
        return None
    batch, height, width = shape
    # One draw of all that is random: XLA takes a tenth of a second to compile each draw.
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
    box_x, box_y = jnp.ones_like(angle), jnp.ones_like(angle)  # the box's sides, as shares of the image's
    middle_x, middle_y = jnp.zeros_like(angle), jnp.zeros_like(angle)  # its centre, from the image's
    if settings.crop_area is not None:
        boxes = _random_crops(drawn[_AFFINE_DRAWS:], height, width, settings.crop_area, settings.crop_aspect)
        top, left, box_height, box_width = boxes
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
    """A box for each image by the law of `crop.random_crop`: top, left, height and width in whole pixels, float32 [B].

    draws: float32 [`_CROP_DRAWS`, B], even in [0, 1).
    """
    areas, ratios, places = draws[: crop.TRIES], draws[crop.TRIES : 2 * crop.TRIES], draws[2 * crop.TRIES :]
    low, high = math.log(aspect[0]), math.log(aspect[1])
    areas = height * width * (area[0] + (area[1] - area[0]) * areas)
    ratios = jnp.exp(low + (high - low) * ratios)
    widths, heights = jnp.round(jnp.sqrt(areas * ratios)), jnp.round(jnp.sqrt(areas / ratios))
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits & (jnp.cumsum(fits, axis=0) == 1)
    _, _, largest_height, largest_width = crop.largest_box(height, width, aspect)
    found = fits.any(axis=0)
    box_height = jnp.where(found, jnp.sum(heights * first, axis=0), largest_height)
    box_width = jnp.where(found, jnp.sum(widths * first, axis=0), largest_width)

    def start(place: jax.Array, side: int, box_side: jax.Array) -> jax.Array:
        free = side - box_side
        return jnp.where(found, jnp.minimum(jnp.floor(place * (free + 1)), free), free // 2)

    return start(places[0], height, box_height), start(places[1], width, box_width), box_height, box_width


def sample(images: jax.Array, matrix: jax.Array, offset: jax.Array) -> jax.Array:
    """Images [B, H, W, C] read, bilinearly, where an affine map says: out(p) = in(matrix @ p + offset); float32.

    matrix [B, 2, 2] and offset [B, 2] act on p = (x, y) in pixels from the image's centre, x to the right and y down.
    """
    return _on_own_rows(_sample, images, matrix, offset)


def mix(
    images: jax.Array, targets: jax.Array, key: jax.Array, *, mixup: float = 0.0, cutmix: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Each example of the global batch blended with the one at the mirrored place, and its target likewise.

    images [B, H, W, C], targets [B, C']. One lambda ~ Beta(alpha, alpha) a step. Mixup (Zhang et al. 2018,
    arXiv:1710.09412): lambda * x + (1 - lambda) * partner. Cutmix (Yun et al. 2019, arXiv:1905.04899): a box of 1 -
    lambda of the area, around a point anywhere and cut at the image's edge, comes from the partner; lambda is then set
    to the area that was kept. With both above 0 one is taken at a time, each in half of the steps; with neither
    everything comes back as it is.
    """
    if not mixup and not cutmix:
        return images, targets
    height, width = images.shape[1:3]
    which, draw_share, place = jax.random.split(key, 3)
    cut = jax.random.bernoulli(which) if mixup and cutmix else bool(cutmix)
    alpha = jnp.where(cut, cutmix, mixup)
    share = jax.random.beta(draw_share, alpha, alpha, dtype=jnp.float32)
    # Both are a weight for each pixel: 1 outside the box and 0 in it, or the same number everywhere.
    weights = jnp.where(cut, _outside_box(place, share, height, width), share)
    share = jnp.where(cut, weights.mean(), share)
    weights = weights[None, :, :, None]
    mixed = images * weights + images[::-1] * (1 - weights)
    return mixed.astype(images.dtype), targets * share + targets[::-1] * (1 - share)


def _outside_box(key: jax.Array, share: jax.Array, height: int, width: int) -> jax.Array:
    """[H, W] float32: 0 in a box of the image's shape, 1 - share of its area before the edges cut it; 1 around it."""
    centre_y, centre_x = jax.random.uniform(key, (2,), jnp.float32) * jnp.asarray([height, width])

    def within(side: int, centre: jax.Array) -> jax.Array:
        half = side * jnp.sqrt(1 - share) / 2
        low, high = jnp.round(centre - half), jnp.round(centre + half)
        index = jnp.arange(side)
        return (index >= low) & (index < high)

    return 1.0 - (within(height, centre_y)[:, None] & within(width, centre_x)).astype(jnp.float32)


def _sample(images: jax.Array, matrix: jax.Array, offset: jax.Array) -> jax.Array:
    """`sample` of one device's rows. Four gathers of whole pixels: 10 times as fast on a CPU as dense hat weights."""
    batch, height, width, channels = images.shape
    x = (jnp.arange(width) - (width - 1) / 2)[None, None, :]
    y = (jnp.arange(height) - (height - 1) / 2)[None, :, None]

    def read(row: int, side: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of each output pixel: the two neighbours along one side of the input, and how far on the second is."""
        (a, b), move = matrix[:, row, :].T[:, :, None, None], offset[:, row, None, None]
        place = jnp.clip(a * x + b * y + move + (side - 1) / 2, 0, side - 1)
        first = jnp.floor(place).astype(jnp.int32)
        return first, jnp.minimum(first + 1, side - 1), (place - first)[..., None]

    (left, right, far_x), (top, bottom, far_y) = read(0, width), read(1, height)
    pixels = images.astype(jnp.float32).reshape(batch, height * width, channels)

    def tap(rows: jax.Array, columns: jax.Array) -> jax.Array:
        index = (rows * width + columns).reshape(batch, height * width, 1)
        return jnp.take_along_axis(pixels, index, axis=1, mode="clip").reshape(images.shape)

    upper = tap(top, left) * (1 - far_x) + tap(top, right) * far_x
    lower = tap(bottom, left) * (1 - far_x) + tap(bottom, right) * far_x
    return upper * (1 - far_y) + lower * far_y


def _on_own_rows(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """`function` of arrays whose first axis is the batch, called by each device on the rows it holds."""
    rows = layout.spec("batch")
    return function(*arrays) if rows is None else jax.shard_map(function, in_specs=rows, out_specs=rows)(*arrays)
