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
from vit_dist.job import processes
from vit_dist.model.shape import shape_of
from vit_dist.paths import expanded
from vit_dist.recipes import assignment
from vit_dist.run import workdir as run_files
from vit_dist.run.checkpoints import Checkpoints, Step
from vit_dist.schema import flatten, near_miss
from vit_dist.step.state import State
from vit_dist.weights.adapted import Adapted, placed
from vit_dist.weights.earlier_run import open_run, parameters_of
from vit_dist.weights.published import FITTED, Published, open_published
from vit_dist.weights.traits import PREPARED

_SIZES = ("width", "depth", "mlp", "heads", "activation", "parallel", "qk_norm")  # what a variant says

_log = logging.getLogger(__name__)


def open_weights(settings: config.Init, model: config.Model | None = None) -> Published:
    """Returns the weights that `init.weights` names; raises `ConfigError` if there are none.

    What `model` sets, wins over what the weights of others say of themselves.
    """
    assert settings.weights is not None
    path = expanded(settings.weights, "init.weights")
    # Process 0 looks for all: a network file system may show the others an older state.
    if not processes.gather(run_files.holds_run(path))[0]:
        if settings.step != "newest":
            raise ConfigError(f"init.step: {settings.step}, but {settings.weights} holds no run of ours; leave it out")
        set_keys = {} if model is None else _set_keys(model, config.Model())
        return open_published(settings.weights, given={f"model.{key}": value for key, value in set_keys.items()})
    return open_earlier(path, settings.step, "init.step")


def open_earlier(workdir: Path, step: Step, key: str, *, verify: bool | None = None) -> Published:
    """Returns a checkpoint of an earlier run as weights.

    Args:
      workdir: the directory of the run.
      step: the step, "newest" or "best".
      key: what sets the step, for errors.
      verify: whether to refuse one that is damaged; None: as the run's config says.

    Raises:
      ConfigError: there is no such checkpoint, or it is damaged.
    """
    settings, classes = run_files.read_config(workdir), run_files.class_names(workdir)
    verify = settings.checkpoint.verify if verify is None else verify
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True, verify=verify)
    steps = processes.gather(checkpoints.steps())[0]
    if isinstance(step, int) and step not in steps:
        saved = ", ".join(map(str, steps))
        raise ConfigError(f"{key}: {step}, but {workdir} has saved {saved}; take one, newest or best")
    name = parameters_of(settings)
    chosen, tensors = checkpoints.reading(lambda one: checkpoints.tensors(one, name), step)
    return open_run(workdir, settings, classes, chosen, tensors)


def with_traits(settings: Config, published: Published) -> Config:
    """Returns the config with what the weights say for the keys of `model` and `data` that have their defaults.

    The number of classes stays the data's, and keys in `init.own` stay as they are. Raises `ConfigError` for a key that
    contradicts the weights, and for one in `init.own` that there is not.
    """
    known = flatten(config.to_dict(settings))
    for key in settings.init.own:
        if key not in known or not key.startswith(("model.", "data.")):
            raise ConfigError(f"init.own: {key} is no key of model or data{near_miss(key, known)}")
    model, default = settings.model, config.Model()
    conflicts: dict[str, Any] = {}
    if model.variant is not None:
        own, theirs = shape_of(dataclasses.replace(model, num_classes=1)), shape_of(published.model)
        if any(getattr(own, key) != getattr(theirs, key) for key in _SIZES):
            conflicts["model.variant"] = None
    taken: dict[str, Any] = {}
    for key, value in published.description.model.items():
        ours = getattr(model, key)
        if ours == getattr(default, key) and f"model.{key}" not in settings.init.own:
            taken |= {} if key == "num_classes" else {key: value}
        elif key not in FITTED and ours != value:
            conflicts[f"model.{key}"] = value
    if conflicts:
        found = ", ".join(f"{key}={getattr(model, key.removeprefix('model.'))}" for key in conflicts)
        remedy = " ".join(f"--config.{assignment(key, value)}" for key, value in conflicts.items())
        raise ConfigError(
            f"{found}: the weights {settings.init.weights} are of another model; leave it out, or write {remedy}"
        )
    prepared = _prepared(settings, published, taken.get("channels", model.channels))
    changed = {f"model.{key}": value for key, value in taken.items() if value != getattr(default, key)}
    changed |= {f"data.{key}": value for key, value in prepared.items()}
    _log.info("init.weights: %s", ", ".join(f"{key}={value}" for key, value in changed.items()))
    model, data = dataclasses.replace(model, **taken), dataclasses.replace(settings.data, **prepared)
    return config.resolve(config.to_dict(dataclasses.replace(settings, model=model, data=data)))


def with_own_traits(settings: Config) -> Config:
    """Returns the config with the traits of the weights that `init.weights` names, or as it is if it names none."""
    if settings.init.weights is None:
        return settings
    return with_traits(settings, open_weights(settings.init, settings.model))


def _set_keys(section: Any, default: Any) -> dict[str, Any]:
    """Returns the values of a section of the config that are not its defaults."""
    values = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    return {key: value for key, value in values.items() if value != getattr(default, key)}


def _prepared(settings: Config, published: Published, channels: int) -> dict[str, Any]:
    """Returns how the weights' images were prepared, in the keys of `data` that have their defaults.

    What the weights do not say, or say for another number of channels, stays as the config has it, and is logged.
    """
    data, prepared = settings.data, dict[str, Any]()
    kept = (key.removeprefix("data.") for key in settings.init.own if key.startswith("data."))
    own = _set_keys(data, config.Data()) | {key: getattr(data, key) for key in kept}
    everything = {"model.image_size", "model.channels", *(f"data.{key}" for key in PREPARED)}
    for key in PREPARED:
        try:
            value = published.description.preprocessing(everything - {f"data.{key}"}).get(f"data.{key}")
        except ConfigError as error:
            _log.warning("init.weights: data.%s=%s, the config's: %s", key, getattr(data, key), error)
            continue
        if isinstance(value, tuple) and len(value) != channels:
            if len(set(value)) > 1:
                _log.warning(
                    "init.weights: data.%s=%s, the config's: the weights have %s", key, getattr(data, key), value
                )
                continue
            value = value[0]
        if key not in own:
            prepared |= {} if value is None else {key: value}
        elif value != own[key]:
            _log.warning("init.weights: data.%s=%s, the config's: the weights have %s", key, own[key], value)
    return prepared


def weights_fingerprint(published: Published | None) -> str:
    """Returns what processes compare, so that all start from the same files: their names and sizes."""
    files = published.origin.files if published else ()
    return repr([(file.name, file.stat().st_size) for file in files])


def record(settings: config.Init, published: Published) -> dict[str, Any]:
    """Returns what a run keeps of the weights that it starts from: their name, family, digest and licence, for JSON."""
    family = published.description.family
    return {
        "name": settings.weights,
        "family": family,
        "digest": published.origin.digest(),
        "license": published.license,
    }


def started(state: State, start: Adapted, mesh: Mesh) -> State:
    """Returns a new run's state with these parameters, where they have them; logs what was changed in them."""
    for note in start.notes:
        _log.info("init.weights: %s", note)
    jax.tree.map(lambda leaf: leaf.delete(), state.ema)
    parameters = placed(start.parameters, state.parameters, mesh)
    processes.alive()
    ema = None if state.ema is None else jax.tree.map(jnp.copy, parameters)
    return dataclasses.replace(state, parameters=parameters, ema=ema)
