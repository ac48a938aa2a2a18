"""timm's ViT trained in PyTorch, eager or compiled, for `step.py`: the model, batch and optimizer of the config.

It runs on the GPU that PyTorch sees, else on the CPU with all cores, as one device. The step is that of a visit to a
GPU (`visit/peer.py`). PyTorch keeps both moments in float32, whatever `optimizer.moment_dtype` is.
"""

import contextlib
import importlib.util
from typing import Any

import numpy as np
from linen_baseline import Sizes, Update
from visit import peer

from vit_dist.config import ConfigError

INSTALL = "python -m pip install torch timm torchvision"


class Trainer:
    """Trains repeatedly on a single batch, which stays on the device."""

    def __init__(
        self,
        sizes: Sizes,
        update: Update,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        compiled: bool,
    ):
        """Builds the model; images are uint8 [B, H, W, C], labels int32 [B], and `compiled`: by `torch.compile`.

        Raises `ConfigError` where torch or timm is not installed.
        """
        check_installed()
        import torch

        self.name = "timm compiled" if compiled else "timm"
        self._on_gpu = torch.cuda.is_available()
        device = "cuda" if self._on_gpu else "cpu"
        torch.manual_seed(0)
        self.model = peer.prepare(make_model(sizes, images.shape[1:3], images.shape[3]), device)
        if update.adam:
            settings: dict[str, Any] = {"betas": (update.b1, update.b2), "eps": update.eps}
            optimizer = peer.adamw(self.model, lr=update.rate, weight_decay=update.decay, **settings)
        else:
            optimizer = torch.optim.SGD(self.model.parameters(), lr=update.rate, fused=True)
        self._step = peer.make_step(
            torch.compile(self.model) if compiled else self.model,
            optimizer,
            torch.from_numpy(np.moveaxis(images, 3, 1)),
            torch.from_numpy(labels.astype(np.int64)),
            device,
            dtype=str(np.dtype(sizes.dtype)),
            mean=mean,
            std=std,
            clip=update.clip,
        )
        self._loss: Any = None

    def in_use(self) -> contextlib.AbstractContextManager:
        """Returns the context in which to call the steps."""
        return contextlib.nullcontext()

    def step(self) -> None:
        """Dispatches one step, which a CPU finishes before it returns."""
        self._loss = self._step()

    def block(self) -> float:
        """Waits for all steps; returns the loss of the last."""
        return float(self._loss)

    def parameters(self) -> int:
        """Returns the number of parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def check_installed() -> None:
    """Raises `ConfigError` where torch or timm is not installed."""
    for name in ("torch", "timm"):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"--peer: timm needs {name}, which is not installed; run {INSTALL}, or take another peer")


def make_model(sizes: Sizes, image: tuple[int, ...], channels: int) -> Any:
    """Returns timm's model of these sizes.

    Raises `ConfigError` for what it has not: fixed positions, and a class token without a position.
    """
    import functools

    import torch
    from timm.models.vision_transformer import VisionTransformer

    if sizes.position != "learned" or (sizes.pool == "cls" and not sizes.cls_position):
        raise ConfigError("--peer: timm's model has learned positions alone, one of them the class token's")
    gelu = functools.partial(torch.nn.GELU, approximate="tanh" if sizes.tanh_gelu else "none")
    model = VisionTransformer(
        img_size=image,
        patch_size=sizes.patch,
        in_chans=channels,
        num_classes=sizes.classes,
        global_pool="token" if sizes.pool == "cls" else "avg",
        class_token=sizes.pool == "cls",
        fc_norm=False,  # the norm comes before the mean, as in ours
        embed_dim=sizes.width,
        depth=sizes.depth,
        num_heads=sizes.heads,
        mlp_ratio=sizes.hidden / sizes.width,
        qkv_bias=sizes.attention_bias,
        pos_drop_rate=sizes.embedding_dropout,
        proj_drop_rate=sizes.dropout,
        attn_drop_rate=sizes.attention_dropout,
        act_layer=gelu,
    )
    for block in model.blocks:
        block.attn.proj_drop.p = sizes.projection_dropout
        if not sizes.attention_bias:
            block.attn.proj.bias = None  # timm's own option also takes the MLP's biases
    return model
