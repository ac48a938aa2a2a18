"""What a run does not train costs nothing, by the compiled step; and what it trains, by path."""

import re

import jax
import numpy as np
import pytest
from system import NOTHING_RANDOM, settings

from vit_dist.config import ConfigError
from vit_dist.model.flops import forward_flops
from vit_dist.program import Program
from vit_dist.step.optimizer import parameter_paths
from vit_dist.step.trained import parted, rules_of

# Wide enough that products outweigh all else.
WIDE = (
    *("model.width=64", "model.mlp=256", "model.heads=4", "model.depth=3", "batch_size=64", "mesh.data=8"),
    *("log_examples=false", "model.remat=none", *NOTHING_RANDOM),
)


class Compiled:
    """A step's cost: floating-point operations, temporaries, bytes reduced over devices, of the optimizer's state."""

    def __init__(self, *overrides):
        program = Program(settings(*WIDE, *overrides), classes=10, steps=10, augment_on_device=False)
        with program.in_use():
            self.state = program.abstract_state()
            batch = {name: leaf for name, leaf in program.abstract_batch().items() if name != "id"}
            step = program.train_step.lower(self.state, batch).compile()
        self.flops, self.temporaries = step.cost_analysis()["flops"], step.memory_analysis().temp_size_in_bytes
        reduced = re.findall(r"= (.*?) all-reduce(?:-start)?\(", step.as_text())
        self.reduced = sum(4 * int(np.prod([int(n) for n in shape.split(",") if n]))
                           for one in reduced for shape in re.findall(r"f32\[([\d,]*)\]", one))  # fmt: skip
        self.moments = 4 * sum(leaf.size for leaf in jax.tree.leaves(self.state.optimizer) if leaf.ndim)


@pytest.fixture(scope="module", params=["model.scan=true", "model.scan=false"])
def costs(request):
    scan = request.param
    return {
        "full": Compiled(scan),
        "probe": Compiled(scan, "init.freeze=backbone"),
        "lora": Compiled(scan, "lora.rank=4"),
    }


def trained_bytes(compiled, *overrides):
    own, _ = parted(compiled.state.parameters, rules_of(settings(*WIDE, *overrides)))
    return 4 * sum(leaf.size for leaf in jax.tree.leaves(own))


def test_a_linear_probe_has_no_backward_pass_and_reduces_the_heads_gradient_alone(costs):
    full, probe, head = costs["full"], costs["probe"], trained_bytes(costs["probe"], "init.freeze=backbone")
    assert head == 4 * (64 * 10 + 10)
    assert probe.flops < 0.4 * full.flops  # the forward pass is a third
    assert probe.temporaries < 0.5 * full.temporaries
    assert probe.moments == 2 * head
    assert head <= probe.reduced <= head + 64  # and the loss
    for name, cost in costs.items():
        print(f"{name}: {cost.flops / 1e6:.1f} MFLOP, {cost.temporaries / 1e6:.2f} MB of temporaries a device, "
              f"{cost.moments / 1e3:.1f} kB of moments, {cost.reduced / 1e3:.1f} kB reduced")  # fmt: skip


def test_adapters_cost_no_gradient_of_the_kernels_and_state_for_themselves_alone(costs):
    full, lora, own = costs["full"], costs["lora"], trained_bytes(costs["lora"], "lora.rank=4")
    adapters = 4 * (
        (64 + 3 * 64) + (64 + 64) + 2 * (64 + 256)
    )  # rank x (inputs + outputs) of qkv, projection, up, down
    assert own == 4 * (3 * adapters + 64 * 10 + 10)
    assert lora.flops < 0.8 * full.flops  # two thirds, and the adapters
    assert lora.moments == 2 * own
    assert own <= lora.reduced <= own + 64


def test_blocks_before_the_first_that_is_trained_keep_no_activations():
    one, two, every = (Compiled("model.scan=auto", f"init.freeze=all_but_last_{count}") for count in (1, 2, 3))
    flops, bytes_kept = ([getattr(one_of, name) for one_of in (one, two, every)] for name in ("flops", "temporaries"))
    assert flops[0] < 0.8 * flops[1] < 0.8 * flops[2] * 1.1
    assert bytes_kept[0] < bytes_kept[1] < bytes_kept[2]
    paths = jax.tree.leaves(parameter_paths(parted(one.state.parameters, rules_of(
        settings(*WIDE, "model.scan=false", "init.freeze=all_but_last_1")))[0]))  # fmt: skip
    assert {path.partition("/")[0] for path in paths} == {"blocks", "norm", "head"}
    assert {path.split("/")[1] for path in paths if path.startswith("blocks/")} == {"2"}


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ((), 3),
        (("init.freeze=backbone",), 1),
        (("lora.rank=4",), 2),
        (("init.freeze=all_but_last_1", "model.scan=false"), 1 + 2 / 3),
    ],
    ids=str,
)
def test_the_operations_of_a_step_are_counted_by_what_is_trained(changes, passes):
    program = Program(settings(*WIDE, *changes), classes=10, steps=10, augment_on_device=False)
    assert program.flops_per_step() == pytest.approx(passes * forward_flops(program.settings.model) * 64, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("init.freeze=backbon",), "init.freeze: 'backbon' matches no parameter"),
        (("init.freeze=blocks(",), r"init.freeze: 'blocks\(' is no regular expression"),
        (("init.freeze=.",), "init.freeze: all parameters are frozen"),
        (("init.freeze=all_but_last_7",), "init.freeze: all_but_last_7, but the model has 3 blocks; take 1 to 3"),
        (("init.freeze=all_but_last_0",), "init.freeze: all_but_last_0, but the model has 3 blocks; take 1 to 3"),
        (("init.freeze=all_but_last_1", "model.scan=true"), "needs blocks of their own; set model.scan=false"),
        (
            ("init.freeze=backbone", "optimizer.rules=[{path: blocks, learning_rate: 0.1}]"),
            r"optimizer.rules\[0\].path: 'blocks' matches only parameters that an earlier rule takes",
        ),
        (("init.freeze=blocks/0/", "model.scan=true"), "'blocks/0/' matches no parameter .*set model.scan=false"),
        (("lora.alpha=8",), "lora.rank: 0, so there are no adapters, but another key of lora is set; set lora.rank"),
        (("lora.rank=65",), "lora.rank: 65, but a layer of qkv maps 64 to 64; take a smaller one"),
        (("lora.rank=4", "lora.targets=[]"), "lora.targets: "),
        (("lora.rank=4", "init.freeze=backbone"), "init.freeze: backbone, which holds the adapters of lora.rank too"),
    ],
    ids=str,
)
def test_what_cannot_be_frozen_or_adapted_is_refused_by_its_key(changes, message):
    with pytest.raises(ConfigError, match=message):
        program = Program(settings(*WIDE, *changes), classes=10, steps=10, augment_on_device=False)
        with program.in_use():
            program.abstract_state()
