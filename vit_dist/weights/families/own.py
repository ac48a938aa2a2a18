"""Our own files: the config has our keys, and tensors have the paths of our parameters and nearly their shapes."""

from collections.abc import Collection, Mapping
from typing import Any

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.weights.description import Description, Draft, Subject
from vit_dist.weights.naming import Entry, Naming
from vit_dist.weights.origin import Origin
from vit_dist.weights.said import Said
from vit_dist.weights.traits import PREPARED, traits_of

FORMAT = "vit_dist"
_ENDS = (
    "patch", "embedding_norm", "norm", "pooled_norm", "output_projection", "pre_logits", "head", "pool/query",
    "pool/key_value", "pool/projection", "pool/norm", "pool/mlp/up", "pool/mlp/down",
)  # fmt: skip
_IN_BLOCKS = (
    "norm1", "norm2", "attention/qkv", "attention/query_norm", "attention/key_norm", "attention/projection", "mlp/gate",
    "mlp/up", "mlp/down", "scale1", "scale2",
)  # fmt: skip
_TABLE: dict[str, Entry] = {
    **{module: f"{module}/{{}}" for module in _ENDS},
    **{module: f"blocks/#/{module}/{{}}" for module in _IN_BLOCKS},
    "pool/probe": "pool/probe",
}


def recognises(origin: Origin) -> bool:
    """Returns whether `vit-dist export` wrote these files in our own format."""
    return (origin.config or {}).get("format") == FORMAT


def describe(origin: Origin) -> Description:
    """Returns the model of config.json; raises `ConfigError` where it is not as we write it."""
    assert origin.config is not None
    source = str(origin.folder / "config.json")
    return _description(Said(origin.config, source), source)


def draft(subject: Subject) -> Draft:
    """Returns our own files of a model."""
    model, data = traits_of(subject.model), {key: getattr(subject.data, key) for key in PREPARED}
    values = {"format": FORMAT, "model": model, "data": data, "classes": list(subject.classes)}
    values |= {} if subject.license is None else {"license": subject.license}
    before = 1 if model["cls_position"] and model["class_token"] else 0
    return Draft(_description(Said(values, "config.json"), "config.json"), {"config.json": values}, before=before)


def _description(said: Said, source: str) -> Description:
    model, data = (Said(said.stated(name, "init.weights"), f"{source}: {name}").values for name in ("model", "data"))
    classes = said.read("classes", tuple[str, ...], "init.head=new")

    def preprocessing(given: Collection[str]) -> dict[str, Any]:
        values: Mapping[str, Any] = {f"data.{key}": data.get(key) for key in PREPARED}
        found = {key: value for key, value in values.items() if key not in given}
        try:
            config.resolve({"total_steps": 1, "model": {"channels": model.get("channels")}, "data": data})
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from error
        return found

    return Description(
        "vit_dist",
        model,
        Naming(_TABLE, "flax", batched_tokens=False),
        preprocessing,
        position="position" if model.get("position") == "learned" else None,
        cls="cls" if model.get("class_token") else None,
        registers=("registers",) if model.get("registers") else (),
        classes=classes or None,
    )
