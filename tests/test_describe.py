"""What `inspect` says of a config, without data and without arrays."""

import jax
import pytest

from vit_dist import config, inspect, recipes
from vit_dist.config import Config, ConfigError, resolve
from vit_dist.describe import parameter_table
from vit_dist.program import Program


def settings(*overrides: str) -> Config:
    """S/16 as in the paper, on one device."""
    base = ["total_steps=10", "model.variant=S/16", "model.num_classes=1000", "mesh.data=1"]
    return resolve(recipes.override(config.to_dict(Config()), [*base, *overrides]))


def test_s16_has_its_published_parameters_and_arithmetic():
    found = inspect(settings())
    assert found["parameters"] == 22_050_664
    assert found["flops_per_image"] == pytest.approx(27.6e9, rel=0.01)
    assert found["mesh"] == {"data": 1}


def test_bytes_follow_from_the_optimizer_the_average_and_the_first_moment():
    size = 4 * 22_050_664
    adam = inspect(settings())["bytes_per_device"]
    assert adam["parameters"] == size and adam["ema"] == 0
    assert adam["optimizer"] == pytest.approx(2 * size, abs=100)  # and some counters
    half = inspect(settings("optimizer.moment_dtype=bfloat16", "ema_decay=0.9"))["bytes_per_device"]
    assert half["optimizer"] == pytest.approx(1.5 * size, abs=100) and half["ema"] == size
    sgd = inspect(settings("optimizer.name=sgd", "optimizer.momentum=0"))["bytes_per_device"]
    assert sgd["optimizer"] < 100


def test_fsdp_splits_what_one_device_holds_and_data_does_not():
    whole = inspect(settings())["bytes_per_device"]["parameters"]
    data = inspect(settings("mesh.data=8", "batch_size=64"))["bytes_per_device"]["parameters"]
    fsdp = inspect(settings("mesh.fsdp=8", "batch_size=64"))["bytes_per_device"]
    assert data == whole
    assert whole / 8 <= fsdp["parameters"] <= whole / 8 * 1.05
    assert whole / 4 <= fsdp["optimizer"] <= whole / 4 * 1.05


def test_tensors_carry_name_shape_type_and_the_axes_that_split_them():
    found = inspect(settings("model.scan=true", "mesh.fsdp=2", "mesh.tensor=2", "batch_size=64"))
    tensors = {one["name"]: one for one in found["tensors"]}
    up = tensors["blocks/mlp/up/kernel"]
    assert up["shape"] == [12, 384, 1536] and up["dtype"] == "float32"
    assert up["sharding"] == [None, "fsdp", "tensor"]
    assert up["bytes_per_device"] == 12 * 384 * 1536 * 4 // 4
    assert sum(one["bytes_per_device"] for one in tensors.values()) == found["bytes_per_device"]["parameters"]


def test_no_data_are_opened_and_a_thousand_classes_are_assumed_where_none_are_given(caplog):
    found = inspect(settings("data.source=tar", "data.path=/nowhere", "model.num_classes=null"))
    assert found["parameters"] == 22_050_664
    assert "model.num_classes is left to the data, which inspect does not open: 1000 assumed" in caplog.text


def test_a_model_too_large_for_this_machine_can_be_inspected():
    giant = settings(
        "model.variant=22B/14", "mesh.fsdp=8", "batch_size=64", "optimizer.name=sgd", "optimizer.momentum=0"
    )
    assert 21e9 < inspect(giant)["parameters"] < 23e9


def test_what_training_would_refuse_is_refused_here_too():
    with pytest.raises(ConfigError, match="mesh: data=16 needs 16 devices, found 8"):
        inspect(settings("mesh.data=16"))
    with pytest.raises(ConfigError, match=r"optimizer.rules\[0\].path: 'nowhere' matches no parameter"):
        inspect(settings("optimizer.rules=[{path: nowhere}]"))


def test_the_table_of_parameters_ends_with_their_sum():
    program = Program(settings(), classes=1000, steps=10, augment_on_device=True)
    with jax.set_mesh(program.mesh):
        lines = parameter_table(program.abstract_state().parameters).splitlines()
    assert lines[0].split() == ["parameter", "shape", "sharding", "bytes", "per", "device"]
    assert lines[-1].split() == ["all", "22,050,664", "88,202,656"]
    assert any(line.split()[:5] == ["head/kernel", "384", "x", "1000", "replicated"] for line in lines)
