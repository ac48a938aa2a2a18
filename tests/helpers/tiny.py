"""The digits on a model so small that a system test takes seconds, with everything random that a step can have on."""

from vit_dist.config import default_config


def get_config():
    config = default_config()
    config.total_steps = 20
    config.batch_size = 64
    config.log_every = 1
    config.log_examples = True
    config.label_smoothing = 0.05
    config.mixup, config.cutmix = 0.1, 0.1

    model = config.model
    model.width, model.depth, model.mlp, model.heads = 32, 2, 64, 8
    model.scan = True  # a loop compiles sooner
    model.image_size, model.patch_size, model.channels, model.num_classes = 8, 4, 1, 10
    model.pool, model.position_std = "mean", 0.3  # this, and patches of a quarter image, make 20 steps learn something
    model.dropout, model.embedding_dropout, model.attention_dropout, model.drop_path = 0.1, 0.1, 0.1, 0.2

    data = config.data
    data.source = "digits"
    data.rotate, data.scale, data.shear, data.shift = 10.0, 0.1, 5.0, 0.1
    data.flip, data.crop_area = True, (0.8, 1.0)

    optimizer = config.optimizer
    optimizer.name, optimizer.learning_rate, optimizer.weight_decay, optimizer.b2 = "adamw", 1e-2, 0.05, 0.95
    optimizer.schedule, optimizer.clip = "constant", 1.0
    return config
