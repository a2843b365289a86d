"""Policy: what it costs the traffic, packet by packet, and what a change of it costs."""

from __future__ import annotations

from bench.figures import Part
from bench.policy_fleet import Fleet, fleet
from bench.policy_packets import Runs, packets
from bench.policy_traffic import Effort, traffic

#: Numbers of rules that are compared.
SIZES = (10, 100, 1_000, 10_000, 100_000)
#: For who only wants to know whether it works.
FEW = (10, 100)


def policy() -> Part:
    """The whole of it, within four minutes."""
    return _policy(SIZES, Effort(31, 200, 31, 7, 150, 2_000), Runs(9, 20, 400), Fleet(1_000, 1_000, 10, 3))


def quick() -> Part:
    """A round of each, small."""
    return _policy(FEW, Effort(1, 1, 1, 1, 10, 100), Runs(1, 2, 20), Fleet(4, 6, 2, 1))


def _policy(sizes: tuple[int, ...], effort: Effort, runs: Runs, size: Fleet) -> Part:
    """Each of the three in turn; the programs alone first, while the machine is empty."""
    alone, flat = packets(sizes, runs)
    carried, kept, facts = traffic(sizes, effort)
    changed = fleet(size)
    return Part(
        "policy",
        [*carried, *alone, *changed.series],
        [*kept, *flat, *changed.goals],
        {**facts, **changed.facts},
    )
