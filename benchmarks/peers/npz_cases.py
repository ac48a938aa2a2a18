"""Files as google-research's big_vision and vision_transformer write them, without either library.

The names and shapes are those of their parameter trees. What the names mean is said by timm, whose `load_pretrained`
reads such files into a model of its own; only the kind of GELU is set here, as both libraries use Flax's default, the
approximation by tanh. Arrays of bfloat16 are stored as NumPy stores what it does not know, as two void bytes; timm is
given the same numbers in float32.
"""

import functools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

from peers import random_weights
from peers.case import Case, Outputs
from peers.timm_cases import outputs

WIDTH, DEPTH, HEADS, HIDDEN, PATCH, GRID, CLASSES = 64, 3, 4, 128, 16, 3, 10
REPRESENTATION = 32
Shapes = dict[str, tuple[int, ...]]


def attention(path: str) -> Shapes:
    size = WIDTH // HEADS
    shapes: Shapes = {}
    for name in ("query", "key", "value"):
        shapes |= {f"{path}/{name}/kernel": (WIDTH, HEADS, size), f"{path}/{name}/bias": (HEADS, size)}
    return shapes | {f"{path}/out/kernel": (HEADS, size, WIDTH), f"{path}/out/bias": (WIDTH,)}


def mlp(path: str) -> Shapes:
    return dense(f"{path}/Dense_0", WIDTH, HIDDEN) | dense(f"{path}/Dense_1", HIDDEN, WIDTH)


def dense(path: str, inputs: int, outputs: int) -> Shapes:
    return {f"{path}/kernel": (inputs, outputs), f"{path}/bias": (outputs,)}


def norm(path: str) -> Shapes:
    return {f"{path}/scale": (WIDTH,), f"{path}/bias": (WIDTH,)}


def block(path: str, numbers: tuple[int, int, int]) -> Shapes:
    """Returns the arrays of a block; `numbers` are those in the names of its attention, second norm and MLP."""
    heads, second, hidden = numbers
    return (
        norm(f"{path}/LayerNorm_0")
        | attention(f"{path}/MultiHeadDotProductAttention_{heads}")
        | norm(f"{path}/LayerNorm_{second}")
        | mlp(f"{path}/MlpBlock_{hidden}")
    )


def embedding() -> Shapes:
    return {"embedding/kernel": (PATCH, PATCH, 3, WIDTH), "embedding/bias": (WIDTH,)}


def vision_transformer(pre_logits: bool = False) -> Shapes:
    """Returns the arrays of vision_transformer's ViT with a class token, as AugReg's.

    `pre_logits`: with a layer before the head, as the older files of ImageNet-21k have it.
    """
    shapes = embedding() | {
        "cls": (1, 1, WIDTH),
        "Transformer/posembed_input/pos_embedding": (1, GRID**2 + 1, WIDTH),
    }
    for index in range(DEPTH):
        shapes |= block(f"Transformer/encoderblock_{index}", (1, 2, 3))
    shapes |= norm("Transformer/encoder_norm")
    if pre_logits:
        shapes |= dense("pre_logits", WIDTH, REPRESENTATION)
    return shapes | dense("head", REPRESENTATION if pre_logits else WIDTH, CLASSES)


def checkpoint(shapes: Shapes, parameters: str, state: str) -> Shapes:
    """Returns the arrays of a checkpoint of training; some of what its optimizer keeps is under `state`."""
    kept = {f"{state}{name}": shape for name, shape in shapes.items() if name.startswith("embedding/")}
    return {f"{parameters}{name}": shape for name, shape in shapes.items()} | kept


def big_vision(
    pool: str, stacked: bool = False, head: bool = True, prefix: str = "params/", positions: bool = True
) -> Shapes:
    """Returns the arrays of big_vision's ViT.

    `stacked`: blocks are one loop, their arrays have a leading axis. `positions`: they are learned.
    """
    shapes = embedding() | ({"pos_embedding": (1, GRID**2, WIDTH)} if positions else {})
    if pool == "tok":
        shapes["cls"] = (1, 1, WIDTH)
    if stacked:
        rows = block("Transformer/encoderblock", (0, 1, 0))
        shapes |= {name: (DEPTH, *shape) for name, shape in rows.items()}
    else:
        for index in range(DEPTH):
            shapes |= block(f"Transformer/encoderblock_{index}", (0, 1, 0))
    shapes |= norm("Transformer/encoder_norm")
    if pool == "map":
        shapes |= {"MAPHead_0/probe": (1, 1, WIDTH)} | norm("MAPHead_0/LayerNorm_0") | mlp("MAPHead_0/MlpBlock_0")
        shapes |= attention("MAPHead_0/MultiHeadDotProductAttention_0")
    if head:
        shapes |= dense("head", WIDTH, CLASSES)
    shapes = {prefix + name: shape for name, shape in shapes.items()}
    if prefix == "params/img/":  # an image and text model, such as SigLIP
        shapes |= {"params/t": (1,), "params/b": (1,), "params/txt/head/kernel": (8, WIDTH)}
    return shapes


TIMM_ARGUMENTS: dict[str, dict[str, Any]] = {
    "tok": {"no_embed_class": True},
    "gap": {"global_pool": "avg", "class_token": False, "fc_norm": False},
    "map": {"global_pool": "map", "class_token": False},
    "vision_transformer": {},
}
# name of the fixture: (key of TIMM_ARGUMENTS, arrays, whether they are bfloat16)
CASES: dict[str, tuple[str, Shapes, bool]] = {
    "npz_augreg": ("vision_transformer", vision_transformer(), False),
    "npz_augreg_in21k": ("vision_transformer", vision_transformer(pre_logits=True), False),
    "npz_augreg_checkpoint": (
        "vision_transformer",
        checkpoint(vision_transformer(), "opt/target/", "opt/state/param_states/"),
        False,
    ),
    "npz_big_vision_checkpoint": ("gap", checkpoint(big_vision("gap", prefix=""), "params/", "opt/0/mu/"), False),
    "npz_big_vision_map": ("map", big_vision("map"), False),
    "npz_big_vision_sincos": ("map", big_vision("map", prefix="", positions=False), False),
    "npz_big_vision_gap": ("gap", big_vision("gap"), False),
    "npz_big_vision_tok_stacked": ("tok", big_vision("tok", stacked=True), False),
    "npz_big_vision_siglip_bf16": ("map", big_vision("map", head=False, prefix="params/img/"), True),
    "npz_big_vision_map_stacked_bf16": ("map", big_vision("map", stacked=True), True),
}


def golden() -> Iterator[Case]:
    """Yields the files of both libraries."""
    for name, (kind, shapes, half) in CASES.items():
        classes = CLASSES if any(path.endswith("head/kernel") and "txt" not in path for path in shapes) else 0
        classifies_twice = "pre_logits/kernel" in shapes
        further = "; pre_logits and head by PyTorch" if classifies_twice else ""
        further += "" if any("pos_embedding" in path for path in shapes) else "; positions by NumPy"
        yield Case(
            name,
            f"timm {timm.__version__}, its reader of .npz with act_layer='gelu_tanh'{further}",
            (GRID * PATCH, GRID * PATCH, 3),
            functools.partial(save, shapes, half),
            functools.partial(load, kind, 0 if classifies_twice else classes),
            further_outputs if classifies_twice else outputs,
            config="",
            weights="model.npz",
        )


def save(shapes: Shapes, half: bool, folder: pathlib.Path) -> None:
    """Writes the random weights themselves: no library of theirs is here to write a file first."""
    arrays: dict[str, Any] = {name: random_weights.weight(name, shape) for name, shape in shapes.items()}
    if half:
        rounded = {name: torch.from_numpy(array).to(torch.bfloat16) for name, array in arrays.items()}
        plain: dict[str, Any] = {name: tensor.to(torch.float32).numpy() for name, tensor in rounded.items()}
        np.savez(folder / "float32.npz", **plain)
        arrays = {name: tensor.view(torch.int16).numpy().view("V2") for name, tensor in rounded.items()}
    np.savez(folder / "model.npz", **arrays)


def load(kind: str, classes: int, folder: pathlib.Path) -> nn.Module:
    model = timm.create_model(
        "vit_base_patch16_224",
        img_size=GRID * PATCH,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        mlp_ratio=HIDDEN / WIDTH,
        num_classes=classes,
        act_layer="gelu_tanh",
        **TIMM_ARGUMENTS[kind],
    )
    for parameter in model.parameters():  # what the file does not set would show
        torch.nn.init.constant_(parameter, torch.nan)
    plain = folder / "float32.npz"
    file = plain if plain.exists() else folder / "model.npz"
    with np.load(file) as arrays:
        if not any("pos_embedding" in name for name in arrays):
            file = folder / "with_positions.npz"
            np.savez(file, **arrays, pos_embedding=computed_positions())
    model.load_pretrained(str(file))
    with np.load(file) as arrays:
        if "pre_logits/kernel" in arrays:
            model.further = nn.ModuleDict({name: linear(arrays, name) for name in ("pre_logits", "head")})
    return model


def computed_positions() -> np.ndarray:
    """Returns the positions that big_vision computes where it learns none, which timm knows only as learned."""
    rates = 10_000 ** -np.linspace(0, 1, WIDTH // 4)
    rows, columns = np.divmod(np.arange(GRID**2), GRID)
    x, y = np.outer(columns, rates), np.outer(rows, rates)
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], 1)[None].astype(np.float32)


def linear(arrays: Mapping[str, np.ndarray], path: str) -> nn.Linear:
    """Returns a layer of a file; timm has dropped `pre_logits`, and with it reads no head of another width."""
    kernel, bias = (torch.from_numpy(arrays[f"{path}/{kind}"]) for kind in ("kernel", "bias"))
    layer = nn.Linear(*kernel.shape)
    layer.weight.copy_(kernel.T)
    layer.bias.copy_(bias)
    return layer


def further_outputs(model: Any, images: torch.Tensor) -> Outputs:
    """Returns the outputs where a layer with tanh stands before the head."""
    features = torch.tanh(model.further["pre_logits"](outputs(model, images)["features"]))
    return {"logits": model.further["head"](features), "features": features}
