"""Does fine-tuning help? A small ViT of five of CIFAR-10's classes, fine-tuned on a few images of the other five.

    python benchmarks/fine_tuning.py --data=DIR --out=FOLDER            # DIR holds train.tar.gz and test.tar.gz

It trains a model on five classes, then on `--fraction` of the other classes' images from these weights in several ways,
and from scratch, all for as many steps, and prints a table. FOLDER keeps the runs; those that are finished there are
not run again.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vit_dist import train

FIRST = ("airplane", "bird", "deer", "frog", "ship")
OTHERS = ("automobile", "cat", "dog", "horse", "truck")
MODEL = {"model.width": 96, "model.depth": 4, "model.mlp": 192, "model.heads": 3, "model.dtype": "float32"}
COMMON = {"fake_devices": 1, "data.source": "tar", "data.in_memory": True, "checkpoint.keep_best": 0}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "all, one rate": ("finetune", {"optimizer.layer_decay": 1.0}),
    "all, layer decay 0.75": ("finetune", {}),
    "adapters, rank 8": ("finetune", {"lora.rank": 8, "optimizer.layer_decay": 1.0}),
    "last two blocks": ("finetune", {"init.freeze": "all_but_last_2", "optimizer.layer_decay": 1.0}),
    "head alone": ("linear_probe", {}),
}
SCRATCH: dict[str, Any] = {
    **MODEL, "model.patch_size": 8, "model.image_size": 32, "model.pool": "mean", "optimizer.layer_decay": 1.0,
    "data.mean": (0.4914, 0.4822, 0.4465), "data.std": (0.2470, 0.2435, 0.2616),
}  # fmt: skip
RATES = (3e-4, 1e-3, 3e-3)  # each way at each; the table has them all


def first(data: Path, out: Path, epochs: float) -> dict[str, Any]:
    """Trains on the first five classes; returns the summary."""
    changes = {
        **COMMON, **MODEL, "data.path": str(data), "data.classes": FIRST, "total_epochs": epochs, "batch_size": 128,
        "model.variant": None, "model.patch_size": 8, "model.num_classes": None, "model.drop_path": 0.0,
        "log_every": 100, "ema_decay": 0.99, "optimizer.warmup_steps": 100, "evaluate.every_steps": 0,
        "evaluate.every_epochs": epochs, "checkpoint.every_steps": 0, "mixup": 0.0,
        "data.rotate": 0.0, "data.crop_area": (0.5, 1.0),
    }  # fmt: skip
    return train("cifar10", out / "first", changes)


def other(data: Path, workdir: Path, recipe: str, rate: float, fraction: float, epochs: float, **changes: Any) -> float:
    """Trains on a part of the other five classes; returns top-1 of all their test images."""
    changes = {
        **COMMON, "data.path": str(data), "data.classes": OTHERS, "data.fraction": fraction, "batch_size": 50,
        "total_epochs": epochs, "optimizer.learning_rate": rate, "evaluate.every_epochs": epochs,
        "model.drop_path": 0.0, "checkpoint.every_epochs": epochs, "model.dtype": "float32", **changes,
    }  # fmt: skip
    return float(train(recipe, workdir, changes)["top1"])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of CIFAR-10's archives")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--first-epochs", type=float, default=8, help="over the first five classes' 25,000 images (8)")
    parser.add_argument("--epochs", type=float, default=20, help="over the few images of the others (20)")
    parser.add_argument("--fraction", type=float, default=0.02, help="of the others' 25,000 images (0.02)")
    options = parser.parse_args(argv)
    begun, processor = time.perf_counter(), time.process_time()
    summary = first(options.data, options.out, options.first_epochs)
    minutes = (time.perf_counter() - begun) / 60, (time.process_time() - processor) / 60
    print(f"the first classes: top-1 {summary['top1']:.3f}, {minutes[0]:.1f} min, {minutes[1]:.1f} of processor time\n")
    print("| trained | " + " | ".join(f"rate {rate:g}" for rate in RATES) + " | s a run |")
    print("| --- |" + " --- |" * (len(RATES) + 1))
    start = {"init.weights": str(options.out / "first")}
    rows = {name: (recipe, {**start, **changes}) for name, (recipe, changes) in WAYS.items()}
    for name, (recipe, changes) in (rows | {"from scratch": ("finetune", SCRATCH)}).items():
        begun, found = time.perf_counter(), []
        for rate in RATES:
            workdir = options.out / f"{name} {rate:g}".replace(",", "").replace(" ", "-")
            found.append(other(options.data, workdir, recipe, rate, options.fraction, options.epochs, **changes))
        seconds = (time.perf_counter() - begun) / len(RATES)
        print(f"| {name} | " + " | ".join(f"{top1:.3f}" for top1 in found) + f" | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
