"""The lengths of a run that are given in epochs, as steps."""

import dataclasses
import math

from vit_dist.config import Config, ConfigError


def in_steps(config: Config, train_examples: int) -> Config:
    """Returns the config of a run over so many training examples, with every length in steps.

    A length in epochs takes effect where that in steps is not set. Raises `ConfigError` for a batch that is larger than
    the training split.
    """
    if config.batch_size > train_examples:
        raise ConfigError(
            f"batch_size: {config.batch_size}, but the training split has {train_examples} images; take at most as many"
        )

    def steps(steps: int, epochs: float) -> int:
        return steps or math.ceil(epochs * train_examples / config.batch_size)

    optimizer, evaluate, checkpoint = config.optimizer, config.evaluate, config.checkpoint
    return dataclasses.replace(
        config,
        total_steps=total_steps(config, train_examples),
        optimizer=dataclasses.replace(optimizer, warmup_steps=steps(optimizer.warmup_steps, optimizer.warmup_epochs)),
        evaluate=dataclasses.replace(evaluate, every_steps=steps(evaluate.every_steps, evaluate.every_epochs)),
        checkpoint=dataclasses.replace(checkpoint, every_steps=steps(checkpoint.every_steps, checkpoint.every_epochs)),
    )


def total_steps(config: Config, train_examples: int) -> int:
    """Returns the optimizer steps of the whole run: `total_steps`, or those of `total_epochs`, rounded up."""
    if config.total_steps is not None:
        return config.total_steps
    assert config.total_epochs is not None
    return max(1, math.ceil(config.total_epochs * train_examples / config.batch_size))
