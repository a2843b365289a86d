"""Places for look-ups: bounds for a port and for all, and who gives way to whom."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portwright.node.dns_places import Place, Places


def taken(places: Places, port_id: str, count: int) -> Iterator[Place]:
    """So many places of a port."""
    for _ in range(count):
        place = places.take(port_id)
        assert place is not None
        yield place


def test_a_port_has_so_many() -> None:
    """One more is none, until one is given back; giving back twice counts once."""
    places = Places(2, 10)
    first, _ = taken(places, "p", 2)

    assert places.take("p") is None
    places.free(first)
    places.free(first)
    assert places.take("p") is not None
    assert places.take("p") is None


async def forever() -> None:
    """What a place is taken for, until it is cancelled."""
    await asyncio.Event().wait()


@pytest.mark.asyncio
async def test_who_holds_most_gives_way() -> None:
    """When all are taken the port with the most loses its oldest to one that has less; and none to one of the
    same kind, so that two that take all they can don't displace each other."""
    places = Places(4, 8)
    greedy = [*taken(places, "p", 4), *taken(places, "q", 4)]
    for place in greedy:
        place.task = asyncio.create_task(forever())

    assert places.take("p") is None
    assert [places.take("r") is not None for _ in range(3)] == [True, True, False]
    await asyncio.sleep(0)
    gone = [place for place in greedy if place.task is not None and place.task.cancelled()]
    assert gone == [greedy[0], greedy[4]]
    for place in greedy:
        if place.task is not None:
            place.task.cancel()


@given(st.lists(st.tuples(st.sampled_from("pqr"), st.booleans())))
def test_no_bound_is_passed(steps: list[tuple[str, bool]]) -> None:
    """Whatever is taken and given back, nobody has more than his own, nor all together; and whoever holds
    nothing gets a place."""
    places, held = Places(3, 6), dict[str, list[Place]]()
    for port_id, take in steps:
        mine = held.setdefault(port_id, [])
        if take:
            place = places.take(port_id)
            assert place is not None or places.held(port_id)
            mine += [place] if place is not None else []
        elif mine:
            places.free(mine.pop())
        assert all(places.held(one) <= 3 for one in "pqr")
        assert sum(places.held(one) for one in "pqr") <= 6
