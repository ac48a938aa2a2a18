"""Every key of a run, its type, default and meaning, in one place.

The schema is a tree of frozen dataclasses. A recipe (`configs/*.py`) receives it as an `ml_collections.ConfigDict`
from `default_config()`, changes what it wants and returns it (`recipes.py` runs it); `resolve` turns the result back
into a `Config`, so that the rest of the package reads typed attributes and a key that nobody declared cannot be read.
This module checks names and types and does the arithmetic that belongs to several keys at once; what a value *means*
(is there such a variant, such a source) is checked by the room that knows.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import ml_collections


class ConfigError(ValueError):
    """What the user asked for cannot be done; the message is one line that says which key or file, and what to do."""


Size = int | tuple[int, int]  # one number, or (height, width)
Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Mesh:
    """How many devices each axis takes; one of the first four may be -1: all devices that are left."""

    data: int = -1  # replicas of the model; each takes its share of the batch
    fsdp: int = 1  # the batch is split as over `data`, and parameters and optimizer state are split too
    tensor: int = 1  # attention heads and MLP columns are split
    context: int = 1  # the tokens of an image are split (see `model.context_attention`)
    dcn_data: int = 1  # replicas over TPU slices or over nodes; the axes above are then those within one


@dataclasses.dataclass(frozen=True)
class Model:
    """The Vision Transformer (Dosovitskiy et al. 2021, arXiv:2010.11929) and its common variations."""

    variant: str | None = None  # such as "B/16": size and patch; the four numbers below win over it
    width: int | None = None
    depth: int | None = None
    mlp: int | None = None
    heads: int | None = None
    image_size: Size = 224
    patch_size: Size | None = None  # None: the variant's
    channels: int = 3
    num_classes: int | None = None  # None: as many as the data has
    pool: Literal["cls", "mean", "map"] = "cls"
    position: Literal["learned", "sincos2d"] = "learned"
    position_std: float = 0.02  # of the learned position embeddings at the start
    cls_position: bool = True  # of learned positions: the class token has one and starts at zero, as in the paper; in
    # DeiT-III it has none, and is drawn with `position_std` itself
    registers: int = 0  # extra learned tokens (Darcet et al. 2024, arXiv:2309.16588)
    dropout: float = 0.0  # after each of the MLP's two layers and after the attention's projection
    projection_dropout: float | None = None  # after the attention's projection alone; None: as `dropout`
    embedding_dropout: float = 0.0  # on the sum of patch and position embeddings
    attention_dropout: float = 0.0  # on the attention weights
    drop_path: float = 0.0  # stochastic depth (Huang et al. 2016, arXiv:1603.09382): the last block's rate
    drop_path_schedule: Literal["linear", "constant"] = "linear"  # from 0 at the first block, or the same in all
    layer_scale: float | None = None  # initial value (Touvron et al. 2021, arXiv:2103.17239); None: no LayerScale
    qk_norm: bool | None = None  # LayerNorm on queries and keys (Dehghani et al. 2023, arXiv:2302.05442)
    qkv_bias: bool = True
    projection_bias: bool = True  # of the attention's output projection
    parallel: bool | None = None  # attention and MLP side by side on one LayerNorm, as in ViT-22B
    activation: Literal["gelu", "gelu_tanh", "swiglu"] | None = None  # None, here and above: the variant's
    kernel_init: Literal["xavier_uniform", "lecun_normal", "normal"] = "xavier_uniform"  # normal: N(0, 0.02^2)
    pre_logits: int | None = None  # width of a tanh layer before the head; None: none
    head_zero_init: bool = True
    head_bias: float = 0.0  # its initial value; -6.9 or -10 with a sigmoid loss
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the arithmetic; parameters are float32
    remat: Literal["none", "names", "block"] = "none"  # what the backward pass computes again: nothing, all but
    # the named dense products' results, or everything inside a block
    scan: bool = True  # blocks stacked and run by one compiled loop; False: each by itself, quicker but for compiling
    attention: Literal["auto", "xla", "cudnn"] = "auto"
    context_attention: Literal["ring", "all_to_all"] = "ring"  # with mesh.context: pass keys and values round, or
    # trade tokens for heads before and after, as DeepSpeed-Ulysses does


@dataclasses.dataclass(frozen=True)
class Part:
    """One of the sets that a mixture is made of."""

    source: str = "folder"
    path: str | None = None
    weight: float | None = None  # its share of the stream, over the sum of all; None for all: each example as likely


@dataclasses.dataclass(frozen=True)
class Data:
    """Where images come from, and what is done to them before the model sees them."""

    source: str = "digits"  # the container: a key of `data.sets.sources.SOURCES`
    path: str | None = None  # a file or folder, or an address that fsspec knows, such as gs://bucket/images
    mixture: tuple[Part, ...] = ()  # sets to train on together, in place of source and path
    classes: tuple[str, ...] = ()  # keep these alone, in this order; none: all
    fraction: float = 1.0  # of each class's training examples; a smaller one's are among a larger one's
    repeats: int = 1  # times an example follows itself, augmented anew (arXiv:1902.05509); each counts for the epoch
    cache_dir: str | None = None  # for the indexes of large sets; None: the user's cache folder
    name: Literal["mnist", "fashion_mnist"] | None = None  # which set an `idx` source is: it names the classes
    download: bool = False  # fetch the files of the set that `name` says where they are missing
    in_memory: bool = False  # decode the whole split at the start and keep its pixels
    memory_limit_gb: float = 4.0  # of host memory, for pixels or a compressed tar kept in it
    on_bad: Literal["error", "skip"] = "error"  # what to do about a file that does not decode
    max_bad_fraction: float = 0.01  # of a split; when more of it was skipped the run stops
    workers: int = 0  # processes that decode images in files; 0: threads of this one, which is quicker on few cores
    threads: int = 8  # of each process of the job that decode, where there are no workers
    read_ahead_mb: float = 512.0  # of pixels that each process of the job has ready ahead of time
    prefetch: int = 2  # batches placed on the devices ahead of the step
    mean: float | tuple[float, ...] = 0.5  # of pixels in [0, 1]; one number or one a channel
    std: float | tuple[float, ...] = 0.5
    crop_area: Interval | None = None  # random resized crop: share of the image's area; None: the whole image
    crop_aspect: Interval = (3 / 4, 4 / 3)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"  # of every resize, antialiased; the device's random
    # crops are sampled bilinearly
    crop_decode: bool = False  # of JPEG, the rows and columns of a crop alone: needs vit-dist[crop-decode]
    flip: bool = False  # left-right, one time in two
    augment_on: Literal["auto", "host", "device"] = "auto"  # what crops and flips; auto: the device does where the
    # images are in memory and nothing is asked for that only the host can do
    color_jitter: float = 0.0  # largest change of brightness, contrast and saturation: 0.3 is a factor of 0.7 to 1.3
    hue_jitter: float = 0.0  # largest turn of the hue, as a share of the colour circle
    randaugment_layers: int = 0  # operations on each image (Cubuk et al. 2020, arXiv:1909.13719); 0: none
    randaugment_magnitude: float = 10.0  # of 10, which most recipes stay below; 15 and 20 go beyond
    randaugment_std: float = 0.0  # of the magnitude, drawn anew for each operation
    three_augment: bool = False  # gray, solarised or blurred (Touvron et al. 2022, arXiv:2204.07118)
    erase: float = 0.0  # probability of a random box of noise (Zhong et al. 2020, arXiv:1708.04896)
    shift: float = 0.0  # largest shift, as a share of the image's side
    rotate: float = 0.0  # largest rotation, in degrees
    scale: float = 0.0  # largest change of scale: 0.1 is between 1/1.1 and 1.1
    shear: float = 0.0  # largest shear, in degrees
    eval_crop: float | None = None  # centre crop of this ratio of the short side; None: the whole image


@dataclasses.dataclass(frozen=True)
class Rule:
    """What holds for the parameters whose path (`blocks/mlp/up/kernel`) matches a regular expression."""

    path: str = ""
    learning_rate: float = 1.0  # multiplies the schedule
    weight_decay: float | None = None  # multiplies `optimizer.weight_decay`; None: 1 for kernels, 0 for all else
    frozen: bool = False


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The update rule (optax) and its schedule. Weight decay is AdamW's: scaled by the schedule."""

    name: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warmup_steps: int = 0
    schedule: Literal["cosine", "linear", "rsqrt", "constant"] = "cosine"
    end_factor: float = 0.0  # of the peak, reached at the end of a cosine or linear schedule
    rsqrt_timescale: int = 10_000
    cooldown_steps: int = 0  # linear to zero at the end of an rsqrt or constant schedule
    clip: float | None = None  # largest global norm of the gradient
    momentum: float = 0.9
    nesterov: bool = False
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    moment_dtype: Literal["float32", "bfloat16"] = "float32"  # of the first moment
    rules: tuple[Rule, ...] = ()  # the first that matches holds


@dataclasses.dataclass(frozen=True)
class Evaluate:
    every_steps: int = 0  # 0: never; otherwise also at the end
    splits: tuple[str, ...] = ("test",)
    batch_size: int | None = None  # None: the training batch


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    every_steps: int = 0  # 0: only at the end
    keep_last: int = 1
    keep_best: int = 0  # by top-1 of the first split of `evaluate.splits`; a best one is saved when it is measured


@dataclasses.dataclass(frozen=True)
class Profile:
    steps: int = 0  # how many to trace into `workdir/profile`; 0: none
    start_step: int = 10  # the steps after this one


@dataclasses.dataclass(frozen=True)
class Deadlines:
    """Seconds after which a job of several processes gives up a wait, and names who did not come."""

    start_seconds: int = 300  # for all processes to join
    peer_seconds: int = 60  # without a sign of life from a process
    step_seconds: int = 1800  # once the data are open: in which no process begins a step or an evaluation's batch


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int = 0
    total_steps: int | None = None  # wins over total_epochs
    total_epochs: float | None = None
    batch_size: int = 128  # examples a step, over all devices
    accumulate_steps: int = 1  # micro-batches a step
    accumulate_gather: Literal["step", "microbatch"] = "microbatch"  # with fsdp: when parameters are gathered and
    # gradients scattered: once a step costs memory for both whole, once a micro-batch costs traffic
    loss: Literal["softmax", "sigmoid"] = "softmax"
    binarize_targets: bool = False  # sigmoid loss: every class that is in the mixed image counts in full (DeiT-III)
    label_smoothing: float = 0.0
    mixup: float = 0.0  # alpha of Beta(alpha, alpha) (Zhang et al. 2018, arXiv:1710.09412); 0: none
    cutmix: float = 0.0  # likewise (Yun et al. 2019, arXiv:1905.04899); with both, each is taken one time in two
    ema_decay: float = 0.0  # 0: none
    log_every: int = 20
    log_examples: bool = False
    deterministic: bool = False  # bitwise repeatable on GPUs too, at some cost
    fake_devices: int = 0  # CPU devices to pretend to have, in each process; 0: the real ones
    xla_options: bool = True  # compile with the options of `mesh/xla_options.py`; False: XLA's own defaults
    mesh: Mesh = Mesh()
    model: Model = Model()
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    profile: Profile = Profile()
    deadlines: Deadlines = Deadlines()


def default_config() -> ml_collections.ConfigDict:
    """The schema's defaults, for a recipe to change; `recipes.load` checks what comes back."""
    return ml_collections.ConfigDict(dataclasses.asdict(Config()), type_safe=False)


def resolve(values: Mapping[str, Any]) -> Config:
    """Nested values -> a checked `Config`. Raises `ConfigError` naming the key."""
    config = typed(values)
    _check(config)
    return config


def typed(values: Mapping[str, Any]) -> Config:
    """As `resolve`, names and types alone: what a recipe says before the command line has had its say."""
    return _build(Config, values, "")


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values that JSON can hold and `resolve` takes back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def differences(old: Config, new: Config) -> list[str]:
    """The keys, such as `model.depth`, that two configs give different values."""
    flat_old, flat_new = flatten(to_dict(old)), flatten(to_dict(new))
    return [key for key in flat_new if flat_old.get(key) != flat_new[key]]


def one_of(key: str, value: str, options: Iterable[str]) -> str:
    """`value`, if it is among the options; otherwise a `ConfigError` that lists them and the near miss."""
    options = list(options)
    if value not in options:
        raise ConfigError(f"{key}: {value!r} is none of {', '.join(options)}{near_miss(value, options)}")
    return value


def pair(size: Size) -> tuple[int, int]:
    """(height, width) of a size given as one number or two."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def nearest_multiples(value: int, of: int) -> str:
    """'24 or 32' for 30 and 8: the sizes to suggest where one does not divide."""
    below = value // of * of
    return f"{below} or {below + of}" if below else str(of)


def total_steps(config: Config, train_examples: int) -> int:
    """Optimizer steps of the whole run: `total_steps`, or the epochs' worth of batches, rounded up."""
    if config.total_steps is not None:
        return config.total_steps
    assert config.total_epochs is not None
    return max(1, math.ceil(config.total_epochs * train_examples / config.batch_size))


def _build(hint: Any, value: Any, key: str) -> Any:
    """`value` as the type that the schema declares at `key`."""
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key or 'config'}: expected keys and values, found {value!r} ({type(value).__name__})")
        for name in value:
            check_known(hint, name, key)
        hints = typing.get_type_hints(hint)
        return typing.cast(type, hint)(
            **{name: _build(hints[name], item, f"{key}.{name}" if key else name) for name, item in value.items()}
        )
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            if _fits(option, value):
                return _build(option, value, key)
    elif origin is tuple and isinstance(value, Sequence) and not isinstance(value, str):
        items = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(items) == len(value):
            return tuple(_build(item, one, f"{key}[{i}]") for i, (item, one) in enumerate(zip(items, value)))
    elif origin is Literal:
        if isinstance(value, str):
            return one_of(key, value, arguments)
    elif _fits(hint, value):
        return hint(value) if hint in (int, float) else value
    raise ConfigError(f"{key}: expected {_name(hint)}, found {value!r} ({type(value).__name__})")


def _fits(hint: Any, value: Any) -> bool:
    if typing.get_origin(hint) is tuple:
        arguments = typing.get_args(hint)
        right_length = arguments[-1] is Ellipsis or (hasattr(value, "__len__") and len(value) == len(arguments))
        return isinstance(value, list | tuple) and right_length
    if typing.get_origin(hint) is Literal:
        return isinstance(value, str)
    if hint is types.NoneType:
        return value is None
    if isinstance(value, bool):
        return hint is bool
    if hint is int:
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if hint is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, hint)


def _name(hint: Any) -> str:
    """A type as a person would say it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_name(a) for a in arguments)
    if origin is tuple:
        return (
            f"a list of {_name(arguments[0])}" if arguments[-1] is Ellipsis else f"({', '.join(map(_name, arguments))})"
        )
    if origin is Literal:
        return " | ".join(map(str, arguments))
    plain = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}
    return plain.get(hint) or "{" + ", ".join(field.name for field in dataclasses.fields(hint)) + "}"


def check_known(hint: Any, name: str, parent: str) -> None:
    """Raises `ConfigError` where the dataclass `hint`, at key `parent`, declares no key `name`."""
    fields = [field.name for field in dataclasses.fields(hint)]
    if name not in fields:
        meant = near_miss(name, fields, parent) or _elsewhere(name)
        raise ConfigError(f"unknown key {parent + '.' if parent else ''}{name}{meant}")


_SHORT = {"lr": "learning_rate", "wd": "weight_decay", "epochs": "total_epochs", "steps": "total_steps"}


def _elsewhere(name: str) -> str:
    """The keys anywhere in the schema that end as `name`, one of its usual short forms, or nearly so."""
    keys = flatten(dataclasses.asdict(Config()))
    ends = {key.rpartition(".")[2] for key in keys}
    wanted = _SHORT.get(name) or next(iter(difflib.get_close_matches(name, ends, n=1, cutoff=0.75)), None)
    meant = [key for key in keys if key.rpartition(".")[2] == wanted]
    return f" (did you mean {' or '.join(meant)}?)" if meant else ""


def near_miss(name: str, options: Iterable[str], parent: str = "") -> str:
    close = difflib.get_close_matches(name, list(options), n=1)
    return f" (did you mean {parent + '.' if parent else ''}{close[0]}?)" if close else ""


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def _check(config: Config) -> None:
    """What can be said of the values without data, devices or a model."""
    if config.total_steps is None and config.total_epochs is None:
        raise ConfigError("total_steps: neither it nor total_epochs is set; set one")
    flat = flatten(dataclasses.asdict(config))
    for key, (wanted, holds) in _RANGES.items():
        values = flat[key] if isinstance(flat[key], tuple) else (flat[key],)
        for value in values:
            if value is not None and not holds(value):
                raise ConfigError(f"{key}: must be {wanted}, found {value}")
    for i, rule in enumerate(config.optimizer.rules):
        for name, value in (("learning_rate", rule.learning_rate), ("weight_decay", rule.weight_decay)):
            if value is not None and value < 0:
                raise ConfigError(f"optimizer.rules[{i}].{name}: must not be below 0, found {value}")
    for key in ("data.crop_area", "data.crop_aspect"):
        if flat[key] is not None and flat[key][0] > flat[key][1]:
            raise ConfigError(f"{key}: runs from {flat[key][0]:g} down to {flat[key][1]:g}; write the smaller first")
    for key in ("data.mean", "data.std"):
        if isinstance(flat[key], tuple) and len(flat[key]) != config.model.channels:
            raise ConfigError(
                f"{key}: has {len(flat[key])} numbers, but model.channels is {config.model.channels}; "
                "give one a channel, or a single number for all"
            )
    if config.binarize_targets and config.loss != "sigmoid":
        raise ConfigError(f"binarize_targets: goes with loss=sigmoid, found loss={config.loss}; set one of them")
    model = config.model
    if model.attention == "cudnn" and (model.dtype != "bfloat16" or model.attention_dropout):
        raise ConfigError(
            f"model.attention: cudnn takes dtype=bfloat16 and attention_dropout=0, found {model.dtype} and "
            f"{model.attention_dropout:g}; change these or set model.attention=auto"
        )
    if config.batch_size % config.accumulate_steps:
        raise ConfigError(
            f"batch_size: {config.batch_size} does not divide into accumulate_steps={config.accumulate_steps} "
            f"micro-batches; take {nearest_multiples(config.batch_size, config.accumulate_steps)}"
        )


_Range = tuple[str, Callable[[float], bool]]
_POSITIVE: _Range = ("above 0", lambda value: value > 0)
_NOT_NEGATIVE: _Range = ("0 or more", lambda value: value >= 0)
_SHARE: _Range = ("in [0, 1)", lambda value: 0 <= value < 1)
_PART: _Range = ("above 0 and at most 1", lambda value: 0 < value <= 1)
_RANGES: dict[str, _Range] = {
    **dict.fromkeys(
        "total_steps total_epochs batch_size accumulate_steps log_every model.width model.depth model.mlp model.heads "
        "model.channels model.num_classes model.image_size model.patch_size model.pre_logits data.threads "
        "data.prefetch data.read_ahead_mb data.repeats data.memory_limit_gb data.std data.crop_aspect "
        "evaluate.batch_size optimizer.clip optimizer.eps optimizer.rsqrt_timescale checkpoint.keep_last "
        "profile.start_step deadlines.start_seconds deadlines.peer_seconds deadlines.step_seconds".split(),
        _POSITIVE,
    ),
    **dict.fromkeys(
        "mixup cutmix fake_devices model.registers model.position_std data.workers data.rotate data.scale "
        "data.max_bad_fraction data.color_jitter data.randaugment_layers data.randaugment_magnitude "
        "data.randaugment_std optimizer.learning_rate optimizer.weight_decay optimizer.warmup_steps "
        "optimizer.end_factor optimizer.cooldown_steps evaluate.every_steps checkpoint.every_steps "
        "checkpoint.keep_best profile.steps".split(),
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys(
        "label_smoothing ema_decay model.dropout model.projection_dropout model.embedding_dropout "
        "model.attention_dropout model.drop_path data.shift optimizer.momentum optimizer.b1 optimizer.b2".split(),
        _SHARE,
    ),
    **dict.fromkeys(("data.crop_area", "data.eval_crop", "data.fraction"), _PART),
    "data.erase": ("a probability, 0 to 1", lambda value: 0 <= value <= 1),
    "data.hue_jitter": ("at least 0 and at most 0.5", lambda value: 0 <= value <= 0.5),
    "data.shear": ("at least 0 and below 90", lambda value: 0 <= value < 90),
    "seed": ("at least 0 and below 2**32", lambda value: 0 <= value < 2**32),  # jax's keys take 32 bits of it
}
