"""Nets as the release before kept them are found by these programs, from before they judge a packet."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from portwright.dataplane import OBJECT, bounds, policy_values
from portwright.kernel.bpf import Collection, CollectionSpec, Map
from portwright.kernel.bpf.enums import MapType
from portwright.kernel.bpf.spec import MapSpec
from portwright.node import generations, older

pytestmark = pytest.mark.netns

_NUMBER = struct.Struct("=I")
_TREE = MapSpec("pw_nets.inner", MapType.LPM_TRIE, 20, 4, 1024, flags=1)
_NETS = {"::/0": 1, "0.0.0.0/0": 2, "10.0.0.0/8": 3, "10.1.0.0/16": 4, "2001:db8::/32": 5}


@pytest.fixture
def maps() -> Iterator[dict[str, Map]]:
    """The data path's maps with a generation in force, its nets in a prefix tree as up to ABI 4."""
    with Collection.load(CollectionSpec.load(OBJECT)) as collection, closing(Map.create(_TREE)) as inner:
        outer = MapSpec("pw_nets", MapType.ARRAY_OF_MAPS, 4, 4, 8, inner=_TREE)
        inner.update_batch(
            (policy_values.net_key(net), policy_values.number_value(c)) for net, c in _NETS.items()
        )
        with closing(Map.create(outer)) as nets:
            generation = 11
            nets.update(generations.slot_of(generation), _NUMBER.pack(inner.fd))
            collection.maps["pw_generation"].update(bytes(4), _NUMBER.pack(generation))
            yield {**collection.maps, "pw_nets": nets}


def entered(maps: dict[str, Map]) -> list[bytes]:
    """The nodes of the generation in force."""
    raw = maps["pw_bounds"].lookup(generations.slot_of(generations.in_force(maps)))
    if raw is None:
        return []
    with closing(Map.from_id(_NUMBER.unpack(raw)[0])) as inner:
        return [value for _, value in sorted(inner.items())]


def test_nets_are_carried_over(maps: dict[str, Map]) -> None:
    """As they would be entered now; a second time, after a crash, changes nothing."""
    older.carry(maps)
    assert entered(maps) == bounds.nodes(_NETS)
    before = maps["pw_bounds"].lookup(generations.slot_of(11))
    older.carry(maps)
    assert maps["pw_bounds"].lookup(generations.slot_of(11)) == before


def test_nothing_in_force_is_nothing_to_carry(maps: dict[str, Map]) -> None:
    """Without policy there are no nets."""
    maps["pw_generation"].update(bytes(4), bytes(4))
    older.carry(maps)
    assert entered(maps) == []


def test_the_older_pin_goes(tmp_path: Path) -> None:
    """And may be gone."""
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "pw_nets").touch()
    older.forget(tmp_path)
    older.forget(tmp_path)
    assert list((tmp_path / "maps").iterdir()) == []
