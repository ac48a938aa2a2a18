"""timm's ViT trained the way it is done in PyTorch, beside which ours is timed: the same model, batch and optimizer.

`torch.compile`, autocast to bf16 over float32 parameters, channels-last, fused AdamW with decay on matrices alone,
TF32 where float32 is left. The batch is uint8 in device memory, and made into normalised floats within the step, as
ours is.
"""

import importlib.util
import math
import statistics
import time
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
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    model = timm.create_model(told["model"], num_classes=1000, img_size=told["image"], **told.get("shape", {}))
    model = model.to(device=device, memory_format=torch.channels_last).train()
    matrices = [one for one in model.parameters() if one.ndim > 1]
    others = [one for one in model.parameters() if one.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    compiled = torch.compile(model)
    images = torch.randint(0, 256, (told["batch"], 3, told["image"], told["image"]), dtype=torch.uint8, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (told["batch"],), device=device)

    def step() -> Any:
        floats = images.float().div_(127.5).sub_(1)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(compiled(floats), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step, sum(one.numel() for one in model.parameters())


def _nothing() -> None:
    """A CPU is never ahead of Python."""
