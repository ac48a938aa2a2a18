"""Trains a head on the frozen features of published weights, or of an earlier run.

    vit-dist train --config=linear_probe --config.init.weights=WEIGHTS --config.data.path=DIR --workdir=runs/probed

The arguments are those of `finetune.py`. A step costs a third of fine-tuning's and keeps no activations. The features
are those of the model as it is evaluated, of augmented images.

Expected: depends on weights and images; there, 0.45.
"""

import finetune


def get_config():
    config = finetune.get_config()
    config.init.freeze = "backbone"
    config.label_smoothing = 0.0
    config.model.drop_path = 0.0
    optimizer = config.optimizer
    optimizer.learning_rate, optimizer.weight_decay, optimizer.layer_decay = 3e-3, 0.0, 1.0
    return config
