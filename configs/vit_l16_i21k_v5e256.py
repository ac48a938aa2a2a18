"""ImageNet-21k on a TPU v5e-256: L/16 as "How to train your ViT?" does (AugReg, arXiv:2106.10270), 300 epochs.

    launch/tpu_pod.sh --zone=us-west4-a --type=v5litepod-256 --before='sudo mount 10.0.0.2:/runs /mnt' \\
      configs/vit_l16_i21k_v5e256.py /mnt/l16 --config.data.path=DIR

or `launch/gke_tpu.yaml`. DIR holds what `vit-dist prepare` wrote of the 14.2 M images, with a split `val` that was held
out; it must be a disk that all 64 hosts read. Medium2 augmentation: RandAugment of two operations at magnitude 15, and
mixup 0.5. The mesh follows the torus: 16 chips of a row share the parameters, the 16 rows are replicas. On several
slices add `--config.mesh.dcn_data=N`.

Expected: pretraining, to be judged after fine-tuning. Not yet run. Time: 17 hours, if half of the chips' 197 TFLOP/s
each were used. A host must then decode and augment some 1,060 images per second.

Compiled for v5e:16x16 (`vit-dist plan`), 2026-11-27, jax 0.10.2: 2.8 of a chip's 16 GiB, of which 0.2 are parameters
and optimizer.
"""

from vit_dist.config import default_config


def get_config():
    config = default_config()
    config.total_epochs = 300
    config.batch_size = 4096
    config.log_every = 100
    config.loss = "sigmoid"
    config.mixup = 0.5
    config.mesh.data, config.mesh.fsdp = 16, 16

    model = config.model
    model.variant, model.image_size, model.num_classes = "L/16", 224, 21_843
    model.head_bias = -10.0
    model.dtype = "bfloat16"

    data = config.data
    data.source, data.path = "array_record", "datasets/imagenet21k"
    data.crop_area, data.flip = (0.05, 1.0), True
    data.randaugment_layers, data.randaugment_magnitude = 2, 15.0
    data.eval_crop = 0.875
    data.threads, data.read_ahead_mb, data.on_bad = 64, 2048.0, "skip"  # one process a host of 112 virtual cores

    optimizer = config.optimizer
    optimizer.name, optimizer.learning_rate, optimizer.weight_decay = "adamw", 1e-3, 0.1
    optimizer.warmup_steps, optimizer.clip, optimizer.moment_dtype = 10_000, 1.0, "bfloat16"

    config.evaluate.every_steps = 10_000
    config.evaluate.splits = ("val",)
    config.checkpoint.every_steps, config.checkpoint.keep_last = 5000, 2
    config.deadlines.start_seconds = 900  # 64 hosts are seldom ready at once
    return config
