"""The numbers of a Vision Transformer: sizes from the config, with those of the named variant filled in and checked."""

import dataclasses

from vit_dist import config
from vit_dist.config import ConfigError, pair
from vit_dist.model import variants
from vit_dist.schema import nearest_multiples


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
    class_token: bool
    registers: int
    pooled: int  # width of what is pooled

    @property
    def special(self) -> int:
        """Number of tokens before the patches: the class token, then registers."""
        return self.class_token + self.registers

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
            raise ConfigError(
                f"model.{name}: not set; set it, or model.variant to a name such as B/16, or init.weights to weights"
            )
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
    if model.position == "rope2d" and numbers["width"] // numbers["heads"] % 4:
        raise ConfigError(
            f"model.heads: {numbers['heads']} of {numbers['width'] // numbers['heads']} channels each, which must "
            "divide by 4 for model.position=rope2d"
        )
    pools_class_token = model.pool in ("cls", "cls_mean")
    class_token = pools_class_token if model.class_token is None else model.class_token
    if pools_class_token and not class_token:
        raise ConfigError(f"model.class_token: false, but model.pool={model.pool} takes it; set pool=mean or map")
    return Shape(
        **numbers,
        image=image,
        patch=patches,
        channels=model.channels,
        classes=model.num_classes,
        class_token=class_token,
        registers=model.registers,
        pooled=numbers["width"] * (2 if model.pool == "cls_mean" else 1),
    )
