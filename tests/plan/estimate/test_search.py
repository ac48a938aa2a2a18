"""The search over layouts, with a fake compiler."""

import dataclasses

import jax
import pytest
import system

from vit_dist import config, recipes
from vit_dist.config import ConfigError
from vit_dist.mesh import topology
from vit_dist.plan.estimate.layouts import layouts, meshes
from vit_dist.plan.estimate.search import search
from vit_dist.plan.targets import Chip, Target

CHIP = Chip("one", "NVIDIA H200", "gpu", 10**12, 1e12, "NVLink", 1e11, 0, 1e10, "none")
EIGHT = Target("one:8", CHIP, (1, 8))


def settings(*overrides):
    """tiny.py with nothing left to the program, which decides before it searches."""
    return system.settings("model.remat=none", *overrides)


def target_with(memory_bytes):
    return dataclasses.replace(EIGHT, chip=dataclasses.replace(CHIP, memory_bytes=memory_bytes))


class Compiler:
    """Returns that a config fits, unless `fits` says no, and records the configs that it was called with."""

    def __init__(self, fits=lambda asked: True, quick=()):
        self.fits, self.quick, self.asked = fits, quick, []

    def __call__(self, asked):
        self.asked.append(asked)
        step_ms = 0.5 if asked in self.quick else float(len(self.asked))
        return {"fits": self.fits(asked), "peak_bytes": 1000 + len(self.asked), "step_ms": step_ms}


def search_of(compiler, *overrides, target=EIGHT, **limits):
    return search(settings(*overrides), target, jax.devices()[:8], compiler, **limits)


def test_meshes_are_all_factorisations_of_the_devices():
    two = [{name: size for name, size in sizes.items() if size > 1} for sizes in meshes(Target("one:2", CHIP, (1, 2)))]
    assert two == [{"tensor": 2}, {"context": 2}, {"fsdp": 2}, {"data": 2}]
    assert len(list(meshes(EIGHT))) == 20  # three twos over four axes
    nodes = list(meshes(Target("one:4x2", CHIP, (2, 4))))
    assert [sizes["dcn_data"] for sizes in nodes] == [1] * 20 + [2] * 10
    tpu = dataclasses.replace(CHIP, platform="tpu")
    assert {sizes["dcn_data"] for sizes in meshes(Target("two", tpu, (2, 2), slices=2))} == {2}


def test_a_layout_is_the_config_with_its_overrides():
    own = settings()
    found, _ = layouts(own, EIGHT, jax.devices()[:8])
    for layout in found[:: len(found) // 50]:
        changed = config.resolve(recipes.override(config.to_dict(own), layout.overrides))
        assert topology.axis_sizes(changed.mesh, 8) == topology.axis_sizes(layout.settings.mesh, 8)
        assert dataclasses.replace(changed, mesh=layout.settings.mesh) == layout.settings
    assert () in {layout.overrides for layout in found}  # data=-1 is the mesh of eight replicas
    assert len({layout.overrides for layout in found}) == len(found)


def test_the_fastest_compiled_layout_that_fits_is_the_choice():
    ranked, _ = layouts(settings(), EIGHT, jax.devices()[:8])
    assert () not in {layout.overrides for layout in ranked[:3]}
    compiler = Compiler(quick=[ranked[1].settings])
    found = search_of(compiler)
    assert compiler.asked == [
        settings(),
        *(layout.settings for layout in ranked[:3]),
    ]  # its own, and others until three fit
    assert found["choice"] == {"overrides": list(ranked[1].overrides), "step_ms": 0.5, "peak_bytes": 1003}
    assert [row["note"] for row in found["ranking"]][:4] == [
        "fits", "the choice", "fits", "slower by estimate, not compiled"
    ]  # fmt: skip
    assert found["ranking"][0]["step_ms"] == pytest.approx(ranked[0].seconds * 1000)
    assert found["ranking"][0]["estimated_bytes"] == ranked[0].estimate.peak_bytes
    assert [row["compiled_step_ms"] for row in found["ranking"]][:4] == [2.0, 0.5, 4.0, None]


def test_a_config_that_is_faster_than_every_other_compiled_layout_stays_as_it_is():
    found = search_of(Compiler(quick=[settings()]))
    assert found["choice"]["overrides"] == []
    # Far down by estimate, it is shown all the same.
    assert [row["note"] for row in found["ranking"] if row["overrides"] == []] == ["the choice"]


def test_if_the_compiler_refuses_two_layouts_the_third_is_the_choice():
    first, _ = layouts(settings(), EIGHT, jax.devices()[:8])
    kinds = list(dict.fromkeys(layout.kind for layout in first))
    refused = [next(layout for layout in first if layout.kind == kind).settings for kind in kinds[:2]] + [settings()]
    compiler = Compiler(lambda asked: asked not in refused)
    found = search_of(compiler, wanted=1)
    choice = next(layout for layout in first if layout.overrides == tuple(found["choice"]["overrides"]))
    assert compiler.asked[-1] == choice.settings
    assert set(map(str, compiler.asked[:-1])) <= set(map(str, refused))
    notes = {tuple(row["overrides"]): row["note"] for row in found["ranking"]}
    assert notes[first[0].overrides] == "too large by the compiler"
    assert {"reason": "too large by the compiler", "count": len(compiler.asked) - 1, "example": example(first[0])} in (
        found["fallen"]
    )


def example(layout):
    return " ".join(layout.overrides) or "as it is"


def test_a_layout_larger_than_a_refused_one_of_its_kind_is_not_compiled():
    compiler = Compiler(lambda asked: asked.model.remat == "block")
    search_of(compiler, wanted=1)
    ranked, _ = layouts(settings(), EIGHT, jax.devices()[:8])
    sizes = {layout.settings: (layout.kind, layout.estimate.peak_bytes) for layout in ranked}
    smallest = {}
    for kind, size in map(sizes.get, compiler.asked):
        assert size < smallest.get(kind, size + 1)
        smallest[kind] = size


def test_where_nothing_fits_the_smallest_layout_is_returned():
    compiler = Compiler(lambda asked: False)
    found = search_of(compiler, target=target_with(100))
    ranked, _ = layouts(settings(), EIGHT, jax.devices()[:8])
    least = min(ranked, key=lambda layout: layout.estimate.peak_bytes)
    assert compiler.asked == [least.settings]  # all seem too large; the compiler has the last word on one
    assert found["choice"] is None
    assert found["smallest"] == {"overrides": list(least.overrides), "peak_bytes": 1001}
    reasons = {row["reason"]: row["count"] for row in found["fallen"]}
    assert reasons["too large by the compiler"] == 1
    (by_estimate,) = (reason for reason in reasons if reason.startswith("too large by estimate, by 0.0 GiB"))
    assert reasons[by_estimate] == len(ranked) - 1


def test_a_config_too_large_as_it_stands_gets_a_layout_that_fits():
    big = ("model.width=256", "model.mlp=1024", "batch_size=512")
    ranked, _ = layouts(settings(*big), EIGHT, jax.devices()[:8])
    own = next(layout for layout in ranked if layout.overrides == ()).estimate.peak_bytes
    truth = {layout.settings: layout.estimate.peak_bytes for layout in ranked}
    compiler = Compiler(lambda asked: truth[asked] <= own / 3)
    found = search_of(compiler, *big, target=target_with(own // 3))
    chosen = next(layout for layout in ranked if list(layout.overrides) == found["choice"]["overrides"])
    assert chosen.estimate.peak_bytes <= own / 3
    faster = ranked[: ranked.index(chosen)]
    assert faster and all(layout.estimate.peak_bytes > own / 3 for layout in faster)


def test_meshes_that_do_not_divide_are_counted_with_the_error():
    found = search_of(Compiler(), "model.heads=2", "batch_size=4")
    rows = {row["reason"]: row for row in found["fallen"]}
    heads = rows["model.heads is not valid on the mesh"]
    # of tensor=4 and 8 that leave at most 4 to the batch: 4 x (2 of any other axis), 8
    assert heads["count"] == 4
    assert heads["example"].startswith("model.heads: 2 does not divide over mesh.tensor=")
    batch = rows["batch_size is not valid on the mesh"]
    assert batch["count"] == 4  # data x fsdp = 8


def test_a_search_that_runs_out_of_time_returns_its_results_so_far():
    compiler = Compiler()
    found = search_of(compiler, seconds=0.0)
    assert len(compiler.asked) == 1
    assert found["choice"]["peak_bytes"] == 1001


def test_without_a_chips_rates_layouts_are_ranked_by_flops():
    unknown = dataclasses.replace(
        CHIP, kind="cpu", platform="cpu", memory_bytes=None, memory_bandwidth=None, link="", link_bandwidth=None,
        network_bandwidth=None,
    )  # fmt: skip
    ranked, _ = layouts(settings(), dataclasses.replace(EIGHT, chip=unknown, shape=(8,)), jax.devices()[:8])
    assert ranked[0].seconds is None
    assert ranked[0].settings.model.remat != "block" and ranked[0].shards == 1


def test_a_config_that_is_valid_on_no_mesh_has_no_choice():
    found = search_of(Compiler(), "batch_size=3", "model.heads=1", "model.context_attention=all_to_all")
    assert found["choice"] is None and found["smallest"] is None and found["ranking"] == []
    with pytest.raises(ConfigError):
        search_of(Compiler(), "model.width=33")


def test_the_fastest_comes_first_and_of_equals_the_configs_own_layout():
    ranked, _ = layouts(settings(), EIGHT, jax.devices()[:8])
    assert [layout.seconds for layout in ranked] == sorted(layout.seconds for layout in ranked)
    # Without micro-batches it makes no difference when parameters are gathered.
    again, _ = layouts(ranked[0].settings, EIGHT, jax.devices()[:8])
    assert again[0].overrides == ()
    assert again[0].seconds == ranked[0].seconds


def test_a_layout_that_cannot_be_compiled_is_rejected_with_the_error_and_the_next_is_compiled():
    ranked, _ = layouts(settings(), EIGHT, jax.devices()[:8])
    compiler = Compiler(quick=[ranked[1].settings])

    def fails_once(asked):
        if asked == ranked[0].settings:
            raise ConfigError("XLA's compiler cannot make this program: INTERNAL: odd tiles")
        return compiler(asked)

    found = search_of(fails_once)
    assert found["choice"]["overrides"] == list(ranked[1].overrides)
    assert found["ranking"][0]["note"] == (
        "cannot be compiled: XLA's compiler cannot make this program: INTERNAL: odd tiles"
    )
