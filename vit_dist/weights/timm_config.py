"""The config.json that timm needs to be a model of ours: the way back of `timm_architectures`.

Every architecture is tried with the arguments that its own differ by from ours, and what the reader makes of that is
compared with our model. So a row of the table and the reader decide, and nothing is said twice.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from vit_dist.config import ConfigError
from vit_dist.weights.timm_architectures import POOLS, arguments, model_keys, table

Traits = Mapping[str, Any]
_USUAL = "vit_base_patch16_224"  # of equally good architectures, the one that is taken
_PASSES = 3  # an argument may change what another one means, as the width does for the ratio of the MLP
# Keys that both classes have the same argument for.
_SAME = {
    "width": "embed_dim", "depth": "depth", "heads": "num_heads", "channels": "in_chans",
    "num_classes": "num_classes", "qkv_bias": "qkv_bias", "qk_norm": "qk_norm", "class_token": "class_token",
}  # fmt: skip
_PLAIN_ONLY = {"registers": "reg_tokens", "projection_bias": "proj_bias"}
_EVA_ONLY = {"registers": "num_reg_tokens", "rope_base": "rope_temperature"}


def architecture_of(traits: Traits) -> dict[str, Any]:
    """Returns `architecture` and `model_args` of the model that is nearest to ours: in most cases, ours.

    Args:
      traits: the keys of our model, all that are set.
    """
    candidates = [
        candidate
        for cls, rows in table()["architectures"].items()
        for name in rows
        if name not in table()["unsupported"] and (candidate := _fitted(cls, name, traits)) is not None
    ]

    def rank(candidate: dict[str, Any]) -> tuple:
        name = candidate["architecture"]
        wrong = differing(model_keys(candidate), traits)
        return len(wrong), name.startswith("test_"), len(candidate["model_args"]), name != _USUAL, name[:4] != "vit_"

    best = min(candidates, key=rank)
    keys, given = model_keys(best), best["model_args"]
    for argument in list(given):  # the first pass sets what a later one may make superfluous
        fewer = {**best, "model_args": {name: value for name, value in given.items() if name != argument}}
        if _same_keys(fewer, keys):
            best, given = fewer, fewer["model_args"]
    return best


def _same_keys(config: Mapping[str, Any], keys: Traits) -> bool:
    """Returns whether a config has these keys; one that our model cannot be has not."""
    try:
        return model_keys(config) == keys
    except ConfigError:
        return False


def differing(keys: Traits, traits: Traits) -> list[str]:
    """Returns the keys of which `traits`, those of our model, have another value that changes what it computes."""
    return [key for key, value in keys.items() if _value(key, value, keys) != _value(key, traits[key], traits)]


def _value(key: str, value: Any, traits: Traits) -> Any:
    if key == "layer_scale":
        return value is not None
    if key == "qk_norm_bias":
        return bool(traits["qk_norm"] and value)
    if key == "cls_position":
        return bool(traits["class_token"] and traits["position"] == "learned" and value)
    if key == "rope_base":
        return value if traits["position"] == "rope2d" else None
    return tuple(value) if isinstance(value, list) else value


def _fitted(cls: str, name: str, traits: Traits) -> dict[str, Any] | None:
    """Returns an architecture with the arguments that bring it as near to our model as they can; None: it has none."""
    config: dict[str, Any] = {"architecture": name, "model_args": {}}
    try:
        for _ in range(_PASSES):
            own = arguments(config)[1]
            for key in differing(model_keys(config), traits):
                config["model_args"] |= _argument(cls, key, traits, own)
        model_keys(config)
    except ConfigError:  # such as an activation that its MLP does not have
        return None
    return config


def _argument(cls: str, key: str, traits: Traits, own: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a class that make it have a trait; none, if there are none that do.

    Args:
      cls: the class.
      key: the trait's.
      traits: of our model.
      own: the arguments so far.
    """
    same = _SAME | (_EVA_ONLY if cls == "Eva" else _PLAIN_ONLY)
    if key in same:
        return {same[key]: traits[key]}
    makers = _MAKERS | (_OF_EVA if cls == "Eva" else _OF_PLAIN)
    return makers[key](traits, own) if key in makers else {}


def _pool(traits: Traits, own: Mapping[str, Any]) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in POOLS.items()}
    return {"global_pool": names[traits["pool"]]} if traits["pool"] in names else {}


def _norm(traits: Traits, own: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the norm by its name, which has one epsilon; another one is that of an architecture alone."""
    known = [traits["norm"], traits["norm_epsilon"]]
    return {"norm_layer": traits["norm"]} if table()["layers"]["norm_layer"][traits["norm"]] == known else {}


def _ratio(traits: Traits, own: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the ratio of which timm makes the number of hidden units, rounded down."""
    hidden = traits["mlp"] * (2 if own.get("mlp_layer") == "GluMlp" else 1)
    exact, whole = hidden / traits["width"], hidden // traits["width"]
    ratio = whole if whole * traits["width"] == hidden else exact
    if int(traits["width"] * ratio) != hidden:
        ratio = (hidden + 0.5) / traits["width"]
    step = own.get("swiglu_align_to")
    return {"mlp_ratio": ratio} | ({"swiglu_align_to": 0} if step and hidden % step else {})


def _norms(final: str, after: str, traits: Traits, own: Mapping[str, Any]) -> dict[str, Any]:
    before, behind = (traits["pool_norm"] in (one, "both") for one in ("before", "after"))
    if final == "final_norm":  # it is there if one of both is
        return {"final_norm": before or behind, "fc_norm": behind}
    return {final: before, after: behind}


def _embedding_norm(traits: Traits, own: Mapping[str, Any]) -> dict[str, Any]:
    kind = traits["embedding_norm"]
    named = {"embed_norm_layer": traits["norm"]} if kind == "patches" else {}
    return {"pre_norm": kind == "tokens"} | named


_Maker = Callable[[Traits, Mapping[str, Any]], dict[str, Any]]
_MAKERS: dict[str, _Maker] = {
    "image_size": lambda traits, own: {"img_size": list(traits["image_size"])},
    "patch_size": lambda traits, own: {"patch_size": _side(traits["patch_size"])},
    "pool": _pool,
    "norm": _norm,
    "norm_epsilon": _norm,
    "mlp": _ratio,
    "cls_position": lambda traits, own: {"no_embed_class": not traits["cls_position"]},
    "layer_scale": lambda traits, own: {"init_values": None if traits["layer_scale"] is None else 1e-5},
}
_OF_PLAIN: dict[str, _Maker] = {
    "position": lambda traits, own: {"pos_embed": "none" if traits["position"] == "none" else "learn"},
    "pool_norm": functools.partial(_norms, "final_norm", "fc_norm"),
    "embedding_norm": _embedding_norm,
    "activation": lambda traits, own: {} if traits["activation"] == "swiglu" else {"act_layer": traits["activation"]},
}
_OF_EVA: dict[str, _Maker] = {
    "pool_norm": functools.partial(_norms, "use_post_transformer_norm", "use_fc_norm"),
    "embedding_norm": lambda traits, own: {"use_pre_transformer_norm": traits["embedding_norm"] == "tokens"},
    "activation": lambda traits, own: {"swiglu_mlp": traits["activation"] == "swiglu"},
}


def _side(sides: tuple[int, int]) -> Any:
    return sides[0] if sides[0] == sides[1] else list(sides)
