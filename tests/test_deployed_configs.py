"""The recipes for real launches: each fits its machines, by arithmetic; none is run here."""

import math

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType
from system import ROOT

from vit_dist import recipes
from vit_dist.mesh import layout, topology
from vit_dist.mesh.layout import bytes_per_device
from vit_dist.model import vit
from vit_dist.step.optimizer import make_optimizer
from vit_dist.step.state import ModelFunction, make_state

GIB = 2**30
# recipe: (devices, bytes of one's memory, parameters, bytes of parameters and of optimizer state on one device)
# The parameters are the variant's with its pooling and head: 12 (24, 40, 48) blocks and what is around them.
DEPLOYED = {
    "vit_b16_i1k_8gpu": (8, 80e9, 86_545_384, 4 + 8),
    "vit_l16_i21k_v5e256": (256, 16 * GIB, 325_690_707, 10 / 16),
    "vit_g14_64gpu": (64, 80e9, 1_067_225_171, 10 / 8),
    "vit_22b_v5p1024": (1024, 95 * GIB, 22_338_131_283, 10 / 256),
}


def load(name):
    return recipes.load(ROOT / "configs" / f"{name}.py")


def abstract_mesh(settings, devices):
    """The recipe's mesh of devices that are not here."""
    sizes = {axis: size for axis, size in topology.axis_sizes(settings.mesh, devices).items() if size > 1}
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Explicit,) * len(sizes))


@pytest.fixture(scope="module", params=DEPLOYED)
def deployed(request):
    """(name, config, abstract state on the recipe's own mesh)"""
    settings = load(request.param)
    with jax.sharding.use_abstract_mesh(abstract_mesh(settings, DEPLOYED[request.param][0])):
        optimizer = make_optimizer(settings.optimizer, 400_000)
        model, average = ModelFunction(settings.model), settings.ema_decay > 0
        state = jax.eval_shape(lambda: make_state(model, optimizer, settings.seed, average))
        yield request.param, settings, state


def test_the_mesh_takes_every_device_and_the_batch_divides_over_it(deployed):
    name, settings, _ = deployed
    devices = DEPLOYED[name][0]
    sizes = topology.axis_sizes(settings.mesh, devices)
    shape = vit.shape_of(settings.model)
    assert math.prod(sizes.values()) == devices
    layout.check_divides("batch_size", settings.batch_size, "batch", sizes, settings.accumulate_steps)
    layout.check_divides("model.width", shape.width, "width", sizes)
    layout.check_divides("model.heads", shape.heads, "heads", sizes)
    layout.check_divides("model.mlp", shape.mlp, "mlp", sizes)


def test_the_parameters_are_the_variants_with_its_pooling_and_head(deployed):
    name, settings, state = deployed
    shape = vit.shape_of(settings.model)
    width, patches = shape.width, math.prod(shape.grid)
    mixing = 4 * width * width + width + (3 * width if settings.model.qkv_bias else 0)  # attention
    mlp = 2 * width * shape.mlp + shape.mlp + width
    norms = (1 if shape.parallel else 2) * 2 * width + (2 * width // shape.heads if shape.qk_norm else 0)
    scales = 0 if settings.model.layer_scale is None else 2 * width
    embedding = (math.prod(shape.patch) * 3 + 1) * width + patches * width
    pooled = (1 + settings.model.cls_position) * width  # a class token and its position
    if settings.model.pool == "map":
        pooled = width + 4 * (width * width + width) + mlp + 2 * width  # one query over all tokens, norm and MLP
    head = (width + 1) * settings.model.num_classes
    expected = shape.depth * (mixing + mlp + norms + scales) + embedding + pooled + 2 * width + head
    found = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.parameters))
    assert found == expected == DEPLOYED[name][2]


def test_a_device_holds_its_share_of_parameters_and_optimizer_and_most_of_its_memory_is_left(deployed):
    name, _, state = deployed
    _, memory, parameters, share = DEPLOYED[name]
    held = bytes_per_device((state.parameters, state.optimizer))
    assert held == pytest.approx(parameters * share, rel=0.05)
    assert held < memory / 10


def test_a_save_is_never_further_away_than_an_evaluation(deployed):
    _, settings, _ = deployed
    assert 0 < settings.checkpoint.every_steps <= settings.evaluate.every_steps
    assert settings.checkpoint.keep_last >= 2  # one may be cut short


def test_the_docstring_says_how_it_is_launched_and_what_was_compiled(deployed):
    name, _, _ = deployed
    text = (ROOT / "configs" / f"{name}.py").read_text().split('"""')[1]
    assert f"configs/{name}.py" in text and "launch/" in text
    assert "Not yet run" in text and "Compiled for" in text
