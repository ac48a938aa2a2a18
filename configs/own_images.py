"""A folder of your own images: a small ViT with the usual augmentation, every length in epochs.

    vit-dist train --config=own_images --config.data.path=DIR --workdir=runs/own

DIR holds `train/` and `test/`, each with a folder of images for every class. `--config.evaluate.splits=[val]` takes
`val/` instead of `test/`, and `--config.data.source=tar` archives `train.tar.gz` and `test.tar.gz`. Without an
accelerator add `--config.fake_devices=1`. The classes are counted by the folders. The learning rate rises for 5 of the
90 epochs and then falls to zero, however many images there are; fewer images than `batch_size` are refused.

S/16 needs about 100,000 images to beat a convolutional network from scratch (DeiT-S, arXiv:2012.12877, trains on 1.28
million). For a few thousand start smaller: `--config.model.variant=Ti/16 --config.batch_size=64`.

Expected: depends on the images. Not yet run to the end here; `tests/test_recipes.py` runs it on a folder of a few.
"""

from vit_dist.config import default_config


def get_config():
    config = default_config()
    config.total_epochs = 90
    config.batch_size = 256
    config.label_smoothing = 0.1
    config.mixup = 0.2

    model = config.model
    model.variant, model.image_size = "S/16", 224
    model.pool, model.drop_path = "mean", 0.1
    model.dtype = "bfloat16"

    data = config.data
    data.source, data.path = "folder", "datasets/own"
    data.mean, data.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    data.crop_area, data.flip = (0.2, 1.0), True
    data.eval_crop = 0.875
    data.on_bad = "skip"

    optimizer = config.optimizer
    optimizer.name, optimizer.learning_rate, optimizer.weight_decay = "adamw", 5e-4, 0.05
    optimizer.warmup_epochs, optimizer.clip = 5, 1.0

    config.evaluate.every_epochs = 5
    config.checkpoint.every_epochs, config.checkpoint.keep_best = 1, 1
    return config
