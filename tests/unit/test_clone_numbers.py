"""The numbers of clones: 16 bits of a filter's class id."""

from __future__ import annotations

import pytest

from portwright.kernel.bpf import CollectionSpec
from portwright.model.errors import NotSupported
from portwright.node.clones import MAP, MOST, OBJECT, Numbers, value
from portwright.plan.clone_operations import JoinClone


def test_a_number_is_nobody_elses() -> None:
    """Each is given once while it is somebody's, those on record not at all, and 0 never."""
    numbers = Numbers([0, 1, 3])
    given = []
    for _ in range(5):
        given.append(numbers.free())
        numbers.take(given[-1])

    assert given == [2, 4, 5, 6, 7]
    numbers.release(4)
    numbers.take(0)
    numbers.take(8)
    assert numbers.free() == 9


def test_the_bound_is_named() -> None:
    """With 65,535 clones there is no other one; with one of them gone there is again, its own."""
    numbers = Numbers(range(1, MOST + 1))

    with pytest.raises(NotSupported, match="another clone: this node has 65535"):
        numbers.free()
    numbers.release(54321)
    assert numbers.free() == 54321


def test_an_entry_is_as_the_program_reads_it() -> None:
    """The value has the map's size, whatever families there are, and the map has room for every number."""
    spec = CollectionSpec.load(OBJECT).maps[MAP]
    assert (spec.key_size, spec.max_entries) == (4, MOST)
    for inner, addresses in (
        (("198.51.100.2", "2001:db8::2"), ("10.0.0.2", "fd00::2")),
        (("198.51.100.2",), ("10.0.0.2",)),
        (("2001:db8::2",), ("fd00::2",)),
    ):
        operation = JoinClone(
            port_id="1".zfill(16), index=1, device="eth0", tap="tap0", inner=inner, addresses=addresses
        )
        assert len(value(operation, tap=2, device=3)) == spec.value_size
