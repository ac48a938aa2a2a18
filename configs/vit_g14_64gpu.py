"""Web-scale pretraining on 8 nodes of 8 H100: g/14, 1.07 billion parameters (arXiv:2106.04560), on 1.28 billion images.

    sbatch --nodes=8 --time=48:00:00 launch/slurm.sbatch configs/vit_g14_64gpu.py /shared/runs/g14 \\
      --config.data.path=DIR

DIR holds WebDataset shards on a disk that all nodes read; the classes are ImageNet-21k's, whose 14.2 M images make 90
epochs. Schedule and pooling are those of "Scaling Vision Transformers"; AdamW (with b2 = 0.95, our choice for large
batches) replaces Adafactor. The head's weight decay is 3.0, that of all else 0.03. Each node holds the
parameters once, split over its 8 GPUs; only the sum of the gradients crosses the network.

Expected: no published run of this size on this set. Not yet run. Time: 33 hours at NVIDIA's own rate for ViT-g/14 in
NeMo, 1,428 images per second per node, and 95 % weak scaling. A process must then decode some 170 images per second.

Compiled for h100:8x8 (`vit-dist plan`), 2026-11-27, jax 0.10.2: 21.1 GiB per GPU, of which
1.2 are parameters and optimizer.
"""

from vit_dist.config import default_config


def get_config():
    config = default_config()
    config.total_steps = 312_500
    config.batch_size = 4096
    config.log_every = 100
    config.loss = "sigmoid"
    config.mesh.dcn_data, config.mesh.data, config.mesh.fsdp = 8, 1, 8

    model = config.model
    model.variant, model.image_size, model.num_classes = "g/14", 224, 21_843
    model.pool, model.head_bias = "map", -10.0
    model.dtype, model.remat = "bfloat16", "names"
    model.activation = "gelu_tanh"  # on a GPU it is a part of the product before it

    data = config.data
    data.source, data.path = "webdataset", "datasets/imagenet21k_shards"
    data.crop_area, data.flip = (0.05, 1.0), True
    data.eval_crop = 0.875
    data.threads, data.read_ahead_mb, data.on_bad = 12, 1024.0, "skip"

    optimizer = config.optimizer
    optimizer.name, optimizer.learning_rate, optimizer.weight_decay = "adamw", 8e-4, 0.03
    optimizer.rules = ({"path": "^head/kernel", "weight_decay": 100.0},)
    optimizer.schedule, optimizer.warmup_steps, optimizer.cooldown_steps = "rsqrt", 10_000, 50_000
    optimizer.clip, optimizer.b2, optimizer.moment_dtype = 1.0, 0.95, "bfloat16"

    config.evaluate.every_steps = 10_000
    config.evaluate.splits = ("val",)
    config.checkpoint.every_steps, config.checkpoint.keep_last = 2000, 2
    config.deadlines.start_seconds = 900  # the last of 64 processes may have a container to unpack
    return config
