"""Options of the XLA compiler by the platform it compiles for: few, and each with the reason why it is there.

They travel with the program, as `compiler_options` of `jax.jit`, and not in `XLA_FLAGS`: a name that the compiler does
not know is then an error, where an unknown flag ends the process. Every row is accepted by the compilers of jax 0.10.2
and 0.12.0.1. What these turn on by themselves is not repeated here: on GPUs asynchronous collectives, the
latency-hiding scheduler and command buffers, on TPUs the same scheduler and asynchronous all-gathers. Neither is what
was tried and made no better schedule of a ViT's step, such as the thresholds for combining collectives: larger ones
leave a single sum of all gradients, after the last product, with nothing to hide it behind.
"""

OPTIONS: dict[str, dict[str, int | bool]] = {
    "gpu": {
        # Optimisation level O1 of XLA's effort levels; 19 is its number, which both versions of jax take. The loop over
        # blocks is unrolled twice and its collectives pipelined, so that the next block's parameters are gathered
        # during this block's products (NVIDIA's JAX-Toolbox, "GPU performance": where to begin).
        "optimization_level": 19,
    },
    "tpu": {
        # All-reduces run during products, as all-gathers do by default: the second makes them asynchronous, the first
        # lets them be fused with what runs meanwhile (OpenXLA, "XLA flags guidance", and MaxText's library of flags).
        # With `mesh.tensor` there are two in every block.
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
        "xla_enable_async_all_reduce": True,
    },
}


def options_for(platform: str) -> dict[str, int | bool]:
    """The options for devices of this platform ("gpu", "tpu", "cpu", as `jax.Device.platform` says); may be none."""
    return dict(OPTIONS.get({"cuda": "gpu"}.get(platform, platform), {}))
