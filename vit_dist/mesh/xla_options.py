"""Options of the XLA compiler by platform: few, each with the reason why it is set.

The options are passed with each program, as `compiler_options` of `jax.jit`, and not in `XLA_FLAGS`: a name that the
compiler does not know then raises an error, whereas an unknown flag ends the process. The compilers of jax 0.10.2 and
0.12.0.1 accept every row. Options that are on by default are not repeated here: on GPUs asynchronous collectives, the
latency-hiding scheduler and command buffers; on TPUs the same scheduler and asynchronous all-gathers.

`plan` counts the collectives that no product hides, "exposed" (`plan/overlap.py`). Left out is what did not improve a
ViT's step by that count:
- larger thresholds for combining collectives: they leave a single sum of all gradients, after the last product
- TPU, no loop over blocks: XLA combines gradients into a few sums, and only a sum of one array is asynchronous. With
  `xla_jf_crs_combiner_threshold_in_bytes` of 4 MiB, v5e:4x4 with mesh.fsdp=16 exposes less: B/16 0.6 ms a step instead
  of 3.3, L/16 3.9 instead of 13.1. But both take 3 % more memory and move more: B/16 1.6 GB, which is 2.4 ms, L/16 3.0
  GB, mostly by products, which arithmetic bounds. For L/16 it may be worth it. 16 MiB hides nothing.
- TPU: asynchronous reduce-scatter fusions, and layouts for reduce-scatters. There are none: gradients are summed whole.
- GPU: `xla_gpu_experimental_parallel_collective_overlap_limit` of 2, so that sums between nodes run beside collectives
  within a node. B/16 on h100:8x2 exposes 0.5 ms less, L/16 as much as before; nobody has run it on several GPUs.
"""

Options = dict[str, int | bool]

OPTIONS: dict[str, Options] = {
    "gpu": {
        # Level O1 of XLA's optimisation levels; 19 is its number in both versions of jax. It unrolls the loop over
        # blocks twice and pipelines its collectives, so that the next block's parameters are gathered during this
        # block's products (NVIDIA's JAX-Toolbox, "GPU performance", recommends starting with it).
        "optimization_level": 19,
        # Else XLA takes every product for Triton first, gives it to cuBLAS when that is quicker, as it is for all of a
        # ViT's, and has then lost the chance to let cuBLAS add the bias: B/16, 256 images on an H100, took 73.9 ms a
        # step instead of 71.2, and its compilation 15 s instead of 12. Compiled for an absent GPU, it is not tried.
        "xla_gpu_enable_triton_gemm": False,
    },
    "tpu": {
        # All-reduces run during products, as all-gathers do by default: the second option makes them asynchronous, the
        # first allows fusing them with the products (OpenXLA, "XLA flags guidance", and MaxText's library of flags).
        # With `mesh.tensor` there are two all-reduces in every block.
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
        "xla_enable_async_all_reduce": True,
    },
}

# Options beside those, for models whose blocks are not a loop (`model.scan=False`).
UNROLLED: dict[str, Options] = {
    "gpu": {
        # With `mesh.fsdp`, XLA would gather the parameters of one or two blocks at once, sum the gradients of many at
        # once, and hide little of it. These sizes, of what a GPU receives, are less than a block's. On h100:8x2 with
        # mesh.fsdp=8, B/16 exposes 75 MB a step instead of 393, L/16 207 instead of 1,004, and both take 2 % less
        # memory. In a loop of one block as its body they expose more: B/16 323 MB instead of 163.
        "xla_gpu_all_gather_combine_threshold_bytes": 8 * 2**20,
        "xla_gpu_reduce_scatter_combine_threshold_bytes": 2**20,
        # Likewise the gradients' sums with `mesh.data`. On h100:8, B/16 exposes 0.8 ms a step instead of 1.0 and takes
        # 12 % less memory; L/16 exposes 2.8 ms instead of 2.4 and moves 3 % fewer bytes.
        "xla_gpu_all_reduce_combine_threshold_bytes": 2 * 2**20,
    },
}


def options_for(platform: str, *, unrolled: bool) -> Options:
    """Returns the options of a program; a dict, maybe empty.

    Args:
      platform: "gpu", "tpu" or "cpu", as in `jax.Device.platform`.
      unrolled: whether the model's blocks are not a loop.
    """
    name = {"cuda": "gpu"}.get(platform, platform)
    return {**OPTIONS.get(name, {}), **(UNROLLED.get(name, {}) if unrolled else {})}
