"""timm's ViT trained the way it is done in PyTorch, beside which ours is timed: the same model, batch and optimizer.

`torch.compile`, autocast to bf16 over float32 parameters, channels-last, fused AdamW with decay on matrices alone,
TF32 where float32 is left. The batch is uint8 in device memory, and made into normalised floats within the step, as
ours is.
"""

import importlib.util
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

from visit.job import Job, Skipped


def run(job: Job) -> None:
    """Keeps a step's time over several rounds, that of the first one, and the memory that PyTorch took."""
    for name in ("torch", "timm"):
        if importlib.util.find_spec(name) is None:
            raise Skipped(f"{name} is not installed")
    import torch

    told = job.arguments
    if not job.dry_run and not torch.cuda.is_available():
        raise RuntimeError("PyTorch sees no GPU")
    device, synchronize = ("cpu", _nothing) if job.dry_run else ("cuda", torch.cuda.synchronize)
    step, parameters = make(told, device)
    begun = time.perf_counter()
    step()
    synchronize()
    job.keep(batch=told["batch"], parameters=parameters, first_step_seconds=time.perf_counter() - begun)
    for _ in range(told["settle"]):
        step()
    synchronize()
    seconds = []
    for _ in range(told["rounds"]):
        begun = time.perf_counter()
        for _ in range(told["steps"]):
            loss = step()
        synchronize()
        seconds.append((time.perf_counter() - begun) / told["steps"])
    job.keep(
        step_ms=[1000 * one for one in seconds],
        images_per_second=told["batch"] / statistics.median(seconds),
        last_loss=float(loss),
        peak_bytes=None if job.dry_run else torch.cuda.max_memory_allocated(),
        reserved_bytes=None if job.dry_run else torch.cuda.max_memory_reserved(),
    )
    job.check("the loss is a number", math.isfinite(float(loss)), f"{float(loss)}")


def make(told: dict[str, Any], device: str) -> tuple[Any, int]:
    """A function that trains one step and returns its loss, and how many numbers are learned."""
    import timm
    import torch

    torch.manual_seed(0)
    model = timm.create_model(told["model"], num_classes=1000, img_size=told["image"], **told.get("shape", {}))
    model = prepare(model, device)
    optimizer = adamw(model, lr=1e-3, weight_decay=0.1)
    images = torch.randint(0, 256, (told["batch"], 3, told["image"], told["image"]), dtype=torch.uint8)
    labels = torch.randint(0, 1000, (told["batch"],), device=device)
    step = make_step(torch.compile(model), optimizer, images, labels, device, dtype="bfloat16")
    return step, sum(one.numel() for one in model.parameters())


def prepare(model: Any, device: str) -> Any:
    """Returns the model on the device, channels-last, to be trained; PyTorch takes TF32 where float32 is left."""
    import torch

    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    return model.to(device=device, memory_format=torch.channels_last).train()


def adamw(model: Any, **settings: Any) -> Any:
    """Returns fused AdamW, whose weight decay is for matrices alone."""
    import torch

    matrices = [one for one in model.parameters() if one.ndim > 1]
    others = [one for one in model.parameters() if one.ndim <= 1]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, **settings, fused=True)


def make_step(
    model: Any,
    optimizer: Any,
    images: Any,
    labels: Any,
    device: str,
    *,
    dtype: str,
    mean: tuple[float, ...] = (0.5,),
    std: tuple[float, ...] = (0.5,),
    clip: float | None = None,
) -> Callable[[], Any]:
    """Makes a function that trains one step and returns its loss, a tensor on the device.

    Args:
      model: maps normalised images to logits; `prepare` has put it on the device.
      optimizer: over the model's parameters.
      images: uint8 [B, C, H, W].
      labels: int64 [B].
      device: "cpu" or "cuda".
      dtype: "bfloat16" for autocast, or "float32".
      mean: of the channels, subtracted from pixels in [0, 1].
      std: what the pixels are then divided by.
      clip: the largest norm of the gradient; None: any.
    """
    import torch

    images = images.to(device).contiguous(memory_format=torch.channels_last)
    labels = labels.to(device)
    shift, scale = (255 * torch.tensor(numbers, device=device).view(1, -1, 1, 1) for numbers in (mean, std))

    def step() -> Any:
        floats = images.float().sub_(shift).div_(scale)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = torch.nn.functional.cross_entropy(model(floats), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        return loss.detach()

    return step


def _nothing() -> None:
    """A CPU is never ahead of Python."""
