"""Options of the XLA compiler by platform: few, each with the reason why it is set.

The options are passed with each program, as `compiler_options` of `jax.jit`, and not in `XLA_FLAGS`: a name that the
compiler does not know then raises an error, whereas an unknown flag ends the process. The compilers of jax 0.10.2 and
0.12.0.1 accept every row. Options that are on by default are not repeated here: on GPUs asynchronous collectives, the
latency-hiding scheduler and command buffers; on TPUs the same scheduler and asynchronous all-gathers. Options that did
not improve the schedule of a ViT's step are left out too, such as larger thresholds for combining collectives: they
leave a single sum of all gradients, after the last product, with no computation left to hide it behind.
"""

OPTIONS: dict[str, dict[str, int | bool]] = {
    "gpu": {
        # Level O1 of XLA's optimisation levels; 19 is its number in both versions of jax. It unrolls the loop over
        # blocks twice and pipelines its collectives, so that the next block's parameters are gathered during this
        # block's products (NVIDIA's JAX-Toolbox, "GPU performance", recommends starting with it).
        "optimization_level": 19,
    },
    "tpu": {
        # All-reduces run during products, as all-gathers do by default: the second option makes them asynchronous, the
        # first allows fusing them with the products (OpenXLA, "XLA flags guidance", and MaxText's library of flags).
        # With `mesh.tensor` there are two all-reduces in every block.
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
        "xla_enable_async_all_reduce": True,
    },
}


def options_for(platform: str) -> dict[str, int | bool]:
    """Returns the options for a platform ("gpu", "tpu" or "cpu", as in `jax.Device.platform`); a dict, maybe empty."""
    return dict(OPTIONS.get({"cuda": "gpu"}.get(platform, platform), {}))
