"""The choice of addresses: round robin, rests, requests."""

from __future__ import annotations

import pytest

from portwright.ipam.allocator import allocate, usage
from portwright.ipam.ranges import Pools, compile_pools, parse_address
from portwright.ipam.state import AddressState, Holder
from portwright.model.errors import Conflict, InternalError, InvalidInput, PoolExhausted
from portwright.model.network import AddressRange


def pools(*subnets: str, reserved: tuple[str, ...] = ()) -> Pools:
    """Compile one range set per subnet."""
    return compile_pools("n", [[AddressRange(subnet=s)] for s in subnets], reserved)


def give(p: Pools, state: AddressState, port: str, *requested: str, now: float = 1000.0) -> list[str]:
    """Allocate and take; return the addresses."""
    chosen = allocate(p, state, requested=requested, now=now)
    for index, address in chosen:
        state.take(*parse_address("", address), Holder(port, p.network, index))
    return [a for _, a in chosen]


def free(state: AddressState, port: str, now: float = 1000.0) -> None:
    """Release all of a port's addresses."""
    for family, value in state.held_by(port):
        state.release(family, value, now)


def test_one_address_of_each_set() -> None:
    """The first port gets .2 and ::2 (.1 and ::1 are the gateways)."""
    assert give(pools("10.1.2.0/24", "2001:db8:1::/64"), AddressState(), "a") == ["10.1.2.2", "2001:db8:1::2"]


def test_round_robin_not_lowest_free() -> None:
    """2 and 3 are given; 2 is released; next comes 4 (host-local's last_reserved_ip), even without a rest."""
    p, state = pools("10.1.2.0/24"), AddressState()
    assert give(p, state, "a") + give(p, state, "b") == ["10.1.2.2", "10.1.2.3"]
    free(state, "a", now=0.0)
    assert give(p, state, "c") == ["10.1.2.4"]


def test_wraps_at_the_end_and_skips_what_is_taken() -> None:
    """After the last address of the set comes its first free one."""
    p, state = pools("10.1.2.0/29"), AddressState()
    assert [give(p, state, f"p{i}")[0][-1] for i in range(5)] == ["2", "3", "4", "5", "6"]
    free(state, "p1", now=0.0)
    assert give(p, state, "x") == ["10.1.2.3"]


def test_order_of_ranges_is_the_order_of_the_configuration() -> None:
    """A set walks its ranges as they are written, not by number."""
    high, low = AddressRange(subnet="10.9.0.0/30"), AddressRange(subnet="10.1.0.0/30")
    p, state = compile_pools("n", [[high, low]]), AddressState()
    assert give(p, state, "a") + give(p, state, "b") == ["10.9.0.2", "10.1.0.2"]


def test_released_addresses_rest() -> None:
    """A full pool of resting addresses is exhausted until the first rest is over, at 60 s sharp."""
    p, state = pools("10.1.2.0/30"), AddressState()
    give(p, state, "a", now=100.0)
    free(state, "a", now=100.0)
    with pytest.raises(PoolExhausted) as caught:
        allocate(p, state, now=159.9)
    assert (caught.value.used, caught.value.resting) == (0, 1)
    assert give(p, state, "b", now=160.0) == ["10.1.2.2"]
    with pytest.raises(PoolExhausted) as caught:
        allocate(p, state, now=160.0)
    assert (caught.value.used, caught.value.resting) == (1, 0)
    assert "10.1.2.1-10.1.2.2" in str(caught.value)


def test_a_clock_set_back_does_not_extend_rests() -> None:
    """Released at 10,000, then the clock says 50: the rest ends 60 s later, not in three hours."""
    p, state = pools("10.1.2.0/30"), AddressState()
    give(p, state, "a", now=10_000.0)
    free(state, "a", now=10_000.0)
    with pytest.raises(PoolExhausted):
        allocate(p, state, now=50.0)
    assert give(p, state, "b", now=110.0) == ["10.1.2.2"]


def test_an_exhausted_set_takes_nothing_from_the_others() -> None:
    """If one of two sets is full, the call changes nothing: no cursor, no owner."""
    p, state = pools("10.1.2.0/24", "10.9.0.0/30"), AddressState()
    give(p, state, "a")
    before = (dict(state.cursors), usage(p, state, now=0.0, rest_seconds=60.0))
    with pytest.raises(PoolExhausted, match="range set 1"):
        allocate(p, state, now=0.0)
    assert before == (dict(state.cursors), usage(p, state, now=0.0, rest_seconds=60.0))


def test_requested_addresses() -> None:
    """One per set, in any order, with or without the prefix; other sets go on round robin."""
    p, state = pools("10.1.2.0/24", "10.1.3.0/24", "fd00::/64"), AddressState()
    assert give(p, state, "a", "10.1.3.77/24", "10.1.2.88") == ["10.1.2.88", "10.1.3.77", "fd00::2"]
    assert give(p, state, "b", "FD00:0::5") == ["10.1.2.89", "10.1.3.78", "fd00::5"]


@pytest.mark.parametrize(
    ("requested", "why"),
    [
        (["10.9.9.9"], "failed to allocate all requested IPs: 10.9.9.9"),
        (["10.1.2.5", "10.1.2.6"], "failed to allocate all requested IPs: 10.1.2.6"),
        (["10.1.2.5", "10.1.2.5"], "failed to allocate all requested IPs: 10.1.2.5"),
        (["10.1.2.0"], "failed to allocate all requested IPs: 10.1.2.0"),
        (["10.1.2.255"], "failed to allocate all requested IPs: 10.1.2.255"),
        (["10.1.2.1"], "requested ip 10.1.2.1 is subnet's gateway"),
        (["10.1.2.9"], "requested ip 10.1.2.9 is reserved in 'n'"),
        (["10.1.2.5/16"], "the prefix length of its range is 24"),
        (["nonsense"], "not an IPv4 or IPv6 address"),
    ],
)
def test_requests_that_are_refused(requested: list[str], why: str) -> None:
    """The reason begins with host-local's words, and nothing is given out."""
    state = AddressState()
    with pytest.raises(InvalidInput) as caught:
        allocate(pools("10.1.2.0/24", reserved=("10.1.2.9",)), state, requested=requested, now=0.0)
    assert caught.value.why.startswith(why)
    assert state.cursors == {}


def test_a_taken_address_is_a_conflict_that_names_the_holder() -> None:
    """The error says who has it."""
    p, state = pools("10.1.2.0/24"), AddressState()
    give(p, state, "a", "10.1.2.50")
    with pytest.raises(
        Conflict, match=r"10\.1\.2\.50 is not available in range set .*port a of network 'n' has it"
    ):
        allocate(p, state, requested=["10.1.2.50"], now=0.0)


def test_a_requested_address_may_rest() -> None:
    """Whoever names an address gets it back at once: a restart with a static address."""
    p, state = pools("10.1.2.0/24"), AddressState()
    give(p, state, "a", "10.1.2.50")
    free(state, "a")
    assert give(p, state, "b", "10.1.2.50") == ["10.1.2.50"]
    free(state, "b", now=1001.0)
    state.expire(1060.5, 60.0)  # the first rest would have ended at 1060
    assert state.resting(*parse_address("", "10.1.2.50")) is not None


def test_networks_that_share_a_subnet_share_no_address() -> None:
    """An address has one owner on the host; the second network's cursor steps over it."""
    one, state = pools("10.1.2.0/24"), AddressState()
    two = compile_pools("m", [[AddressRange(subnet="10.1.2.0/24")]])
    assert give(one, state, "a") + give(two, state, "b") + give(one, state, "c") == [
        "10.1.2.2",
        "10.1.2.3",
        "10.1.2.4",
    ]
    (seen,) = usage(one, state, now=0.0, rest_seconds=60.0)
    assert seen == (3, 0, 253)


def test_a_cursor_outside_of_changed_ranges_means_the_beginning() -> None:
    """The range was moved: allocation starts at its first address."""
    state = AddressState(cursors={("n", 0): (4, 1)})
    assert give(pools("10.1.2.0/24"), state, "a") == ["10.1.2.2"]


def test_taking_twice_is_a_bug() -> None:
    """The state itself refuses a second owner, whatever the allocator says."""
    state = AddressState()
    state.take(4, 5, Holder("a", "n", 0))
    with pytest.raises(InternalError):
        state.take(4, 5, Holder("b", "n", 0))


def test_undo_restores_everything() -> None:
    """Inverses in reverse order bring back owners, rests, order and cursors."""
    p, state = pools("10.1.2.0/24"), AddressState()
    give(p, state, "a")
    give(p, state, "b")
    free(state, "b")

    def picture() -> object:
        """Return all that can be asked."""
        address = parse_address("", "10.1.2.3")
        return (
            state.held_by("a"), state.held_by("b"), state.holder(*address), state.resting(*address),
            dict(state.cursors), state.next_free(*parse_address("", "10.1.2.2")),
        )  # fmt: skip

    before = picture()
    undo = [
        state.release(*parse_address("", "10.1.2.2"), 1000.0),
        state.take(*parse_address("", "10.1.2.3"), Holder("c", "n", 0)),
        state.release(*parse_address("", "10.1.2.3"), None),
        state.drop_cursors("n"),
    ]
    for each in reversed(undo):
        each()
    assert picture() == before


def test_a_nearly_full_16_costs_as_little_as_an_empty_one() -> None:
    """65,000 owners, one hole far from the cursor: found by bisection, counted exactly."""
    p = pools("10.1.0.0/16")
    base = parse_address("", "10.1.0.0")[1]
    hole = base + 30_000
    used = {(4, base + i): Holder(f"p{i}", "n", 0) for i in range(2, 65_535) if base + i != hole}
    state = AddressState(used=used, cursors={("n", 0): (4, base + 60_000)})
    assert allocate(p, state, now=0.0) == [(0, "10.1.117.48")]
    assert usage(p, state, now=0.0, rest_seconds=60.0) == ((65_532, 0, 65_533),)
