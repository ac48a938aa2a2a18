"""How long a step must take at the least, and how long it is likely to: the roofline of one device.

A device multiplies, moves bytes to and from its memory, and transfers to others. At the full rate of each, the time for
it is a lower bound on the step (Williams et al. 2009, "Roofline"). The likely time takes the shares of those rates
that programs reach (`EFFICIENCY`), and counts what one after the other takes: products, bound by arithmetic or, small
ones, by memory; then all that lies between them, bound by memory. Beside both runs what talk can hide there, and after
them the rest of it.
"""

import dataclasses
from collections.abc import Iterable

from vit_dist import config
from vit_dist.plan.collectives import Collective, sent
from vit_dist.plan.targets import Chip

# Shares of the published rates. Arithmetic: a large bfloat16 product was measured at 788 of an H200's 989 TFLOP/s
# (0.80), and a ViT's products are smaller. Memory and network: assumed. None was measured on a whole step.
EFFICIENCY = {"arithmetic": 0.7, "memory": 0.8, "network": 0.8}
_CRITICAL = {
    "tensor",
    "context",
}  # axes whose talk the next product waits for; a parameter is gathered ahead of its use


@dataclasses.dataclass(frozen=True)
class Transfer:
    """What a device sends over one kind of wire for one collective, all its executions in a step together."""

    link: str  # as `links.link` names it
    seconds: float  # at the wire's full rate
    hides: bool  # whether products can run meanwhile


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one device does in a step."""

    flops: float  # of products, those that are done again among them
    bytes: float  # moved to and from its memory
    other_bytes: float  # of these, by what is no product
    transfers: tuple[Transfer, ...] = ()


def transfer(
    one: Collective, members: int, wire: tuple[str, float | None], model: config.Model, times: int
) -> Transfer | None:
    """A collective among so many devices as time on a wire, by name and bytes/s; None where its rate is not known.

    What is said in the loop over blocks can be said a block ahead. What comes before or after it is waited for. times:
    micro-batches, whose loop is around that over blocks.
    """
    name, rate = wire
    if rate is None:
        return None
    in_blocks = one.loops > int(times > 1) or not model.scan
    return Transfer(name, one.count * sent(one, members) / rate, hides=in_blocks and not _CRITICAL & set(one.axes))


def network_ms(transfers: Iterable[Transfer]) -> dict[str, float]:
    """Milliseconds that each kind of wire is busy at its full rate."""
    busy: dict[str, float] = {}
    for talk in transfers:
        busy[talk.link] = busy.get(talk.link, 0.0) + talk.seconds * 1000
    return busy


def bounds_ms(work: Cost, chip: Chip, dtype: str) -> dict[str, float | None]:
    """Lower bounds on a step in milliseconds: arithmetic, memory, network; None where the chip's rate is not known."""
    peak, bandwidth = chip.peak_flops(dtype), chip.memory_bandwidth
    return {
        "arithmetic": work.flops / peak * 1000 if peak else None,
        "memory": work.bytes / bandwidth * 1000 if bandwidth else None,
        "network": max(network_ms(work.transfers).values(), default=0.0) if chip.link_bandwidth else None,
    }


def step_seconds(work: Cost, chip: Chip, dtype: str) -> float | None:
    """How long the step is likely to take; None where the chip's rates are not known, as of a CPU."""
    peak, bandwidth = chip.peak_flops(dtype), chip.memory_bandwidth
    if not peak or not bandwidth:
        return None
    moved = bandwidth * EFFICIENCY["memory"]
    products = max(work.flops / (peak * EFFICIENCY["arithmetic"]), (work.bytes - work.other_bytes) / moved)
    alone = products + work.other_bytes / moved
    hidden, exposed = (
        sum(talk.seconds for talk in work.transfers if talk.hides is hides) / EFFICIENCY["network"]
        for hides in (True, False)
    )
    return max(alone, hidden) + exposed
