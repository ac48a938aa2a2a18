"""Every key of a run with its type, bounds, default and meaning.

The schema is a tree of frozen dataclasses. A recipe (`configs/*.py`) receives it as an `ml_collections.ConfigDict`
from `default_config()`, changes what it wants and returns it (`recipes.py` runs it). `resolve` turns the result back
into a `Config`, so that the rest of the package reads typed attributes and nobody can read a key that is not declared.
The comment after a key is its documentation: `vit-dist configs --keys` prints it (`keys.py`). This module checks names,
types and bounds, and `contradictions.py` what keys say together; `model/` checks that a variant exists, `data/` that a
source does.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import ml_collections

from vit_dist import contradictions
from vit_dist.schema import (
    Bound,
    FractionBelowOne,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    above_0,
    build,
    flatten,
    from_0,
)
from vit_dist.schema import ConfigError as ConfigError

Pixels = Annotated[int, above_0(2**16)]
Size = Pixels | tuple[Pixels, Pixels]  # one number, or (height, width)
Width = Annotated[int, above_0(2**20)]
BatchSize = Annotated[int, above_0(2**24)]
Threads = Annotated[int, above_0(1024)]
Interval = tuple[float, float]
Seed = Annotated[int, Bound("at least 0 and below 2**32", lambda value: 0 <= value < 2**32)]  # what jax's keys take
AtLeastOne = Annotated[float, Bound("at least 1", lambda value: value >= 1)]
Probability = Annotated[float, Bound("in [0, 1]", lambda value: 0 <= value <= 1)]
HueTurn = Annotated[float, Bound("at least 0 and at most 0.5", lambda value: 0 <= value <= 0.5)]
ShearAngle = Annotated[float, Bound("at least 0 and below 90", lambda value: 0 <= value < 90)]


@dataclasses.dataclass(frozen=True)
class Mesh:
    """How many devices each axis takes; one axis, but not dcn_data, may be -1: all devices that are left."""

    data: int = -1  # replicas of the model; each takes its share of the batch
    fsdp: int = 1  # splits the batch as `data` does, and also parameters and optimizer state
    tensor: int = 1  # splits attention heads and MLP columns
    context: int = 1  # splits the tokens of an image (see `model.context_attention`)
    dcn_data: int = 1  # replicas over TPU slices or over nodes; the axes above then lie within one of them


@dataclasses.dataclass(frozen=True)
class Model:
    """The Vision Transformer (Dosovitskiy et al. 2021, arXiv:2010.11929) and its common variations."""

    variant: str | None = None  # size and patch, such as B/16; width, depth, mlp and heads override it
    width: Width | None = None  # of a token
    depth: Annotated[int, above_0(1000)] | None = None  # blocks
    mlp: Width | None = None  # hidden width of a block's MLP
    heads: Width | None = None  # attention heads of a block
    image_size: Size = 224  # pixels
    patch_size: Size | None = None  # pixels; null: the variant's
    channels: Annotated[int, above_0(4096)] = 3  # of an image
    num_classes: Annotated[int, from_0(2**24)] | None = (
        None  # null: as many as the data have; 0: no head, the model returns what the
    )
    # head would classify
    pool: Literal["cls", "mean", "cls_mean", "map"] = "cls"  # what the head classifies; cls: the class token; mean: the
    # mean of all patches; cls_mean: both, one after the other; map: attention pooling with one learned query
    pool_norm: Literal["before", "after", "both", "none"] = "before"  # whether tokens are normalised before pooling, or
    # what is pooled
    output_projection: Width | None = None  # width of a layer without bias after the pooling, as in CLIP
    # (Radford et al. 2021, arXiv:2103.00020); null: none
    class_token: bool | None = None  # whether there is one, even if it is not pooled; null: where `pool` takes it
    position: Literal["learned", "sincos2d", "rope2d", "none"] = "learned"  # kind of position embeddings; rope2d:
    # queries and keys are turned by angles of row and column (Siméoni et al. 2025, DINOv3, arXiv:2508.10104)
    rope_base: PositiveFloat = 100.0  # ratio of the longest and the shortest period of rope2d
    rope_jitter: AtLeastOne = 1.0  # largest factor by which rows and columns are stretched or shrunk in training
    rope_rescale: AtLeastOne = 1.0  # largest factor likewise, of both together
    position_std: NonNegativeFloat = 0.02  # standard deviation of learned position embeddings at the start
    cls_position: bool = True  # of learned positions the class token has one and starts at zero; false: it has none, as
    # in DeiT-III, and is drawn with `position_std`
    registers: Annotated[int, from_0(2**16)] = 0  # extra learned tokens (Darcet et al. 2024, arXiv:2309.16588)
    dropout: FractionBelowOne = 0.0  # rate after each of the MLP's two layers and after the attention's projection
    projection_dropout: FractionBelowOne | None = None  # rate after the attention's projection alone; null: as
    # `dropout`
    embedding_dropout: FractionBelowOne = 0.0  # rate on the sum of patch and position embeddings
    attention_dropout: FractionBelowOne = 0.0  # rate on the attention weights
    drop_path: FractionBelowOne = 0.0  # stochastic depth (Huang et al. 2016, arXiv:1603.09382): the rate of the last
    # block
    drop_path_schedule: Literal["linear", "constant"] = "linear"  # rising from 0 at the first block, or equal in all
    layer_scale: float | None = None  # initial value (Touvron et al. 2021, arXiv:2103.17239); null: no LayerScale
    qk_norm: bool | None = None  # of queries and keys (Dehghani et al. 2023, arXiv:2302.05442); null: the variant's
    qk_norm_bias: bool = False  # of these two norms
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"  # of every norm (RMSNorm: Zhang & Sennrich, arXiv:1910.07467)
    norm_epsilon: PositiveFloat = 1e-6  # added to the variance in every norm
    embedding_norm: Literal["none", "patches", "tokens"] = "none"  # a norm before the blocks: of patches before
    # positions are added, or of all tokens after it
    qkv_bias: bool = True  # of the queries, keys and values
    projection_bias: bool = True  # of the attention's output projection
    parallel: bool | None = None  # attention and MLP side by side on one LayerNorm, as in ViT-22B; null: the variant's
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu"] | None = None  # of the MLP; null: the variant's
    kernel_init: Literal["xavier_uniform", "lecun_normal", "normal"] = "xavier_uniform"  # normal: N(0, 0.02^2)
    pre_logits: Width | None = None  # width of a tanh layer before the head; null: none
    head_zero_init: bool = True  # the head's kernel starts at zero
    head_bias: float = 0.0  # initial value of the head's bias; -6.9 or -10 with a sigmoid loss
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the arithmetic; parameters are float32
    remat: Literal["auto", "none", "names", "block"] = "auto"  # what the backward pass computes again to save
    # memory: nothing; names: attention weights and element-wise operations; block: everything in a block; auto: as much
    # as the device's memory needs
    scan: bool | Literal["auto"] = "auto"  # true: all blocks are one compiled loop; false: blocks are compiled one by
    # one, which takes longer and runs faster; auto: by platform and depth
    attention: Literal["auto", "xla", "cudnn"] = "auto"  # what computes attention; auto: the device's fused kernel
    # where it fits
    context_attention: Literal["ring", "all_to_all"] = "ring"  # with mesh.context: pass keys and values around a ring,
    # or trade tokens for heads before and after, as DeepSpeed-Ulysses does


@dataclasses.dataclass(frozen=True)
class MixtureSource:
    """One of the sets that a mixture joins."""

    source: str = "folder"  # as data.source
    path: str | None = None  # as data.path
    weight: float | None = None  # relative to the sum of all weights: how often its examples come; null in all sources:
    # each example once an epoch


@dataclasses.dataclass(frozen=True)
class Data:
    """Where images come from, and how they are changed before the model sees them."""

    source: str = "digits"  # the container: digits, idx, folder, tar, imagenet_tar, webdataset, parquet, npz, tfds or
    # array_record
    path: str | None = None  # a file or folder, or an address that fsspec knows, such as gs://bucket/images
    mixture: tuple[MixtureSource, ...] = ()  # sets to train on together, instead of source and path
    classes: tuple[str, ...] = ()  # the classes to keep, in this order; none: all
    fraction: PositiveFraction = 1.0  # of each class's training examples to keep; a larger fraction keeps those of a
    # smaller one too
    repeats: Annotated[int, above_0(2**16)] = (
        1  # how often in a row each example comes, augmented differently each time
    )
    # (arXiv:1902.05509); an epoch is longer by this factor
    cache_dir: str | None = None  # folder for the indexes of large sets; null: the user's cache folder
    name: Literal["mnist", "fashion_mnist"] | None = None  # which set an `idx` source is: it names the classes
    download: bool = False  # download the missing files of the data set `name`
    in_memory: bool = False  # decode the whole split at the start and keep its pixels
    memory_limit_gb: Annotated[float, above_0(2**20)] = 4.0  # of host memory, for pixels or a compressed tar kept in it
    on_bad: Literal["error", "skip"] = "error"  # what to do with a file that does not decode
    max_bad_fraction: NonNegativeFloat = 0.01  # of a split; the run stops when more of it was skipped
    workers: Annotated[int, from_0(1024)] = (
        0  # processes that decode images in files; 0: threads of this one, which is quicker on
    )
    # few cores
    threads: Threads = 8  # decoding threads of each process of the job, where there are no workers
    read_ahead_mb: Annotated[float, above_0(2**20)] = (
        512.0  # pixels that each process of the job holds ready ahead of time
    )
    prefetch: Threads = 2  # batches on the devices ahead of the step
    mean: float | tuple[float, ...] = 0.5  # of pixels in [0, 1]; one number, or one per channel
    std: PositiveFloat | tuple[PositiveFloat, ...] = 0.5  # likewise
    crop_area: tuple[PositiveFraction, PositiveFraction] | None = None  # random resized crop: shares of the image's
    # area, from and to; null: the whole image
    crop_aspect: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)  # width over height of such a crop, from and to
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"  # of every resize, antialiased; the device's random
    # crops are sampled bilinearly
    crop_decode: bool = False  # decode only the rows and columns of a JPEG's crop: needs vit-dist[crop-decode]
    flip: bool = False  # left-right, one time in two
    augment_on: Literal["auto", "host", "device"] = "auto"  # where images are cropped and flipped; auto: on the device
    # if they are in memory and every augmentation can be done there
    color_jitter: NonNegativeFloat = 0.0  # largest change of brightness, contrast and saturation: 0.3 is a factor of
    # 0.7 to 1.3
    hue_jitter: HueTurn = 0.0  # largest turn of the hue, as a share of the colour circle
    randaugment_layers: Annotated[int, from_0(100)] = (
        0  # operations on each image (Cubuk et al. 2020, arXiv:1909.13719); 0: none
    )
    randaugment_magnitude: NonNegativeFloat = 10.0  # strength of the operations; the paper goes up to 10, some recipes
    # take 15 or 20
    randaugment_std: NonNegativeFloat = 0.0  # standard deviation of the magnitude, drawn anew for each operation
    three_augment: bool = False  # gray, solarised or blurred (Touvron et al. 2022, arXiv:2204.07118)
    erase: Probability = 0.0  # probability of a random box of noise (Zhong et al. 2020, arXiv:1708.04896)
    shift: FractionBelowOne = 0.0  # largest shift, as a share of the image's side
    rotate: NonNegativeFloat = 0.0  # largest rotation, in degrees
    scale: NonNegativeFloat = 0.0  # largest change of scale: 0.1 is between 1/1.1 and 1.1
    shear: ShearAngle = 0.0  # largest shear, in degrees
    eval_crop: PositiveFraction | None = None  # centre crop of an evaluation, as a share of the short side; null: the
    # whole image
    eval_crop_mode: Literal["fast", "center", "squash", "border"] = "fast"  # fast: cut, then resize; others, as timm's
    # crop_mode: resize the short side, both, or the long one to image_size / eval_crop, then cut, or fill with the mean
    eval_rounding: Literal["timm", "transformers"] = "timm"  # whose pixels they are, unless eval_crop_mode is fast


@dataclasses.dataclass(frozen=True)
class Init:
    """What a fresh run starts from. What has its default in `model` and `data` is then taken from the weights."""

    weights: str | None = None  # a folder, a .safetensors or .npz file, a name on the Hugging Face hub, or the workdir
    # of an earlier run; null: random numbers
    step: NonNegativeInt | Literal["newest", "best"] = "newest"  # which checkpoint of an earlier run
    head: Literal["auto", "new", "keep"] = "auto"  # keep: that of the weights; auto: if it has all classes by name
    freeze: str = "none"  # parameters that do not change: none; backbone, all but the head; all_but_last_N, all but the
    # last N blocks and what follows them; or a regular expression of paths such as blocks/mlp/up/kernel
    own: tuple[str, ...] = ()  # keys that stay as they are though they have their defaults, such as model.image_size


@dataclasses.dataclass(frozen=True)
class Lora:
    """Trains adapters of dense layers, and the head, instead of all parameters (Hu et al. 2021, arXiv:2106.09685)."""

    rank: Annotated[int, from_0(2**16)] = 0  # of an adapter; 0: there are none
    alpha: PositiveFloat | None = None  # what adapters add is multiplied by alpha / rank; null: rank, so by 1
    targets: tuple[Literal["qkv", "projection", "mlp"], ...] = ("qkv", "projection", "mlp")  # which layers of a block


@dataclasses.dataclass(frozen=True)
class Rule:
    """How to train the parameters whose path, such as `blocks/mlp/up/kernel`, matches a regular expression."""

    path: str = ""  # the regular expression
    learning_rate: NonNegativeFloat = 1.0  # multiplies the schedule
    weight_decay: NonNegativeFloat | None = None  # multiplies `optimizer.weight_decay`; null: 1 for kernels, 0 for all
    # else
    frozen: bool = False  # these parameters do not change


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The update rule (optax) and its schedule. Weight decay is AdamW's: scaled by the schedule."""

    name: str = "adamw"  # the update rule: sgd, adam, adamw, lion, lamb, adafactor or muon
    learning_rate: NonNegativeFloat = 1e-3  # the peak of the schedule
    weight_decay: NonNegativeFloat = 0.0  # of kernels, unless a rule says otherwise
    warmup_steps: NonNegativeInt = 0  # in which the learning rate rises to its peak; 0: as warmup_epochs says
    warmup_epochs: NonNegativeFloat = 0.0  # 0: no warm-up
    schedule: Literal["cosine", "linear", "rsqrt", "constant"] = "cosine"  # after the warm-up
    end_factor: NonNegativeFloat = 0.0  # share of the peak that a cosine or linear schedule ends at
    rsqrt_timescale: PositiveInt = 10_000  # steps after which an rsqrt schedule has fallen to 0.71 of the peak
    cooldown_steps: NonNegativeInt = 0  # linear to zero at the end of an rsqrt or constant schedule
    clip: PositiveFloat | None = None  # largest global norm of the gradient; null: no clipping
    momentum: FractionBelowOne = 0.9  # of sgd and muon
    nesterov: bool = False  # Nesterov momentum, for sgd, adam, adamw, lamb and muon
    b1: FractionBelowOne = 0.9  # decay of the first moment
    b2: FractionBelowOne = 0.999  # decay of the second moment
    eps: PositiveFloat = 1e-8  # added to the root of the second moment
    moment_dtype: Literal["float32", "bfloat16"] = "float32"  # of the first moment
    layer_decay: PositiveFraction = 1.0  # the rate falls by this factor from a block to the one before it, from the
    # head's down to the embedding's (BEiT, arXiv:2106.08254)
    rules: tuple[Rule, ...] = ()  # for some of the parameters; the first that matches counts


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """When and on what a run is evaluated."""

    every_steps: NonNegativeInt = 0  # steps between evaluations, with one more at the end; 0: as every_epochs says
    every_epochs: NonNegativeFloat = 0.0  # epochs between evaluations, with one more at the end; 0: never
    splits: tuple[str, ...] = ("test",)  # the first is the run's result
    batch_size: BatchSize | None = None  # null: the training batch
    probes: tuple[Literal["knn", "few_shot", "linear"], ...] = ()  # of the features, on all splits but train: nearest
    # neighbours; a linear classifier of a few examples a class, or of all


@dataclasses.dataclass(frozen=True)
class Probe:
    """How features are evaluated, by `vit-dist probe` and `evaluate.probes`."""

    k: tuple[PositiveInt, ...] = (20,)  # how many nearest neighbours vote
    metric: Literal["cosine", "l2"] = "cosine"  # which neighbours are near; l2: by distance
    temperature: PositiveFloat | None = 0.07  # of their votes, exp(similarity / temperature), as in DINO
    # (arXiv:2104.14294); null: all count alike
    shots: tuple[PositiveInt, ...] = (10,)  # training examples a class of a few-shot probe
    seed: Seed = 0  # of their choice
    l2: tuple[PositiveFloat, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # penalties of linear classifiers to choose
    # from by training examples that are left out


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When a run is saved, and which saves are kept."""

    every_steps: NonNegativeInt = 0  # steps between saves, with one more at the end; 0: as every_epochs says
    every_epochs: NonNegativeFloat = 0.0  # epochs between saves, with one more at the end; 0: at the end alone
    keep_last: PositiveInt = 1  # how many of the newest are kept
    retries: PositiveInt = 3  # how many saves in a row may fail, as on a full disk, before the run ends
    verify: bool = True  # whether a checkpoint that is read is compared with its digests, and refused if it is damaged
    keep_best: NonNegativeInt = 0  # how many of the best are kept, by top-1 of the first split of `evaluate.splits`; a
    # best one is saved when it is measured


@dataclasses.dataclass(frozen=True)
class Profile:
    """A trace of a few steps for TensorBoard or XProf, in `workdir/profile`."""

    steps: NonNegativeInt = 0  # how many to trace; 0: none
    start_step: PositiveInt = 10  # the trace begins after this step


@dataclasses.dataclass(frozen=True)
class Deadlines:
    """Seconds after which a job of several processes stops waiting, and names the processes that are missing."""

    start_seconds: PositiveInt = 300  # for all processes to join
    peer_seconds: PositiveInt = 60  # without a message from a process
    step_seconds: PositiveInt = 1800  # in which no process begins a training step or an evaluation batch; counted from
    # when the data are open, without compilation


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: Seed = 0  # of everything random
    total_steps: PositiveInt | None = None  # length of the run; null: as total_epochs says
    total_epochs: PositiveFloat | None = None  # length of the run, where total_steps is null
    batch_size: BatchSize = 128  # examples a step, over all devices
    accumulate_steps: PositiveInt = 1  # micro-batches a step
    accumulate_gather: Literal["step", "microbatch"] = "microbatch"  # with fsdp, how often parameters are gathered and
    # gradients scattered: step needs memory for all parameters and gradients in full, microbatch communicates more
    loss: Literal["softmax", "sigmoid"] = "softmax"  # cross-entropy over the classes, or of each class by itself
    binarize_targets: bool = False  # sigmoid loss: every class that is in the mixed image counts in full (DeiT-III)
    label_smoothing: FractionBelowOne = 0.0  # share of a target that goes to all classes evenly
    mixup: NonNegativeFloat = 0.0  # alpha of Beta(alpha, alpha) (Zhang et al. 2018, arXiv:1710.09412); 0: none
    cutmix: NonNegativeFloat = 0.0  # likewise (Yun et al. 2019, arXiv:1905.04899); with both, each is taken one time in
    # two
    ema_decay: FractionBelowOne = 0.0  # of the parameters' moving average; 0: none is kept
    log_every: PositiveInt = 20  # steps between rows of metrics
    log_examples: bool = False  # rows hold a digest of the batch's example ids
    deterministic: bool = False  # bitwise repeatable on GPUs too, and slower there
    fake_devices: Annotated[int, from_0(1024)] = 0  # fake CPU devices of each process; 0: the real devices
    xla_options: bool = True  # compile with the options of `mesh/xla_options.py`; false: XLA's own defaults
    mesh: Mesh = Mesh()
    model: Model = Model()
    data: Data = Data()
    init: Init = Init()
    lora: Lora = Lora()
    optimizer: Optimizer = Optimizer()
    evaluate: Evaluate = Evaluate()
    probe: Probe = Probe()
    checkpoint: Checkpoint = Checkpoint()
    profile: Profile = Profile()
    deadlines: Deadlines = Deadlines()


def default_config() -> ml_collections.ConfigDict:
    """Returns the schema's defaults, for a recipe to change; `recipes.load` checks the result."""
    return ml_collections.ConfigDict(dataclasses.asdict(Config()), type_safe=False)


def resolve(values: Mapping[str, Any]) -> Config:
    """Returns nested values as a checked `Config`. Raises `ConfigError` naming the key."""
    config = typed(values)
    contradictions.check(config)
    return config


def typed(values: Mapping[str, Any]) -> Config:
    """Returns nested values as a `Config` of which only names, types and bounds are checked."""
    return build(Config, values)


def to_dict(config: Config) -> dict[str, Any]:
    """Returns nested plain values that JSON can hold and `resolve` takes back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def differences(old: Config, new: Config) -> list[str]:
    """Returns the keys, such as `model.depth`, whose values differ between two configs."""
    flat_old, flat_new = flatten(to_dict(old)), flatten(to_dict(new))
    return [key for key in flat_new if flat_old.get(key) != flat_new[key]]


def pair(size: Size) -> tuple[int, int]:
    """Returns (height, width) of a size given as one number or two."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
