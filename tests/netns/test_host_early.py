"""XDP on a host's interface: what is dropped before the stack, and what never is."""

from __future__ import annotations

import os
import socket
import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from portwright.dataplane import policy_values
from portwright.dataplane.abi import PwCounter
from portwright.kernel import bpf, netns
from portwright.kernel.netlink import NetlinkSocket
from portwright.node.early import OBJECT, PROGRAM, Early
from tests.dataplane import frames
from tests.dataplane.model import IP4, IP6
from tests.deadline import wait_until
from tests.fix_daemon import HOST4, HOST6, WORLD4, WORLD6, Daemon, make_world
from tests.fix_netns import NetnsFactory, TestNetns
from tests.netns.policy_lab import listening
from tests.netns.test_policy_hosts import UNTRACKED, HostProbe, host, policy

pytestmark = pytest.mark.netns

DENIED = ("198.51.100.0/24", "2001:db8:bad::/48", "192.0.2.66/32")


class Lab:
    """A host with an uplink, and what is behind it."""

    def __init__(self, host: TestNetns, world: TestNetns, own: SimpleNamespace) -> None:
        self.host, self.world, self.own = host, world, own
        self.early = Early()
        with world.entered():
            self.raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        self.raw.bind(("w0", 0))

    def send(self, packet: bytes, ethertype: int) -> None:
        """Behind the host's MAC."""
        self.raw.send(frames.ethernet(b"\2\0\0\0\0\1", frames.BROADCAST, ethertype, packet))

    def dropped(self) -> int:
        """Packets so far."""
        return sum(packets for name, _, packets, _ in self.early.dropped() if name == "up0")


@pytest.fixture
def lab(netns_factory: NetnsFactory) -> Iterator[Lab]:
    """With a bpffs of its own, in a mount namespace of nobody else's."""
    host, world = netns_factory(), netns_factory()
    make_world(host, world)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"pwt-{os.getpid()}-")))
        bpf.mount_bpffs(folder)
        stack.callback(bpf.umount_bpffs, folder)
        fd = os.open(host.path, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        sock = stack.enter_context(NetlinkSocket(netns_fd=fd))
        made = Lab(host, world, SimpleNamespace(fd=fd, rtnl=sock, pins=folder))
        stack.enter_context(closing(made.raw))
        yield made
        made.early.put(made.own, {})


def udp(source: str, sport: int, dport: int) -> tuple[bytes, int]:
    """A datagram to the host from an address of either family."""
    body = struct.pack("!HHHH", sport, dport, 12, 0) + b"data"
    if ":" in source:
        return frames.ipv6(source, "2001:db8::1", 17, body), IP6
    return frames.ipv4(source, "192.0.2.2", 17, body), IP4


@pytest.mark.parametrize(
    ("source", "sport", "dport", "is_dropped"),
    [
        ("198.51.100.9", 5000, 80, True),
        ("2001:db8:bad::9", 5000, 80, True),
        ("192.0.2.66", 5000, 80, True),
        ("198.51.101.9", 5000, 80, False),
        ("2001:db8:bae::9", 5000, 80, False),
        ("198.51.100.9", 5000, 68, False),
        ("2001:db8:bad::9", 5000, 68, False),
        ("198.51.100.9", 53, 5000, False),
        ("198.51.100.9", 68, 5000, True),
    ],
)
def test_sources_are_dropped_but_for_failsafes(
    lab: Lab, source: str, sport: int, dport: int, is_dropped: bool
) -> None:
    """What such a source sends, in both families; not to a failsafe port, and not what answers one."""
    lab.early.put(lab.own, {"up0": DENIED})
    assert lab.early.lacking == {}
    lab.send(*udp("198.51.100.1", 1, 1))
    wait_until(lambda: lab.dropped() == 1, why="the first packet to be dropped")
    lab.send(*udp(source, sport, dport))
    lab.send(*udp("198.51.100.2", 2, 2))
    wait_until(lambda: lab.dropped() == 2 + is_dropped, why="the last packet to be dropped")


def test_what_is_not_plain_is_left_to_the_stack() -> None:
    """Fragments, options, extension headers, neighbour discovery, ARP, what is cut off: never dropped."""
    spec = bpf.CollectionSpec.load(OBJECT)
    with closing(bpf.Collection.load(spec)) as made:
        everybody = (policy_values.net_key("0.0.0.0/0"), PwCounter(0, 0).pack())
        made.maps["pw_early"].update(*everybody)
        made.maps["pw_early"].update(policy_values.net_key("::/0"), PwCounter(0, 0).pack())
        plain4, plain6 = udp("198.51.100.9", 1, 2), udp("2001:db8:bad::9", 1, 2)
        body = plain4[0][20:]
        cases = {
            "plain 4": (*plain4, 1),
            "plain 6": (*plain6, 1),
            "first fragment": (frames.ipv4("198.51.100.9", "192.0.2.2", 17, body, frag=0x2000), IP4, 2),
            "options": (frames.ipv4("198.51.100.9", "192.0.2.2", 17, body, options=bytes(4)), IP4, 2),
            "later fragment": (frames.ipv4("198.51.100.9", "192.0.2.2", 17, body, frag=3), IP4, 2),
            "hop-by-hop": (
                frames.ipv6("2001:db8:bad::9", "2001:db8::1", 0, b"\x11\0\0\0\0\0\0\0" + body),
                IP6,
                2,
            ),
            "solicitation": (
                frames.ipv6("2001:db8:bad::9", "2001:db8::1", 58, b"\x87" + bytes(23)),
                IP6,
                2,
            ),
            "ARP": (bytes(40), 0x0806, 2),
        }
        for name, (packet, ethertype, verdict) in cases.items():
            frame = frames.ethernet(b"\2\0\0\0\0\1", b"\2\0\0\0\0\2", ethertype, packet)
            assert made.programs[PROGRAM].test_run(frame.ljust(64, b"\0")).retval == verdict, name
        whole = frames.ethernet(b"\2\0\0\0\0\1", b"\2\0\0\0\0\2", IP6, plain6[0])
        for length in range(14, 14 + 40 + 4):
            assert made.programs[PROGRAM].test_run(whole[:length]).retval == 2, length


def test_a_change_and_an_end(lab: Lab) -> None:
    """Other nets replace those there in one link; another daemon life takes the pins over; without nets
    nothing is left; what can't be is told."""
    lab.early.put(lab.own, {"up0": DENIED, "eth9.100": DENIED})
    assert lab.early.lacking == {"eth9.100": "eth9.100 is not there"}
    lab.early.put(lab.own, {"up0": ("203.0.113.0/24",)})
    lab.send(*udp("198.51.100.1", 1, 1))
    lab.send(*udp("203.0.113.1", 1, 1))
    wait_until(lambda: lab.dropped() == 1, why="the new nets' packet to be dropped")
    lab.early = Early()
    lab.early.put(lab.own, {"up0": DENIED})
    assert lab.dropped() == 0
    lab.send(*udp("198.51.100.1", 1, 1))
    wait_until(lambda: lab.dropped() == 1, why="a packet to be dropped")
    lab.early.put(lab.own, {})
    assert not list((lab.own.pins / "early").glob("*"))
    assert "xdp" not in lab.host.run(["ip", "link", "show", "up0"]).stdout


def test_anothers_program_stays(lab: Lab) -> None:
    """An interface that has somebody's XDP program is left to them, and that is told."""
    with closing(bpf.Collection.load(bpf.CollectionSpec.load(OBJECT))) as theirs, netns.entered(lab.own.fd):
        index = socket.if_nametoindex("up0")
        link = bpf.Link.attach_xdp(theirs.programs[PROGRAM], index)
    with closing(link):
        before = link.info().prog_id
        lab.early.put(lab.own, {"up0": DENIED})
        assert lab.early.lacking == {"up0": "up0 has another's XDP program"}
        assert link.info().prog_id == before


@pytest.mark.parametrize("address", [WORLD4, WORLD6])
def test_what_an_untracked_policy_denies_is_dropped_early(
    daemon: Daemon, world: TestNetns, address: str
) -> None:
    """A flood from a denied source never reaches the stack, is counted as its endpoint's, and ends with the
    policy; a restarted daemon goes on; others, and a failsafe port, are reached."""
    probe = HostProbe(daemon)
    net = f"{address}/{128 if ':' in address else 32}"
    target = HOST6 if ":" in address else HOST4
    open_ = policy("open", "ingress:\n- {action: Allow}\negress:\n- {action: Allow}")
    deny = policy("deny", f"ingress:\n- {{action: Deny, source: {{nets: ['{net}']}}}}", flags=UNTRACKED)
    with daemon.client() as client, listening(daemon.host, 22), listening(daemon.host, 80):
        client.policy_apply([("host.yaml", host() + open_)])
        assert probe.reaches(world, target, 80)
        assert "xdp" not in daemon.host.run(["ip", "link", "show", "up0"]).stdout
        client.policy_apply([("deny.yaml", deny)])
        assert not probe.reaches(world, target, 80)
        assert probe.reaches(world, target, 22)
        assert {rule for _, _, _, rule in probe.drops()} == {"GlobalNetworkPolicy deny ingress[0], by XDP"}
        daemon.kill()
    daemon.start()
    with daemon.client() as client, listening(daemon.host, 80):
        assert not probe.reaches(world, target, 80)
        client.policy_delete(["deny.yaml"])
        assert "xdp" not in daemon.host.run(["ip", "link", "show", "up0"]).stdout
        assert probe.reaches(world, target, 80)
