"""ViT-22B (arXiv:2302.05442) on a TPU v5p slice of 8x8x16 = 1,024 chips: 22.3 billion parameters, batch 65,536.

    launch/tpu_pod.sh --zone=us-east5-a --type=v5p-2048 --queued --before='sudo mount 10.0.0.2:/runs /mnt' \\
      configs/vit_22b_v5p1024.py /mnt/22b --config.data.path=DIR

The number in `v5p-2048` counts cores, two per chip. Blocks have attention and MLP side by side, LayerNorm on queries
and keys, and no bias in the layer that makes queries, keys and values; pooling is attention. Steps, schedule and weight
decay are the paper's. AdamW (with b2 = 0.95, our choice) replaces Adafactor, and plain LayerNorms replace the paper's,
which do not subtract the mean and have no bias. The paper's 4 billion images of JFT are not public: DIR stands for
WebDataset shards of your own, here with ImageNet-21k's classes. Heads and MLP are split over 4 chips, parameters over
64 groups of these, and four such replicas share the batch.

Expected: the paper trained on JFT; there are no results for other images. Not yet run. Time: 19 days, if half of
the chips' 459 TFLOP/s each were used.

Compiled for v5p:8x8x16 (`vit-dist plan`), 2026-11-27, jax 0.10.2: 47.0 of a chip's 95 GiB, of which 0.8 are
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
    data.threads, data.read_ahead_mb, data.on_bad = 64, 2048.0, "skip"  # one process per host of 208 virtual cores

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
