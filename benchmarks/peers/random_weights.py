"""Random weights that a tensor's name and shape determine, so that a test can make those of a peer again.

Raw words of PCG64, seeded by the checksum of the name, are added up to numbers that are nearly normal: NumPy keeps that
stream the same in all its versions, and sums of whole numbers are exact on every machine.

The sizes make mistakes visible. Norms have scales of 1 + 0.1 N(0, 1), LayerScale is far from both 0 and 1, and no bias
is zero. What a model adds to its tokens is small, so that the epsilon of a norm matters beside their variance: with
tokens of standard deviation 0.01, an epsilon of 1e-5 instead of 1e-6 changes what a norm returns by 4 %. The MLP's
hidden units are about -2, where GELU is small and its kinds differ by 1 % of it.
"""

import math
import re
import zlib

import numpy as np

NORM_SCALE = re.compile(r"(norm|\bln)[^./]*[./](weight|scale)$", re.IGNORECASE)
LAYER_SCALE = re.compile(r"(gamma|gamma_\d|lambda1)$")
BIAS = re.compile(r"bias$")
# Tokens and what is added to them: by tables, by the layer that embeds patches, by a block or the pooling.
TABLE = re.compile(
    r"(\bcls|_token|_tokens|class_embedding|latent|probe"
    r"|pos_embed|pos_embedding|position_embeddings|positional_embedding|position_embedding\.weight)$"
)
PATCH = re.compile(r"(patch_embed\.proj|patch_embeddings|\bprojection|patch_embedding|conv1|\bembedding)[./]\w+$")
BRANCH = re.compile(
    r"(attn\.proj|attn_pool\.proj|(attn|mlp)_out_proj|out_proj|o_proj|\boutput\.dense|fc2|w3|c_proj|down_proj|weights_out"
    r"|/out|/Dense_1)[./]\w+$"
)
DOWN = re.compile(
    r"(mlp_out_proj|(?<!attention\.)output\.dense|fc2|w3|c_proj|down_proj|weights_out|/Dense_1)[./](weight|kernel)$"
)
HIDDEN = re.compile(
    r"(mlp_bias|(fc1|fc1_\w|w1|w2|c_fc|up_proj|gate_proj|weights_in|intermediate\.dense|/Dense_0|in_proj)[./]\w+)$"
)
PERIODS = re.compile(r"rope_embed\.periods$")  # of rotated positions: no weights, and always these
HEAD = re.compile(r"(head|head_dist|classifier|\w+_classifier)[./]bias$")


def weight(name: str, shape: tuple[int, ...], embedding: float = 0.01, branch: float = 0.01) -> np.ndarray:
    """Returns the tensor of a name.

    Args:
      name: its name in the file of the peer, in the manner of PyTorch (a.b.weight) or Flax (a/b/kernel).
      shape: its shape there.
      embedding: standard deviation of what the embedding makes of each pixel and adds to it.
      branch: standard deviation of what a block adds to its tokens, roughly.

    Returns:
      float32 of this shape.
    """
    x = normal(name, shape)
    if PERIODS.search(name):
        return np.asarray(100 ** (np.arange(shape[0]) / shape[0]), np.float32)
    if not shape or NORM_SCALE.search(name):
        scaled = 1 + 0.1 * x
    elif LAYER_SCALE.search(name):
        scaled = 0.6 + 0.2 * x
    elif TABLE.search(name) or (PATCH.search(name) and BIAS.search(name)):
        scaled = embedding * x
    elif PATCH.search(name):
        scaled = embedding * x / math.sqrt(fan_in(name, shape))
    elif HEAD.search(name):
        scaled = branch * x  # beside features as small as what a pooling adds up
    elif BIAS.search(name):
        scaled = 0.3 * x - 2 if HIDDEN.search(name) else x * (branch / 2 if BRANCH.search(name) else 0.2)
    elif BRANCH.search(name):
        scaled = x * branch * (10 if DOWN.search(name) else 1) / math.sqrt(fan_in(name, shape))
    else:
        scaled = x * 1.2 / math.sqrt(fan_in(name, shape))
    return np.asarray(scaled, np.float32)


def fan_in(name: str, shape: tuple[int, ...]) -> int:
    """Returns how many inputs a layer's output adds up; the last dimensions of a Flax kernel [..., in, out] count."""
    if not name.endswith("kernel"):
        return math.prod(shape[1:])
    if name.endswith("embedding/kernel"):
        return math.prod(shape[:-1])
    if name.endswith("out/kernel"):
        return math.prod(shape[-3:-1])  # [heads, size, width]
    return shape[-3] if re.search(r"(query|key|value)/kernel$", name) else shape[-2]


def images(count: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    """Returns normalised images, float32 [count, height, width, channels]."""
    return normal("images", (count, height, width, channels)).astype(np.float32)


def normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns nearly normal numbers, float64: mean 0, variance 1, at most 3.5 away from 0."""
    words = np.random.PCG64(zlib.crc32(name.encode())).random_raw(math.prod(shape))
    shifts = np.array([[0], [16], [32], [48]], np.uint64)
    quarters = np.sum((words >> shifts) & np.uint64(0xFFFF), 0, dtype=np.float64)
    # A sum of four uniform numbers, each of 65536 values: mean 4 * 32767.5, variance (65536**2 - 1) / 3.
    return ((quarters - 4 * 32767.5) / math.sqrt((65536**2 - 1) / 3)).reshape(shape)
