"""Address management as pure functions and values: ranges, the allocator, leaks.

No clock, no file, no kernel: the time is an argument, the state is the caller's.
"""

from __future__ import annotations

from portwright.ipam.allocator import REST_SECONDS, allocate, usage
from portwright.ipam.leaks import Leak, ObservedLink, find_leaks
from portwright.ipam.ranges import Pools, Range, RangeSet, canonical_pools, compile_pools, parse_gateway
from portwright.ipam.state import AddressState, Allocation, Holder, Rest, Usage

__all__ = [
    "REST_SECONDS",
    "AddressState",
    "Allocation",
    "Holder",
    "Leak",
    "ObservedLink",
    "Pools",
    "Range",
    "RangeSet",
    "Rest",
    "Usage",
    "allocate",
    "canonical_pools",
    "compile_pools",
    "find_leaks",
    "parse_gateway",
    "usage",
]
