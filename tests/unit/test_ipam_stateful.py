"""The allocator against a plain model, over any sequence of operations (hypothesis)."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from portwright.ipam.allocator import allocate
from portwright.ipam.ranges import compile_pools, parse_address
from portwright.ipam.state import AddressState, Holder
from portwright.model.errors import Conflict, PoolExhausted
from portwright.model.network import AddressRange

REST = 60.0
#: Two ranges, written high one first, with holes: what may be given out, in the order of the walk.
RANGES = (AddressRange(subnet="10.9.0.0/29", gateway="10.9.0.4"), AddressRange(subnet="10.1.0.0/29"))
ORDER = [
    "10.9.0.1",
    "10.9.0.2",
    "10.9.0.3",
    "10.9.0.5",
    "10.9.0.6",
    "10.1.0.2",
    "10.1.0.4",
    "10.1.0.5",
    "10.1.0.6",
]
POOLS = compile_pools("n", [RANGES], ("10.1.0.3",))


class Allocator(RuleBasedStateMachine):
    """``owner`` and ``released`` are the model; a naive walk over ORDER is the expectation."""

    def __init__(self) -> None:
        """Start empty."""
        super().__init__()
        self.state = AddressState()
        self.owner: dict[str, str] = {}
        self.released: dict[str, float] = {}
        self.last = len(ORDER) - 1
        self.now = 1000.0
        self.ports = 0

    def expected(self) -> str | None:
        """Return the first address after the last one given that has no owner and rested enough."""
        for step in range(1, len(ORDER) + 1):
            address = ORDER[(self.last + step) % len(ORDER)]
            rested = self.now - self.released.get(address, self.now - REST) >= REST
            if address not in self.owner and rested:
                return address
        return None

    def take(self, address: str) -> None:
        """Note the new owner in both."""
        self.ports += 1
        assert address not in self.owner, "two owners"
        self.state.take(*parse_address("", address), Holder(f"p{self.ports}", "n", 0))
        self.owner[address] = f"p{self.ports}"
        self.released.pop(address, None)
        self.last = ORDER.index(address)

    @rule()
    def add(self) -> None:
        """Allocate: exactly the model's choice, or exhausted with the model's counts."""
        expected = self.expected()
        if expected is None:
            with pytest.raises(PoolExhausted) as caught:
                allocate(POOLS, self.state, now=self.now, rest_seconds=REST)
            assert caught.value.used == len(self.owner)
            assert caught.value.used + caught.value.resting == len(ORDER)
            return
        ((_, address),) = allocate(POOLS, self.state, now=self.now, rest_seconds=REST)
        assert address == expected
        self.take(address)

    @rule(address=st.sampled_from(ORDER))
    def request(self, address: str) -> None:
        """Ask for an address: given unless it has an owner, resting or not."""
        try:
            ((_, given),) = allocate(POOLS, self.state, requested=[address], now=self.now, rest_seconds=REST)
        except Conflict:
            assert address in self.owner
            return
        assert given == address
        self.take(address)

    @rule(data=st.data(), rest=st.booleans())
    def release(self, data: st.DataObject, rest: bool) -> None:
        """Release any address, with or without a rest."""
        if not self.owner:
            return
        address = data.draw(st.sampled_from(sorted(self.owner)))
        undo = self.state.release(*parse_address("", address), self.now if rest else None)
        if data.draw(st.booleans()):
            undo()
            return
        del self.owner[address]
        if rest:
            self.released[address] = self.now

    @rule(seconds=st.sampled_from([0.5, 10.0, 30.0, 59.5, 60.0]))
    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds

    @invariant()
    def owners_agree(self) -> None:
        """The state names the model's owner of every address, and none of any other."""
        for address in [
            *ORDER,
            "10.9.0.0",
            "10.9.0.4",
            "10.9.0.7",
            "10.1.0.0",
            "10.1.0.1",
            "10.1.0.3",
            "10.1.0.7",
        ]:
            holder = self.state.holder(*parse_address("", address))
            assert (holder.port_id if holder else None) == self.owner.get(address)


Allocator.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAllocator = Allocator.TestCase
