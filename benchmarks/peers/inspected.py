"""Reads the keys of our config off the modules of timm's models; what it does not know, it reports as unsupported."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": nn.SiLU(),
}
KNOWN = set(  # kinds of modules
    "VisionTransformer Eva PatchEmbed Conv2d Dropout Linear Sequential ModuleList Block EvaBlock ParallelScalingBlock"
    " LayerNorm RmsNorm Attention EvaAttention AttentionRope Mlp GluMlp SwiGLU GELU GELUTanh QuickGELU SiLU LayerScale"
    " AttentionPoolLatent RotaryEmbeddingDinoV3 DropPath Identity".split()
)
PARAMETERS = "cls_token reg_token pos_embed patch_embed norm_pre blocks norm fc_norm attn_pool head".split()


def activation(layer: Callable) -> str:
    """Returns the name of an activation by its values; its own name if it is none of ours."""
    x = torch.linspace(-5, 5, 1001)
    y = layer(x)
    same = [name for name, function in ACTIVATIONS.items() if torch.allclose(y, function(x), rtol=0, atol=1e-6)]
    return same[0] if same else type(layer).__name__


def norm(layer: nn.Module) -> tuple[str, float]:
    """Returns the kind of a norm, by its values, and its epsilon."""
    x = torch.linspace(-1, 3, 8)[None]
    kinds = {
        "layernorm": (x - x.mean()) / torch.sqrt(x.var(correction=0) + layer.eps),
        "rmsnorm": x / torch.sqrt(x.square().mean() + layer.eps),
    }
    y = layer(x)
    same = [kind for kind, expected in kinds.items() if torch.allclose(y, expected, atol=1e-6)]
    return same[0] if same else type(layer).__name__, layer.eps


class Inspector:
    """Reads our keys off the modules of a model; what it does not know of is `unsupported`."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.unsupported: set[str] = set()
        self.keys: dict[str, Any] = {}
        self.norms: set[tuple[str, float]] = set()
        self.known: set[str] = set()
        self.inspect()

    def inspect(self) -> None:
        model, first = self.model, self.model.blocks[0]
        self.blocks(first)
        forms = {tuple((name, value.shape) for name, value in block.named_parameters()) for block in model.blocks}
        if len(forms) > 1:
            self.unsupported.add("blocks that differ")
        self.embedding()
        self.pooling()
        size = model.patch_embed.img_size
        self.keys |= {
            "depth": len(model.blocks),
            "width": model.embed_dim,
            "image_size": list(size),
            "patch_size": list(model.patch_embed.patch_size),
            "channels": model.patch_embed.proj.weight.shape[1],
            "num_classes": model.head.out_features if isinstance(model.head, nn.Linear) else 0,
        }
        if len(self.norms) == 1:
            ((self.keys["norm"], self.keys["norm_epsilon"]),) = self.norms
        else:
            self.unsupported.add("norms that differ")
        for module in model.modules():
            kind = type(module).__name__
            if kind not in KNOWN:
                self.unsupported.add(kind)
        for name, _ in model.named_parameters():
            if name.split(".")[0] not in PARAMETERS:
                self.unsupported.add(name.split(".")[0])

    def norm(self, module: nn.Module) -> bool:
        """Returns whether there is a norm; notes its kind and epsilon."""
        if isinstance(module, nn.Identity):
            return False
        # Its parameters have no memory, so a second one computes.
        self.norms.add(norm(type(module)(8, eps=module.eps)))
        return True

    def blocks(self, block: nn.Module) -> None:
        kind = type(block).__name__
        if kind not in ("Block", "EvaBlock", "ParallelScalingBlock"):
            self.unsupported.add(kind)
            return
        parallel = kind == "ParallelScalingBlock"
        attention = block if parallel else block.attn
        if parallel:
            self.norm(block.in_norm)
            act, hidden = block.mlp_act, block.in_split[0]
            projection, heads = block.attn_out_proj, block.num_heads
            qkv_bias = block.in_proj.bias is not None
            if projection is None:
                self.unsupported.add("fuse_out_proj")
                projection = block.out_proj
            scales = [getattr(block.ls, "gamma", None)] * 2
            width = block.in_norm.normalized_shape[0]
            gated = False
        else:
            self.norm(block.norm1)
            self.norm(block.norm2)
            mlp = block.mlp
            act, hidden, gated = mlp.act, mlp.fc2.in_features, type(mlp).__name__ in ("GluMlp", "SwiGLU")
            if getattr(mlp, "gate_last", False):
                self.unsupported.add("gate_last")
            if self.norm(mlp.norm):
                self.unsupported.add("norm inside the MLP")
            if self.norm(attention.norm):
                self.unsupported.add("norm of the attention's output")
            if getattr(attention, "gate", None) is not None:
                self.unsupported.add("gated attention")
            projection, heads = attention.proj, attention.num_heads
            qkv = attention.qkv if getattr(attention, "qkv", None) is not None else attention.q_proj
            qkv_bias = qkv.bias is not None or getattr(attention, "q_bias", None) is not None
            if kind == "Block":
                scales = [getattr(layer, "gamma", None) for layer in (block.ls1, block.ls2)]
            else:
                scales = [block.gamma_1, block.gamma_2]
            width = block.norm1.normalized_shape[0]
            if getattr(attention, "num_kv_heads", heads) not in (None, heads):
                self.unsupported.add("grouped-query attention")
        if attention.head_dim * heads != width:
            self.unsupported.add("attn_head_dim")
        if (scales[0] is None) != (scales[1] is None):
            self.unsupported.add("LayerScale on one branch")
        kind = activation(act)
        if gated and kind != "silu":
            self.unsupported.add(f"gate {kind}")
        elif not gated and kind not in ("gelu", "gelu_tanh", "quick_gelu"):
            self.unsupported.add(f"activation {kind}")
        qk_norm = self.norm(attention.q_norm)
        self.norm(attention.k_norm)
        self.keys |= {
            "mlp": hidden,
            "heads": heads,
            "activation": "swiglu" if gated else kind,
            "parallel": parallel,
            "qkv_bias": qkv_bias,
            "projection_bias": projection.bias is not None,
            "layer_scale": scales[0] is not None,
            "qk_norm": qk_norm,
            "qk_norm_bias": qk_norm and getattr(attention.q_norm, "bias", None) is not None,
        }

    def embedding(self) -> None:
        model = self.model
        before, patches = self.norm(model.norm_pre), self.norm(model.patch_embed.norm)
        if before and patches:
            self.unsupported.add("two embedding norms")
        rope = getattr(model, "rope", None)
        learned = model.pos_embed is not None
        if rope is not None and learned:
            self.unsupported.add("learned and rotated positions")
        self.keys["embedding_norm"] = "tokens" if before else "patches" if patches else "none"
        self.keys["position"] = "rope2d" if rope is not None else "learned" if learned else "none"
        if rope is not None and type(rope).__name__ == "RotaryEmbeddingDinoV3":
            self.keys["rope_base"] = float(rope.temperature)
            expected = (None, None, "separate", 0.0, "ij", True)
            if expected != (
                rope.min_period,
                rope.max_period,
                rope.normalize_coords,
                rope.grid_offset,
                rope.grid_indexing,
                rope.rotate_half,
            ):
                self.unsupported.add("kind of rotation")
        prefix = (model.cls_token is not None) + (0 if model.reg_token is None else model.reg_token.shape[1])
        own = learned and model.pos_embed.shape[1] == model.patch_embed.num_patches + prefix
        cls = model.cls_token is not None
        self.keys["class_token"] = cls
        self.keys["registers"] = prefix - cls  # whose positions can be added to the tokens themselves
        self.keys["cls_position"] = bool(cls and own)

    def pooling(self) -> None:
        model = self.model
        pools = {"token": "cls", "avg": "mean", "map": "map"}
        if model.global_pool not in pools:
            self.unsupported.add(f"global_pool {model.global_pool!r}")
        self.keys["pool"] = pools.get(model.global_pool)
        if getattr(model, "pool_include_prefix", False) and self.keys["registers"] and model.global_pool != "token":
            self.unsupported.add("pool_include_prefix")
        before, after = self.norm(model.norm), self.norm(model.fc_norm)
        self.keys["pool_norm"] = {(1, 0): "before", (0, 1): "after", (1, 1): "both", (0, 0): "none"}[before, after]
        if model.attn_pool is not None and type(model.attn_pool).__name__ == "AttentionPoolLatent":
            self.norm(model.attn_pool.norm)
            pool = model.attn_pool
            act = activation(pool.mlp.act)
            same = (pool.num_heads, pool.mlp.fc1.out_features, act)
            if same != (self.keys.get("heads"), self.keys.get("mlp"), self.keys.get("activation")):
                self.unsupported.add("a pooling whose heads, width or activation are not the blocks'")
