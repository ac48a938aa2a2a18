"""One tensor of published weights that is missing, renamed, of another shape or of nobody is named in one line."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path

import golden_weights
import pytest

from vit_dist.config import ConfigError
from vit_dist.weights import published
from vit_dist.weights.origin import Origin, open_origin
from vit_dist.weights.published import understood
from vit_dist.weights.stored_tensor import StoredTensor

NAMES = [
    "timm_vit_cls", "timm_dinov3", "timm_parallel", "timm_deit3_old_names", "timm_siglip", "hf_vit", "hf_vit_new_names",
    "hf_deit", "hf_dinov2_giant", "hf_dinov2_giant_new_names", "hf_dinov3_plus", "hf_siglip_full", "hf_clip_full",
    "open_clip_gelu", "npz_augreg", "npz_big_vision_map", "npz_big_vision_tok_stacked",
]  # fmt: skip
# Without a config, these files are those of another model, whole and sound: of other patches, or without a class token.
ALSO_SOUND = {
    *((name, change, f"{prefix}embedding/kernel") for name, prefix in (
        ("npz_augreg", ""), ("npz_big_vision_map", "params/"), ("npz_big_vision_tok_stacked", "params/"),
    ) for change in ("axis 0 + 1", "axis 1 + 1", "axis 2 + 1")),
    ("npz_big_vision_tok_stacked", "removed", "params/cls"),
    # big_vision computes positions that are not there; its older code had one for the class token.
    *((name, "removed", "params/pos_embedding") for name in ("npz_big_vision_map", "npz_big_vision_tok_stacked")),
    ("npz_big_vision_tok_stacked", "axis 1 + 1", "params/pos_embedding"),
    ("timm_parallel", "axis 1 + 1", "pos_embed"),  # its register may have a position too
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def shapes_are_traced_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "shapes_of", functools.cache(published.shapes_of))
        yield


@pytest.fixture(scope="module", params=NAMES)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Origin]:
    """The name of a golden fixture and its files."""
    folder = tmp_path_factory.mktemp(request.param)
    golden_weights.write(golden_weights.fixture(request.param), folder)
    return request.param, open_origin(folder)


def error(origin: Origin, tensors: dict[str, StoredTensor]) -> str:
    """The one line that says what is wrong with these tensors; "" where they are loaded."""
    try:
        understood(dataclasses.replace(origin, tensors=tensors))
    except ConfigError as raised:
        line = str(raised)
        assert line.isprintable() and len(line) < 700, line
        return line
    return ""


def other_shapes(shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes like this one, by how they differ."""
    found = {
        f"axis {axis} + 1": (*shape[:axis], size + 1, *shape[axis + 1 :]) for axis, size in enumerate(shape)
    }  # fmt: skip
    found |= {"reversed": shape[::-1], "empty": (0, *shape[1:]), "no axes": ()}
    found |= {"an axis before": (1, *shape), "an axis after": (*shape, 1), "one axis": (math.prod(shape),)}
    return {change: other for change, other in found.items() if other != shape}


def test_a_tensor_that_is_missing_or_renamed_is_named(whole: tuple[str, Origin]) -> None:
    name, origin = whole
    left_out, tensors = understood(origin).left_out, origin.tensors
    for one in tensors:
        rest = {other: tensor for other, tensor in tensors.items() if other != one}
        removed, renamed = error(origin, rest), error(origin, {**rest, f"{one}_": tensors[one]})
        if one in left_out:
            assert removed == ""
        elif (name, "removed", one) not in ALSO_SOUND:
            assert one in removed and one in renamed, (one, removed, renamed)
            assert any(words in removed for words in ("of which", "tells the model's size", "nothing says")) or (
                "cls" in one  # without which positions are too many
            ), removed


def test_a_tensor_of_another_shape_is_named(whole: tuple[str, Origin]) -> None:
    name, origin = whole
    left_out = understood(origin).left_out
    for one, tensor in origin.tensors.items():
        for change, shape in other_shapes(tensor.shape).items():
            line = error(origin, {**origin.tensors, one: dataclasses.replace(tensor, shape=shape)})
            if one in left_out or (name, change, one) in ALSO_SOUND:
                assert line == "", (one, change, line)
            else:
                assert one in line, (one, change, line)


def test_a_tensor_of_nobody_is_named(whole: tuple[str, Origin]) -> None:
    _, origin = whole
    stranger = next(iter(origin.tensors.values()))
    for name in ("stranger", "blocks.3.norm1.weight", "x" * 400, "vision_model.stranger", "visual.stranger", "txt"):
        line = error(origin, {**origin.tensors, name: stranger})
        assert name[:100] in line and "no place" in line, (name, line)


def test_a_file_of_no_family_says_what_is_needed(tmp_path: Path) -> None:
    file = golden_weights.write(golden_weights.fixture("timm_vit_cls"), tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match="tell the family.*put the config.json of timm or transformers beside it"):
        understood(open_origin(file))
