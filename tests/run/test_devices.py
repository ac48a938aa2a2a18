"""Devices: peak rates where they are known, and memory where devices report it."""

import types

import jax

from vit_dist.run.devices import PEAK_FLOPS, memory_bytes, memory_in_use, peak_flops


def test_peak_rates_are_known_by_kind_and_dtype():
    assert peak_flops("NVIDIA H200", "bfloat16") == 989e12
    assert peak_flops("NVIDIA H200", "float32") == 494e12
    assert peak_flops("TPU v5 lite", "bfloat16") == 197e12
    assert peak_flops("TPU v5 lite", "float32") is None
    assert peak_flops(jax.devices()[0].device_kind, "bfloat16") is None


def test_every_rate_is_in_flops_per_second():
    for kind, rates in PEAK_FLOPS.items():
        assert any(rate is not None for rate in rates), kind
        assert all(rate is None or 1e13 <= rate <= 1e16 for rate in rates), kind


def test_memory_is_the_most_that_a_device_of_this_process_held():
    def device(process, stats):
        return types.SimpleNamespace(process_index=process, memory_stats=lambda: stats)

    mine = [device(0, {"peak_bytes_in_use": 5}), device(0, {"peak_bytes_in_use": 7})]
    assert memory_in_use([*mine, device(1, {"peak_bytes_in_use": 9})]) == 7
    assert memory_in_use([device(0, None)]) is None
    assert memory_in_use(jax.devices()) is None


def test_the_memory_of_a_device_is_that_of_this_processs_first():
    def device(*stats):
        local = [types.SimpleNamespace(memory_stats=lambda one=one: one) for one in stats]
        return types.SimpleNamespace(client=types.SimpleNamespace(local_devices=lambda: local))

    assert memory_bytes(device({"bytes_limit": 7}, {"bytes_limit": 9})) == 7
    assert memory_bytes(device(None)) is None  # a CPU
    assert memory_bytes(device()) is None  # a device that is not attached
