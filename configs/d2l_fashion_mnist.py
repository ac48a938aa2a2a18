"""The Vision Transformer lesson of "Dive into Deep Learning" (d2l.ai, section 11.8), as it stands there.

    vit-dist train --config=configs/d2l_fashion_mnist.py --config.data.path=DIR --workdir=runs/d2l

DIR holds Fashion-MNIST's four idx files; `--config.data.download=true` downloads them. On a machine
without accelerators add `--config.fake_devices=1` to run on the CPU.

Ten epochs of SGD. At the lesson's rate of 0.1 the loss first climbs, to some 20 or 30 within 20 steps, as that of the
lesson's own model does (`tests/step/test_lesson.py`). Expected at the end: the lesson plots a validation accuracy of
about 0.85 to 0.9 and gives no figure. Not yet run here to the end.
"""

from vit_dist.config import default_config


def get_config():
    config = default_config()
    config.total_epochs = 10
    config.batch_size = 128
    config.log_every = 100

    model = config.model
    model.image_size, model.patch_size, model.channels, model.num_classes = 96, 16, 1, 10
    model.width, model.depth, model.mlp, model.heads = 512, 2, 2048, 8
    model.pool, model.position, model.position_std = "cls", "learned", 0.01
    model.qkv_bias = model.projection_bias = False
    model.activation, model.kernel_init, model.head_zero_init = "gelu_tanh", "lecun_normal", False
    # On the embedding, after each of the MLP's layers and on the attention weights; not after the projection.
    model.dropout = model.embedding_dropout = model.attention_dropout = 0.1
    model.projection_dropout = 0.0

    config.data.source, config.data.name, config.data.path = "idx", "fashion_mnist", "datasets/fashion_mnist"
    config.data.mean, config.data.std = 0.0, 1.0  # pixels in [0, 1], as the lesson feeds them

    optimizer = config.optimizer
    optimizer.name, optimizer.learning_rate, optimizer.schedule, optimizer.momentum = "sgd", 0.1, "constant", 0.0

    config.evaluate.every_steps = 469  # once an epoch
    config.checkpoint.keep_best = 1
    config.checkpoint.every_steps = 469
    return config
