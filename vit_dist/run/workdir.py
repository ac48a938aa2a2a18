"""The small files of a working directory: the config of the run, its class names, its summary.

A directory holds a run if it has a `config.json` and a checkpoint. A later call may change keys that do not change what
the run is, such as the mesh, and logs them; a change of any other key is refused.
"""

import dataclasses
import json
import logging
import time
from pathlib import Path
from typing import Any

from vit_dist import config, recipes
from vit_dist.config import Config, ConfigError
from vit_dist.data.files import read_file
from vit_dist.job import processes
from vit_dist.run.files import ADVICE, ANY_OBJECT, NUMBER, TEXT, WHOLE, read_json, write_atomically
from vit_dist.run.step_record import steps_in
from vit_dist.schema import flatten
from vit_dist.weights.traits import PREPARED, TRAITS

# Keys that a resumed run may change: where and how it runs, what it writes and when. Its curve stays the same up to
# rounding, with two exceptions: a new length changes the rest of the schedule, and another number of micro-batches
# draws other dropout masks. (Whether the data are the same is checked by their digest.)
MAY_CHANGE = (
    "total_steps", "total_epochs", "log_every", "log_examples", "deterministic", "fake_devices", "accumulate_steps",
    "accumulate_gather", "mesh", "evaluate", "probe", "checkpoint", "profile", "deadlines", "xla_options",
    "data.source", "data.path", "data.mixture", "data.name", "data.download", "data.cache_dir", "data.workers",
    "data.threads", "data.read_ahead_mb", "data.prefetch", "data.memory_limit_gb", "data.on_bad",
    "data.max_bad_fraction", "data.crop_decode", "model.remat", "model.attention", "model.context_attention",
)  # fmt: skip

_SUMMARY = {"step": WHOLE, "count?": WHOLE, "loss?": NUMBER, "top1?": NUMBER, "seconds": NUMBER, "workdir": TEXT}
_LATE_SECONDS = 60  # a network disk may show one host late what another has written

_log = logging.getLogger(__name__)


def holds_run(workdir: Path) -> bool:
    """Returns whether there is a run to resume; one that failed before its first checkpoint does not count."""
    return (workdir / "config.json").is_file() and bool(checkpoint_steps(workdir))


def look(workdir: Path) -> list[Any]:
    """Returns the config of a run as text, None if there is no run to resume, and its steps, as process 0 sees them.

    A network file system may show the others an older state.
    """
    state: list[Any] = []
    if processes.index() == 0:
        steps = checkpoint_steps(workdir)
        state = [read_file(workdir / "config.json").decode(errors="replace") if holds_run(workdir) else None, steps]
    return processes.gather(state)[0]


def check_unchanged(workdir: Path, seen: list[Any]) -> None:
    """Raises `ConfigError`, on all processes alike, if `look` does not return any more what it has."""
    if look(workdir) != seen:
        raise ConfigError(f"{workdir}: another process has trained there meanwhile; start again")


def checkpoint_steps(workdir: Path) -> list[int]:
    """Returns the steps with a complete checkpoint, in order; an incomplete one has a longer name."""
    return steps_in(workdir / "checkpoints")


def check_shared(workdir: Path) -> None:
    """Raises `ConfigError` if not all processes see the same run in `workdir`; all call it, after `write_run`."""
    for _ in range(_LATE_SECONDS):  # counted, not timed, so that all processes give up together
        views = processes.gather([(workdir / "config.json").is_file(), checkpoint_steps(workdir)])
        different = [index for index, view in enumerate(views) if view != views[0]]
        if not different:
            return
        time.sleep(1)
    raise ConfigError(
        f"{workdir}: process {different[0]} does not see what process 0 sees in it; give a --workdir on a disk that "
        "all hosts share"
    )


def read_config(workdir: Path, overrides: recipes.Overrides = ()) -> Config:
    """Returns the run's config with overrides, such as `mesh.data=4`, that do not change what the run is."""
    file = workdir / "config.json"
    if not file.is_file():
        raise ConfigError(f"{workdir}: holds no run ({file.name} is missing); give the --workdir of a training run")
    values = read_json(file, ANY_OBJECT)
    try:
        saved = config.resolve(values)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    if saved.model.num_classes is None or saved.total_steps is None:
        key = "total_steps" if saved.model.num_classes else "model.num_classes"
        raise ConfigError(f"{file}: {key}: null, where each run has a number; {ADVICE}")
    wanted = with_scan_of(saved, config.resolve(recipes.override(config.to_dict(saved), overrides)))
    _refuse_other_runs(workdir, saved, wanted)
    return wanted


def with_scan_of(saved: Config, wanted: Config) -> Config:
    """Returns the config `wanted` with the `model.scan` of a saved run's, if it is left to the program.

    The run's parameters are stacked or not, whatever the platform that it now goes on with would choose.
    """
    scan = saved.model.scan if wanted.model.scan == "auto" else wanted.model.scan
    return dataclasses.replace(wanted, model=dataclasses.replace(wanted.model, scan=scan))


def with_weights_of(saved: Config, wanted: Config) -> Config:
    """Returns the config `wanted` with what a saved run took from `init.weights`, if it did.

    These are the keys that have their defaults; a run that goes on does not open the weights again.
    """
    if saved.init.weights is None:
        return wanted

    def taken(section: str, default: Any, keys: tuple[str, ...]) -> Any:
        old, new = getattr(saved, section), getattr(wanted, section)
        open_keys = (key for key in keys if f"{section}.{key}" not in wanted.init.own)
        unset = {key: getattr(old, key) for key in open_keys if getattr(new, key) == getattr(default, key)}
        return dataclasses.replace(new, **unset)

    model, data = taken("model", config.Model(), TRAITS), taken("data", config.Data(), PREPARED)
    return dataclasses.replace(wanted, model=model, data=data)


def check_same_run(workdir: Path, saved: Config, wanted: Config) -> None:
    """Raises `ConfigError` if `wanted` is another run than the one saved in `workdir`; logs permitted changes."""
    for change in _refuse_other_runs(workdir, saved, wanted):
        _log.warning("%s: resuming with another %s", workdir, change)


def write_run(workdir: Path, settings: Config, class_names: tuple[str, ...]) -> None:
    """Writes the run's config and class names. Raises `ConfigError` if that cannot be done."""
    try:
        names = class_names[: settings.model.num_classes]  # of data that name more classes than they have examples of
        write_atomically(workdir / "classes.json", json.dumps(names, ensure_ascii=False))
        write_atomically(workdir / "config.json", json.dumps(config.to_dict(settings), indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"{workdir}: cannot write there ({error.strerror}); choose another --workdir") from error


def class_names(workdir: Path) -> tuple[str, ...]:
    """Returns the names of the classes, in the order of the logits; the last logits may have no names."""
    file, classes = workdir / "classes.json", read_config(workdir).model.num_classes
    names = tuple(read_json(file, [TEXT]))
    if classes is not None and len(names) > classes:
        raise ConfigError(f"{file}: holds {len(names)} names, but the model has {classes} classes; {ADVICE}")
    return names


def write_summary(workdir: Path, summary: dict[str, Any]) -> None:
    """Writes `summary.json`, which marks a finished run."""
    write_atomically(workdir / "summary.json", json.dumps(summary) + "\n")


def summary(workdir: Path) -> dict[str, Any] | None:
    """Returns the summary of a finished run; None if the run has not finished."""
    file = workdir / "summary.json"
    return read_json(file, _SUMMARY) if file.exists() else None


def _refuse_other_runs(workdir: Path, saved: Config, wanted: Config) -> list[str]:
    """Returns a description of each changed key; raises `ConfigError` for keys that may not change."""
    changed = config.differences(saved, wanted)
    refused = [key for key in changed if not {key, key.partition(".")[0]} & set(MAY_CHANGE)]
    old, new = flatten(config.to_dict(saved)), flatten(config.to_dict(wanted))
    descriptions = {key: f"{key} (was {old.get(key)!r}, now {new.get(key)!r})" for key in changed}
    if refused:
        raise ConfigError(
            f"{workdir} holds a run of another config: {', '.join(descriptions[key] for key in refused)}; "
            "put them back or choose another --workdir"
        )
    return list(descriptions.values())
