"""Descriptions of GPUs for XLA's compiler, so that it can compile without one.

A description is a `stream_executor.GpuTargetConfigProto` in protobuf's text format. The figures are those of
openxla/xla, `xla/backends/gpu/target_config/specs/{a100_sxm_80,h100_sxm,h200,b200}.txtpb`, without the rates of single
arithmetic units, which the compiler does not need. The text format refuses unknown fields, so only fields that jax
0.10.2 knows are used.
"""

import dataclasses

# The version of cuDNN that programs are compiled for. XLA's files have 8.9, 9.7 or 9.10. Here all GPUs have the same,
# so that plans do not differ by it, and a recent one, with which the compiler uses jax's fused attention.
CUDNN = (9, 10, 0)


@dataclasses.dataclass(frozen=True)
class Gpu:
    """The figures that differ between kinds of GPU."""

    kind: str  # the driver's name, which is JAX's `device_kind`
    capability: int  # CUDA compute capability, major
    own_instructions: bool  # whether it has instructions of its generation alone, such as Hopper's wgmma ("sm_90a")
    cores: int  # streaming multiprocessors
    units_a_core: int  # float32 units of one
    clock_ghz: float
    memory_bytes: int
    memory_bandwidth: int  # bytes/s
    l2_bytes: int
    shared_bytes_a_core: int
    shared_bytes_a_block: int  # the maximum that a block may request
    nvlinks: int


GPUS = {
    "a100": Gpu(
        kind="NVIDIA A100-SXM4-80GB",
        capability=8,
        own_instructions=False,
        cores=108,
        units_a_core=64,
        clock_ghz=1.41,
        memory_bytes=85100068864,
        memory_bandwidth=2039040000000,
        l2_bytes=41943040,
        shared_bytes_a_core=167936,
        shared_bytes_a_block=166912,
        nvlinks=12,  # not in XLA's file; NVIDIA A100 Tensor Core GPU Architecture whitepaper
    ),
    "h100": Gpu(
        kind="NVIDIA H100 80GB HBM3",
        capability=9,
        own_instructions=True,
        cores=132,
        units_a_core=128,
        clock_ghz=1.98,
        memory_bytes=84942979072,
        memory_bandwidth=3352320000000,
        l2_bytes=52428800,
        shared_bytes_a_core=233472,
        shared_bytes_a_block=232448,
        nvlinks=18,
    ),
    "h200": Gpu(
        kind="NVIDIA H200",  # the driver's name; XLA's file has "NVIDIA H200 141GB HBM3e"
        capability=9,
        own_instructions=True,
        cores=132,
        units_a_core=128,
        clock_ghz=1.98,
        memory_bytes=151397597184,
        memory_bandwidth=4800000000000,
        l2_bytes=52428800,
        shared_bytes_a_core=233472,
        shared_bytes_a_block=232448,
        nvlinks=18,
    ),
    "b200": Gpu(
        kind="NVIDIA B200",
        capability=10,
        own_instructions=True,
        cores=148,
        units_a_core=128,
        clock_ghz=1.965,
        memory_bytes=191514411008,
        memory_bandwidth=7672320000000,
        l2_bytes=132644864,
        shared_bytes_a_core=233472,
        shared_bytes_a_block=232448,
        nvlinks=18,
    ),
}


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
  fpus_per_core: {gpu.units_a_core}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {gpu.memory_bytes}
  memory_bandwidth: {gpu.memory_bandwidth}
  l2_cache_size: {gpu.l2_bytes}
  shared_memory_per_core: {gpu.shared_bytes_a_core}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {gpu.shared_bytes_a_block}
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
