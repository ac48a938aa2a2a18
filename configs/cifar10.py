"""CIFAR-10 from scratch: a small ViT with patches of 4, random crops and flips, mixup, 200 epochs.

    vit-dist train --config=configs/cifar10.py --config.data.path=DIR --workdir=runs/cifar10

DIR holds `train.tar.gz` and `test.tar.gz` of class folders, or (with `--config.data.source=folder`) `train/` and
`test/` unpacked. The model is narrower and deeper than that of d2l_fashion_mnist.py: 12 blocks of width 192.

Expected: a plain ViT of this kind reaches about 0.80 in 200 epochs, with strong augmentation about 0.90 (ViT-Lite-7/4,
3.7 M parameters, 0.914: Hassani et al. 2021, arXiv:2104.05704). Not yet run to the end here; what a small variant does
in two minutes on two CPU cores is in benchmarks/results/.
"""

from vit_dist.config import default_config


def get_config():
    config = default_config()
    config.total_epochs = 200
    config.batch_size = 512
    config.log_every = 50
    config.label_smoothing = 0.1
    config.mixup = 0.2
    config.ema_decay = 0.999

    model = config.model
    model.variant, model.image_size, model.patch_size, model.num_classes = "Ti/4", 32, 4, 10
    model.pool, model.drop_path = "mean", 0.1

    data = config.data
    data.source, data.path, data.in_memory = "tar", "datasets/cifar10", True
    data.mean, data.std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    data.crop_area, data.flip, data.rotate = (0.3, 1.0), True, 10.0

    optimizer = config.optimizer
    optimizer.name, optimizer.learning_rate, optimizer.weight_decay = "adamw", 1e-3, 0.05
    optimizer.warmup_steps, optimizer.clip = 1000, 1.0

    config.evaluate.every_steps = 980  # ten epochs
    config.checkpoint.keep_best = 1
    config.checkpoint.every_steps = 980
    return config
