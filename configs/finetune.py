"""Fine-tunes published weights, or an earlier run, on a folder of your own images.

    vit-dist train --config=finetune --config.init.weights=WEIGHTS --config.data.path=DIR --workdir=runs/finetuned

WEIGHTS is a folder or file of timm, transformers, OpenCLIP, big_vision or DINOv3, a name on the Hugging Face hub, or
the workdir of a run; the model, its image size and the preparation of images are those of the weights. DIR holds
`train/` and `test/`, each with a folder of images for every class; `--config.evaluate.splits=[val]` takes `val/`. The
head is new unless the weights have all your classes by name. Lengths are in epochs, for 500 or 500,000 images alike;
for many, `--config.batch_size=512 --config.optimizer.learning_rate=1e-3` is quicker. Add `--config.fake_devices=1`
without an accelerator.

All parameters are trained, the first layers more slowly than the last (`optimizer.layer_decay`). Adapters and the head
alone, whose optimizer state is small: `--config.lora.rank=16 --config.optimizer.layer_decay=1
--config.optimizer.learning_rate=1e-3`. The last blocks alone: `--config.init.freeze=all_but_last_4`. The head alone:
`linear_probe.py`.

Expected: depends on weights and images. On 500 images of five of CIFAR-10's classes, from a small model of the other
five, `benchmarks/fine_tuning.py` measured 0.49 where training from scratch reached 0.45 (`benchmarks/results/`).
"""

from vit_dist.config import default_config


def get_config():
    config = default_config()
    config.total_epochs = 20
    config.batch_size = 64
    config.label_smoothing = 0.1

    config.model.drop_path = 0.1
    config.model.dtype = "bfloat16"

    data = config.data
    data.source, data.path = "folder", "datasets/own"
    data.crop_area, data.flip = (0.35, 1.0), True
    data.on_bad = "skip"

    optimizer = config.optimizer
    optimizer.name, optimizer.learning_rate, optimizer.weight_decay = "adamw", 3e-4, 0.05
    optimizer.layer_decay, optimizer.warmup_epochs, optimizer.clip = 0.75, 2, 1.0

    config.evaluate.every_epochs = 1
    config.checkpoint.every_epochs, config.checkpoint.keep_best = 1, 1
    return config
