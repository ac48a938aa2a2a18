"""The smallest run there is: one block, one device, two steps on the digits. For tests of what surrounds training.

vit-dist train --config=tests/helpers/smallest.py --workdir=DIR
"""

from vit_dist.config import default_config


def get_config():
    config = default_config()
    config.total_steps = 2
    config.batch_size = 16
    config.log_every = 1
    config.mesh.data = 1
    model = config.model
    model.width, model.depth, model.mlp, model.heads = 16, 1, 32, 2
    model.image_size, model.patch_size, model.channels, model.num_classes = 8, 4, 1, 10
    config.evaluate.every_steps = 2
    config.checkpoint.every_steps = 2
    return config
