"""The arrays that a block saves, against those of the traced gradient."""

from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from compiled import program_on
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo
from products import equations

from vit_dist import ViT, config
from vit_dist.model import kernels
from vit_dist.model.saved import LocalShape, Saved, saved_arrays, saved_bytes

ROWS, TOKENS, WIDTH, HEADS, HIDDEN, DEPTH = 4, 5, 32, 2, 128, 3
TINY = {
    "width": WIDTH, "depth": DEPTH, "mlp": HIDDEN, "heads": HEADS, "num_classes": 7, "image_size": 8, "patch_size": 4,
    "scan": True,
}  # fmt: skip
LOCAL = LocalShape(TOKENS, WIDTH, HEADS, WIDTH // HEADS, HIDDEN)
MODELS = {
    "plain": {},
    "layer scale": {"layer_scale": 0.1},
    "parallel": {"parallel": True, "qk_norm": True},
    "swiglu": {"activation": "swiglu"},
    "tanh": {"activation": "gelu_tanh"},
    "rope2d": {"position": "rope2d", "activation": "quick_gelu"},
    "rope2d, norms of queries and keys with a bias": {"position": "rope2d", "qk_norm": True, "qk_norm_bias": True},
    "rmsnorm": {"norm": "rmsnorm", "qk_norm": True},
    "dropout": {"dropout": 0.1, "attention_dropout": 0.1, "projection_dropout": 0.2},
}


def stacked(function, *arguments, rows):
    """What the first loop over blocks gives for its blocks, of arrays [depth, rows, ...], an example's."""
    jaxpr = jax.make_jaxpr(jax.grad(function))(*arguments).jaxpr
    loops = (each for each, _ in equations(jaxpr) if each.primitive.name == "scan" and each.params["length"] == DEPTH)
    loop = next(loops)
    results = [one.aval for one in loop.outvars[loop.params["num_carry"] :]]
    return [one for one in results if one.shape[1] == rows and one.ndim > 2]


def bytes_of(arrays):
    return sum(one.size * one.dtype.itemsize for one in arrays)


def logits_of(settings):
    """The sum of a model's logits as a function of parameters and images, and the shapes of both."""
    graph, parameters = nnx.split(nnx.eval_shape(lambda: ViT(**settings, rngs=nnx.Rngs(0))))

    def logits(parameters, images):
        return jnp.sum(nnx.merge(graph, parameters)(images, jax.random.key(0)))

    return logits, parameters, jax.ShapeDtypeStruct((ROWS, 8, 8, 3), jnp.float32)


@pytest.mark.parametrize(
    ("name", "remat", "dtype"),
    [
        *((name, remat, "bfloat16") for name in MODELS for remat in ("none", "names")),
        ("parallel", "none", "float32"),
        ("plain", "block", "float32"),
    ],
)
def test_a_block_saves_what_the_traced_gradient_stacks(name, remat, dtype):
    settings = {**TINY, **MODELS[name], "remat": remat, "dtype": dtype}
    found = stacked(*logits_of(settings), rows=ROWS)
    assert bytes_of(found) == DEPTH * ROWS * saved_bytes(saved_arrays(config.Model(**settings), "xla"), LOCAL)


# Not with dropout: JAX lists the zeros that it puts in, which are constants to a compiler.
@pytest.mark.parametrize("remat", ["none", "names", "block"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "dropout"])
def test_an_unrolled_block_saves_as_much_as_one_in_a_loop(name, remat):
    settings = {**TINY, **MODELS[name], "remat": remat, "dtype": "bfloat16", "scan": False}

    def kept(depth):
        logits, *arguments = logits_of({**settings, "depth": depth})
        pullback = jax.eval_shape(lambda *arguments: jax.vjp(logits, *arguments)[1], *arguments)
        return bytes_of(one for one in jax.tree.leaves(pullback) if one.shape[:1] == (ROWS,) and one.ndim > 2)

    assert kept(3) - kept(2) == ROWS * saved_bytes(saved_arrays(config.Model(**settings), "xla"), LOCAL)


@pytest.mark.parametrize("remat", ["none", "names"])
@pytest.mark.parametrize("attention", ["pallas", "xla"])
def test_on_a_tpu_heads_are_saved_in_the_shapes_that_are_listed(attention, remat, monkeypatch):
    monkeypatch.setattr(kernels, "device", lambda: ("tpu", "TPU v5 lite"))
    implementation = "xla" if attention == "xla" else "auto"
    settings = {**TINY, "remat": remat, "dtype": "bfloat16", "attention": implementation}
    shapes = {
        "width": (TOKENS, WIDTH),
        "heads": (TOKENS, HEADS, WIDTH // HEADS),
        "flat heads": (TOKENS, WIDTH),
        "head_rows": (HEADS, TOKENS, 1),
        "weights": (HEADS, TOKENS, TOKENS),
        "hidden": (TOKENS, HIDDEN),
    }
    expected = Counter()
    for array in saved_arrays(config.Model(**settings), attention):
        expected[(DEPTH, ROWS, *shapes[array.kind]), array.itemsize] += array.count
    found = Counter((one.shape, one.dtype.itemsize) for one in stacked(*logits_of(settings), rows=ROWS))
    assert found == +expected


@pytest.mark.parametrize("algorithm", ["ring", "all_to_all"])
@pytest.mark.parametrize("remat", ["none", "names", "block"])
def test_a_block_of_split_tokens_saves_what_the_traced_gradient_stacks(remat, algorithm):
    off = ("model.dropout=0", "model.attention_dropout=0", "model.drop_path=0", f"model.depth={DEPTH}")
    off += (f"model.context_attention={algorithm}",)
    program = program_on({"context": 2}, f"model.remat={remat}", *off)
    model = program.settings.model
    with program.in_use():
        state = program.abstract_state()
        images = jax.ShapeDtypeStruct((ROWS, 8, 8, 1), jnp.float32)
        found = stacked(lambda p, x: jnp.sum(program.model(p, x)), state.parameters, images, rows=ROWS)
    half = LocalShape(2, model.width, model.heads, model.width // model.heads, model.mlp)  # of four tokens
    arrays = saved_arrays(model, "chunked", exchanged=algorithm == "all_to_all")
    assert bytes_of(found) == 2 * DEPTH * ROWS * saved_bytes(arrays, half)


def test_cudnn_saves_no_weights():
    model = config.Model(**TINY, dtype="bfloat16")
    without = LocalShape(TOKENS, WIDTH, HEADS, WIDTH // HEADS, HIDDEN)
    extra = saved_bytes(saved_arrays(model, "xla"), without) - saved_bytes(saved_arrays(model, "cudnn"), without)
    weights = HEADS * TOKENS * TOKENS * (4 + 2)
    rows = HEADS * TOKENS * 4  # two numbers a row of weights with XLA, one with cuDNN
    assert extra == weights + rows - TOKENS * WIDTH * 2  # and of 5 tokens the output padded to 6 beside the output
    # With "names" XLA's output is named; cuDNN's kernel keeps its own, unnamed, and one number a row.
    named = config.Model(**TINY, dtype="bfloat16", remat="names")
    of_xla, of_cudnn = (saved_bytes(saved_arrays(named, attention), without) for attention in ("xla", "cudnn"))
    assert of_cudnn - of_xla == rows


@pytest.mark.parametrize("remat", ["none", "names"])
def test_cudnns_kernel_runs_once_and_its_output_is_saved_once(remat, monkeypatch):
    monkeypatch.setattr(kernels, "device", lambda: ("gpu", "NVIDIA H100"))
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)  # there is no GPU to ask
    # Sixteen tokens: with an odd number, the output is padded.
    settings = {**TINY, "remat": remat, "dtype": "bfloat16", "image_size": 16, "pool": "mean"}
    local = LocalShape(16, WIDTH, HEADS, WIDTH // HEADS, HIDDEN)
    logits, parameters, _ = logits_of(settings)
    arguments = (logits, parameters, jax.ShapeDtypeStruct((ROWS, 16, 16, 3), jnp.float32))
    found = bytes_of(stacked(*arguments, rows=ROWS))
    assert found == DEPTH * ROWS * saved_bytes(saved_arrays(config.Model(**settings), "cudnn"), local)
    jaxpr = jax.make_jaxpr(jax.grad(logits))(*arguments[1:]).jaxpr
    assert sum("dot_product_attention_fwd" in each.primitive.name for each, _ in equations(jaxpr)) == 1


def test_a_tpu_pads_the_last_two_dimensions_to_tiles_the_way_that_costs_less():
    local = LocalShape(tokens=197, width=1024, heads=16, head_size=64, hidden=4096, tiled=True)
    assert local.elements("width") == 200 * 1024
    assert local.elements("heads") == 16 * 256 * 64  # tokens last: 200 x 128 would be more
    assert local.elements("flat heads") == 200 * 1024
    assert local.elements("weights") == 16 * 200 * 256
    assert saved_bytes([Saved("width", 4, 2), Saved("hidden", 2, 1)], local) == 200 * (2 * 4 * 1024 + 2 * 4096)


def test_a_tensor_group_splits_heads_and_hidden_units_alone():
    model = config.Model(**TINY, remat="names")
    half = LocalShape(TOKENS, WIDTH, HEADS // 2, WIDTH // HEADS, HIDDEN // 2)
    # By token in float32: queries, keys, values, output, hidden units; the block's input and the sum between.
    assert saved_bytes(saved_arrays(model, "xla"), LOCAL) == TOKENS * 4 * (4 * WIDTH + HIDDEN + 2 * WIDTH)
    assert saved_bytes(saved_arrays(model, "xla"), half) == TOKENS * 4 * (4 * WIDTH // 2 + HIDDEN // 2 + 2 * WIDTH)
