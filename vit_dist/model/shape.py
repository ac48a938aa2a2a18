"""The numbers of a Vision Transformer: sizes from the config, with those of the named variant filled in and checked."""

import dataclasses

from vit_dist import config
from vit_dist.config import ConfigError, nearest_multiples, pair
from vit_dist.model import variants


@dataclasses.dataclass(frozen=True)
class Shape:
    """The numbers of one Vision Transformer, with every default filled in."""

    width: int
    depth: int
    mlp: int
    heads: int
    activation: str
    parallel: bool
    qk_norm: bool
    image: tuple[int, int]
    patch: tuple[int, int]
    channels: int
    classes: int
    special: int  # tokens before the patches: the class token, then registers

    @property
    def grid(self) -> tuple[int, int]:
        """Number of patches down and across."""
        return self.image[0] // self.patch[0], self.image[1] // self.patch[1]

    @property
    def patches(self) -> int:
        """Number of patches of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Number of tokens of an image: special ones and patches."""
        return self.special + self.patches


def shape_of(model: config.Model) -> Shape:
    """Fills in the variant's numbers and checks that they fit each other; raises `ConfigError`."""
    variant, patch = variants.parse(model.variant) if model.variant else (None, None)
    numbers = {}
    for name in ("width", "depth", "mlp", "heads", "activation", "parallel", "qk_norm"):
        configured = getattr(model, name)
        numbers[name] = configured if configured is not None else getattr(variant or variants.PLAIN, name)
        if numbers[name] is None:
            raise ConfigError(f"model.{name}: not set; set it, or model.variant to a name such as B/16")
    size = model.patch_size if model.patch_size is not None else patch
    if size is None:
        raise ConfigError("model.patch_size: not set; set it, or model.variant to a name such as B/16")
    if model.num_classes is None:
        raise ConfigError("model.num_classes: not set")
    image, patches = pair(model.image_size), pair(size)
    for side, extent, divisor in zip(("height", "width"), image, patches, strict=True):
        if extent % divisor:
            near = nearest_multiples(extent, divisor)
            raise ConfigError(
                f"model.image_size: {side} {extent} is not a multiple of the patch's {divisor}; take {near}"
            )
    if numbers["width"] % numbers["heads"]:
        near = nearest_multiples(numbers["width"], numbers["heads"])
        raise ConfigError(f"model.width: {numbers['width']} does not divide by {numbers['heads']} heads; take {near}")
    if model.position == "sincos2d" and numbers["width"] % 4:
        raise ConfigError(f"model.width: {numbers['width']} must divide by 4 for model.position=sincos2d")
    numbers |= {"channels": model.channels, "classes": model.num_classes}
    special = (model.pool == "cls") + model.registers
    return Shape(**numbers, image=image, patch=patches, special=special)
