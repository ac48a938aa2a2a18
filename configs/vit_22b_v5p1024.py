"""ViT-22B (arXiv:2302.05442) on a TPU v5p slice of 8x8x16 = 1,024 chips: 22.3 billion parameters, batch 65,536.

    launch/tpu_pod.sh --zone=us-east5-a --type=v5p-2048 --queued --before='sudo mount 10.0.0.2:/runs /mnt' \\
      configs/vit_22b_v5p1024.py /mnt/22b --config.data.path=DIR

The type counts cores, two a chip. Blocks with attention and MLP side by side, LayerNorm on queries and keys, no bias on
their projection; attention pooling; the paper's 177,000 steps, reciprocal square root schedule and weight decay, with
AdamW (b2 of 0.95, a choice of ours) for Adafactor, and plain LayerNorms for the paper's, which neither centre nor
shift. The paper's images are JFT's 4 billion, which are not to be had: DIR stands for WebDataset shards of your own,
here with ImageNet-21k's classes. Heads and MLP are split over 4 chips, parameters over 64 more, and four replicas of
that share the batch.

Expected: the paper's results were had with JFT; for other images there are none. Not yet run. Time: 19 days, if half of
the chips' 459 TFLOP/s each were used.

Compiled for v5p:8x8x16 (`vit-dist plan`), 2026-11-25, jax 0.10.2: 47.1 GiB a chip of its 95, of which 0.9 are
parameters and optimizer.
"""

from vit_dist.config import default_config


def get_config():
    config = default_config()
    config.total_steps = 177_000
    config.batch_size = 65_536
    config.log_every = 20
    config.loss = "sigmoid"
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 4, 64, 4

    model = config.model
    model.variant, model.image_size, model.num_classes = "22B/14", 224, 21_843
    model.pool, model.head_bias, model.qkv_bias = "map", -10.0, False
    model.dtype, model.remat = "bfloat16", "block"

    data = config.data
    data.source, data.path = "webdataset", "datasets/web_shards"
    data.crop_area, data.flip = (0.05, 1.0), True
    data.eval_crop = 0.875
    data.threads, data.read_ahead_mb, data.on_bad = 64, 2048.0, "skip"  # one process a host of 208 virtual cores

    optimizer = config.optimizer
    optimizer.name, optimizer.learning_rate, optimizer.weight_decay = "adamw", 1e-3, 0.03
    optimizer.rules = ({"path": "^head/kernel", "weight_decay": 100.0},)
    optimizer.schedule, optimizer.warmup_steps, optimizer.cooldown_steps = "rsqrt", 10_000, 30_000
    optimizer.clip, optimizer.b2, optimizer.moment_dtype = 1.0, 0.95, "bfloat16"

    config.evaluate.every_steps = 5000
    config.evaluate.splits = ("val",)
    config.checkpoint.every_steps, config.checkpoint.keep_last = 500, 2
    config.deadlines.start_seconds = 1800  # 256 hosts
    config.deadlines.step_seconds = 3600  # the first step compiles, and a save writes 223 GB
    return config
