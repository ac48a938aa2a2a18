"""The parts of a visit in the order of their value, each with the seconds that it should take on an H100.

The seconds were measured on 2026-11-27, but those of `padding` and `b16_scan`, which are estimates. Batch sizes are
fixed: those that fit into the 59 GiB that jax takes of an H100's memory, by the plans.
"""

from visit.runner import Part

MACHINE = Part("machine", "visit.machine:run", 20)

_OURS, _PROFILE, _TIMM = "visit.ours:throughput", "visit.ours:profile", "visit.peer:run"
_TINY_SHAPE = {"depth": 1, "embed_dim": 32, "num_heads": 2}
_TINY = {"model": "mu/16", "batch": 8, "image": 32, "settle": 2, "steps": 2, "rounds": 2}
_TINY_TIMM = {"batch": 8, "image": 32, "settle": 1, "steps": 2, "rounds": 2, "shape": _TINY_SHAPE}


def _ours(name: str, seconds: float, model: str, batch: int, rounds: int, scan: bool = False) -> Part:
    sizes = {"model": model, "batch": batch, "image": 224, "settle": 20, "steps": 20, "rounds": rounds, "scan": scan}
    return Part(name, _OURS, seconds, sizes, _TINY)


def _timm(name: str, seconds: float, model: str, batch: int) -> Part:
    sizes = {"model": model, "batch": batch, "image": 224, "settle": 9, "steps": 20, "rounds": 4}
    return Part(name, _TIMM, seconds, sizes, _TINY_TIMM)


PARTS = (
    Part(
        "ceilings",
        "visit.ceilings:run",
        8,
        {"side": 8192, "copy_mib": 2048, "calls": 20, "rounds": 7},
        {"side": 128, "copy_mib": 1, "calls": 2, "rounds": 2},
    ),
    _ours("b16", 45, "B/16", 256, rounds=9),
    _timm("b16_timm", 55, "vit_base_patch16_224", 256),
    Part("golden", "visit.golden:run", 72),
    Part(
        "attention",
        "visit.attention:run",
        38,
        {"tokens": [197, 196], "examples": 8, "heads": 12, "head_size": 64},
        {"tokens": [17, 16], "examples": 2, "heads": 2},
    ),
    Part(
        "padding",
        "visit.attention:in_model",
        20,
        {"examples": 64, "width": 384, "depth": 3, "mlp": 768, "heads": 6, "image_size": 224, "patch_size": 16},
        {"examples": 2, "width": 16, "depth": 2, "mlp": 32, "heads": 2, "image_size": 32, "patch_size": 8},
    ),
    Part("resume", "visit.resume:run", 74, {"steps": 300}, {"steps": 60}),
    _ours("s16", 32, "S/16", 512, rounds=4),
    _ours("l16", 50, "L/16", 128, rounds=4),
    Part("profile", _PROFILE, 22, {"model": "B/16", "batch": 256, "image": 224, "steps": 10}, _TINY),
    _timm("s16_timm", 42, "vit_small_patch16_224", 512),
    _timm("l16_timm", 82, "vit_large_patch16_224", 128),
    _ours("b16_scan", 45, "B/16", 256, rounds=2, scan=True),
)
# A visit of its own, by `--parts=loader`.
LOADER = Part(
    "loader",
    "visit.loader:run",
    60,
    {"steps": 16, "rounds": 5},
    {"steps": 1, "rounds": 1},
)
BY_NAME = {part.name: part for part in (*PARTS, LOADER)}


def planned() -> list[Part]:
    """The parts whose training step is planned beforehand."""
    return [part for part in PARTS if part.function == _OURS]
