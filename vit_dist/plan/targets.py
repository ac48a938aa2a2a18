"""Hardware to plan for: the published figures of each kind of chip, and devices that XLA can compile for.

None of it need be attached. A target is a kind of chip and a number of them: `v5e:4x4`, the chips along each side of a
TPU slice (`--slices=N` takes several slices); `h200:8x4`, 4 nodes of 8 GPUs; `cpu:8`, 8 fake devices.

The figures of a TPU come from Google Cloud's documentation, pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e". ICI,
the links between the chips of a slice, is published as the bytes/s of a chip over all ports in both directions: 400
GB/s over 4 ports is 50 GB/s one way for each port. The memory that a program may use is what libtpu 0.0.50.1 reports
for a program that is too large, in GiB ("exceeds available HBM (15.75G)"); libtpu 0.0.42.1 reports 0.01 more for v5p
and v6e.

The figures of a GPU are those that XLA's compiler gets (`gpu.py`) and those of NVIDIA's datasheets, which give NVLink's
rate in both directions together. Its share of the network is that of a DGX, which has a network card for each GPU. A
program may use only the share of a GPU's memory that JAX reserves: `MEMORY_SHARE`, or the value of an environment
variable.
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
from vit_dist.run.devices import memory_bytes, peak_flops
from vit_dist.schema import near_miss

GIB = 2**30
MEMORY_SHARE = 0.75  # jaxlib's default of the two variables (JAX documentation, "GPU memory allocation")
MEMORY_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the second is jaxlib's older name
MAX_DEVICES = 32768  # more is taken for a typing error; their descriptions would fill this machine's memory

_GPUS_PER_NODE = (1, 2, 4, 8)
_FLAT_SHAPES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))  # pages "TPU v5e" and "TPU v6e"
# Pages "TPU v4", "TPU v5p" and "TPU types and topologies": A <= B <= C, all at most 4 or all multiples of 4.
_SMALL_SHAPES = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_CUBE = 4
_LARGEST = {"v4": (16, 16, 16), "v5p": (16, 16, 24)}  # a full pod of v4; the largest job of v5p


@dataclasses.dataclass(frozen=True)
class Chip:
    """The published figures of one kind of device; None where nothing is published, as for a CPU."""

    name: str
    kind: str  # JAX's `device_kind`
    platform: str  # "tpu", "gpu", "cpu"
    memory_bytes: int | None  # that a program may use
    memory_bandwidth: float | None  # bytes/s
    link: str  # within a slice or node: "ICI", "NVLink", "" for none
    link_bandwidth: float | None  # bytes/s one way: one port of ICI, or all NVLinks of a GPU together
    ports: int  # of ICI: 4 in a two-dimensional torus, 6 in a three-dimensional one; else 0
    network_bandwidth: float | None  # bytes/s one way: a device's share of the network between slices or nodes
    source: str

    def peak_flops(self, dtype: str) -> float | None:
        """Returns the peak FLOP/s in `bfloat16` or `float32`; None if it is unknown."""
        return peak_flops(self.kind, dtype)


@dataclasses.dataclass(frozen=True)
class Target:
    """A number of devices of one kind, and how they are connected."""

    name: str  # for messages: "h200:8x4", "2 slices of v5e:4x4"
    chip: Chip
    shape: tuple[int, ...]  # TPU: chips along each side of a slice; GPU: (nodes, GPUs a node); CPU: (devices,)
    slices: int = 1

    @property
    def count(self) -> int:
        """The number of devices in all slices."""
        return self.slices * math.prod(self.shape)


def _tpu(
    name: str, kind: str, usable_gib: float, memory_gb: float, ici_gb: float, ports: int, network_gbit: float
) -> Chip:
    """Returns a TPU.

    Args:
      name: its name in a target.
      kind: JAX's `device_kind`.
      usable_gib: GiB of memory that a program may use.
      memory_gb: GB/s of the memory.
      ici_gb: GB/s of all ports in both directions.
      ports: number of ICI ports.
      network_gbit: Gbit/s of a chip's share of the network.
    """
    link, page = ici_gb / ports / 2 * 1e9, f"Google Cloud documentation, TPU {name}"
    memory = int(usable_gib * GIB)
    return Chip(name, kind, "tpu", memory, memory_gb * 1e9, "ICI", link, ports, network_gbit / 8 * 1e9, page)


def _gpu(name: str, nvlink_gb: float, network_gbit: float, source: str) -> Chip:
    """Returns a GPU of `gpu.GPUS`.

    Args:
      name: its name in a target.
      nvlink_gb: GB/s of all its NVLinks in both directions.
      network_gbit: Gbit/s of its network card.
      source: of these two figures.
    """
    specs, source = gpu.GPUS[name], f"openxla/xla target_config/specs; {source}"
    link, network = nvlink_gb / 2 * 1e9, network_gbit / 8 * 1e9
    return Chip(name, specs.kind, "gpu", specs.memory_bytes, specs.memory_bandwidth, "NVLink", link, 0, network, source)


# `memory_bytes` of a GPU is its full memory in this table; `_chip` takes JAX's share of it.
_CHIPS = {
    chip.name: chip
    for chip in (
        # The page of v4 does not give the rate of ICI, only that of a pod's all-reduce: 1.1 PB/s, which is 45 GB/s one
        # way for each of 6 ports of 4,096 chips (v5e's 51.2 TB/s are 50 GB/s for 4 ports of 256 chips). Austin et al.
        # 2025, "How to Scale Your Model", TPU specs, agree and give its network, 6.25 GB/s. The networks of v5e and v6e
        # are published for a pod of 256 chips: 6.4 and 25.6 Tbit/s.
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
    """Returns the target of `--target` and `--slices`. Raises `ConfigError` with the valid values."""
    name, colon, shape = text.partition(":")
    if name not in _CHIPS:
        near = near_miss(name.lower(), (chip for chip in _CHIPS if chip != "cpu"))  # "tpu" and "gpu" do not mean "cpu"
        raise ConfigError(f"--target={text}: {name!r} is none of {', '.join(_CHIPS)}{near}; see plan --targets")
    chip = _chip(name)
    sides = tuple(map(int, shape.split("x"))) if re.fullmatch(r"[1-9]\d{0,8}(x[1-9]\d{0,8})*", shape) else ()
    if not _valid(chip, sides):
        problem = f"{shape!r} is not a shape of {name}{_suggestion(chip, shape, sides)}" if colon else "has no shape"
        raise ConfigError(f"--target={text}: {problem}; valid: {_shapes(chip)}")
    if slices < 1 or (slices > 1 and chip.platform != "tpu"):
        wanted = "1 or more" if chip.platform == "tpu" else f"1, because {name} has no slices"
        nodes = f"; more nodes are written {name}:8x4" if chip.platform == "gpu" else ""
        raise ConfigError(f"--slices: must be {wanted}, found {slices}{nodes}")
    if chip.platform == "gpu":
        sides = (sides[1] if len(sides) == 2 else 1, sides[0])
    if chip.platform == "cpu":
        chip = dataclasses.replace(chip, memory_bytes=_machine_memory() // sides[0])
    target = Target(text if slices == 1 else f"{slices} slices of {text}", chip, sides, slices)
    if target.count > MAX_DEVICES:
        raise ConfigError(f"--target={text}: {target.count} devices are too many; plan takes at most {MAX_DEVICES}")
    return target


def devices(target: Target) -> list[jax.Device]:
    """Returns the devices of a target. XLA can compile for them; unless they are CPUs, nothing can run on them.

    TPU devices have `coords` in their slice and, with several slices, a `slice_index`; 4 chips share a `process_index`,
    as in slices whose virtual machines have 4 chips (those of v5e and v6e may have 8). The `process_index` of a GPU is
    its node, and its `slice_index` is 0.

    Raises:
      ConfigError: the compiler is not installed, or JAX already runs with too few CPU devices.
    """
    platform = target.chip.platform
    if platform == "cpu":
        available = jax.devices("cpu")
        if len(available) < target.count:
            raise ConfigError(
                f"--target={target.name}: jax runs with {len(available)} CPU devices already; start a new process with "
                f"fake_devices={target.count}"
            )
        return available[: target.count]
    if platform == "gpu":
        _check_installed(target, "jax_plugins.xla_cuda13", "cuda13", "GPU")
        nodes, gpus = target.shape
        options = {"target_config": gpu.target_config(target.chip.name), "topology": f"1x{nodes}x{gpus}"}
        return list(topologies.get_topology_desc(platform="cuda", topology_name="", **options).devices)
    _check_installed(target, "libtpu", "tpu", "TPU")
    _quiet_libtpu()
    name = f"{target.chip.name}:{_shape_text(target.shape)}"
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **_tpu_options(target)).devices)


def attached_chip(device: jax.Device) -> Chip:
    """Returns the chip of an attached device with the memory that JAX reserved; without figures for unknown kinds."""
    known = (chip for chip in _CHIPS.values() if device.device_kind in (chip.kind, f"TPU {chip.name}"))
    kind = device.device_kind
    chip = next(known, Chip(kind, kind, device.platform, None, None, "", None, 0, None, "no figures"))
    return dataclasses.replace(chip, memory_bytes=memory_bytes(device))


def listing() -> list[dict[str, Any]]:
    """Returns a row for each chip: its figures, their source, and the valid shapes."""
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
    """Returns the share of a GPU's memory that JAX reserves. Raises `ConfigError` if its variable is not a share."""
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


def _machine_memory() -> int:
    """Returns the bytes of this machine's memory, which its fake devices share."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _valid(chip: Chip, sides: tuple[int, ...]) -> bool:
    if not sides:
        return False
    if chip.platform == "cpu":
        return len(sides) == 1
    if chip.platform == "gpu":
        return len(sides) <= 2 and sides[0] in _GPUS_PER_NODE
    if chip.ports == 4:
        return sides in _FLAT_SHAPES
    cubes = len(sides) == 3 and all(side % _CUBE == 0 for side in sides) and list(sides) == sorted(sides)
    return sides in _SMALL_SHAPES or (cubes and math.prod(sides) <= math.prod(_LARGEST[chip.name]))


def _shapes(chip: Chip) -> str:
    """Returns the valid shapes as text."""
    if chip.platform == "cpu":
        return "cpu:N for N devices"
    if chip.platform == "gpu":
        counts = ", ".join(map(str, _GPUS_PER_NODE))
        return f"{chip.name}:G or {chip.name}:GxN for N nodes of G GPUs, G one of {counts}"
    if chip.ports == 4:
        return " ".join(f"{chip.name}:{_shape_text(sides)}" for sides in _FLAT_SHAPES)
    small, largest = " ".join(f"{chip.name}:{_shape_text(sides)}" for sides in _SMALL_SHAPES), _LARGEST[chip.name]
    cubes = f"{chip.name}:AxBxC of multiples of {_CUBE}, A <= B <= C, up to {math.prod(largest):,} chips"
    return f"{small} and {cubes}, such as {_shape_text(largest)}"


def _suggestion(chip: Chip, shape: str, sides: tuple[int, ...]) -> str:
    """Returns ` (did you mean 4x4?)` with a valid shape close to this one, "" if there is none."""
    if chip.platform != "tpu":
        return ""
    if _valid(chip, tuple(sorted(sides))):
        return f" (did you mean {_shape_text(tuple(sorted(sides)))}?)"
    return near_miss(shape, map(_shape_text, _FLAT_SHAPES if chip.ports == 4 else _SMALL_SHAPES))


def _shape_text(sides: tuple[int, ...]) -> str:
    return "x".join(map(str, sides))


def _tpu_options(target: Target) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if target.slices > 1:
        options["num_slices"] = target.slices
    if target.shape == (1, 1):  # libtpu's default is 4 chips a host
        options["chips_per_host_bounds"] = [1, 1, 1]
    if target.chip.name == "v4":  # one device for both cores of a chip, as JAX has on a v4
        options["chip_config_name"] = "megacore"
    return options


def _quiet_libtpu() -> None:
    """Sets variables so that libtpu does not look for a TPU.

    The first keeps it from querying the network, the second from refusing another process that compiles. The others
    only silence its warnings: they change neither the devices of any target nor what is compiled for them.
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
