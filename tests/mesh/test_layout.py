"""The table of logical names, the shardings it gives on a mesh, and the sizes it refuses to split."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from vit_dist.config import ConfigError
from vit_dist.mesh import layout, topology


def mesh_of(**sizes: int) -> jax.sharding.Mesh:
    return topology.make_mesh({"data": 1, "fsdp": 1, "tensor": 1} | sizes, jax.devices())


@pytest.mark.parametrize(
    ("sizes", "names", "spec"),
    [
        ({"data": 8}, ("batch", None, "width"), P("data", None, None)),
        ({"fsdp": 8}, ("batch", "width"), P("fsdp", "fsdp")),
        ({"data": 2, "fsdp": 2, "tensor": 2}, ("batch", None, "heads"), P(("data", "fsdp"), None, "tensor")),
        ({"data": 2, "fsdp": 2, "tensor": 2}, ("width", "mlp"), P("fsdp", "tensor")),
        ({"tensor": 8}, ("batch", "width", "mlp"), P(None, None, "tensor")),
        ({}, ("batch", "heads"), P("data", None)),
    ],
)
def test_names_become_the_axes_that_the_mesh_has(sizes, names, spec):
    with jax.set_mesh(mesh_of(**sizes)):
        assert layout.spec(*names) == spec


def test_without_a_mesh_no_layout_is_specified():
    assert layout.spec("batch", None) is None
    assert layout.batch_axes() == ()
    x = jnp.arange(3.0)
    assert layout.spec_of(x) is None and layout.shard_count("batch") == 1 and layout.reshard(x, "batch") is x
    assert layout.gathered(x, None) is x and layout.replicated(x) is x and layout.defer_reduction(x, "step") is x


def test_a_name_that_the_table_lacks_is_a_programming_error():
    with jax.set_mesh(mesh_of(data=8)), pytest.raises(KeyError, match="widht"):
        layout.spec("widht")


def test_a_gathered_parameter_is_not_split_over_fsdp_and_stays_split_over_tensor():
    with jax.set_mesh(mesh_of(data=2, fsdp=2, tensor=2)):
        parameter = jax.device_put(jnp.arange(32.0).reshape(4, 8), P("fsdp", "tensor"))
        gathered = layout.gathered(parameter, layout.spec("batch"))
        assert jax.typeof(gathered).sharding.spec.partitions == (None, "tensor")
        assert jax.typeof(gathered).sharding.spec.reduced == {"data", "fsdp"}


def test_the_gradient_of_a_gathered_parameter_is_summed_over_the_batch_and_split_as_it_is_stored():
    with jax.set_mesh(mesh_of(data=2, fsdp=4)):
        parameter = jax.device_put(jnp.ones(8), P("fsdp"))
        split = layout.spec("batch", None)
        rows = jax.device_put(jnp.arange(128.0).reshape(16, 8), P(("data", "fsdp"), None))

        @jax.jit
        def gradient(parameter: jax.Array) -> jax.Array:
            return jax.grad(lambda p: jnp.sum(rows * layout.broadcast(layout.gathered(p, split), rows.shape, split)))(
                parameter
            )

        result = gradient(parameter)
        assert jax.typeof(result).sharding.spec.partitions == ("fsdp",)
        assert result.tolist() == [960.0 + 16 * column for column in range(8)]


@pytest.mark.parametrize(
    ("key", "size", "name", "sizes", "micro_batches", "message"),
    [
        ("batch_size", 30, "batch", {"data": 2, "fsdp": 4}, 1, "30 .* mesh.data=2 x mesh.fsdp=4; take 24 or 32"),
        ("batch_size", 16, "batch", {"data": 8}, 4, "16 does not .* mesh.data=8 x accumulate_steps=4; take 32"),
        ("model.heads", 6, "heads", {"tensor": 4}, 1, "model.heads: 6 does not divide over mesh.tensor=4; take 4 or 8"),
        ("model.mlp", 100, "mlp", {"tensor": 8}, 1, "mlp: 100 does not divide over mesh.tensor=8; take 96 or 104"),
        ("model.width", 20, "width", {"fsdp": 8}, 1, "model.width: 20 does not divide over mesh.fsdp=8; take 16 or 24"),
    ],
)  # fmt: skip
def test_a_size_that_does_not_divide_is_refused_with_the_nearest_that_do(
    key, size, name, sizes, micro_batches, message
):
    with pytest.raises(ConfigError, match=message):
        layout.check_divides(key, size, name, sizes, micro_batches)


def test_a_size_that_divides_is_taken_and_an_axis_that_does_not_split_it_does_not_matter():
    layout.check_divides("batch_size", 96, "batch", {"data": 2, "fsdp": 4, "tensor": 7}, 3)
    layout.check_divides("model.width", 17, "width", {"data": 8, "fsdp": 1})
