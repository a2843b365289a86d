"""Maps against the real kernel: one entry, many entries, per CPU, maps of maps, pins."""

from __future__ import annotations

import dataclasses
import struct
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from portwright.kernel.bpf import (
    BPF_EXIST,
    BPF_NOEXIST,
    Collection,
    Map,
    MapSpec,
    MapType,
    Packed,
    _libbpf,
    possible_cpus,
)
from portwright.model.errors import KernelFailed

pytestmark = pytest.mark.netns

EEXIST, ENOENT, E2BIG, EINVAL = 17, 2, 7, 22


def u32(number: int) -> bytes:
    """A native u32."""
    return struct.pack("=I", number)


def u64(number: int) -> bytes:
    """A native u64."""
    return struct.pack("=Q", number)


def lpm(length: int, last: int) -> bytes:
    """The key of 10.0.0.last/length."""
    return u32(length) + bytes([10, 0, 0, last])


def test_one_entry(zoo: Collection) -> None:
    """What is updated is looked up; what was deleted is None, and deleting it again is False."""
    table = zoo.maps["hash"]

    assert table.lookup(u32(1)) is None
    table.update(u32(1), u64(2**63))
    assert u64(2**63) == table.lookup(u32(1))
    assert table.delete(u32(1)) is True
    assert table.delete(u32(1)) is False
    assert table.lookup(u32(1)) is None


def test_update_flags(zoo: Collection) -> None:
    """NOEXIST only creates and EXIST only replaces; the error says which key."""
    table = zoo.maps["hash"]

    with pytest.raises(KernelFailed, match="key 05 00 00 00") as caught:
        table.update(u32(5), u64(1), BPF_EXIST)
    assert caught.value.errno == ENOENT
    table.update(u32(5), u64(1), BPF_NOEXIST)
    with pytest.raises(KernelFailed) as caught:
        table.update(u32(5), u64(2), BPF_NOEXIST)
    assert caught.value.errno == EEXIST
    assert u64(1) == table.lookup(u32(5))


def test_full_map() -> None:
    """A full hash refuses one more with E2BIG and keeps what it has."""
    with Map.create(MapSpec("small", MapType.HASH, 4, 8, 2)) as table:
        table.update_batch([(u32(1), u64(1)), (u32(2), u64(2))])
        with pytest.raises(KernelFailed) as caught:
            table.update(u32(3), u64(3))

        assert caught.value.errno == E2BIG
        assert {u32(1), u32(2)} == set(table.keys())


def test_wrong_sizes_never_reach_the_kernel(zoo: Collection) -> None:
    """A short key or value is a ValueError on every method: the kernel would read past it."""
    table, percpu = zoo.maps["hash"], zoo.maps["counts"]
    calls: list[Callable[[], object]] = [
        lambda: table.lookup(b"abc"),
        lambda: table.update(b"abc", u64(0)),
        lambda: table.update(u32(0), b"abc"),
        lambda: table.delete(b"abcde"),
        lambda: table.update_batch([(u32(0), u64(0)), (u32(0), b"")]),
        lambda: table.delete_batch([u32(0), b""]),
        lambda: table.update_packed(Packed(u32(0), u64(0), 2)),
        lambda: table.update_packed(Packed(u32(0), u32(0), 1)),
        lambda: percpu.update_packed(Packed(u32(0), u64(0), 1)),
        lambda: percpu.lookup(u32(0)),
        lambda: percpu.update(u32(0), bytes(12)),
        lambda: percpu.update_percpu(u32(0), [bytes(12)] * (possible_cpus() + 1)),
        lambda: percpu.update_percpu(u32(0), [bytes(11)] * possible_cpus()),
        lambda: table.lookup_percpu(u32(0)),
        lambda: table.update_percpu(u32(0), []),
        percpu.items,
        table.items_percpu,
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"bytes and needs|per CPU|possible CPUs"):
            call()
    assert list(table.items()) == []


@pytest.mark.parametrize("name", ["counts", "percpu_hash"])
def test_per_cpu(zoo: Collection, name: str) -> None:
    """Each CPU's value comes back at its place, also where the kernel pads it to 8 bytes."""
    table = zoo.maps[name]
    values = [bytes([cpu + 1]) * table.value_size for cpu in range(possible_cpus())]

    table.update_percpu(u32(2), values)

    assert values == table.lookup_percpu(u32(2))
    assert values == dict(table.items_percpu())[u32(2)]


@pytest.mark.parametrize("name", ["hash", "lru", "prefixes"])
def test_batches(zoo: Collection, name: str) -> None:
    """A batch sets all entries, iteration gives each once, a batch with absent keys deletes the rest."""
    table = zoo.maps[name]
    if name == "prefixes":
        entries = {lpm(32, n): u32(n) for n in range(200)}
    else:
        entries = {u32(n): u64(n) for n in range(200)}

    table.update_batch(entries.items())
    assert sorted(entries.items()) == sorted(table.items())
    assert sorted(entries) == sorted(table.keys())

    keys = list(entries)
    table.delete(keys[3])
    table.delete_batch([keys[3], *keys[:100]])
    assert sorted(keys[100:]) == sorted(table.keys())
    table.update_batch([])
    table.delete_batch([])

    table.update_packed(Packed.of(entries.items()))
    assert sorted(entries.items()) == sorted(table.items())
    assert sorted(entries.items()) == sorted(Packed.of(entries.items()).pairs())
    table.update_packed(Packed.of([]))


def test_array_and_empty_maps(zoo: Collection) -> None:
    """An array gives all its entries; an empty hash none; an array can't be deleted from."""
    assert [(u32(n), u64(0)) for n in range(16)] == list(zoo.maps["array"].items())
    assert list(zoo.maps["prefixes"].items()) == []
    with pytest.raises(KernelFailed) as caught:
        zoo.maps["array"].delete(u32(1))
    assert caught.value.errno == EINVAL


def test_large_map_in_chunks() -> None:
    """More entries than one read's buffer come out complete and once each."""
    with Map.create(MapSpec("large", MapType.HASH, 4, 8, 20000)) as table:
        entries = {u32(n): u64(n) for n in range(20000)}
        table.update_batch(entries.items())
        got = list(table.items())

    assert len(entries) == len(got)
    assert entries == dict(got)


def test_longest_prefix(zoo: Collection) -> None:
    """An LPM trie answers with the longest prefix."""
    table = zoo.maps["prefixes"]
    table.update(lpm(24, 0), u32(24))
    table.update(lpm(32, 7), u32(32))

    assert u32(32) == table.lookup(lpm(32, 7))
    assert u32(24) == table.lookup(lpm(32, 8))


@pytest.mark.parametrize(
    ("kind", "flags"), [(MapType.HASH, 0), (MapType.LPM_TRIE, 1)], ids=["hash", "lpm-trie"]
)
def test_iteration_survives_deletions(kind: MapType, flags: int) -> None:
    """While another thread deletes and adds, reading ends, gives no key twice and misses none that stay."""
    with Map.create(MapSpec("busy", kind, 8, 4, 6000, flags)) as table:

        def key(number: int) -> bytes:
            return u32(32) + struct.pack(">I", number)

        stays = {key(n) for n in range(0, 5000, 2)}
        comes_and_goes = [key(n) for n in range(1, 5000, 2)]
        table.update_batch((k, u32(1)) for k in [*stays, *comes_and_goes])
        stop = threading.Event()

        def churn() -> None:
            while not stop.is_set():
                table.delete_batch(comes_and_goes)
                table.update_batch((k, u32(2)) for k in comes_and_goes)

        thread = threading.Thread(target=churn)
        thread.start()
        try:
            for _ in range(5):
                got = list(table.keys())
                assert len(set(got)) == len(got)
                assert stays <= set(got)
        finally:
            stop.set()
            thread.join()


@pytest.mark.parametrize("name", ["hash", "prefixes"])
def test_deleting_while_reading(zoo: Collection, name: str) -> None:
    """A caller that deletes what it was given empties the map."""
    table = zoo.maps[name]
    size = table.value_size
    table.update_batch((u32(32) + u32(n) if name == "prefixes" else u32(n), bytes(size)) for n in range(500))

    given = sum(table.delete(key) for key in table.keys())  # noqa: SIM118 -- a Map is no dict

    assert given == 500
    assert list(table.keys()) == []


def test_map_of_maps(zoo: Collection) -> None:
    """A rule set is made from the template, put in by descriptor, found by id, replaced in one update."""
    outer = zoo.maps["sets"]
    template = MapSpec("sets.inner", MapType.HASH, 4, 4, 32)
    with Map.create(template) as old, Map.create(dataclasses.replace(template, name="new")) as new:
        outer.update(u32(7), u32(old.fd))
        assert u32(old.id) == outer.lookup(u32(7))
        outer.update(u32(7), u32(new.fd))
        new.update(u32(64), u32(5))
        new_id = new.id

    with Map.from_id(new_id) as found:
        assert [(u32(64), u32(5))] == list(found.items())
    assert [(u32(7), u32(new_id))] == list(outer.items())


def test_create_map_of_maps() -> None:
    """A map of maps is made after its template and refuses a map that differs."""
    inner = MapSpec("inner", MapType.HASH, 4, 4, 32)
    spec = MapSpec("outer", MapType.HASH_OF_MAPS, 4, 4, 8, inner=inner)
    with (
        Map.create(spec) as outer,
        Map.create(inner) as fits,
        Map.create(dataclasses.replace(inner, value_size=8)) as differs,
    ):
        outer.update(u32(0), u32(fits.fd))
        with pytest.raises(KernelFailed) as caught:
            outer.update(u32(1), u32(differs.fd))

    assert caught.value.errno == EINVAL


def test_pin(zoo: Collection, bpffs: Path) -> None:
    """A pinned map outlives its descriptors and is opened again with what it holds."""
    path = bpffs / "hash"
    zoo.maps["hash"].update(u32(1), u64(1))
    zoo.maps["hash"].pin(path)
    map_id = zoo.maps["hash"].id
    zoo.close()

    with Map.from_pin(path) as table:
        assert map_id == table.id
        assert (table.type, table.key_size, table.value_size, table.max_entries) == (MapType.HASH, 4, 8, 1024)
        assert table.name == "hash"
        assert [(u32(1), u64(1))] == list(table.items())
        with pytest.raises(KernelFailed) as caught:
            table.pin(path)
    assert caught.value.errno == EEXIST


def test_pins_that_are_wrong(zoo: Collection, bpffs: Path, tmp_path: Path) -> None:
    """No pin is ENOENT; another kind of object is refused; outside of a bpffs nothing is pinned."""
    with pytest.raises(KernelFailed) as caught:
        Map.from_pin(bpffs / "nothing")
    assert caught.value.errno == ENOENT

    zoo.programs["drop_test"].pin(bpffs / "program")
    with pytest.raises(KernelFailed, match="it is a bpf-prog, not a bpf-map"):
        Map.from_pin(bpffs / "program")

    with pytest.raises(KernelFailed):
        zoo.maps["hash"].pin(tmp_path / "hash")
    assert list(tmp_path.iterdir()) == []


def test_closing(zoo: Collection) -> None:
    """Closing twice is fine; every use afterwards is a ValueError that names the map."""
    table = zoo.maps["hash"]
    percpu = zoo.maps["counts"]
    table.close()
    table.close()
    percpu.close()

    assert table.closed
    for call in (
        lambda: table.fd,
        lambda: table.lookup(u32(0)),
        lambda: table.update(u32(0), u64(0)),
        lambda: table.delete(u32(0)),
        lambda: list(table.items()),
        lambda: table.update_batch([(u32(0), u64(0))]),
        lambda: table.delete_batch([u32(0)]),
        lambda: percpu.lookup_percpu(u32(0)),
        lambda: table.pin("/sys/fs/bpf/never"),
    ):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_forgotten_map_warns_and_is_closed() -> None:
    """A map that nobody closed is freed with its last reference, and says so."""
    table = Map.create(MapSpec(f"lost{uuid.uuid4().hex[:8]}", MapType.ARRAY, 4, 4, 1))
    map_id = table.id
    held = [table]
    del table
    with pytest.warns(ResourceWarning, match="unclosed <Map 'lost"):
        held.clear()

    with pytest.raises(KernelFailed) as caught:
        Map.from_id(map_id)  # the id goes with the last descriptor, the memory later
    assert caught.value.errno == ENOENT


@pytest.mark.parametrize("name", ["hash", "prefixes", "counts"])
def test_without_batches(zoo: Collection, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Where the kernel has no batches for a type, every method gives the same, entry by entry."""
    for function in ("bpf_map_lookup_batch", "bpf_map_update_batch", "bpf_map_delete_batch"):
        monkeypatch.setattr(_libbpf, function, lambda *_: -_libbpf.ENOTSUPP)
    table = zoo.maps[name]
    if name == "counts":
        assert [key for key, _ in table.items_percpu()] == [u32(n) for n in range(4)]
        return
    keys = [lpm(32, n) if name == "prefixes" else u32(n) for n in range(200)]
    entries = [(key, bytes(table.value_size)) for key in keys]

    table.update_batch(entries)
    assert sorted(table.items()) == sorted(entries)
    table.delete_batch([keys[0], *keys[:100]])
    assert sorted(table.keys()) == sorted(keys[100:])
    assert sum(table.delete(key) for key in table.keys()) == 100  # noqa: SIM118 -- a Map is no dict
