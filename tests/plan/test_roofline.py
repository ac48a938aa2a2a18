"""Bounds and the likely time, by hand."""

import types

import pytest

from vit_dist.plan.roofline import EFFICIENCY, Cost, Transfer, bounds_ms, network_ms, step_seconds

# 100 TFLOP/s, 1 TB/s.
CHIP = types.SimpleNamespace(memory_bandwidth=1e12, link_bandwidth=1e11, peak_flops=lambda dtype: 100e12)
UNKNOWN = types.SimpleNamespace(memory_bandwidth=None, link_bandwidth=None, peak_flops=lambda dtype: None)
E, M, N = (EFFICIENCY[name] for name in ("arithmetic", "memory", "network"))


def test_the_bounds_are_what_each_takes_at_its_full_rate():
    cost = Cost(
        2e12,
        5e9,
        3e9,
        (Transfer("NVLink", 0.004, True), Transfer("NVLink", 0.002, False), Transfer("network", 0.005, True)),
    )
    assert network_ms(cost.transfers) == pytest.approx({"NVLink": 6.0, "network": 5.0})
    assert bounds_ms(cost, CHIP, "bfloat16") == pytest.approx({"arithmetic": 20.0, "memory": 5.0, "network": 6.0})


def test_the_times_of_products_and_other_instructions_add_up():
    assert step_seconds(Cost(2e12, 5e9, 3e9), CHIP, "bfloat16") == pytest.approx(0.02 / E + 0.003 / M)


def test_collectives_overlap_with_products_as_long_as_they_last():
    products = 0.02 / E
    for sent, seconds in ((0.001, products), (0.1, 0.1 / N)):
        cost = Cost(2e12, 0, 0, (Transfer("ICI", sent, True),))
        assert step_seconds(cost, CHIP, "bfloat16") == pytest.approx(seconds)


def test_collectives_that_a_product_waits_for_lengthen_the_step():
    cost = Cost(2e12, 0, 0, (Transfer("ICI", 0.001, True), Transfer("ICI", 0.007, False)))
    assert step_seconds(cost, CHIP, "bfloat16") == pytest.approx(0.02 / E + 0.007 / N)


def test_a_device_whose_rates_are_unknown_has_no_bounds_and_no_time():
    cost = Cost(2e12, 5e9, 3e9)
    assert bounds_ms(cost, UNKNOWN, "float32") == {"arithmetic": None, "memory": None, "network": None}
    assert step_seconds(cost, UNKNOWN, "float32") is None
