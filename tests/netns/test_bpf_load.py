"""Loading collections: all or nothing, reuse, sizes, constants, and what is said on failure."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from portwright.kernel.bpf import Collection, CollectionSpec, Map, MapSpec, MapType, ProgramType
from portwright.model.errors import Conflict, InvalidInput, KernelFailed, VerifierRejected
from tests.fix_bpf import descriptors

pytestmark = pytest.mark.netns

FRAME = bytes(12) + b"\x88\xb5" + bytes(50)


@pytest.fixture(scope="module")
def spec(bpf_object: Callable[[str], Path]) -> CollectionSpec:
    """The zoo's spec."""
    return CollectionSpec.load(bpf_object("zoo"))


def u32(number: int) -> bytes:
    """A native u32."""
    return struct.pack("=I", number)


def test_objects_stand_for_themselves(spec: CollectionSpec) -> None:
    """Names and types are the source's; every descriptor is ours, close-on-exec, gone on close."""
    before = descriptors()
    with Collection.load(spec) as zoo:
        assert set(spec.maps) == set(zoo.maps)
        assert set(spec.programs) == set(zoo.programs)
        assert all(name == table.name for name, table in zoo.maps.items())
        assert all(name == program.name for name, program in zoo.programs.items())
        assert ProgramType.SCHED_CLS is zoo.programs["emit"].type
        items = [*zoo.maps.values(), *zoo.programs.values()]
        assert len(items) == len({item.fd for item in items})
        assert not any(os.get_inheritable(item.fd) for item in items)
    zoo.close()

    assert before == descriptors()


def test_nothing_is_pinned_unasked(spec: CollectionSpec) -> None:
    """A map that asks libbpf for a pin by name gets none: pins are ours to make."""
    with Collection.load(spec):
        assert not Path("/sys/fs/bpf/wants_a_pin").exists()


def test_verifier_rejection(bpf_object: Callable[[str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    """The error names the program, sums up, keeps the whole log; nothing is printed or left open."""
    before = descriptors()
    with pytest.raises(VerifierRejected) as caught:
        Collection.load(CollectionSpec.load(bpf_object("rejected")))

    assert caught.value.program == "reads_too_far"
    assert "invalid access to packet" in caught.value.summary
    assert "processed" not in caught.value.summary
    assert "processed" in caught.value.log
    assert tuple(capfd.readouterr()) == ("", "")
    assert before == descriptors()


def test_kernel_refuses_a_map(spec: CollectionSpec) -> None:
    """A map that the kernel won't make is KernelFailed with libbpf's account of which."""
    with pytest.raises(KernelFailed) as caught:
        Collection.load(spec, max_entries={"array": 0xFFFFFFFF})

    assert "array" in caught.value.detail


def test_program_without_a_type(bpf_object: Callable[[str], Path]) -> None:
    """A section that names no type is refused before the kernel is asked."""
    with pytest.raises(InvalidInput, match="the section names no program type") as caught:
        Collection.load(CollectionSpec.load(bpf_object("untyped")))
    assert caught.value.value == "portwright/unheard_of"


def test_sizes(spec: CollectionSpec) -> None:
    """max_entries overrides the source's size of the maps it names, and no other's."""
    with Collection.load(spec, max_entries={"hash": 17}) as zoo:
        assert zoo.maps["hash"].max_entries == 17
        assert zoo.maps["lru"].max_entries == 1024


def test_constants(spec: CollectionSpec) -> None:
    """A constant set at load is what the program sees; the others keep the source's value."""
    with Collection.load(spec) as plain, Collection.load(spec, constants={"verdict": u32(2)}) as set_:
        assert plain.programs["count_slot"].test_run(FRAME).retval == 0
        assert set_.programs["count_slot"].test_run(FRAME).retval == 2


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"constants": {"verdict": b"\0"}}, "constants.verdict"),
        ({"constants": {"none": u32(0)}}, "constants.none"),
        ({"max_entries": {"none": 1}}, "max_entries.none"),
    ],
)
def test_names_and_sizes_are_checked(
    spec: CollectionSpec, arguments: dict[str, dict[str, bytes]], field: str
) -> None:
    """What the spec lacks, or has in another size, is InvalidInput with its name."""
    with pytest.raises(InvalidInput) as caught:
        Collection.load(spec, **arguments)  # type: ignore[arg-type]
    assert field == caught.value.field


def test_reuse(spec: CollectionSpec) -> None:
    """A reused map is shared by both collections and survives the one that made it."""
    with Collection.load(spec) as old:
        old.maps["counts"].update_percpu(
            u32(3), [bytes(12)] * (len(old.maps["counts"].lookup_percpu(u32(3)) or []))
        )
        with Collection.load(spec, reuse={"counts": old.maps["counts"]}) as new:
            assert old.maps["counts"].id == new.maps["counts"].id
            assert old.maps["counts"].fd != new.maps["counts"].fd
            assert old.maps["hash"].id != new.maps["hash"].id
            old.close()
            assert new.programs["drop_test"].test_run(FRAME).retval == 2
            counts = new.maps["counts"].lookup_percpu(u32(3))
            assert counts is not None
            assert sum(struct.unpack_from("=I", value)[0] for value in counts) == 1


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (MapSpec("hash", MapType.LRU_HASH, 4, 8, 1024), "type"),
        (MapSpec("hash", MapType.HASH, 8, 8, 1024), "key_size"),
        (MapSpec("hash", MapType.HASH, 4, 4, 1024), "value_size"),
        (MapSpec("hash", MapType.HASH, 4, 8, 1000), "max_entries is 1000 and must be 1024"),
        (MapSpec("hash", MapType.HASH, 4, 8, 1024, flags=1), "flags"),
    ],
)
def test_reuse_of_what_does_not_fit(spec: CollectionSpec, wrong: MapSpec, why: str) -> None:
    """A map of another shape is a Conflict that says what differs: libbpf itself would take it."""
    with Map.create(wrong) as table, pytest.raises(Conflict, match=why):
        Collection.load(spec, reuse={"hash": table})


def test_reuse_with_another_size(spec: CollectionSpec) -> None:
    """A map to reuse is measured by the size asked for, not by the source's."""
    with (
        Map.create(MapSpec("hash", MapType.HASH, 4, 8, 64)) as table,
        Collection.load(spec, reuse={"hash": table}, max_entries={"hash": 64}) as zoo,
    ):
        assert table.id == zoo.maps["hash"].id
