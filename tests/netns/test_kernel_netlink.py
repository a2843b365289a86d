"""The netlink socket against the real kernel: batches, failures, dumps, liars and silence."""

from __future__ import annotations

import errno
import socket
import struct

import pytest

from portwright.kernel import netlink, rtnl
from portwright.kernel.netlink import Message, NetlinkSocket, Request, RequestFailed
from portwright.model.errors import KernelFailed, NetlinkFailed
from tests.fix_netns import NetnsFactory, open_fds

pytestmark = pytest.mark.netns
LO = 1


def _addresses(sock: NetlinkSocket) -> set[str]:
    return {a.address for a in rtnl.addresses(sock, LO) if a.address.startswith("10.")}


def test_a_socket_belongs_to_its_namespace_for_good(netns_factory: NetnsFactory) -> None:
    """Opened in a namespace, it acts there while the thread is, and stays, elsewhere."""
    one, two = netns_factory(), netns_factory()
    with NetlinkSocket(netns_fd=one.fd) as in_one, NetlinkSocket(netns_fd=two.fd) as in_two:
        in_one.execute([rtnl.addr_add(LO, "10.1.1.1/32")])
        assert _addresses(in_one) == {"10.1.1.1"}
        assert _addresses(in_two) == set()


def test_a_batch_goes_on_after_a_refusal_and_names_the_first(netns_factory: NetnsFactory) -> None:
    """RequestFailed tells the first refused request, the kernel's sentence and every refused place."""
    with NetlinkSocket(netns_fd=netns_factory().fd) as sock:
        requests = [
            rtnl.addr_add(LO, "10.0.0.1/32"),
            rtnl.addr_add(LO, "10.0.0.1/32"),
            rtnl.route_add("10.9.0.0/16", gw="192.0.2.1"),
            rtnl.addr_add(LO, "10.0.0.2/32"),
        ]
        with pytest.raises(NetlinkFailed) as caught:
            sock.execute(requests)
        error = caught.value
        assert isinstance(error, RequestFailed)
        assert (error.errno, error.index, error.failed) == (errno.EEXIST, 1, (1, 2))
        assert error.request == "ip addr add 10.0.0.1/32 dev if1"
        assert _addresses(sock) == {"10.0.0.1", "10.0.0.2"}


def test_the_kernels_own_sentence_is_passed_on(netns_factory: NetnsFactory) -> None:
    """What extack says is in the error and in its text, beside the command."""
    with NetlinkSocket(netns_fd=netns_factory().fd) as sock:
        with pytest.raises(NetlinkFailed) as caught:
            sock.execute([rtnl.route_add("10.9.0.0/16", gw="192.0.2.1")])
        assert "gateway" in caught.value.extack
        assert caught.value.extack in str(caught.value)
        assert "ip route add 10.9.0.0/16 via 192.0.2.1" in str(caught.value)


def test_execute_until_failure_stops(netns_factory: NetnsFactory) -> None:
    """What follows the first refusal is not executed."""
    with NetlinkSocket(netns_fd=netns_factory().fd) as sock:
        requests = [rtnl.addr_add(LO, f"10.0.0.{last}/32") for last in (1, 1, 2)]
        with pytest.raises(RequestFailed) as caught:
            sock.execute_until_failure(requests)
        assert (caught.value.index, caught.value.failed) == (1, (1,))
        assert _addresses(sock) == {"10.0.0.1"}


def test_a_tolerated_errno_is_success(netns_factory: NetnsFactory) -> None:
    """Deleting what is gone can be declared fine, and only for the errno named."""
    with NetlinkSocket(netns_fd=netns_factory().fd) as sock:
        sock.execute([rtnl.link_del("nobody").tolerating(errno.ENODEV)])
        with pytest.raises(RequestFailed):
            sock.execute([rtnl.link_del("nobody").tolerating(errno.EEXIST)])


def test_more_requests_than_one_sendmsg_takes(netns_factory: NetnsFactory) -> None:
    """A long list is cut silently; every ack is accounted for, and places count from the list's start."""
    with NetlinkSocket(netns_fd=netns_factory().fd) as sock:
        wanted = [f"10.{n // 250}.0.{n % 250 + 1}" for n in range(500)]
        requests = [rtnl.addr_add(LO, f"{address}/32") for address in wanted]
        assert len(sock.execute(requests)) == len(wanted)
        assert _addresses(sock) == set(wanted)
        with pytest.raises(RequestFailed) as caught:
            sock.execute([*requests[:100], rtnl.addr_add(LO, "10.99.0.1/32")])
        assert caught.value.failed == tuple(range(100))
        assert "10.99.0.1" in _addresses(sock)


def test_a_reply_belongs_to_its_request(netns_factory: NetnsFactory) -> None:
    """In one batch, a link created by one request is read back by the next."""
    with NetlinkSocket(netns_fd=netns_factory().fd) as sock:
        create = rtnl.veth_create(
            "pwa",
            mac="02:00:00:00:00:0a",
            mtu=1500,
            peer_name="pwb",
            peer_mac="02:00:00:00:00:0b",
            peer_mtu=1400,
        )
        replies = sock.execute([create, rtnl.link_get("pwa"), rtnl.link_get("pwb")])
        assert replies[0] == []
        ends = [rtnl.parse_link(reply[0]) for reply in replies[1:]]
        assert [(end.name, end.mtu) for end in ends if end] == [("pwa", 1500), ("pwb", 1400)]


def test_messages_from_another_process_are_ignored(netns_factory: NetnsFactory) -> None:
    """A forged ack for our next sequence number, sent by a process, does not count."""
    ns = netns_factory()
    with NetlinkSocket(netns_fd=ns.fd) as sock, ns.entered():
        port = sock._sock.getsockname()[0]
        lie = struct.pack("=IHHIIi", 36, 2, 0, sock._seq + 1, 0, -errno.EPERM) + bytes(16)
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, netlink.NETLINK_ROUTE) as liar:
            liar.sendto(lie, (port, 0))
        sock.execute([rtnl.addr_add(LO, "10.0.0.1/32")])


def test_silence_ends_in_an_error(netns_factory: NetnsFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an answer KernelFailed(ETIMEDOUT) is raised after the timeout, not a hang."""
    monkeypatch.setattr(netlink, "REPLY_TIMEOUT", 0.02)
    with NetlinkSocket(netns_fd=netns_factory().fd) as sock:
        with pytest.raises(KernelFailed) as caught:
            sock._receive("ip link show")
        assert caught.value.errno == errno.ETIMEDOUT


def test_an_answer_that_does_not_fit_is_an_error(netns_factory: NetnsFactory) -> None:
    """A datagram longer than the buffer is EMSGSIZE, never half an answer."""
    with NetlinkSocket(netns_fd=netns_factory().fd) as sock:
        sock._buffer = bytearray(64)
        with pytest.raises(KernelFailed) as caught:
            sock.dump(Request(18, 0, bytes(16), "ip link show"))
        assert caught.value.errno == errno.EMSGSIZE


@pytest.mark.parametrize(("interrupted", "fails"), [(1, False), (99, True)])
def test_an_interrupted_dump_is_read_again(
    netns_factory: NetnsFactory, monkeypatch: pytest.MonkeyPatch, interrupted: int, fails: bool
) -> None:
    """NLM_F_DUMP_INTR starts over and drops the first pass; a list that never holds still is an error."""
    left = interrupted
    real = netlink.receive

    def marked(sock: socket.socket, buffer: bytearray) -> list[Message]:
        nonlocal left
        messages = real(sock, buffer)
        if left and any(m.type == 3 for m in messages):  # NLMSG_DONE
            left -= 1
            return [m._replace(flags=m.flags | netlink.NLM_F_DUMP_INTR) for m in messages]
        return messages

    monkeypatch.setattr(netlink, "receive", marked)
    with NetlinkSocket(netns_fd=netns_factory().fd) as sock:
        if fails:
            with pytest.raises(KernelFailed):
                rtnl.links(sock)
        else:
            assert [link.name for link in rtnl.links(sock)] == ["lo"]


def test_a_refused_dump_is_an_error_with_the_request(netns_factory: NetnsFactory) -> None:
    """The kernel's strict check refuses a malformed dump, and says so."""
    with NetlinkSocket(netns_fd=netns_factory().fd) as sock:
        with pytest.raises(RequestFailed) as caught:
            sock.dump(Request(18, 0, b"\0\0\0\0" + b"\7" * 12, "ip link show nonsense"))
        assert caught.value.request == "ip link show nonsense"
        assert [link.name for link in rtnl.links(sock)] == ["lo"]  # still usable


def test_nothing_stays_open(netns_factory: NetnsFactory) -> None:
    """Opening, failing to open and closing leave no descriptor behind."""
    ns = netns_factory()
    before = open_fds()
    for _ in range(3):
        with NetlinkSocket(netns_fd=ns.fd) as sock:
            rtnl.links(sock)
    with pytest.raises(KernelFailed):
        NetlinkSocket(netns_fd=0)  # not a namespace
    with pytest.raises(KernelFailed):
        NetlinkSocket(31)  # no such protocol here
    assert open_fds() == before
