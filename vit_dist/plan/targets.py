"""Hardware that need not be here: what is known of each kind of chip, and its devices as XLA's compilers see them.

A target is a kind of chip and how many: `v5e:4x4`, the chips along each side of a TPU slice, of which `--slices=N`
takes several; `h200:8x4`, 4 nodes of 8 GPUs; `cpu:8`, 8 pretended devices.

A TPU's figures are those of Google Cloud's documentation, pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e". ICI, the
wires between the chips of a slice, is published as bytes/s a chip over all ports and in both directions: 400 GB/s over
4 ports is 50 GB/s one way by each. The memory that a program may use is what libtpu itself says when one is too large
for the chip, in gibibytes ("exceeds available HBM (15.75G)"), in version 0.0.50.1; 0.0.42.1 has 0.01 more of v5p and
v6e.

A GPU's are those that XLA's compiler is told (`gpu.py`) and NVIDIA's datasheets, which give NVLink in both directions
together. Its share of the network is that of a DGX, which has a network card for each GPU. JAX takes a share of a GPU's
memory for its arrays, `MEMORY_SHARE` unless a variable says otherwise, and a program has no more.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from vit_dist.config import ConfigError
from vit_dist.plan import gpu
from vit_dist.run.devices import peak_flops
from vit_dist.schema import near_miss

GIB = 2**30
MEMORY_SHARE = 0.75  # jaxlib's default of the two variables (JAX documentation, "GPU memory allocation")
MEMORY_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the second is jaxlib's older name
MOST_DEVICES = 32768  # a limit of ours: more of them is a slip of the finger that would fill this machine's memory

_GPUS_A_NODE = (1, 2, 4, 8)
_FLAT_SHAPES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))  # pages "TPU v5e" and "TPU v6e"
# Pages "TPU v4", "TPU v5p" and "TPU types and topologies": A <= B <= C, all at most 4 or all multiples of 4, by cubes.
_SMALL_SHAPES = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_CUBE = 4
_LARGEST = {"v4": (16, 16, 16), "v5p": (16, 16, 24)}  # a whole pod of v4; the largest job of v5p


@dataclasses.dataclass(frozen=True)
class Chip:
    """What is known of one kind of device; None where nothing is published, as of a CPU."""

    name: str
    kind: str  # as JAX says in `device_kind`
    platform: str  # "tpu", "gpu", "cpu"
    memory_bytes: int | None  # that a program may use
    memory_bandwidth: float | None  # bytes/s
    link: str  # the quick wires, within a slice or node: "ICI", "NVLink", "" for none
    link_bandwidth: float | None  # bytes/s one way: of one port of ICI; of all NVLinks of a GPU together
    ports: int  # of ICI: 4 in a torus of two dimensions, 6 in one of three; else 0
    network_bandwidth: float | None  # bytes/s one way: a device's share of the network between slices or nodes
    source: str

    def peak_flops(self, dtype: str) -> float | None:
        """FLOP/s at the most in `bfloat16` or `float32` arithmetic."""
        return peak_flops(self.kind, dtype)


@dataclasses.dataclass(frozen=True)
class Target:
    """So many devices of one kind, and how they hang together."""

    name: str  # to be shown: "h200:8x4", "2 slices of v5e:4x4"
    chip: Chip
    shape: tuple[int, ...]  # TPU: chips along each side of a slice; GPU: (nodes, GPUs a node); CPU: (devices,)
    slices: int = 1

    @property
    def count(self) -> int:
        """How many devices there are in all."""
        return self.slices * math.prod(self.shape)


def _tpu(
    name: str, kind: str, usable_gib: float, memory_gb: float, ici_gb: float, ports: int, network_gbit: float
) -> Chip:
    """usable_gib: see above. memory_gb: GB/s. ici_gb: GB/s of all ports, both ways. network_gbit: Gbit/s a chip."""
    link, page = ici_gb / ports / 2 * 1e9, f"Google Cloud documentation, TPU {name}"
    memory = int(usable_gib * GIB)
    return Chip(name, kind, "tpu", memory, memory_gb * 1e9, "ICI", link, ports, network_gbit / 8 * 1e9, page)


def _gpu(name: str, nvlink_gb: float, network_gbit: float, source: str) -> Chip:
    """nvlink_gb: GB/s of all NVLinks of a GPU, both ways. network_gbit: Gbit/s of a GPU's network card."""
    of, source = gpu.GPUS[name], f"openxla/xla target_config/specs; {source}"
    link, network = nvlink_gb / 2 * 1e9, network_gbit / 8 * 1e9
    return Chip(name, of.kind, "gpu", of.memory_bytes, of.memory_bandwidth, "NVLink", link, 0, network, source)


# `memory_bytes` of a GPU is here all that it has; `_chip` takes JAX's share of it.
_CHIPS = {
    chip.name: chip
    for chip in (
        # What the page of v4 leaves open: its pods all-reduce at 1.1 PB/s, which over 4,096 chips and 6 ports is 45
        # GB/s one way by each (51.2 TB/s of 256 chips and 4 ports are v5e's 50). So say Austin et al. 2025, "How to
        # Scale Your Model", TPU specs, which also has its network, 6.25 GB/s. The networks of v5e and v6e are published
        # a pod: 6.4 and 25.6 Tbit/s of 256 chips.
        _tpu("v4", "TPU v4", 30.75, memory_gb=1200, ici_gb=540, ports=6, network_gbit=50),
        _tpu("v5e", "TPU v5 lite", 15.75, memory_gb=819, ici_gb=400, ports=4, network_gbit=25),
        _tpu("v5p", "TPU v5", 95.73, memory_gb=2765, ici_gb=1200, ports=6, network_gbit=50),
        _tpu("v6e", "TPU v6 lite", 31.24, memory_gb=1638, ici_gb=800, ports=4, network_gbit=100),
        _gpu("a100", nvlink_gb=600, network_gbit=200, source="NVIDIA A100 and DGX A100 datasheets"),
        _gpu("h100", nvlink_gb=900, network_gbit=400, source="NVIDIA H100 and DGX H100 datasheets"),
        _gpu("h200", nvlink_gb=900, network_gbit=400, source="NVIDIA H200 and DGX H200 datasheets"),
        _gpu("b200", nvlink_gb=1800, network_gbit=400, source="NVIDIA HGX and DGX B200 datasheets"),
        Chip("cpu", "cpu", "cpu", None, None, "", None, 0, None, "no figures: how memory is used, not how fast it is"),
    )
}


def parse(text: str, slices: int = 1) -> Target:
    """`--target` and `--slices` as a `Target`. Raises `ConfigError`, which says what is valid."""
    name, colon, shape = text.partition(":")
    if name not in _CHIPS:
        near = near_miss(name.lower(), (one for one in _CHIPS if one != "cpu"))  # which "tpu" and "gpu" do not mean
        raise ConfigError(f"--target={text}: {name!r} is none of {', '.join(_CHIPS)}{near}; see plan --targets")
    chip = _chip(name)
    sides = tuple(map(int, shape.split("x"))) if re.fullmatch(r"[1-9]\d{0,8}(x[1-9]\d{0,8})*", shape) else ()
    if not _valid(chip, sides):
        found = f"{shape!r} is no shape of {name}{_near(chip, shape, sides)}" if colon else "does not say how many"
        raise ConfigError(f"--target={text}: {found}; valid: {_shapes(chip)}")
    if slices < 1 or (slices > 1 and chip.platform != "tpu"):
        wanted = "1 or more" if chip.platform == "tpu" else f"1, as {name} comes in no slices"
        nodes = f"; more nodes are written {name}:8x4" if chip.platform == "gpu" else ""
        raise ConfigError(f"--slices: must be {wanted}, found {slices}{nodes}")
    if chip.platform == "gpu":
        sides = (sides[1] if len(sides) == 2 else 1, sides[0])
    if chip.platform == "cpu":
        chip = dataclasses.replace(chip, memory_bytes=_memory_here() // sides[0])
    target = Target(text if slices == 1 else f"{slices} slices of {text}", chip, sides, slices)
    if target.count > MOST_DEVICES:
        raise ConfigError(f"--target={text}: {target.count} devices are too many; plan takes at most {MOST_DEVICES}")
    return target


def devices(target: Target) -> list[jax.Device]:
    """The devices of a target, for XLA to compile for: nothing can run on those that are not here.

    A TPU's have `coords` in their slice and, where there are several, a `slice_index`; their `process_index` is one for
    every 4 chips, as in a slice whose virtual machines have 4 (those of v5e and v6e may have 8). A GPU's
    `process_index` is its node, its `slice_index` 0. Raises `ConfigError` where a compiler is not installed, or where
    JAX runs with too few CPU devices.
    """
    platform = target.chip.platform
    if platform == "cpu":
        here = jax.devices("cpu")
        if len(here) < target.count:
            raise ConfigError(
                f"--target={target.name}: jax runs with {len(here)} CPU devices already; start anew, with "
                f"fake_devices={target.count}"
            )
        return here[: target.count]
    if platform == "gpu":
        _check_installed(target, "jax_plugins.xla_cuda13", "cuda13", "GPU")
        nodes, each = target.shape
        options = {"target_config": gpu.text(target.chip.name), "topology": f"1x{nodes}x{each}"}
        return list(topologies.get_topology_desc(platform="cuda", topology_name="", **options).devices)
    _check_installed(target, "libtpu", "tpu", "TPU")
    _quiet_libtpu()
    name = f"{target.chip.name}:{'x'.join(map(str, target.shape))}"
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **_tpu_options(target)).devices)


def attached_chip(device: jax.Device) -> Chip:
    """The chip of a device of this job, with the memory that JAX has of it, and no figures where it is not known."""
    known = (chip for chip in _CHIPS.values() if device.device_kind in (chip.kind, f"TPU {chip.name}"))
    kind = device.device_kind
    chip = next(known, Chip(kind, kind, device.platform, None, None, "", None, 0, None, "no figures"))
    stats = device.client.local_devices()[0].memory_stats() or {}  # another process's device does not tell
    return dataclasses.replace(chip, memory_bytes=stats.get("bytes_limit"))


def listing() -> list[dict[str, Any]]:
    """A row for each chip, for people to choose from: the figures, the shapes that are valid, and who says so."""
    return [
        {
            "name": chip.name,
            "kind": chip.kind,
            "memory_bytes": chip.memory_bytes,
            "memory_bandwidth": chip.memory_bandwidth,
            "link": chip.link,
            "link_bandwidth": chip.link_bandwidth,
            "ports": chip.ports,
            "network_bandwidth": chip.network_bandwidth,
            "bfloat16_flops": chip.peak_flops("bfloat16"),
            "shapes": _shapes(chip),
            "source": chip.source,
        }
        for chip in map(_chip, _CHIPS)
    ]


def _chip(name: str) -> Chip:
    chip = _CHIPS[name]
    if chip.platform != "gpu" or chip.memory_bytes is None:
        return chip
    return dataclasses.replace(chip, memory_bytes=int(chip.memory_bytes * _memory_share()))


def _memory_share() -> float:
    """The share of a GPU's memory that JAX takes. Raises `ConfigError` where its variable makes no sense."""
    for name in MEMORY_VARIABLES:
        if value := os.environ.get(name, ""):
            try:
                share = float(value)
            except ValueError:
                share = math.nan
            if not 0 < share <= 1:
                raise ConfigError(f"{name}: the share of a GPU's memory, above 0 and at most 1, found {value!r}")
            return share
    return MEMORY_SHARE


def _memory_here() -> int:
    """The bytes of this machine's memory, which the devices that it pretends to have share."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _valid(chip: Chip, sides: tuple[int, ...]) -> bool:
    if not sides:
        return False
    if chip.platform == "cpu":
        return len(sides) == 1
    if chip.platform == "gpu":
        return len(sides) <= 2 and sides[0] in _GPUS_A_NODE
    if chip.ports == 4:
        return sides in _FLAT_SHAPES
    cubes = len(sides) == 3 and all(side % _CUBE == 0 for side in sides) and list(sides) == sorted(sides)
    return sides in _SMALL_SHAPES or (cubes and math.prod(sides) <= math.prod(_LARGEST[chip.name]))


def _shapes(chip: Chip) -> str:
    """The valid shapes in words."""
    if chip.platform == "cpu":
        return "cpu:N for N devices"
    if chip.platform == "gpu":
        each = ", ".join(map(str, _GPUS_A_NODE))
        return f"{chip.name}:G or {chip.name}:GxN for N nodes of G GPUs, G one of {each}"
    if chip.ports == 4:
        return " ".join(f"{chip.name}:{_written(sides)}" for sides in _FLAT_SHAPES)
    small, most = " ".join(f"{chip.name}:{_written(sides)}" for sides in _SMALL_SHAPES), _LARGEST[chip.name]
    cubes = f"{chip.name}:AxBxC of multiples of {_CUBE}, A <= B <= C, up to {math.prod(most):,} chips"
    return f"{small} and {cubes}, such as {_written(most)}"


def _near(chip: Chip, shape: str, sides: tuple[int, ...]) -> str:
    """Says which valid shape is near, ` (did you mean 4x4?)`; where none is, nothing."""
    if chip.platform != "tpu":
        return ""
    if _valid(chip, tuple(sorted(sides))):
        return f" (did you mean {_written(tuple(sorted(sides)))}?)"
    return near_miss(shape, map(_written, _FLAT_SHAPES if chip.ports == 4 else _SMALL_SHAPES))


def _written(sides: tuple[int, ...]) -> str:
    return "x".join(map(str, sides))


def _tpu_options(target: Target) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if target.slices > 1:
        options["num_slices"] = target.slices
    if target.shape == (1, 1):  # libtpu takes 4 chips for a host otherwise
        options["chips_per_host_bounds"] = [1, 1, 1]
    if target.chip.name == "v4":  # both cores of a chip as one device, as JAX has them on a v4 (else there are two)
        options["chip_config_name"] = "megacore"
    return options


def _quiet_libtpu() -> None:
    """Tells libtpu that there is no TPU to look for.

    The first two keep it from asking the network and from refusing a second process that compiles. Without the others
    it complains on stderr; they change neither the devices nor what is compiled for them, whatever the target.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def _check_installed(target: Target, module: str, extra: str, compiler: str) -> None:
    parent = module.partition(".")[0]
    if importlib.util.find_spec(parent) is None or importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"--target={target.name}: the {compiler} compiler is not installed; in a checkout run make compilers and "
            f"set PYTHONPATH=.cache/compilers, elsewhere pip install 'jax[{extra}]=={jax.__version__}'"
        )
