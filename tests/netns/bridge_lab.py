"""A bridge as Docker makes it, with containers on it, and what must not notice that they leave."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager

from portwright.kernel import rtnl
from portwright.kernel.netlink import NetlinkSocket
from tests.deadline import wait_until
from tests.faults.streams import Stream
from tests.fix_daemon import Daemon
from tests.fix_netns import TestNetns
from tests.netns.policy_lab import connect, listening

BRIDGE = "br-lab"
HOST4, HOST6 = "10.88.0.1", "fd88::1"
MAC = "02:88:00:00:00:01"
#: Seconds for which traffic may stand still while a bridge is left.
GAP = 0.2


class Member:
    """A container on the bridge: its namespace, its addresses, its host end."""

    def __init__(self, ns: TestNetns, host: TestNetns, number: int, bridge: str = BRIDGE) -> None:
        """Plugs it in."""
        self.ns, self.link = ns, f"veth{number}lab"
        self.ip4, self.ip6 = f"10.88.0.{number}", f"fd88::{number}"
        ip(
            host,
            f"link add {self.link} type veth peer name eth0 netns {ns.name}",
            f"link set {self.link} master {bridge} up",
        )
        ip(
            ns,
            "link set eth0 up",
            f"addr add {self.ip4}/24 dev eth0",
            f"addr add {self.ip6}/64 dev eth0 nodad",
            f"route add default via {HOST4}",
            f"route add default via {HOST6}",
        )
        wait_until(lambda: self.ping(HOST4) and self.ping(HOST6), why="the bridge to forward")

    def ping(self, address: str) -> bool:
        """Whether an echo request has its answer within a second."""
        return self.ns.run(["ping", "-n", "-c1", "-W1", address], check=False).returncode == 0

    @property
    def mac(self) -> str:
        """Of its device."""
        return link(self.ns, "eth0").mac


def ip(ns: TestNetns, *commands: str) -> None:
    """Several commands of ``ip`` by one process."""
    ns.run(["ip", "-batch", "-"], input="".join(f"{command}\n" for command in commands))


def link(ns: TestNetns, name: str) -> rtnl.LinkInfo:
    """A link by one of its names; AssertionError if there is none."""
    with NetlinkSocket(netns_fd=ns.fd) as sock:
        found = rtnl.link_by_name(sock, name)
    assert found is not None, f"no {name} in {ns.name}"
    return found


def names(ns: TestNetns) -> set[str]:
    """The links of a namespace."""
    with NetlinkSocket(netns_fd=ns.fd) as sock:
        return {found.name for found in rtnl.links(sock)}


def picture(ns: TestNetns) -> object:
    """What a move that is taken back must leave as it was: links, masters, routes, neighbours, filters."""
    with NetlinkSocket(netns_fd=ns.fd) as sock:
        links = {(x.name, x.altnames, x.master, x.mac, x.up, x.mtu) for x in rtnl.links(sock)}
        routes = {(r.dst, r.oif, r.gw, r.src, r.priority) for r in rtnl.routes(sock, table=254)}
        still = {(n.address, n.index, n.mac) for n in rtnl.neighbours(sock) if n.state & 0x80}
    answers = sorted(ns.run(["ip", family, "neigh", "show", "proxy"]).stdout for family in ("-4", "-6"))
    qdiscs = json.loads(ns.run(["tc", "-j", "qdisc", "show"]).stdout)
    return links, routes, still, answers, sorted(str(q) for q in qdiscs)


def make_bridge(host: TestNetns, *, name: str = BRIDGE, mac: str = MAC) -> None:
    """Up, dual-stack, forwarding, with a MAC of its own, as Docker's.

    Without one (``mac=""``) a bridge takes the lowest of its members', and who had found the host before
    another joined does not reach it for half a minute.
    """
    ip(
        host,
        f"link add {name} {f'address {mac}' if mac else ''} type bridge",
        f"link set {name} up",
        f"addr add {HOST4}/24 dev {name}",
        f"addr add {HOST6}/64 dev {name} nodad",
    )
    host.run(["sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"])


def network(daemon: Daemon, name: str = "lab") -> None:
    """A network of ours with the bridge's subnets."""
    with daemon.client() as client:
        client.network_create(name, subnets=["10.88.0.0/24", "fd88::/64"])


def judge(noise: float, gaps: Sequence[float], record_property: Callable[[str, object], None]) -> None:
    """AssertionError if a stream stood still for too long, over what its control did; notes both."""
    note = f"{max(gaps) * 1e3:.0f} ms (control {noise * 1e3:.0f} ms)"
    record_property("longest_gap", note)
    print(f"longest gap {note}")
    assert max(gaps) < GAP + noise


class Idle:
    """A connection on which nothing is said until it is asked to."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self._ends = (near, far)

    def alive(self) -> None:
        """AssertionError unless both ways carry what is said now."""
        for one, other in (self._ends, self._ends[::-1]):
            other.settimeout(5)
            one.sendall(b"still there?")
            assert other.recv(64) == b"still there?"


@contextmanager
def idle(source: TestNetns, target: TestNetns, address: str, port: int) -> Iterator[Idle]:
    """One that is established, and silent."""
    with listening(target, port) as server, ExitStack() as stack:
        near = stack.enter_context(closing(connect(source, address, port)))
        server.settimeout(5)
        far, _ = server.accept()
        stack.enter_context(far)
        yield Idle(near, far)


@contextmanager
def streams(*ways: tuple[str, TestNetns, TestNetns, str, int]) -> Iterator[list[Stream]]:
    """Streams (name, source, target, address, port) that run; they are checked to have gone on at the end."""
    with ExitStack() as stack:
        made = []
        for name, source, target, address, port in ways:
            made.append(Stream(name, source, target, address, port))
            stack.callback(made[-1].close)
        for stream in made:
            stream.advance()
        yield made
