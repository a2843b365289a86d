"""Forgetting connections: exactly those that match, in that namespace."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from portwright.kernel import conntrack
from portwright.kernel.netlink import NETLINK_NETFILTER, NetlinkSocket
from portwright.model.errors import InvalidInput
from tests.fix_netns import NetnsFactory, TestNetns

pytestmark = pytest.mark.netns
BOTH = pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["v4", "v6"])
LOOPBACK = {int(socket.AF_INET): "127.0.0.1", int(socket.AF_INET6): "::1"}


@pytest.fixture
def tracked(netns_factory: NetnsFactory) -> Iterator[TestNetns]:
    """A namespace that tracks connections and redirects UDP port 5300 to 5301."""
    ns = netns_factory()
    redirect(ns, 5301)
    yield ns
    ns.run(["nft", "delete", "table", "inet", "t"])


def redirect(ns: TestNetns, port: int) -> None:
    rules = f"""
        table inet t {{ }}
        delete table inet t
        table inet t {{
            chain out {{
                type nat hook output priority -100
                udp dport 5300 redirect to :{port}
            }}
        }}"""
    ns.run(["nft", "-f", "-"], input=rules)


def insert(ns: TestNetns, proto: str, src: str, dst: str, ports: str) -> None:
    sport, dport = ports.split(">")
    more = ["--state", "ESTABLISHED"] if proto == "tcp" else []
    ns.run(
        [
            *("conntrack", "-I", "-p", proto, "-s", src, "-d", dst),
            *("--sport", sport, "--dport", dport, "--timeout", "100", *more),
        ]
    )


def entries(ns: TestNetns, family: int) -> list[str]:
    word = "ipv6" if family == socket.AF_INET6 else "ipv4"
    return ns.run(["conntrack", "-L", "-f", word], check=False).stdout.splitlines()


def test_it_is_available(netns_factory: NetnsFactory) -> None:
    """Every kernel that we support and test on has ctnetlink; what is no namespace has not."""
    assert conntrack.available(netns_factory().fd)
    assert conntrack.available()
    assert not conntrack.available(0)


@BOTH
def test_a_redirected_client_reaches_the_new_target_after_the_purge(tracked: TestNetns, family: int) -> None:
    """The reason for it all: same source port, new rule, and only the purge makes it count."""
    address = LOOPBACK[family]
    with tracked.entered():
        old, new, client = (socket.socket(family, socket.SOCK_DGRAM) for _ in range(3))
    with old, new, client:
        for server, port in ((old, 5301), (new, 5302)):
            server.bind((address, port))
            server.settimeout(5)
        client.sendto(b"one", (address, 5300))
        assert old.recv(10) == b"one"
        redirect(tracked, 5302)
        client.sendto(b"two", (address, 5300))
        assert old.recv(10) == b"two"
        entries = conntrack.Entries("udp", family, None, 5300, reply_src=address, reply_src_port=5301)
        purged = conntrack.purge(tracked.fd, entries)
        assert purged == 1
        client.sendto(b"three", (address, 5300))
        assert new.recv(10) == b"three"


@BOTH
def test_only_what_matches_is_deleted(tracked: TestNetns, family: int) -> None:
    """Each field narrows; another protocol, address, port, direction or family stays."""
    a, b, c = (
        ("10.0.0.1", "10.0.0.2", "10.0.0.3") if family == socket.AF_INET else ("fd::1", "fd::2", "fd::3")
    )
    insert(tracked, "udp", a, b, "1000>53")
    insert(tracked, "udp", a, c, "1000>53")
    insert(tracked, "udp", a, b, "53>1000")  # the port on the other side
    insert(tracked, "tcp", a, b, "1000>53")
    insert(tracked, "udp", b, a, "1000>54")
    far = ("fd::9", "fd::8") if family == socket.AF_INET else ("10.9.9.9", "10.9.9.8")
    insert(tracked, "udp", *far, "1000>53")  # the other family
    other = socket.AF_INET6 if family == socket.AF_INET else socket.AF_INET
    before_other = len(entries(tracked, other))
    with NetlinkSocket(NETLINK_NETFILTER, tracked.fd) as sock:
        assert (
            conntrack.purge(sock, conntrack.Entries(proto="udp", family=family, orig_dst=c, orig_dst_port=99))
            == 0
        )
        assert len(entries(tracked, family)) == 5
        assert (
            conntrack.purge(sock, conntrack.Entries(proto="udp", family=family, orig_dst=b, orig_dst_port=53))
            == 1
        )
        assert conntrack.purge(sock, conntrack.Entries(proto=17, family=family, orig_dst_port=53)) == 1
        assert (
            conntrack.purge(
                sock, conntrack.Entries(proto="tcp", family=family, reply_src=b, reply_src_port=53)
            )
            == 1
        )
        left = entries(tracked, family)
        assert len(left) == 2
        assert any("dport=1000" in line for line in left)
        assert any("dport=54" in line for line in left)
        assert conntrack.purge(sock, conntrack.Entries(proto="udp", family=family, reply_src=a)) == 1
    assert len(entries(tracked, other)) == before_other


def test_other_namespaces_keep_their_entries(tracked: TestNetns, netns_factory: NetnsFactory) -> None:
    """A purge acts in the namespace given, and nowhere else."""
    insert(tracked, "udp", "10.0.0.1", "10.0.0.2", "1000>53")
    elsewhere = netns_factory()
    assert (
        conntrack.purge(elsewhere.fd, conntrack.Entries(proto="udp", family=socket.AF_INET, orig_dst_port=53))
        == 0
    )
    assert len(entries(tracked, socket.AF_INET)) == 1
    assert (
        conntrack.purge(tracked.fd, conntrack.Entries(proto="udp", family=socket.AF_INET, orig_dst_port=53))
        == 1
    )


def test_an_empty_or_wrong_question_is_refused(tracked: TestNetns) -> None:
    """No fields, a wrong family or port, an address of the other family: InvalidInput, nothing deleted."""
    insert(tracked, "udp", "10.0.0.1", "10.0.0.2", "1000>53")
    four = int(socket.AF_INET)
    with pytest.raises(InvalidInput):
        conntrack.purge(tracked.fd, conntrack.Entries(proto="udp", family=four))
    with pytest.raises(InvalidInput):
        conntrack.purge(tracked.fd, conntrack.Entries(proto="udp", family=four, orig_dst="fd::1"))
    with pytest.raises(InvalidInput):
        conntrack.purge(tracked.fd, conntrack.Entries(proto="udp", family=four, orig_dst_port=65536))
    with pytest.raises(InvalidInput):
        conntrack.purge(tracked.fd, conntrack.Entries(proto="nonsense", family=four, orig_dst_port=53))
    with pytest.raises(InvalidInput):
        conntrack.purge(tracked.fd, conntrack.Entries(proto="udp", family=0, orig_dst_port=53))
    assert len(entries(tracked, socket.AF_INET)) == 1


def test_several_questions_are_answered_by_one_walk(tracked: TestNetns) -> None:
    """What matches any of them goes, in both families, once; the rest stays; no question deletes nothing."""
    for port in (53, 54, 55):
        insert(tracked, "udp", "10.0.0.1", "10.0.0.2", f"1000>{port}")
    insert(tracked, "udp", "fd::1", "fd::2", "1000>53")
    four, six = int(socket.AF_INET), int(socket.AF_INET6)
    assert conntrack.purge(tracked.fd) == 0
    asked = [conntrack.Entries("udp", four, orig_dst_port=port) for port in (53, 54)]
    asked += [conntrack.Entries("udp", four, orig_dst="10.0.0.2", orig_dst_port=53)]
    asked += [conntrack.Entries("udp", six, orig_dst_port=53)]
    assert conntrack.purge(tracked.fd, *asked) == 3
    (left,) = entries(tracked, four)
    assert "dport=55" in left
    assert entries(tracked, six) == []
