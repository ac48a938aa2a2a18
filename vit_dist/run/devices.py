"""Peak arithmetic rates by device kind, and memory: what there is and what is in use."""

import os
from collections.abc import Iterable

import jax

# FLOP/s of one device as JAX counts devices, for dense matrix products: (bfloat16, float32). A float32 product runs as
# TF32 on NVIDIA's tensor cores by default; TPUs publish no float32 rate. Vendors' figures "with sparsity" are halved. A
# V100 has no bfloat16; its rate is that of its float32 units.
PEAK_FLOPS: dict[str, tuple[float | None, float | None]] = {
    # Google Cloud documentation, "System architecture" page of each TPU version, peak compute per chip. A device of
    # v2 and v3 is one core, half a chip.
    "TPU v2": (45e12 / 2, None),
    "TPU v3": (123e12 / 2, None),
    "TPU v4": (275e12, None),
    "TPU v5 lite": (197e12, None),
    "TPU v5e": (197e12, None),
    "TPU v5": (459e12, None),
    "TPU v5p": (459e12, None),
    "TPU v6 lite": (918e12, None),
    "TPU v6e": (918e12, None),
    # NVIDIA Tesla V100 GPU Architecture whitepaper, table 1 (SXM2).
    "Tesla V100-SXM2-16GB": (None, 15.7e12),
    "Tesla V100-SXM2-32GB": (None, 15.7e12),
    # NVIDIA A100 Tensor Core GPU datasheet; the figures are the same for every form and memory size.
    "NVIDIA A100-SXM4-40GB": (312e12, 156e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 156e12),
    "NVIDIA A100-PCIE-40GB": (312e12, 156e12),
    "NVIDIA A100 80GB PCIe": (312e12, 156e12),
    # NVIDIA L4 and L40S Tensor Core GPU datasheets.
    "NVIDIA L4": (121e12, 60e12),
    "NVIDIA L40S": (362e12, 183e12),
    # NVIDIA H100 and H200 Tensor Core GPU datasheets.
    "NVIDIA H100 80GB HBM3": (989e12, 494e12),
    "NVIDIA H100 PCIe": (756e12, 378e12),
    "NVIDIA H200": (989e12, 494e12),
    # NVIDIA HGX platform datasheet, HGX B200, an eighth of the board's figures.
    "NVIDIA B200": (2250e12, 1125e12),
    # NVIDIA Ampere GA102 and Ada GPU Architecture whitepapers, with float32 accumulation.
    "NVIDIA GeForce RTX 3090": (71e12, 35.6e12),
    "NVIDIA GeForce RTX 4090": (165.2e12, 82.6e12),
}


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Returns the peak FLOP/s of one device in `bfloat16` or `float32` arithmetic; None if unknown, as for a CPU."""
    bfloat16, float32 = PEAK_FLOPS.get(device_kind, (None, None))
    return {"bfloat16": bfloat16, "float32": float32}[dtype]


def memory_bytes(device: jax.Device) -> int | None:
    """Returns the bytes that programs may use of a device's memory; None if unknown, as for a CPU or an absent device.

    `device` may be another process's; it counts as one of this process's.
    """
    local = device.client.local_devices()  # other processes' devices have no stats
    stats = local[0].memory_stats() if local else None
    limit: int | None = (stats or {}).get("bytes_limit")
    return limit


def memory_share(device: jax.Device) -> int:
    """Returns the bytes of memory that there are for a device; a CPU's are its share of the host's memory."""
    limit = memory_bytes(device)
    if limit is not None:
        return limit
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(device.client.local_devices())


def memory_in_use(devices: Iterable[jax.Device]) -> int | None:
    """Returns the most bytes that any device of this process has held at once; None if unknown, as for a CPU."""
    process = jax.process_index()
    all_stats = [device.memory_stats() for device in devices if device.process_index == process]
    peaks = [stats["peak_bytes_in_use"] for stats in all_stats if stats and "peak_bytes_in_use" in stats]
    return max(peaks, default=None)
