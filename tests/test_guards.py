"""What keeps a run from going wrong in silence: a state that is no number, other data, another model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from system import settings, train_here

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.run.environment import check_same_data, write
from vit_dist.run.workdir import check_same_run
from vit_dist.step.optimizer import make_optimizer
from vit_dist.train import Diverged


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    with pytest.raises(Diverged, match="step"):
        train_here(tmp_path / "run", "optimizer.learning_rate=1e38", "checkpoint.every_steps=1", "log_every=20")
    saved = [int(folder.name) for folder in (tmp_path / "run" / "checkpoints").iterdir() if folder.name.isdigit()]
    assert all(step < 20 for step in saved)
    assert len(saved) <= 1


def test_other_data_under_a_run_is_refused_by_its_split(tmp_path):
    write(tmp_path, {"data": {"train": "aa", "test": "bb"}})
    check_same_data(tmp_path, {"train": "aa", "test": "bb", "val": "cc"})
    with pytest.raises(ConfigError, match=r"the test split has another content \(digest dd\)"):
        check_same_data(tmp_path, {"train": "aa", "test": "dd"})


@pytest.mark.parametrize("key", ["model.attention_dropout=0.3", "model.scan=false", "data.scale=0.2"])
def test_a_key_that_begins_as_one_that_may_change_is_still_refused(tmp_path, key):
    with pytest.raises(ConfigError, match=key.partition("=")[0]):
        check_same_run(tmp_path, settings(), settings(key))


@pytest.mark.parametrize("name", ["adamw", "lamb", "adafactor", "muon", "lion", "sgd"])
def test_blocks_of_their_own_are_updated_as_those_of_a_stack(name):
    numbers = np.random.default_rng(0)
    stack = {"kernel": numbers.normal(size=(2, 64, 48)), "bias": numbers.normal(size=(2, 48))}
    stack = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), stack)
    optimizer = make_optimizer(config.Optimizer(name=name, weight_decay=0.1, schedule="constant"), 10)

    def update(blocks):
        parameters = {"blocks": blocks}
        gradients = jax.tree.map(jnp.sin, parameters)
        return optimizer.update(gradients, optimizer.init(parameters), parameters)[0]["blocks"]

    stacked = update({"mlp": {"up": stack}})["mlp"]["up"]
    apart = update({str(i): {"mlp": {"up": jax.tree.map(lambda leaf, i=i: leaf[i], stack)}} for i in range(2)})
    for i in range(2):
        for leaf in ("kernel", "bias"):
            np.testing.assert_allclose(apart[str(i)]["mlp"]["up"][leaf], stacked[leaf][i], rtol=1e-5, atol=1e-7)
