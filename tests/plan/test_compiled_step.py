"""What the compilers for GPUs and TPUs make of a training step of two blocks, by the text of the compiled program."""

import math
import re

import pytest
from compilers import run_python

from vit_dist.plan import hlo
from vit_dist.plan.products import Products

pytestmark = pytest.mark.slow

DEPTH = 2
SCRIPT = """
import sys
from vit_dist import recipes
from vit_dist.config import default_config
from vit_dist.plan import targets
from vit_dist.plan.compile import compile_step, make_program

config = default_config()
config.total_steps, config.batch_size = 1000, int(sys.argv[3])
config.model.update(variant=sys.argv[2], num_classes=1000, dtype="bfloat16", pool="mean", depth=2, remat="none")
config.optimizer.update(name="adamw", weight_decay=0.1)
target = targets.parse(sys.argv[1])
program = make_program(recipes.load_config(config, sys.argv[4:]), targets.devices(target))
print(compile_step(program).executable.as_text())
"""


def text_of(target, variant, batch, *overrides):
    return run_python("-c", SCRIPT, target, variant, str(batch), *overrides).stdout


def compiled(target, variant, batch, *overrides):
    """The instructions that run in a step, fused ones included, and which of them are or hold matrix products."""
    program = hlo.parse(text_of(target, variant, batch, *overrides))
    products = Products(program)
    run = [
        (instruction, executions.fused)
        for name, executions in program.executions().items()
        for instruction in program.computations[name].values()
    ]
    return run, [instruction for instruction, fused in run if not fused and products.run(instruction)]


def test_a_step_on_gpus_computes_no_product_twice_and_transposes_nothing_but_the_images():
    run, products = compiled("h100:8", "B/16", 2048, "mesh.data=8", "model.scan=false")
    attention = [one.target for one in products if "cudnn" in one.target]
    assert len(attention) == 2 * DEPTH and len(set(attention)) == 2  # forward and backward, never XLA's
    # Of a block 6 products forward (queries, keys, values, projection, two of the MLP), each with two gradients; the
    # patches' and its kernel's gradient, the gradient of the positions, and three of the head.
    assert len(products) - len(attention) == 3 * 6 * DEPTH + 2 + 1 + 3
    stream = 256 * 196 * 768
    moved = [
        (one.opcode, array.shape)
        for one, _ in run
        for array in one.arrays
        if one.opcode == "transpose" and array.bytes >= 2 * stream
    ]
    assert moved == [("transpose", (256, 14, 14, 16, 16, 3))]  # images into patches
    layouts = {array.layout for one, _ in run for array in one.arrays if array.shape == (256, 196, 768)}
    assert layouts == {"2,1,0"}


def test_a_step_on_gpus_takes_few_tokens_at_a_time_in_norms_and_never_selects_rows_after_attention():
    text = text_of("h100:8", "B/16", 2048, "mesh.data=8", "model.scan=false", "model.pool=cls")
    tiles = [[int(size) for size in re.findall(r"\d+", tile)] for tile in re.findall(r'"sizes":\[([^\]]*)\]', text)]
    rows = [math.prod(tile[:-1]) for tile in tiles if tile[-1] == 768]
    assert len(rows) >= 2 * (2 * DEPTH + 1)  # forward and backward
    assert max(rows) <= 4  # 16 did not fit into registers
    assert not [
        line for line in text.splitlines() if " select(" in line and re.search(r"\[256,198,(12,64|768)\]", line)
    ]
    assert text.count('"epilogue":"BIAS"') >= 6 * DEPTH  # cuBLAS adds the biases


def test_a_step_on_tpus_keeps_the_scores_on_the_chip():
    run, _ = compiled("v5e:4x4", "S/16", 2048, "mesh.data=1", "mesh.fsdp=16", "model.scan=true")
    kernels = [one for one, _ in run if one.target == "tpu_custom_call"]
    assert len(kernels) == 2  # forward and backward, each in a loop over blocks
    scores = [one.name for one, _ in run if re.search(r"\[(\d+,)*196,196\]", one.type)]
    assert scores == []
