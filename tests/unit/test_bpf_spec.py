"""Reading ELF objects: what a spec says, without the kernel."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from portwright.kernel.bpf import CollectionSpec, MapSpec, MapType, ProgramSpec, ProgramType, Variable
from portwright.model.errors import InvalidInput, NotFound


@pytest.fixture(scope="module")
def spec(bpf_object: Callable[[str], Path]) -> CollectionSpec:
    """The zoo's spec."""
    return CollectionSpec.load(bpf_object("zoo"))


def test_maps_as_declared(spec: CollectionSpec) -> None:
    """A map's spec has the source's type, sizes, count and flags."""
    assert MapSpec("hash", MapType.HASH, 4, 8, 1024) == spec.maps["hash"]
    assert MapSpec("counts", MapType.PERCPU_ARRAY, 4, 12, 4) == spec.maps["counts"]
    assert MapSpec("prefixes", MapType.LPM_TRIE, 8, 4, 1024, flags=1) == spec.maps["prefixes"]
    assert MapSpec("events", MapType.RINGBUF, 0, 0, 65536) == spec.maps["events"]


def test_map_of_maps_has_its_template(spec: CollectionSpec) -> None:
    """A map of maps carries the spec of what it accepts, from which one can be made."""
    inner = spec.maps["sets"].inner

    assert inner is not None
    assert (inner.type, inner.key_size, inner.value_size, inner.max_entries) == (MapType.HASH, 4, 4, 32)


def test_globals_are_maps_named_as_sections(spec: CollectionSpec) -> None:
    """Sections of globals are listed under the ELF's names, without libbpf's prefix."""
    assert {".rodata", ".bss"} == {name for name in spec.maps if name.startswith(".")}


def test_constants(spec: CollectionSpec) -> None:
    """Each const volatile global is listed with its place."""
    assert {"verdict", "slot"} == set(spec.constants)
    assert Variable("verdict", ".rodata", spec.constants["verdict"].offset, 4) == spec.constants["verdict"]
    assert spec.constants["slot"].size == 8


def test_programs(spec: CollectionSpec) -> None:
    """Types follow from sections, tcx and netkit included, whatever libbpf knows of them."""
    assert ProgramSpec("count_slot", "tcx/ingress", ProgramType.SCHED_CLS) == spec.programs["count_slot"]
    assert ProgramSpec("emit", "netkit/primary", ProgramType.SCHED_CLS) == spec.programs["emit"]
    assert ProgramSpec("drop_test", "tc", ProgramType.SCHED_CLS) == spec.programs["drop_test"]
    assert ProgramType.XDP is spec.programs["xdp_pass"].type
    assert ProgramType.CGROUP_SOCK_ADDR is spec.programs["refuse"].type


def test_same_file_same_spec(bpf_object: Callable[[str], Path], spec: CollectionSpec) -> None:
    """Loading twice gives equal specs."""
    assert spec == CollectionSpec.load(bpf_object("zoo"))


def test_needs_no_privilege(bpf_object: Callable[[str], Path]) -> None:
    """A spec is read without a single bpf(2) that the kernel grants: a user namespace's nobody can."""
    program = (
        "import ctypes, os, sys\n"
        "from portwright.kernel.bpf import CollectionSpec\n"
        "data = open(sys.argv[1], 'rb').read()\n"
        "fd = os.memfd_create('elf'); os.write(fd, data)\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "print(len(CollectionSpec.load(f'/proc/self/fd/{fd}').programs))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(bpf_object("zoo"))], check=True, capture_output=True, text=True
    )

    assert done.stdout.strip() == "7"
    assert done.stderr == ""


def test_missing_file(tmp_path: Path) -> None:
    """A path without a file is NotFound, with the path."""
    with pytest.raises(NotFound, match=r"no\.bpf\.o"):
        CollectionSpec.load(tmp_path / "no.bpf.o")


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"hello" * 100])
def test_not_an_object(tmp_path: Path, capfd: pytest.CaptureFixture[str], content: bytes) -> None:
    """What is no BPF object is refused with libbpf's reason; nothing is printed."""
    path = tmp_path / "x.bpf.o"
    path.write_bytes(content)

    with pytest.raises(InvalidInput) as caught:
        CollectionSpec.load(path)

    assert str(path) == caught.value.value
    assert tuple(capfd.readouterr()) == ("", "")
