"""A Vision Transformer and a step of its training in NumPy float64, written from the papers: the judge of ours.

It uses nothing of vit_dist, jax, flax or optax. Parameters have the names that ours have, and those of the blocks are
stacked, so that the two can be laid side by side. Random numbers are not drawn here: dropout is off, and how a batch
is mixed is an argument.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from tape import Value, concatenate, error_function, exp, gradients, log, tanh, value

Flat = dict[str, np.ndarray]  # by path, such as "blocks/mlp/up/kernel"
Tree = dict[str, Any]


def nested(flat: Mapping[str, Any]) -> Tree:
    """The tree whose leaves have these paths."""
    tree: Tree = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def flattened(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """The leaves by path."""
    flat = {}
    for name, item in tree.items():
        flat |= flattened(item, f"{prefix}{name}/") if isinstance(item, dict) else {f"{prefix}{name}": item}
    return flat


# The model: Dosovitskiy et al. 2021, arXiv:2010.11929, equations 1 to 4, and the variations of our `config.Model`.


DEFAULTS = {
    "pool": "cls", "pool_norm": "before", "position": "learned", "cls_position": True, "class_token": None,
    "registers": 0, "parallel": False, "norm": "layernorm", "norm_epsilon": 1e-6, "embedding_norm": "none",
    "rope_base": 100.0,
}  # fmt: skip


def logits(model: Mapping[str, Any], parameters: Mapping[str, Any], images: np.ndarray) -> Value:
    """[B, H, W, C], normalised -> [B, classes], without dropout.

    model: keys of `config.Model` that parameters alone do not tell; parameters: by path, arrays or values.
    """
    model = DEFAULTS | model
    pools_class = model["pool"] in ("cls", "cls_mean")
    model["class_token"] = pools_class if model["class_token"] is None else model["class_token"]
    before = model["class_token"] + model["registers"]
    p = nested({path: value(leaf) for path, leaf in parameters.items()})
    x = _encoded(model, p, images)[-1]
    if model["pool_norm"] in ("before", "both"):
        x = _norm(model, p["norm"], x)
    if model["pool"] == "map":
        x = _attention_pool(model, p["pool"], x[:, before:])
    else:
        parts = [x[:, 0]] if pools_class else []
        parts += [x[:, before:].mean(1)] if model["pool"] != "cls" else []
        x = concatenate(parts, axis=1)
    if model["pool_norm"] in ("after", "both"):
        x = _norm(model, p["pooled_norm"], x)
    if "output_projection" in p:  # Radford et al. 2021, arXiv:2103.00020
        x = _linear(p["output_projection"], x)
    if "pre_logits" in p:
        x = tanh(_linear(p["pre_logits"], x))
    return _linear(p["head"], x) if "head" in p else x


def inside(
    model: Mapping[str, Any], parameters: Mapping[str, Any], images: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The tokens that each block puts out, normed as the model's last are, and the attention weights of each.

    They are [B, N, D] and [B, H, N, N]; arguments are those of `logits`, of a model that has no attention pooling.
    """
    model = DEFAULTS | model
    model["class_token"] = (
        model["pool"] in ("cls", "cls_mean") if model["class_token"] is None else model["class_token"]
    )
    p = nested({path: value(leaf) for path, leaf in parameters.items()})
    weights: list[np.ndarray] = []
    tokens = _encoded(model, p, images, weights)
    return [(_norm(model, p["norm"], x) if "norm" in p else x).data for x in tokens], weights


def _encoded(
    model: Mapping[str, Any], p: Tree, images: np.ndarray, weights: list[np.ndarray] | None = None
) -> list[Value]:
    """The tokens that each block puts out; `weights` gets those of attention."""
    x, depth, found = _tokens(model, p, images), len(p["blocks"]["norm1"]["scale"].data), []
    for i in range(depth):
        block = nested({path: leaf[i] for path, leaf in flattened(p["blocks"]).items()})
        if weights is not None:
            q, k, _ = _queries_keys_values(model, block["attention"], _norm(model, block["norm1"], x))
            weights.append(_weights(q, k).data)
        x = _block(model, block, x)
        found.append(x)
    return found


def _tokens(model: Mapping[str, Any], p: Tree, images: np.ndarray) -> Value:
    """The class token, registers, and patches row by row."""
    batch, height, width = images.shape[:3]
    high, wide = np.broadcast_to(model["patch_size"], 2)
    rows, columns = height // high, width // wide
    corners = [(high * row, wide * column) for row in range(rows) for column in range(columns)]
    patches = [images[:, y : y + high, x : x + wide].reshape(batch, -1) for y, x in corners]
    x = _linear(p["patch"], value(np.stack(patches, axis=1)))
    if model["embedding_norm"] == "patches":
        x = _norm(model, p["embedding_norm"], x)
    position = value(np.zeros((rows * columns, x.shape[-1])))
    if model["position"] == "learned":
        position = p["position"]
    elif model["position"] == "sincos2d":
        position = value(_sines(rows, columns, x.shape[-1]))
    x = x + position[len(position.data) - rows * columns :]
    lead = []
    if model["class_token"]:
        has_own = model["position"] == "learned" and model["cls_position"]
        lead.append((p["cls"] + position[0] if has_own else p["cls"]).reshape(1, 1, -1))
    if model["registers"]:
        lead.append(p["registers"].reshape(1, model["registers"], -1))
    x = concatenate([token + np.zeros((batch, 1, 1)) for token in lead] + [x], axis=1)
    return _norm(model, p["embedding_norm"], x) if model["embedding_norm"] == "tokens" else x


def _sines(rows: int, columns: int, width: int) -> np.ndarray:
    """Chen et al. 2021, arXiv:2104.02057, with the wave numbers of Beyer et al. 2022, arXiv:2205.01580."""
    waves = 1 / 10_000 ** (np.arange(width // 4) / (width // 4 - 1))
    y, x = np.divmod(np.arange(rows * columns), columns)
    y, x = np.outer(y, waves), np.outer(x, waves)
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)


def _angles(model: Mapping[str, Any], rows: int, columns: int, size: int) -> np.ndarray:
    """[P, size / 2]: 2 pi times the patch's centre in (-1, 1) over each period, first down, then across (DINOv3)."""
    periods = [model["rope_base"] ** (i / (size // 4)) for i in range(size // 4)]
    angles = [
        [2 * math.pi * centre / period for centre in (2 * (y + 0.5) / rows - 1, 2 * (x + 0.5) / columns - 1)
         for period in periods]
        for y in range(rows) for x in range(columns)
    ]  # fmt: skip
    return np.array(angles)


def _turned(model: Mapping[str, Any], x: Value) -> Value:
    """The patches among the tokens of x [B, H, N, d], turned: channels i and i + d / 2 are a point of the plane."""
    height, width = np.broadcast_to(model["image_size"], 2) // np.broadcast_to(model["patch_size"], 2)
    angles, before = _angles(model, height, width, x.shape[-1]), model["class_token"] + model["registers"]
    still, patches, half = x[:, :, :before], x[:, :, before:], x.shape[-1] // 2
    first, second = patches[..., :half], patches[..., half:]
    cosine, sine = np.cos(angles), np.sin(angles)
    patches = concatenate([first * cosine - second * sine, first * sine + second * cosine], axis=-1)
    return concatenate([still, patches], axis=2)


def _block(model: Mapping[str, Any], p: Tree, x: Value) -> Value:
    first = p["scale1"]["scale"] if "scale1" in p else 1.0
    second = p["scale2"]["scale"] if "scale2" in p else 1.0
    if model["parallel"]:  # Dehghani et al. 2023, arXiv:2302.05442
        h = _norm(model, p["norm1"], x)
        return x + _self_attention(model, p["attention"], h) * first + _mlp(model, p["mlp"], h) * second
    x = x + _self_attention(model, p["attention"], _norm(model, p["norm1"], x)) * first
    return x + _mlp(model, p["mlp"], _norm(model, p["norm2"], x)) * second


def _linear(p: Tree, x: Value) -> Value:
    y = x @ p["kernel"].reshape(x.shape[-1], -1)
    return y + p["bias"].reshape(-1) if "bias" in p else y


def _norm(model: Mapping[str, Any], p: Tree, x: Value) -> Value:
    """Ba et al. 2016, arXiv:1607.06450; Zhang and Sennrich 2019, arXiv:1910.07467."""
    centred = x - x.mean(-1, keepdims=True) if model["norm"] == "layernorm" else x
    variance = (centred * centred).mean(-1, keepdims=True)
    return centred * (variance + model["norm_epsilon"]) ** -0.5 * p["scale"] + p.get("bias", 0.0)


def _mlp(model: Mapping[str, Any], p: Tree, x: Value) -> Value:
    up = _linear(p["up"], x)
    if model["activation"] == "swiglu":  # Shazeer 2020, arXiv:2002.05202
        gate = _linear(p["gate"], x)
        return _linear(p["down"], gate / (1.0 + exp(-gate)) * up)
    if model["activation"] == "quick_gelu":
        return _linear(p["down"], up / (1.0 + exp(up * -1.702)))
    if model["activation"] == "gelu":  # Hendrycks and Gimpel 2016, arXiv:1606.08415, and its approximation
        return _linear(p["down"], up * (1.0 + error_function(up * math.sqrt(0.5))) * 0.5)
    return _linear(p["down"], up * (1.0 + tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3))) * 0.5)


def _self_attention(model: Mapping[str, Any], p: Tree, x: Value) -> Value:
    return _linear(p["projection"], _attention(*_queries_keys_values(model, p, x)))


def _queries_keys_values(model: Mapping[str, Any], p: Tree, x: Value) -> tuple[Value, Value, Value]:
    q, k, v = (_by_head(part, model["heads"]) for part in _parted(_linear(p["qkv"], x), 3))
    if "query_norm" in p:
        q, k = _norm(model, p["query_norm"], q), _norm(model, p["key_norm"], k)
    if model["position"] == "rope2d":
        q, k = _turned(model, q), _turned(model, k)
    return q, k, v


def _attention(q: Value, k: Value, v: Value) -> Value:
    """Vaswani et al. 2017, arXiv:1706.03762: [B, H, N, d] -> [B, N, H d]."""
    return (_weights(q, k) @ v).transpose(0, 2, 1, 3).reshape(q.shape[0], q.shape[2], -1)


def _weights(q: Value, k: Value) -> Value:
    scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(q.shape[-1])
    weights = exp(scores - scores.data.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _attention_pool(model: Mapping[str, Any], p: Tree, x: Value) -> Value:
    """Zhai et al. 2022, arXiv:2106.04560."""
    probe = p["probe"].reshape(1, 1, -1) + np.zeros((x.shape[0], 1, 1))
    k, v = (_by_head(part, model["heads"]) for part in _parted(_linear(p["key_value"], x), 2))
    y = _linear(p["projection"], _attention(_by_head(_linear(p["query"], probe), model["heads"]), k, v))
    return (y + _mlp(model, p["mlp"], _norm(model, p["norm"], y)))[:, 0]


def _parted(x: Value, count: int) -> list[Value]:
    size = x.shape[-1] // count
    return [x[..., size * i : size * (i + 1)] for i in range(count)]


def _by_head(x: Value, heads: int) -> Value:
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads).transpose(0, 2, 1, 3)


# The loss of each example, of logits and targets [B, C].


def softmax_loss(x: Value, targets: np.ndarray) -> Value:
    """-sum_c t_c log softmax(x)_c."""
    x = x - x.data.max(-1, keepdims=True)
    return -((x - log(exp(x).sum(-1, keepdims=True))) * targets).sum(-1)


def sigmoid_loss(x: Value, targets: np.ndarray) -> Value:
    """-sum_c t_c log s(x_c) + (1 - t_c) log(1 - s(x_c)), where s(x) = 1 / (1 + exp(-x))."""
    chance = 1.0 / (1.0 + exp(-x))
    return -(log(chance) * targets + log(1.0 - chance) * (1.0 - targets)).sum(-1)


LOSSES = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}


# The step.


def resized(images: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """[B, h, w, C] -> [B, *size, C]; antialiased: the kernel is as wide as the step between new pixels, if they shrink.

    Bicubic: Keys 1981, with a = -1/2.
    """

    def kernel(x: np.ndarray) -> np.ndarray:
        if interpolation == "bilinear":
            return np.maximum(0, 1 - x)
        near, far = 1 - 2.5 * x**2 + 1.5 * x**3, 2 - 4 * x + 2.5 * x**2 - 0.5 * x**3
        return np.where(x < 1, near, np.where(x < 2, far, 0))

    def weights(old: int, new: int) -> np.ndarray:
        """[new, old]: of each new pixel the shares of the old ones."""
        places = (np.arange(new)[:, None] + 0.5) * old / new - 0.5
        shares = kernel(np.abs(np.arange(old) - places) / max(1, old / new))
        return shares / shares.sum(axis=1, keepdims=True)

    height, width = images.shape[1:3]
    return np.einsum("ij,bjkc,lk->bilc", weights(height, size[0]), images, weights(width, size[1]))


@dataclasses.dataclass
class State:
    """AdamW's (Loshchilov and Hutter 2019, arXiv:1711.05101) and a moving average of the parameters."""

    parameters: Flat
    average: Flat
    step: int = 0
    first: Flat = dataclasses.field(default_factory=dict)  # moments of the gradient
    second: Flat = dataclasses.field(default_factory=dict)


def gradient_of(settings: Any, parameters: Flat, images: np.ndarray, targets: np.ndarray) -> tuple[Flat, float]:
    """The gradient of the batch's mean loss, and that loss; over micro-batches of the rows i, i + count, ..."""
    total, loss = {path: np.zeros(leaf.shape) for path, leaf in parameters.items()}, 0.0
    model = dataclasses.asdict(settings.model)
    for first in range(settings.accumulate_steps):
        rows = slice(first, None, settings.accumulate_steps)
        own = {path: value(leaf) for path, leaf in parameters.items()}
        part = LOSSES[settings.loss](logits(model, own, images[rows]), targets[rows]).sum() / len(images)
        loss += float(part.data)
        for path, gradient in zip(own, gradients(part, list(own.values())), strict=True):
            total[path] += gradient
    return total, loss


def train_step(
    settings: Any, steps: int, state: State, pixels: np.ndarray, labels: np.ndarray, weights: np.ndarray
) -> tuple[State, dict[str, float]]:
    """The state after one step, and what the step measured.

    Args:
      settings: a `config.Config`, read for its numbers alone; of the optimizer `adamw` with the schedule `cosine`.
      steps: of the whole run.
      pixels: `uint8 [B, h, w, C]`. labels: `[B]`.
      weights: `[H, W]`, as large as the model takes images: what each pixel keeps of its own image; the rest is that
        of the partner's.
    """
    asked, classes = settings.optimizer, settings.model.num_classes
    images = (
        resized(pixels, weights.shape, settings.data.interpolation) / 255 - settings.data.mean
    ) / settings.data.std
    targets = np.eye(classes)[labels]
    partner = [_partner_of(row, len(images), settings.data.repeats) for row in range(len(images))]
    images = images * weights[:, :, None] + images[partner] * (1 - weights[:, :, None])
    targets = targets * weights.mean() + targets[partner] * (1 - weights.mean())
    if settings.binarize_targets:  # Wightman et al. 2021, arXiv:2110.00476
        targets = (targets > 0).astype(np.float64)
    targets = targets * (1 - settings.label_smoothing) + settings.label_smoothing / classes

    gradient, loss = gradient_of(settings, state.parameters, images, targets)
    rules = {path: _rule_of(path, asked.rules) for path in gradient}
    gradient = {path: leaf for path, leaf in gradient.items() if not rules[path]["frozen"]}
    norm = _norm_of(gradient)
    if asked.clip is not None and norm > asked.clip:
        gradient = {path: leaf * asked.clip / norm for path, leaf in gradient.items()}

    if state.step < asked.warmup_steps:
        rate = asked.learning_rate * (state.step + 1) / asked.warmup_steps
    else:
        share = (state.step - asked.warmup_steps) / (steps - asked.warmup_steps)
        height = (1 + math.cos(math.pi * share)) / 2  # Loshchilov and Hutter 2017, arXiv:1608.03983
        rate = asked.learning_rate * (asked.end_factor + (1 - asked.end_factor) * height)

    new = State(parameters={}, average={}, step=state.step + 1)
    keep = min(settings.ema_decay, (1 + state.step) / (10 + state.step))
    for path in gradient:
        new.first[path] = asked.b1 * state.first.get(path, 0.0) + (1 - asked.b1) * gradient[path]
        new.second[path] = asked.b2 * state.second.get(path, 0.0) + (1 - asked.b2) * gradient[path] ** 2
        mean, square = new.first[path] / (1 - asked.b1**new.step), new.second[path] / (1 - asked.b2**new.step)
        direction = mean / (np.sqrt(square) + asked.eps)
        decay = asked.weight_decay * rules[path]["weight_decay"] * state.parameters[path]
        own = rate * rules[path]["learning_rate"] * _layer_factor(path, state.parameters[path], settings)
        new.parameters[path] = state.parameters[path] - own * (direction + decay)
    for path, old in state.parameters.items():
        new.parameters.setdefault(path, old)
        # That of a frozen parameter is the parameter from the start on, and nothing is computed.
        moved = keep * state.average[path] + (1 - keep) * new.parameters[path]
        new.average[path] = moved if path in gradient else state.average[path]
    param_norm = _norm_of({path: new.parameters[path] for path in gradient})
    return new, {"loss": loss, "learning_rate": rate, "grad_norm": norm, "param_norm": param_norm}


def _layer_factor(path: str, stacked: np.ndarray, settings: Any) -> Any:
    """By how much the rate of a layer is lower than the head's: BEiT numbers embedding, blocks and head 0 to L + 1."""
    depth, decay = settings.model.depth, settings.optimizer.layer_decay
    if path.startswith("blocks/"):
        layers = np.arange(1, depth + 1).reshape(depth, *[1] * (stacked.ndim - 1))
    else:
        layers = 0 if path.split("/")[0] in ("patch", "cls", "position") else depth + 1
    return decay ** (depth + 1 - layers)


def _partner_of(row: int, count: int, repeats: int) -> int:
    """Of the row of a batch: a power of two away, within the pair of runs of that length; a last group is mirrored."""
    distance = next(2**power for power in range(count + repeats) if 2**power >= repeats)
    start = row // (2 * distance) * (2 * distance)
    if start + 2 * distance > count:
        return start + count - 1 - row
    return row + distance if row < start + distance else row - distance


def _rule_of(path: str, rules: Any) -> dict[str, Any]:
    """The first that matches; decay is for kernels where none says otherwise."""
    rule = next((dataclasses.asdict(rule) for rule in rules if re.search(rule.path, path)), {})
    rule = {"learning_rate": 1.0, "weight_decay": None, "frozen": False} | rule
    if rule["weight_decay"] is None:
        rule["weight_decay"] = float(path.endswith("kernel"))
    return rule


def _norm_of(tree: Flat) -> float:
    return math.sqrt(sum(float(np.square(leaf).sum()) for leaf in tree.values()))
