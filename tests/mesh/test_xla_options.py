"""The compiler's options: which platforms get them, and that the compilers accept them."""

import jax
import jax.numpy as jnp
import pytest
from compilers import run_python
from system import settings

from vit_dist.config import ConfigError
from vit_dist.mesh.feed import batch_sharding
from vit_dist.mesh.xla_options import OPTIONS, UNROLLED, options_for
from vit_dist.program import Program, _compiler_options, decided

BY_CUDNN = ("model.attention=cudnn", "model.dtype=bfloat16", "model.attention_dropout=0")


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_an_accelerator_gets_its_row_of_the_table(platform):
    assert OPTIONS[platform]
    assert _compiler_options(settings("model.scan=true"), platform) == OPTIONS[platform]


def test_blocks_that_are_not_a_loop_get_more_on_a_gpu():
    assert UNROLLED["gpu"]
    assert _compiler_options(settings("model.scan=false"), "gpu") == OPTIONS["gpu"] | UNROLLED["gpu"]
    assert _compiler_options(settings("model.scan=false"), "tpu") == OPTIONS["tpu"]
    assert _compiler_options(settings("model.scan=false"), "cpu") == {}


def test_cuda_is_another_name_for_gpu():
    assert options_for("cuda", unrolled=True) == options_for("gpu", unrolled=True) != {}


def test_a_cpu_gets_none():
    assert _compiler_options(settings(), "cpu") == {}
    assert _compiler_options(settings("deterministic=true"), "cpu") == {}


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_the_config_turns_them_off(platform):
    assert _compiler_options(settings("xla_options=false"), platform) == {}


def test_determinism_on_a_gpu_is_kept_with_and_without_the_table():
    deterministic = {"xla_gpu_deterministic_ops": True}
    assert _compiler_options(settings("deterministic=true", "xla_options=false"), "gpu") == deterministic
    with_table = _compiler_options(settings("deterministic=true", "model.scan=true"), "gpu")
    assert with_table == OPTIONS["gpu"] | deterministic


def test_determinism_on_a_gpu_takes_xlas_attention_since_xla_loses_cudnns_backward_pass():
    assert decided(settings("deterministic=true"), "cuda", "any", 1, None).model.attention == "xla"
    assert decided(settings("deterministic=true"), "tpu", "any", 1, None).model.attention == "auto"
    assert decided(settings(), "cuda", "any", 1, None).model.attention == "auto"
    with pytest.raises(ConfigError, match="^model.attention: .* take auto or xla, or deterministic=false"):
        decided(settings(*BY_CUDNN, "deterministic=true"), "cuda", "any", 1, None)


def test_changing_the_returned_options_does_not_change_the_table():
    options_for("gpu", unrolled=False)["mine"] = True
    assert "mine" not in OPTIONS["gpu"]


def test_the_steps_are_compiled_with_the_options_of_their_devices(monkeypatch):
    monkeypatch.setitem(OPTIONS, "cpu", {"xla_no_such_option": True})
    program = Program(settings("mesh.data=1"), classes=10, steps=1, augment_on_device=True)
    with program.in_use():
        state = program.abstract_state()
        sharding, shapes = batch_sharding(program.mesh), {"image": (64, 8, 8, 1), "label": (64,), "id": (64,)}
        kinds = {"image": jnp.uint8, "label": jnp.int32, "id": jnp.int32}
        batch = {name: jax.ShapeDtypeStruct(shapes[name], kinds[name], sharding=sharding) for name in shapes}
        step = program.train_step.lower(state, batch)
        with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
            step.compile()


def test_an_unknown_option_is_an_error_and_the_process_goes_on():
    compiled = jax.jit(jnp.sin, compiler_options={"xla_no_such_option": True})
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option: 'xla_no_such_option'"):
        compiled(1.0)
    assert jax.jit(jnp.sin)(0.0) == 0.0


TPU_STEP = """
import sys
import jax
sys.path.insert(0, "tests/helpers")
from compiled import compiled_step, program_on
from vit_dist.mesh.xla_options import OPTIONS
from vit_dist.plan import targets

devices = targets.devices(targets.parse("v5e:2x4"))
sizes = {"data": 2, "fsdp": 2, "tensor": 2}
step = compiled_step(program_on(sizes, "model.dtype=bfloat16", devices=devices))
assert step.memory_analysis().temp_size_in_bytes > 0
OPTIONS["tpu"]["xla_tpu_no_such_option"] = True
try:
    compiled_step(program_on(sizes, "model.dtype=bfloat16", devices=devices))
except jax.errors.JaxRuntimeError as error:
    assert "xla_tpu_no_such_option" in str(error), error
    print("compiled, and refused an unknown option")
"""


@pytest.mark.slow
def test_the_tpu_compiler_accepts_every_option_of_the_table():
    assert "compiled, and refused an unknown option" in run_python("-c", TPU_STEP).stdout
