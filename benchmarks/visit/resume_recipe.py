"""The run that a visit kills and resumes: small, in bf16, with dropout, mixup, crops and an average.

    vit-dist train --config=benchmarks/visit/resume_recipe.py --config.data.path=FILE.npz --workdir=DIR

The data are those of the kit. Takes a few seconds on a GPU.
"""

from vit_dist.config import default_config


def get_config():
    config = default_config()
    config.total_steps = 300
    config.batch_size = 64
    config.log_every = 5
    config.log_examples = True
    config.deterministic = True
    config.label_smoothing, config.mixup = 0.1, 0.2
    config.ema_decay = 0.99
    config.mesh.data = 1

    model = config.model
    model.width, model.depth, model.mlp, model.heads = 128, 2, 256, 2
    model.image_size, model.patch_size, model.num_classes = 32, 8, 10
    model.dropout, model.drop_path = 0.1, 0.1
    model.dtype, model.scan = "bfloat16", False

    data = config.data
    data.source = "npz"
    data.flip, data.crop_area = True, (0.5, 1.0)

    optimizer = config.optimizer
    optimizer.learning_rate, optimizer.weight_decay, optimizer.warmup_steps, optimizer.clip = 1e-3, 0.1, 20, 1.0

    config.checkpoint.every_steps = 20
    return config
