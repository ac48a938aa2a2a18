"""timm: plain ViTs, DeiT-III, DINOv2 and 3, SigLIP, CLIP, AIMv2, as its `VisionTransformer` and `Eva` name them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_dist.weights.description import Description, Draft, Subject
from vit_dist.weights.naming import Entry, Naming, Part
from vit_dist.weights.origin import Origin
from vit_dist.weights.prepared import timm_cfg
from vit_dist.weights.preprocessing import from_timm
from vit_dist.weights.said import Said
from vit_dist.weights.stored_tensor import stubs
from vit_dist.weights.timm_architectures import arguments, model_keys
from vit_dist.weights.timm_config import architecture_of
from vit_dist.weights.traits import full_traits_of

_MAP: dict[str, Entry] = {
    "pool/probe": "attn_pool.latent",
    "pool/query": "attn_pool.q.{}",
    "pool/key_value": (Part("attn_pool.kv.{}", 0, 1, 2), Part("attn_pool.kv.{}", 1, 2, 2)),
    "pool/projection": "attn_pool.proj.{}",
    "pool/norm": "attn_pool.norm.{}",
    "pool/mlp/up": "attn_pool.mlp.fc1.{}",
    "pool/mlp/down": "attn_pool.mlp.fc2.{}",
}

_MLP = ("gate", "up", "down")


def recognises(origin: Origin) -> bool:
    """Returns whether timm wrote these files."""
    return "architecture" in (origin.config or {})


def describe(origin: Origin) -> Description:
    """Returns the model that timm's config.json names; raises `ConfigError` for one that ours cannot be."""
    config = origin.config
    assert config is not None
    source = str(origin.folder / "config.json")
    model, names = model_keys(config, source), origin.tensors
    cfg = config.get("pretrained_cfg", config)
    classes = _classes(config, source) or (_classes(cfg, source) if isinstance(cfg, Mapping) else None)
    return Description(
        "timm",
        model,
        Naming(_parallel(model, names) if model["parallel"] else _table(model, names)),
        lambda given: from_timm(cfg, source, given),
        position="pos_embed" if model["position"] == "learned" else None,
        cls="cls_token" if model["class_token"] else None,
        registers=("reg_token",) if model["registers"] else (),
        classes=classes,
    )


def draft(subject: Subject) -> Draft:
    """Returns the files of the model of timm that is nearest to ours."""
    config = architecture_of(full_traits_of(subject.model))
    cls, given = arguments(config)
    if cls == "Eva" and subject.has_key_biases():
        config["model_args"]["attn_type"] = "rope"  # whose keys have one
        cls, given = arguments(config)
    classes = given["num_classes"]
    config |= {"num_classes": classes, "num_features": given["embed_dim"], "global_pool": given["global_pool"]}
    if subject.classes and classes:
        config["label_names"] = list(subject.classes)
    config["pretrained_cfg"] = timm_cfg(subject) | {"num_classes": classes}
    tokens = given["num_reg_tokens" if cls == "Eva" else "reg_tokens"] + given["class_token"]
    origin = Origin(
        stubs(dict.fromkeys(_markers(cls, given), ())), {"config.json": config}, (Path("model.safetensors"),)
    )
    return Draft(describe(origin), origin.configs, before=0 if given["no_embed_class"] else tokens)


def _markers(cls: str, given: Mapping[str, Any]) -> list[str]:
    """Returns names that tell which of several ways of naming a class with these arguments has; see `_table`."""
    names = []
    if cls == "Eva":
        names += ["blocks.0.gamma_1"]
        names += ["blocks.0.attn.q_bias"] if given["qkv_bias"] and given["attn_type"] != "rope" else []
    if given.get("mlp_layer") == "SwiGLU" or given.get("swiglu_mlp"):
        names += ["blocks.0.mlp.fc1_g.weight"]
    if given.get("block_fn") == "ParallelScalingBlock" and not given["qkv_bias"]:
        names += ["blocks.0.mlp_bias"]
    return names


def _any(names: Mapping[str, Any], *ends: str) -> bool:
    """Returns whether the tensors of some block end so."""
    return any(name.startswith("blocks.") and name.endswith(ends) for name in names)


def _classes(config: Mapping[str, Any], source: str) -> tuple[str, ...] | None:
    """Returns `label_names`, a list, or names by number; timm writes them at the top of its file."""
    labels = config.get("label_names")
    if isinstance(labels, Mapping):
        labels = [labels.get(str(number)) for number in range(len(labels))]
        return None if None in labels else tuple(map(str, labels))
    return Said(config, source).read("label_names", tuple[str, ...], "init.head=new") if labels else None


def _ends(model: Mapping[str, Any]) -> dict[str, Entry]:
    """Returns what stands before and after the blocks."""
    before = model["pool_norm"] in ("before", "both")
    # timm's convolution has no bias where a norm of all tokens follows.
    bias = None if model["embedding_norm"] == "tokens" else "patch_embed.proj.bias"
    return {
        "patch": "patch_embed.proj.{}",
        "patch/bias": bias,
        "embedding_norm": "norm_pre.{}" if model["embedding_norm"] == "tokens" else "patch_embed.norm.{}",
        "norm": "norm.{}" if before else None,
        "pooled_norm": "fc_norm.{}",
        "head": "head.{}",
        **_MAP,
    }


def _table(model: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Entry]:
    """Returns the table of a model whose blocks attend first."""
    qkv = tuple(Part("blocks.#.attn.qkv.{}", i, i + 1, 3) for i in range(3))
    own_biases = _any(names, ".attn.q_bias", ".attn.v_bias")  # of queries and values; keys have none
    joined = not _any(names, ".mlp.fc1_g.weight", ".mlp.fc1_x.weight")  # gate and value are two halves of one tensor
    halves = (Part("blocks.#.mlp.fc1.{}", 0, 1, 2), Part("blocks.#.mlp.fc1.{}", 1, 2, 2))
    gate, up = halves if joined else ("blocks.#.mlp.fc1_g.{}", "blocks.#.mlp.fc1_x.{}")
    old = _any(names, ".gamma_1", ".gamma_2")
    # timm's `proj_bias` is that of the MLP too; ours has biases, of zero.
    without: dict[str, Entry] = {} if model["projection_bias"] else {f"mlp/{name}/bias": None for name in _MLP}
    return _ends(model) | {
        "norm1": "blocks.#.norm1.{}",
        "norm2": "blocks.#.norm2.{}",
        "attention/qkv": qkv,
        "attention/qkv/bias": ("blocks.#.attn.q_bias", None, "blocks.#.attn.v_bias") if own_biases else qkv,
        "attention/query_norm": "blocks.#.attn.q_norm.{}",
        "attention/key_norm": "blocks.#.attn.k_norm.{}",
        "attention/projection": "blocks.#.attn.proj.{}",
        "mlp/gate": gate,
        "mlp/up": up if model["activation"] == "swiglu" else "blocks.#.mlp.fc1.{}",
        "mlp/down": "blocks.#.mlp.fc2.{}",
        "scale1": "blocks.#.gamma_1" if old else "blocks.#.ls1.gamma",
        "scale2": "blocks.#.gamma_2" if old else "blocks.#.ls2.gamma",
        **without,
    }


def _parallel(model: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Entry]:
    """Returns the table of a model whose MLP stands beside attention, with one product before both."""
    width, mlp = model["width"], model["mlp"]
    rows = mlp + 3 * width
    qkv = tuple(Part("blocks.#.in_proj.{}", mlp + i * width, mlp + (i + 1) * width, rows) for i in range(3))
    bias: Entry = "blocks.#.mlp_bias" if _any(names, ".mlp_bias") else Part("blocks.#.in_proj.bias", 0, mlp, rows)
    return _ends(model) | {
        "norm1": "blocks.#.in_norm.{}",
        "attention/qkv": qkv,
        "attention/query_norm": "blocks.#.q_norm.{}",
        "attention/key_norm": "blocks.#.k_norm.{}",
        "attention/projection": "blocks.#.attn_out_proj.{}",
        "mlp/up": Part("blocks.#.in_proj.{}", 0, mlp, rows),
        "mlp/up/bias": bias,
        "mlp/down": "blocks.#.mlp_out_proj.{}",
        "scale1": "blocks.#.ls.gamma",  # of the sum of both branches
        "scale2": "blocks.#.ls.gamma",
    }
