"""Published weights fitted to a model of ours: its image, patch, channels, classes, blocks and mesh."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import golden_weights
import jax
import numpy as np
import pytest
from filled_model import filled
from jax.sharding import NamedSharding
from peers import random_weights

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.mesh.topology import make_mesh
from vit_dist.step.state import ModelFunction
from vit_dist.weights import fitting
from vit_dist.weights.adapted import Adapted, adapted, placed
from vit_dist.weights.published import Published, by_path, open_published

CASES = json.loads(Path(__file__).with_name("adapted.json").read_text())["cases"]
TOLERANCE = 1e-4  # of the outputs' standard deviation
LABELS = tuple(f"LABEL_{number}" for number in range(10))  # of the fixtures of transformers


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Opens a golden fixture by its name."""

    @functools.cache
    def opened(name: str) -> Published:
        return open_published(golden_weights.write(golden_weights.fixture(name), tmp_path_factory.mktemp(name)).parent)

    return opened


def fitted(weights: Published, **changes: Any) -> Adapted:
    return adapted(weights, dataclasses.replace(weights.model, **changes), "keep")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['fixture']}-{case['arguments']}")
def test_outputs_at_another_size_are_those_of_timm(case: Mapping[str, Any], published: Any) -> None:
    weights = published(case["fixture"])
    keys = {"img_size": "image_size", "patch_size": "patch_size", "in_chans": "channels"}
    changes = {keys[name]: tuple(v) if isinstance(v, list) else v for name, v in case["arguments"].items()}
    model = dataclasses.replace(weights.model, **changes)
    images, expected = random_weights.images(*case["images"]), np.asarray(case["output"])
    found = filled(model, adapted(weights, model, "keep").parameters)(images)
    difference = np.abs(found - expected).max() / expected.std()
    assert difference <= TOLERANCE, f"{difference:.1e}"


@pytest.mark.parametrize(("name", "before"), [("timm_vit_cls", 1), ("timm_dinov2_reg4", 0), ("hf_deit", 1)])
@pytest.mark.parametrize("grid", [(4, 4), (2, 5)])
def test_positions_are_resampled_after_those_of_special_tokens(
    name: str, before: int, grid: tuple[int, int], published: Any
) -> None:
    weights = published(name)
    high, wide = config.pair(weights.model.patch_size)
    found = fitted(weights, image_size=(grid[0] * high, grid[1] * wide))
    position = weights.parameters["position"].read()
    expected = fitting.resample_positions(position, (3, 3), grid, before)
    np.testing.assert_array_equal(found.parameters["position"].read(), expected)
    np.testing.assert_array_equal(found.parameters["position"].read()[:before], position[:before])
    assert found.notes == (f"position: resampled from 3x3 to {grid[0]}x{grid[1]} patches",)
    others = {path: lazy for path, lazy in found.parameters.items() if path != "position"}
    assert all(weights.parameters[path] is lazy for path, lazy in others.items())


def test_patches_and_channels_are_fitted_together(published: Any) -> None:
    weights = published("timm_vit_cls")
    found = fitted(weights, image_size=(42, 36), patch_size=(14, 12), channels=1)
    kernel = weights.parameters["patch/kernel"].read().reshape(16, 16, 3, 64)
    expected = fitting.adapt_channels(fitting.resample_patch_kernel(kernel, (14, 12)), 1)
    np.testing.assert_array_equal(found.parameters["patch/kernel"].read(), expected.reshape(-1, 64))
    assert found.parameters["position"] is weights.parameters["position"]  # the same grid
    assert found.notes == ("patch/kernel: fitted from 16x16 pixels of 3 channels to 14x12 of 1",)


def test_rotated_positions_need_no_resampling(published: Any) -> None:
    weights = published("timm_dinov3")
    found = fitted(weights, image_size=(96, 32))
    assert found.notes == () and found.parameters == weights.parameters


def test_the_model_of_the_weights_is_changed_in_nothing(published: Any) -> None:
    for name in ("timm_vit_cls", "hf_clip_full", "open_clip_gelu"):
        found = fitted(published(name))
        assert found.parameters == published(name).parameters
        assert [note.partition(":")[0] for note in found.notes] == ["not used"] * bool(published(name).left_out)


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"width": 96}, "cls has the shape .64. in .* expected .96."),
        ({"depth": 4}, "has no blocks/3/"),
        ({"registers": 2}, "has no registers"),
        ({"mlp": 128}, "blocks/0/mlp/.* has the shape"),
        ({"qk_norm": True}, "has no blocks/0/attention/.*_norm"),
    ],
)
def test_another_model_is_named(changes: dict[str, Any], path: str, published: Any) -> None:
    with pytest.raises(ConfigError, match=f"{path}.*see inspect"):
        fitted(published("timm_vit_cls"), **changes)


def of_head(
    weights: Published, count: int, head: Any, classes: Sequence[str] | None
) -> tuple[list[int] | None, tuple[str, ...]]:
    """Which rows of the published head are taken, None for a new one, and the notes."""
    found = adapted(weights, dataclasses.replace(weights.model, num_classes=count), head, classes)
    if "head/kernel" not in found.parameters:
        assert "head/bias" not in found.parameters
        return None, found.notes
    whole = {name: weights.parameters[f"head/{name}"].read().T.reshape(10, -1) for name in ("kernel", "bias")}
    rows = []
    for kernel, bias in zip(
        found.parameters["head/kernel"].read().T, found.parameters["head/bias"].read(), strict=True
    ):
        rows.append(next(row for row in range(10) if (whole["kernel"][row] == kernel).all()))
        assert whole["bias"][rows[-1]] == bias
    return rows, found.notes


ALL = list(range(10))
SOME = ("LABEL_7", "LABEL_2", "LABEL_4")


@pytest.mark.parametrize(
    ("count", "head", "classes", "rows", "note"),
    [
        (10, "auto", None, None, "head: new, for 10 classes; that of the weights has 10"),
        (10, "keep", None, ALL, None),
        (10, "auto", LABELS, ALL, None),
        (10, "auto", LABELS[::-1], ALL[::-1], "head: 10 of its 10 classes, by name"),
        (3, "auto", SOME, [7, 2, 4], "head: 3 of its 10 classes, by name"),
        (3, "keep", SOME, [7, 2, 4], "head: 3 of its 10 classes, by name"),
        (3, "auto", None, None, "head: new, for 3 classes; that of the weights has 10"),
        (10, "new", LABELS, None, "head: new, for 10 classes; that of the weights has 10"),
        (3, "auto", ("LABEL_7", "cat", "LABEL_4"), None, "head: new, for 3 classes; that of the weights has 10"),
        (10, "auto", [f"other {i}" for i in ALL], None, "head: new, for 10 classes; that of the weights has 10"),
        (0, "auto", None, None, "head: left out"),
        (0, "keep", None, None, "head: left out"),
    ],
)
def test_the_head_is_taken_by_the_names_of_classes(
    count: int, head: str, classes: Any, rows: Any, note: str | None, published: Any
) -> None:
    found = of_head(published("hf_vit"), count, head, classes)
    assert found == (rows, () if note is None else (note,))


def test_without_names_a_head_is_kept_on_request_only(published: Any) -> None:
    assert published("timm_vit_cls").description.classes is None
    note = "head: new, for 10 classes; that of the weights has 10, without names"
    assert of_head(published("timm_vit_cls"), 10, "auto", SOME) == (None, (note,))
    assert of_head(published("timm_vit_cls"), 10, "keep", SOME)[0] == ALL


@pytest.mark.parametrize(
    ("name", "count", "classes", "words"),
    [
        ("hf_vit", 3, None, "it has 10 classes and the model 3"),
        ("hf_vit", 3, ("LABEL_7", "cat", "dog"), "it has no class of its own named cat, dog"),
        ("timm_vit_cls", 11, None, "it has 10 classes and the model 11"),
        ("hf_dinov2", 3, None, "there is none"),
    ],
)
def test_a_head_that_cannot_be_kept_says_why(name: str, count: int, classes: Any, words: str, published: Any) -> None:
    weights = published(name)
    with pytest.raises(ConfigError, match=f"^init.head: keep, .*{words}; set init.head=new$"):
        adapted(weights, dataclasses.replace(weights.model, num_classes=count), "keep", classes)


def test_two_classes_of_one_name_are_not_confused(published: Any) -> None:
    weights, twice = published("hf_vit"), ("crane", *LABELS[1:9], "crane")
    weights = dataclasses.replace(weights, description=dataclasses.replace(weights.description, classes=twice))
    assert of_head(weights, 10, "auto", twice)[0] == ALL
    assert of_head(weights, 10, "auto", twice[::-1])[0] is None
    assert of_head(weights, 2, "auto", ("LABEL_5", "crane"))[0] is None
    with pytest.raises(ConfigError, match="no class of its own named crane"):
        of_head(weights, 2, "keep", ("LABEL_5", "crane"))


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4}], ids=str)
def test_parameters_on_a_mesh_are_those_of_one_device(sizes: dict[str, int], scan: bool, published: Any) -> None:
    weights = published("timm_vit_cls")
    model = dataclasses.replace(weights.model, image_size=64, scan=scan)
    parameters = adapted(weights, model, "keep").parameters
    mesh = make_mesh(sizes, jax.devices())
    with jax.set_mesh(mesh):
        like = jax.eval_shape(lambda: ModelFunction(model).initialise(0))
        found = by_path(placed(parameters, like, mesh))
    split = 0
    for path, expected in by_path(like).items():
        array = found[path]
        within = path.removeprefix("blocks/")
        stacked = scan and path.startswith("blocks/")
        whole = (
            np.stack([parameters[f"blocks/{number}/{within}"].read() for number in range(3)])
            if stacked
            else parameters[path].read()
        )
        assert array.sharding == NamedSharding(mesh, expected.sharding.spec) and array.dtype == np.float32
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index])
        split += array.addressable_shards[0].data.size < whole.size
    assert (split > 0) == ("data" not in sizes or len(sizes) > 1)
    assert found.keys() == by_path(like).keys()


def test_a_share_that_several_devices_hold_is_read_once(published: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = published("timm_vit_cls")
    mesh, reads = make_mesh({"data": 4, "fsdp": 2}, jax.devices()), list[tuple[int, ...]]()
    lazy = weights.parameters["blocks/0/mlp/up/kernel"]
    read = type(lazy).read

    def counted(self: Any, index: Any = ()) -> np.ndarray:
        values = read(self, index)
        if self is lazy:
            reads.append(values.shape)
        return values

    monkeypatch.setattr(type(lazy), "read", counted)
    with jax.set_mesh(mesh):
        like = jax.eval_shape(lambda: ModelFunction(weights.model).initialise(0))
        placed(weights.parameters, like, mesh)
    assert reads == [(32, 256), (32, 256)]
