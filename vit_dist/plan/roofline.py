"""The roofline of one device: lower bounds on the time of a step, and its likely time.

A device computes, moves bytes to and from its memory, and sends bytes to other devices. The time of each at its full
rate is a lower bound on the time of the step (Williams et al. 2009, "Roofline"). The likely time assumes that programs
reach certain shares of these rates (`EFFICIENCY`), and adds up what cannot overlap: matrix products, bound by
arithmetic or by memory; all other instructions, bound by memory; and the collectives that nothing can overlap. The
other collectives overlap with the first two, and lengthen the step only if they take longer.
"""

import dataclasses
from collections.abc import Iterable

from vit_dist import config
from vit_dist.plan.collectives import Collective, bytes_sent
from vit_dist.plan.links import Link
from vit_dist.plan.targets import Chip

# Shares of the published rates. Arithmetic: a large bfloat16 product was measured at 788 of an H200's 989 TFLOP/s
# (0.80), and a ViT's products are smaller. Memory and network: assumed. None was measured on a complete step.
EFFICIENCY = {"arithmetic": 0.7, "memory": 0.8, "network": 0.8}
# The next product needs the result of a collective over these axes. Over other axes, parameters are gathered ahead.
_BLOCKING_AXES = {"tensor", "context"}


@dataclasses.dataclass(frozen=True)
class Transfer:
    """All executions of one collective in a step, as time on a link."""

    link: str  # name of the link (`links.Link`)
    seconds: float  # at the link's full rate
    overlaps: bool  # whether it can run while the device computes


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one device computes and moves in a step."""

    flops: float  # of matrix products, including those that are computed again
    bytes: float  # moved to and from its memory
    other_bytes: float  # the part of `bytes` that is not moved by matrix products
    transfers: tuple[Transfer, ...] = ()


def transfer(
    collective: Collective, members: int, link: Link, model: config.Model, micro_batches: int
) -> Transfer | None:
    """Returns a collective as time on a link.

    A collective in the loop over blocks can run one block ahead of its use. Outside this loop nothing overlaps with it.

    Args:
      collective: what is sent.
      members: number of devices that take part.
      link: the link between them.
      model: `scan` says whether the blocks are a loop.
      micro_batches: with more than one, their loop is around the loop over blocks.

    Returns:
      The transfer; None if the bandwidth of the link is unknown.
    """
    if link.bandwidth is None:
        return None
    in_blocks = collective.loops > int(micro_batches > 1) or not model.scan
    seconds = collective.count * bytes_sent(collective, members) / link.bandwidth
    return Transfer(link.name, seconds, overlaps=in_blocks and not _BLOCKING_AXES & set(collective.axes))


def network_ms(transfers: Iterable[Transfer]) -> dict[str, float]:
    """Returns the milliseconds that each link is busy at its full rate, by name."""
    busy: dict[str, float] = {}
    for transfer in transfers:
        busy[transfer.link] = busy.get(transfer.link, 0.0) + transfer.seconds * 1000
    return busy


def bounds_ms(cost: Cost, chip: Chip, dtype: str) -> dict[str, float | None]:
    """Returns the lower bounds on a step in ms: arithmetic, memory, network; None where the chip's rate is unknown."""
    peak, bandwidth = chip.peak_flops(dtype), chip.memory_bandwidth
    return {
        "arithmetic": cost.flops / peak * 1000 if peak else None,
        "memory": cost.bytes / bandwidth * 1000 if bandwidth else None,
        "network": max(network_ms(cost.transfers).values(), default=0.0) if chip.link_bandwidth else None,
    }


def step_seconds(cost: Cost, chip: Chip, dtype: str) -> float | None:
    """Returns the likely time of a step; None if the chip's rates are unknown, as those of a CPU."""
    peak, bandwidth = chip.peak_flops(dtype), chip.memory_bandwidth
    if not peak or not bandwidth:
        return None
    memory_rate = bandwidth * EFFICIENCY["memory"]
    products = max(cost.flops / (peak * EFFICIENCY["arithmetic"]), (cost.bytes - cost.other_bytes) / memory_rate)
    computation = products + cost.other_bytes / memory_rate
    overlapped, exposed = (
        sum(transfer.seconds for transfer in cost.transfers if transfer.overlaps is overlaps) / EFFICIENCY["network"]
        for overlaps in (True, False)
    )
    return max(computation, overlapped) + exposed
