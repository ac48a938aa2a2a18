"""Opens published weights: which family wrote them, the model that they are, and its parameters, not yet read."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from flax import nnx

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.model.shape import shape_of
from vit_dist.model.vit import ViT
from vit_dist.weights import naming
from vit_dist.weights import tokens as special_tokens
from vit_dist.weights.description import Description
from vit_dist.weights.families import dinov3, flax_npz, open_clip, own, timm, transformers
from vit_dist.weights.lazy import Lazy
from vit_dist.weights.naming import Tensors
from vit_dist.weights.origin import Origin, open_origin
from vit_dist.weights.stored_tensor import printed

# Keys of `model` in which ours may differ from the weights: their tensors are fitted.
FITTED = ("image_size", "patch_size", "channels", "num_classes")
# What no tensor shows, and a user may therefore have to say.
UNSEEN = ("model.heads", "model.activation", "model.norm_epsilon", "model.rope_base")
# The first that recognises the files counts: names of tensors tell more than a config that may lie beside other files.
FAMILIES: tuple[ModuleType, ...] = (own, open_clip, flax_npz, timm, transformers, dinov3)


@dataclasses.dataclass(frozen=True)
class Published:
    """Weights to start from: of others, or of an earlier run.

    Attributes:
      origin: the files.
      description: what their family tells of them.
      model: the model that they are.
      parameters: ours by path, of this model, the blocks one by one.
      taken: for each tensor that is used, the paths of those that are made of it.
      left_out: the names of tensors that are not used, on purpose.
      step: that of the checkpoint, of an earlier run; None of others.
    """

    origin: Origin
    description: Description
    model: config.Model
    parameters: Mapping[str, Lazy]
    taken: Mapping[str, list[str]]
    left_out: tuple[str, ...]
    step: int | None = None

    @property
    def license(self) -> str | None:
        """The licence of the weights, as timm's config says it; None: nothing tells it."""
        told = (self.origin.config or {}).get("pretrained_cfg")
        found = told.get("license") if isinstance(told, Mapping) else (self.origin.config or {}).get("license")
        return printed(found) if isinstance(found, str) and found else None


def open_published(name: str | Path, key: str = "init.weights", given: Mapping[str, Any] | None = None) -> Published:
    """Returns the weights that `name` names.

    Args:
      name: as for `open_origin`.
      key: what the user set to it, for errors.
      given: keys that the user has set; those of `UNSEEN` win over what the weights say.

    Raises:
      ConfigError: there are none, their family is not known, our model cannot be theirs, or a tensor is missing,
        unexpected or of another shape.
    """
    own = {key: value for key, value in (given or {}).items() if key in UNSEEN}
    return understood(dataclasses.replace(open_origin(name, key), given=own))


def understood(origin: Origin) -> Published:
    """Returns the weights that these files hold; raises `ConfigError` as `open_published`."""
    family = next((family for family in FAMILIES if family.recognises(origin)), None)
    if family is None:
        names = ", ".join(printed(name, 60) for name in list(origin.tensors)[:3])
        described = "there is no config.json beside it" if origin.config is None else "its config.json names none"
        raise ConfigError(
            f"{origin.files[0]}: neither tensors, such as {names}, nor config tell the family ({described}); put the "
            "config.json of timm or transformers beside it, or name weights of big_vision or OpenCLIP"
        )
    described = family.describe(origin)
    told = {key.removeprefix("model."): value for key, value in origin.given.items()}
    described = dataclasses.replace(described, model={**described.model, **told})
    names, count = described.classes, described.model.get("num_classes") or 0
    if names is not None and len(names) != count:
        if count:
            raise ConfigError(
                f"{origin.files[0]}: {len(names)} names of classes, but its head has {count}; correct them"
            )
        described = dataclasses.replace(described, classes=None)
    values = {"total_steps": 1, "model": {**described.model, "scan": False}}
    try:
        model = config.resolve(values).model
        shapes = shapes_of(model)
    except ConfigError as error:
        told_by = described.naming.told_by
        raise ConfigError(f"{origin.files[0]}: its model is not one of ours{told_by}: {printed(error, 300)}") from error
    tensors, shape = Tensors(origin.tensors, origin.files[0]), shape_of(model)
    parameters = naming.parameters(described.naming, tensors, shapes, (*shape.patch, shape.channels))
    special = described.position, described.cls, described.registers
    parameters |= special_tokens.tokens(described.naming, tensors, special, shapes, shape.patches)
    left_out = tensors.check_all_taken(described.naming.left_out)
    assert {path: lazy.shape for path, lazy in parameters.items()} == shapes
    return Published(origin, described, model, parameters, tensors.taken, tuple(left_out))


def shapes_of(model: config.Model, lora: config.Lora | None = None) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of our parameters by path, the blocks one by one, as they are without a mesh.

    With `lora`, those of adapters too.
    """
    keywords = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    stacked = {**keywords, "scan": True}  # however many blocks there are, one is traced
    tree = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: ViT(**stacked, lora=lora, rngs=nnx.Rngs(0)))))
    shapes = {path: leaf.shape for path, leaf in by_path(tree).items()}
    ends = {path: shape for path, shape in shapes.items() if not path.startswith("blocks/")}
    of_blocks = {path.removeprefix("blocks/"): shape for path, shape in shapes.items() if path not in ends}
    depth = next(iter(of_blocks.values()))[0]
    return ends | {f"blocks/{i}/{path}": shape[1:] for i in range(depth) for path, shape in of_blocks.items()}


def by_path(tree: Any) -> dict[str, Any]:
    """Returns the leaves of nested dicts by path, such as `blocks/0/norm1/scale`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}
