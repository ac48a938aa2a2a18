"""The published sizes of Vision Transformers by name; a name such as `B/16` also gives the patch size."""

import dataclasses

from vit_dist.config import ConfigError
from vit_dist.schema import near_miss


@dataclasses.dataclass(frozen=True)
class Variant:
    """The numbers of a named size; the last three are defaults for keys that the config leaves unset."""

    width: int | None = None
    depth: int | None = None
    mlp: int | None = None
    heads: int | None = None
    activation: str = "gelu"
    parallel: bool = False
    qk_norm: bool = False


PLAIN = Variant()  # for a config that gives the four numbers itself

# B, L, H: Dosovitskiy et al. 2021 (arXiv:2010.11929); Ti, S: Touvron et al. 2021 (arXiv:2012.12877); g, G: Zhai et al.
# 2022 (arXiv:2106.04560); e: Chen et al. 2023 (arXiv:2209.06794); So400m: Alabdulmohsin et al. 2023 (arXiv:2305.13035);
# mu, M and the -opt shapes: big_vision, g-opt in SigLIP 2 (arXiv:2502.14786); 22B: Dehghani et al. 2023
# (arXiv:2302.05442); giant2: Oquab et al. 2023 (arXiv:2304.07193), whose gated MLP of nominal size 6144 has 4096 units;
# S+, H+, 7B: Siméoni et al. 2025, DINOv3 (arXiv:2508.10104).
VARIANTS: dict[str, Variant] = {
    "mu": Variant(32, 1, 128, 2),
    "Ti": Variant(192, 12, 768, 3),
    "S": Variant(384, 12, 1536, 6),
    "S+": Variant(384, 12, 1536, 6, activation="swiglu"),
    "M": Variant(512, 12, 2048, 8),
    "B": Variant(768, 12, 3072, 12),
    "L": Variant(1024, 24, 4096, 16),
    "So400m": Variant(1152, 27, 4304, 16),
    "H": Variant(1280, 32, 5120, 16),
    "H+": Variant(1280, 32, 5120, 20, activation="swiglu"),
    "g": Variant(1408, 40, 6144, 16),
    "g-opt": Variant(1536, 40, 6144, 16),
    "G": Variant(1664, 48, 8192, 16),
    "G-opt": Variant(1536, 48, 8192, 16),
    "e": Variant(1792, 56, 15360, 16),
    "7B": Variant(4096, 40, 8192, 32, activation="swiglu"),
    "22B": Variant(6144, 48, 24576, 48, parallel=True, qk_norm=True),
    "giant2": Variant(1536, 40, 4096, 24, activation="swiglu"),
}


def parse(name: str) -> tuple[Variant, int]:
    """Returns the variant and the patch size of a name: (`VARIANTS["B"]`, 16) for "B/16".

    Raises `ConfigError` for an unknown size or a missing patch size.
    """
    size, slash, patch = name.partition("/")
    if size not in VARIANTS:
        known = f"{', '.join(VARIANTS)}{near_miss(size, VARIANTS)}"
        raise ConfigError(f"model.variant: {size!r} is none of {known}; write size and patch like B/16")
    if not slash or not patch.isdigit() or int(patch) == 0:
        raise ConfigError(f"model.variant: {name!r} names no patch size; write it like {size}/16")
    return VARIANTS[size], int(patch)
