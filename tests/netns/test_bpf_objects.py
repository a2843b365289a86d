"""Programs and links against the real kernel, with real packets."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from portwright.kernel.bpf import (
    AttachType,
    Collection,
    CollectionSpec,
    Link,
    LinkType,
    Map,
    MapSpec,
    MapType,
    Program,
    prog_query_tcx,
)
from portwright.model.errors import KernelFailed
from tests.deadline import wait_until
from tests.fix_bpf import TEST_FRAME, Veth, ip, own_netns
from tests.fix_features import require_for_test

pytestmark = pytest.mark.netns

ENOENT, EEXIST, ENODEV, ENOSPC, ENOLINK = 2, 17, 19, 28, 67


def counted(table: Map, key: int) -> int:
    """The packets in one slot of zoo's per-CPU counters."""
    values = table.lookup_percpu(struct.pack("=I", key))
    assert values is not None
    return sum(struct.unpack_from("=I", value)[0] for value in values)


@pytest.fixture
def tcx() -> None:
    """The test needs TCX."""
    require_for_test("tcx")


# -- programs --------------------------------------------------------------------------------------


def test_run_returns_frame_and_context(zoo: Collection) -> None:
    """A run gives the verdict and the context as the program left it (mark is at byte 8 of __sk_buff)."""
    context = bytearray(192)
    struct.pack_into("=I", context, 8, 41)

    run = zoo.programs["look_in_set"].test_run(TEST_FRAME, ctx=bytes(context))

    assert run.retval == 99
    assert run.data == TEST_FRAME
    assert struct.unpack_from("=I", run.ctx, 8) == (42,)


def test_run_sees_the_inner_map_of_now(zoo: Collection) -> None:
    """The program reads through a map of maps what was put there last."""
    with Map.create(MapSpec("rules", MapType.HASH, 4, 4, 32)) as rules:
        zoo.maps["sets"].update(struct.pack("=I", 7), struct.pack("=I", rules.fd))
        assert zoo.programs["look_in_set"].test_run(TEST_FRAME).retval == 98
        rules.update(struct.pack("=I", 64), struct.pack("=I", 5))
        assert zoo.programs["look_in_set"].test_run(TEST_FRAME).retval == 5


def test_run_of_a_program_that_grows_the_frame(zoo: Collection) -> None:
    """The frame comes back in its new length; too small a buffer is ENOSPC and not a cut frame."""
    assert zoo.programs["grow"].test_run(TEST_FRAME).data == TEST_FRAME + bytes(8)
    with pytest.raises(KernelFailed) as caught:
        zoo.programs["grow"].test_run(TEST_FRAME, data_out_size=len(TEST_FRAME))
    assert caught.value.errno == ENOSPC


def test_run_repeats(zoo: Collection) -> None:
    """A repeated run runs that often, and the time of one run is measured."""
    before = counted(zoo.maps["counts"], 3)
    run = zoo.programs["drop_test"].test_run(TEST_FRAME, repeat=1000)

    assert counted(zoo.maps["counts"], 3) - before == 1000
    assert 0 < run.duration_ns < 1_000_000


def test_program_by_pin_and_id(zoo: Collection, bpffs: Path) -> None:
    """A program is the same object by name, pin and id; the tag is its digest."""
    program = zoo.programs["drop_test"]
    program.pin(bpffs / "p")
    with Program.from_pin(bpffs / "p") as by_pin, Program.from_id(program.id) as by_id:
        assert {program.id} == {by_pin.id, by_id.id}
        assert {program.tag} == {by_pin.tag, by_id.tag}
        assert len(program.tag) == 16
        assert by_id.name == "drop_test"


def test_absent_ids() -> None:
    """An id that nobody has is ENOENT for each kind."""
    for kind in (Program, Link, Map):
        with pytest.raises(KernelFailed) as caught:
            kind.from_id(0x7FFFFFFF)
        assert caught.value.errno == ENOENT


# -- links -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tcx")
@pytest.mark.parametrize("direction", ["ingress", "egress"])
def test_tcx_sees_packets_until_closed(zoo: Collection, veth: Veth, direction: str) -> None:
    """An attached program runs for each packet of its direction, and for none once the link is closed."""
    on = veth.peer_ifindex if direction == "ingress" else veth.ifindex
    with Link.attach_tcx(zoo.programs["drop_test"], on, direction) as link:  # type: ignore[arg-type]
        assert [zoo.programs["drop_test"].id] == prog_query_tcx(on, direction)  # type: ignore[arg-type]
        info = link.info()
        assert (on, zoo.programs["drop_test"].id, LinkType.TCX) == (info.ifindex, info.prog_id, info.type)
        assert AttachType[f"TCX_{direction.upper()}"] is info.attach_type
        veth.send(count=10)
        assert counted(zoo.maps["counts"], 3) == 10
    veth.send(count=10)

    assert prog_query_tcx(on, direction) == []  # type: ignore[arg-type]
    assert counted(zoo.maps["counts"], 3) == 10


@pytest.mark.usefixtures("tcx")
def test_links_of_others_stay(zoo: Collection, veth: Veth) -> None:
    """Attaching comes behind what is there and detaching leaves the rest."""
    ifindex = veth.peer_ifindex
    first, second = zoo.programs["emit"], zoo.programs["count_slot"]
    with Link.attach_tcx(first, ifindex, "ingress"):
        with Link.attach_tcx(second, ifindex, "ingress"):
            assert [first.id, second.id] == prog_query_tcx(ifindex, "ingress")
        assert [first.id] == prog_query_tcx(ifindex, "ingress")


@pytest.mark.usefixtures("tcx")
def test_pinned_link_outlives_everything(zoo: Collection, veth: Veth, bpffs: Path) -> None:
    """With all descriptors closed a pinned link still works; unlinking the pin ends it."""
    path = bpffs / "link"
    counts = zoo.maps["counts"]
    with Link.attach_tcx(zoo.programs["drop_test"], veth.peer_ifindex, "ingress") as link:
        link.pin(path)
    zoo.programs["drop_test"].close()
    veth.send()
    assert counted(counts, 3) == 1

    with Link.from_pin(path) as link:
        assert veth.peer_ifindex == link.info().ifindex
        with Link.from_id(link.info().id) as same:
            assert link.info() == same.info()
    path.unlink()
    # The kernel drops the last reference of a pin from a work queue: soon, not at once.
    wait_until(lambda: not prog_query_tcx(veth.peer_ifindex, "ingress"), why="the unpinned link to end")
    veth.send()

    assert counted(counts, 3) == 1


@pytest.fixture
def slots(bpf_object: Callable[[str], Path]) -> Iterator[tuple[Collection, Collection]]:
    """Two collections that share their counters; count_slot counts in slot 0 or 1, and drops."""
    spec = CollectionSpec.load(bpf_object("zoo"))
    first, second = ({"verdict": struct.pack("=I", 2), "slot": struct.pack("=Q", slot)} for slot in (0, 1))
    with (
        Collection.load(spec, constants=first) as old,
        Collection.load(spec, constants=second, reuse={"counts": old.maps["counts"]}) as new,
    ):
        yield old, new


@pytest.mark.usefixtures("tcx")
def test_update_takes_effect(slots: tuple[Collection, Collection], veth: Veth) -> None:
    """After update() the next packet meets the new program, under the same link."""
    counts = slots[0].maps["counts"]
    with Link.attach_tcx(slots[0].programs["count_slot"], veth.peer_ifindex, "ingress") as link:
        link_id = link.info().id
        for turn, collection in enumerate([slots[1], slots[0]] * 5, 1):
            link.update(collection.programs["count_slot"])
            assert [collection.programs["count_slot"].id] == prog_query_tcx(veth.peer_ifindex, "ingress")
            veth.send()
            assert (turn // 2, (turn + 1) // 2) == (counted(counts, 0), counted(counts, 1))
        assert link.info().id == link_id


@pytest.mark.usefixtures("tcx")
def test_update_loses_no_packet(slots: tuple[Collection, Collection], veth: Veth) -> None:
    """While the program is replaced again and again, each packet meets exactly one of the two."""
    counts = slots[0].maps["counts"]
    programs = [collection.programs["count_slot"] for collection in slots]
    chance, stop, sent = random.Random(1), threading.Event(), 0

    def send() -> None:
        nonlocal sent
        with veth.sender() as one:
            while not stop.is_set():
                one()
                sent += 1

    with Link.attach_tcx(programs[0], veth.peer_ifindex, "ingress") as link:
        thread = threading.Thread(target=send)
        thread.start()
        try:
            wait_until(lambda: counted(counts, 0), why="the stream's first packet")

            def swapped() -> bool:
                for _ in range(100):
                    # At random: alternating falls into step with the sender's turns at the GIL.
                    link.update(chance.choice(programs))
                return min(counted(counts, 0), counted(counts, 1)) > 100

            wait_until(swapped, timeout=20, why="both programs to have met 100 packets")
        finally:
            stop.set()
            thread.join()
        met = counted(counts, 0) + counted(counts, 1)

    assert met == sent


@pytest.mark.usefixtures("tcx")
def test_device_gone(zoo: Collection, veth: Veth) -> None:
    """When its device goes, a link stays as an object: ifindex 0, and an update is ENOLINK."""
    with Link.attach_tcx(zoo.programs["drop_test"], veth.peer_ifindex, "ingress") as link:
        ip("link", "del", veth.name)
        assert link.info().ifindex == 0
        with pytest.raises(KernelFailed) as caught:
            link.update(zoo.programs["emit"])
        assert caught.value.errno == ENOLINK
        link.detach()


@pytest.mark.usefixtures("tcx")
def test_detach(zoo: Collection, veth: Veth, bpffs: Path) -> None:
    """detach() takes the program off although a pin holds the link; twice is fine."""
    with Link.attach_tcx(zoo.programs["drop_test"], veth.peer_ifindex, "ingress") as link:
        link.pin(bpffs / "link")
        link.detach()
        assert prog_query_tcx(veth.peer_ifindex, "ingress") == []
        assert link.info().ifindex == 0
        link.detach()


@pytest.mark.usefixtures("tcx")
def test_ifindex_is_the_callers_namespace(zoo: Collection, veth: Veth) -> None:
    """A device is looked up in the calling thread's namespace; the link then works from any other."""
    with Link.attach_tcx(zoo.programs["drop_test"], veth.peer_ifindex, "ingress") as link:
        with own_netns():
            with pytest.raises(KernelFailed) as caught:
                Link.attach_tcx(zoo.programs["drop_test"], veth.peer_ifindex + 1000, "ingress")
            assert caught.value.errno == ENODEV
            with pytest.raises(KernelFailed):
                prog_query_tcx(veth.peer_ifindex + 1000, "ingress")
            assert veth.peer_ifindex == link.info().ifindex
            link.update(zoo.programs["count_slot"])
        assert [zoo.programs["count_slot"].id] == prog_query_tcx(veth.peer_ifindex, "ingress")


@pytest.mark.usefixtures("tcx")
def test_same_program_twice(zoo: Collection, veth: Veth) -> None:
    """One program is attached to one hook once: EEXIST."""
    with Link.attach_tcx(zoo.programs["emit"], veth.ifindex, "egress"):
        with pytest.raises(KernelFailed) as caught:
            Link.attach_tcx(zoo.programs["emit"], veth.ifindex, "egress")
        assert caught.value.errno == EEXIST


def test_netkit_links(zoo: Collection) -> None:
    """Both ends of a netkit pair take a link through the primary's index, and say which end it is."""
    require_for_test("netkit")
    with own_netns():
        ip("link", "add", "bpf0", "type", "netkit")
        ifindex = socket.if_nametoindex("bpf0")
        with (
            Link.attach_netkit(zoo.programs["emit"], ifindex, "primary") as primary,
            Link.attach_netkit(zoo.programs["emit"], ifindex, "peer") as peer,
        ):
            assert (primary.info().type, peer.info().type) == (LinkType.NETKIT, LinkType.NETKIT)
            assert primary.info().attach_type is AttachType.NETKIT_PRIMARY
            assert peer.info().attach_type is AttachType.NETKIT_PEER


def test_xdp_link(zoo: Collection, veth: Veth) -> None:
    """An XDP link attaches in the generic mode and says where it is."""
    with Link.attach_xdp(zoo.programs["xdp_pass"], veth.ifindex, "generic") as link:
        info = link.info()

        assert (LinkType.XDP, veth.ifindex, AttachType.XDP) == (info.type, info.ifindex, info.attach_type)
        assert zoo.programs["xdp_pass"].id == info.prog_id


def test_cgroup_link(zoo: Collection) -> None:
    """A connect4 program on a cgroup refuses the connections of its members and of nobody else."""
    mounts = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    root = next((Path(fields[1]) for fields in mounts if fields[2] == "cgroup2"), None)
    assert root is not None, "cgroup v2 is not mounted"
    home = next(
        line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")
    )
    group = root / f"pwt-{os.getpid()}-{threading.get_native_id()}"
    group.mkdir()
    try:
        fd = os.open(group, os.O_RDONLY | os.O_DIRECTORY)
        with (
            Link.attach_cgroup(zoo.programs["refuse"], fd, AttachType.CGROUP_INET4_CONNECT) as link,
            socket.create_server(("127.0.0.1", 0)) as server,
        ):
            os.close(fd)
            assert AttachType.CGROUP_INET4_CONNECT is link.info().attach_type
            assert LinkType.CGROUP is link.info().type
            socket.create_connection(server.getsockname()).close()
            (group / "cgroup.procs").write_text(str(os.getpid()))
            try:
                with pytest.raises(PermissionError):
                    socket.create_connection(server.getsockname())
            finally:
                (root / home.lstrip("/") / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        group.rmdir()


@pytest.mark.usefixtures("tcx")
def test_closed_link(zoo: Collection, veth: Veth) -> None:
    """A closed link or program is a ValueError wherever it's used."""
    program = zoo.programs["emit"]
    link = Link.attach_tcx(program, veth.ifindex, "ingress")
    link.close()
    link.close()
    for call in (link.info, link.detach, lambda: link.update(program), lambda: link.fd):
        with pytest.raises(ValueError, match="closed"):
            call()
    program.close()
    with pytest.raises(ValueError, match="closed"):
        Link.attach_tcx(program, veth.ifindex, "ingress")
    with pytest.raises(ValueError, match="closed"):
        program.test_run(TEST_FRAME)
