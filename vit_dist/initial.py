"""What a fresh run starts from: `init.weights`, which is published weights or an earlier run of ours.

It is no resume: the run has its own steps, optimizer and config, and does not need the weights once it has saved.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vit_dist import config
from vit_dist.config import Config, ConfigError
from vit_dist.model.shape import shape_of
from vit_dist.paths import expanded
from vit_dist.run import workdir as run_files
from vit_dist.run.checkpoints import Checkpoints
from vit_dist.step.state import State
from vit_dist.weights.adapted import Adapted, placed
from vit_dist.weights.earlier_run import open_run
from vit_dist.weights.published import FITTED, Published, open_published

_SIZES = ("width", "depth", "mlp", "heads", "activation", "parallel", "qk_norm")  # what a variant says

_log = logging.getLogger(__name__)


def open_weights(settings: config.Init, model: config.Model | None = None) -> Published:
    """Returns the weights that `init.weights` names; raises `ConfigError` if there are none.

    What `model` sets, wins over what the weights of others say of themselves.
    """
    assert settings.weights is not None
    path = expanded(settings.weights, "init.weights")
    if not run_files.holds_run(path):
        if settings.step != "newest":
            raise ConfigError(f"init.step: {settings.step}, but {settings.weights} holds no run of ours; leave it out")
        set_keys = {} if model is None else _set_keys(model, config.Model())
        return open_published(settings.weights, given={f"model.{key}": value for key, value in set_keys.items()})
    return open_earlier(path, settings.step, "init.step")


def open_earlier(workdir: Path, step: int | str, key: str) -> Published:
    """Returns a checkpoint of an earlier run as weights: of a step, the "newest" or the "best"; `key` is for errors."""
    steps = run_files.checkpoint_steps(workdir)
    chosen = steps[-1] if step == "newest" else _best(workdir) if step == "best" else step
    if chosen not in steps:
        saved = ", ".join(map(str, steps))
        raise ConfigError(f"{key}: {chosen}, but {workdir} has saved {saved}; take one, newest or best")
    return open_run(workdir, run_files.read_config(workdir), run_files.class_names(workdir), int(chosen))


def _best(workdir: Path) -> int:
    checkpoints = Checkpoints(workdir / "checkpoints", keep_last=1, keep_best=0, read_only=True)
    try:
        best = checkpoints.best()
    finally:
        checkpoints.close()
    if best is None:
        raise ConfigError(f"{workdir}: no checkpoint has been evaluated, so none is the best; take the newest")
    return best


def with_traits(settings: Config, published: Published) -> Config:
    """Returns the config with what the weights say for the keys of `model` and `data` that have their defaults.

    The number of classes stays the data's. Raises `ConfigError` for a key that contradicts the weights.
    """
    model, default = settings.model, config.Model()
    name = settings.init.weights
    if model.variant is not None:
        own, theirs = shape_of(dataclasses.replace(model, num_classes=1)), shape_of(published.model)
        for key in _SIZES:
            if getattr(own, key) != getattr(theirs, key):
                raise ConfigError(
                    f"model.variant: {model.variant} has {key} {getattr(own, key)}, but the weights {name} have "
                    f"{getattr(theirs, key)}; leave model.variant out"
                )
    taken: dict[str, Any] = {}
    for key, theirs in published.description.model.items():
        ours = getattr(model, key)
        if ours == getattr(default, key):
            taken |= {} if key == "num_classes" else {key: theirs}
        elif key not in FITTED and ours != theirs:
            raise ConfigError(f"model.{key}: {ours}, but the weights {name} have {theirs}; leave it out")
    data = settings.data
    try:
        prepared = published.description.preprocessing([f"data.{key}" for key in _set_keys(data, config.Data())])
    except ConfigError as error:
        _log.warning("init.weights: images are prepared as the config says, for %s", error)
        prepared = {}
    model = dataclasses.replace(model, **taken)
    values = {key.removeprefix("data."): value for key, value in prepared.items() if key.startswith("data.")}
    data = dataclasses.replace(data, **_for_channels(values, model.channels))
    return config.resolve(config.to_dict(dataclasses.replace(settings, model=model, data=data)))


def _set_keys(section: Any, default: Any) -> dict[str, Any]:
    """Returns the values of a section of the config that are not its defaults."""
    values = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    return {key: value for key, value in values.items() if value != getattr(default, key)}


def _for_channels(values: dict[str, Any], channels: int) -> dict[str, Any]:
    """Returns values of `data`, without those for another number of channels, unless they are all equal."""
    fitting = {}
    for key, value in values.items():
        if not isinstance(value, tuple) or len(value) == channels:
            fitting[key] = value
        elif len(set(value)) == 1:
            fitting[key] = value[0]
        else:
            _log.warning(
                "init.weights: data.%s is the config's, as that of the weights is for %d channels", key, len(value)
            )
    return fitting


def record(settings: config.Init, published: Published) -> dict[str, Any]:
    """Returns what a run keeps of the weights that it starts from: their name, family and digest, for JSON."""
    family = published.description.family
    return {"name": settings.weights, "family": family, "digest": published.origin.digest()}


def started(state: State, start: Adapted, mesh: Mesh) -> State:
    """Returns a new run's state with these parameters, where they have them; logs what was changed in them."""
    for note in start.notes:
        _log.info("init.weights: %s", note)
    parameters = placed(start.parameters, state.parameters, mesh)
    ema = None if state.ema is None else jax.tree.map(jnp.copy, parameters)
    return dataclasses.replace(state, parameters=parameters, ema=ema)
