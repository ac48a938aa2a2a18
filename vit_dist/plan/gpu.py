"""Descriptions of GPUs for XLA's compiler, so that it can compile without one.

A description is a `stream_executor.GpuTargetConfigProto` in protobuf's text format. The figures are those of
openxla/xla, `xla/backends/gpu/target_config/specs/{a100_sxm_80,h100_sxm,h200,b200}.txtpb`, without the rates of single
arithmetic units, which the compiler does not need. The text format refuses unknown fields, so only fields that jax
0.10.2 knows are used.
"""

from typing import NamedTuple

# The version of cuDNN that programs are compiled for. XLA's files have 8.9, 9.7 or 9.10. Here all GPUs have the same,
# so that plans do not differ by it, and a recent one, with which the compiler uses jax's fused attention.
CUDNN = (9, 10, 0)


class Gpu(NamedTuple):
    """The figures that differ between kinds of GPU."""

    kind: str  # the driver's name, which is JAX's `device_kind`
    capability: int  # CUDA compute capability, major
    own_instructions: bool  # whether it has instructions of its generation alone, such as Hopper's wgmma ("sm_90a")
    cores: int  # streaming multiprocessors
    units_per_core: int  # float32 units of one
    clock_ghz: float
    memory_bytes: int
    memory_bandwidth: int  # bytes/s
    l2_bytes: int
    shared_bytes_per_core: int
    shared_bytes_per_block: int  # the maximum that a block may request
    nvlinks: int


# The NVLinks of an A100 are not in XLA's file, but in NVIDIA's "A100 Tensor Core GPU Architecture" whitepaper. XLA's
# file calls the H200 "NVIDIA H200 141GB HBM3e".
GPUS = {
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB", 8, False,
        108, 64, 1.41, 85_100_068_864, 2_039_040_000_000, 41_943_040, 167_936, 166_912, 12,
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", 9, True,
        132, 128, 1.98, 84_942_979_072, 3_352_320_000_000, 52_428_800, 233_472, 232_448, 18,
    ),
    "h200": Gpu(
        "NVIDIA H200", 9, True,
        132, 128, 1.98, 151_397_597_184, 4_800_000_000_000, 52_428_800, 233_472, 232_448, 18,
    ),
    "b200": Gpu(
        "NVIDIA B200", 10, True,
        148, 128, 1.965, 191_514_411_008, 7_672_320_000_000, 132_644_864, 233_472, 232_448, 18,
    ),
}  # fmt: skip


def target_config(name: str) -> str:
    """Returns the description of a GPU of `GPUS` for `get_topology_desc(platform="cuda", target_config=...)`."""
    gpu = GPUS[name]
    major, minor, patch = CUDNN
    return f"""
gpu_device_info {{
  name: "{gpu.kind}"
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability {gpu.capability}.0{"a" if gpu.own_instructions else ""}"
  cuda_compute_capability {{
    major: {gpu.capability}
    feature_extension: {"ACCELERATED_FEATURES" if gpu.own_instructions else "NONE"}
  }}
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "{major}.{minor}.{patch}"
  core_count: {gpu.cores}
  fpus_per_core: {gpu.units_per_core}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {gpu.memory_bytes}
  memory_bandwidth: {gpu.memory_bandwidth}
  l2_cache_size: {gpu.l2_bytes}
  shared_memory_per_core: {gpu.shared_bytes_per_core}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {gpu.shared_bytes_per_block}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  device_address_bits: 64
  ecc_enabled: true
  device_interconnect_info {{
    active_links: {gpu.nvlinks}
  }}
}}
platform_name: "CUDA"
dnn_version_info {{
  major: {major}
  minor: {minor}
  patch: {patch}
}}
device_description_str: "{gpu.kind}"
"""
