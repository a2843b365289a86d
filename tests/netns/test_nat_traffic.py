"""Port mappings and masquerading with real packets: client - host - two sandboxes (nat_lab.py)."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from portwright.model.network import GATEWAY_MAC
from portwright.plan import nat, publish
from tests.deadline import wait_until
from tests.netns.nat_lab import (
    CLIENT,
    HOST,
    HOST2,
    LOOPBACK,
    LOOPBACK_SEEN,
    TIMEOUT,
    A,
    B,
    Lab,
    mapping,
)

pytestmark = pytest.mark.netns

FAMILIES = pytest.mark.parametrize("family", [4, 6])
PROTOCOLS = pytest.mark.parametrize("proto", ["tcp", "udp"])


@pytest.fixture(scope="module")
def shared_lab() -> Iterator[Lab]:
    """One lab for all tests that put everything back."""
    with contextlib.ExitStack() as stack:
        yield Lab(stack)


@pytest.fixture
def lab(shared_lab: Lab) -> Lab:
    """Hand out the lab as it was new."""
    shared_lab.reset()
    return shared_lab


@pytest.fixture
def own_lab() -> Iterator[Lab]:
    """Build a lab that the test may damage."""
    with contextlib.ExitStack() as stack:
        yield Lab(stack)


@FAMILIES
@PROTOCOLS
def test_from_outside(lab: Lab, family: int, proto: str) -> None:
    """A client outside reaches the sandbox by any of the host's addresses, and the sandbox sees who it is."""
    lab.publish(A, mapping(proto=proto))
    for address in (HOST[family], HOST2[family]):
        assert lab.client.ask(proto, address, 8080) == ("A", CLIENT[family])


@FAMILIES
@PROTOCOLS
def test_from_the_host_by_its_own_address(lab: Lab, family: int, proto: str) -> None:
    """A process of the host reaches the sandbox by the host's own address, untranslated."""
    lab.publish(A, mapping(proto=proto))
    assert lab.host.ask(proto, HOST[family], 8080) == ("A", HOST[family])


@FAMILIES
@PROTOCOLS
def test_from_the_host_by_loopback(lab: Lab, family: int, proto: str) -> None:
    """127.0.0.1 and [::1] of the host reach the sandbox, which sees a fixed stand-in."""
    lab.publish(A, mapping(proto=proto), rep=lab.reps["a"])
    for _ in range(2):
        assert lab.host.ask(proto, LOOPBACK[family], 8080) == ("A", LOOPBACK_SEEN[family])


@FAMILIES
def test_loopback_of_two_sandboxes_and_of_the_host(lab: Lab, family: int) -> None:
    """Loopback mappings of two ports work beside each other, and the host's own loopback goes on working."""
    lab.publish(A, mapping(8080), rep=lab.reps["a"])
    lab.publish(B, mapping(8081, host_ip=LOOPBACK[4]), mapping(8081, host_ip=LOOPBACK[6]), rep=lab.reps["b"])
    assert lab.host.ask("tcp", LOOPBACK[family], 8080)[0] == "A"
    assert lab.host.ask("tcp", LOOPBACK[family], 8081)[0] == "B"
    with pytest.raises(ConnectionRefusedError):
        lab.client.ask("tcp", HOST[family], 8081)
    with lab.host.socket(family, "tcp") as server:
        server.bind((LOOPBACK[family], 0))
        server.listen()
        with lab.host.socket(family, "tcp") as client:
            client.connect((LOOPBACK[family], server.getsockname()[1]))
            accepted, peer = server.accept()
            accepted.close()
            assert peer[0] == LOOPBACK[family]


@FAMILIES
def test_loopback_without_any_host_address(own_lab: Lab, family: int) -> None:
    """The loopback mapping works on a host that has no address but its loopback: a laptop without a link."""
    own_lab.publish(A, mapping(), rep=own_lab.reps["a"])
    own_lab.host.ip("link del up0")
    assert own_lab.host.ask("tcp", LOOPBACK[family], 8080) == ("A", LOOPBACK_SEEN[family])


@FAMILIES
@PROTOCOLS
def test_hairpin(lab: Lab, family: int, proto: str) -> None:
    """A sandbox reaches its own published port by a host address, and sees that address as the peer."""
    lab.publish(A, mapping(proto=proto))
    for address in (HOST[family], HOST2[family]):
        assert lab.a.ask(proto, address, 8080) == ("A", address)


@FAMILIES
@PROTOCOLS
def test_from_one_sandbox_to_another_by_the_host(lab: Lab, family: int, proto: str) -> None:
    """A reaches B by a host port, and B sees A's own address, though A's subnet is masqueraded."""
    lab.publish(B, mapping(proto=proto))
    assert lab.a.ask(proto, HOST[family], 8080) == ("B", A[family])


@FAMILIES
def test_host_ip_restricts(lab: Lab, family: int) -> None:
    """A mapping bound to one host address does not answer on another; two may share the port number."""
    lab.publish(A, mapping(host_ip=HOST[family]))
    assert lab.client.ask("tcp", HOST[family], 8080)[0] == "A"
    with pytest.raises(ConnectionRefusedError):
        lab.client.ask("tcp", HOST2[family], 8080)
    with pytest.raises(ConnectionRefusedError):
        lab.host.ask("tcp", LOOPBACK[family], 8080)
    lab.publish(B, mapping(host_ip=HOST2[family]))
    assert lab.client.ask("tcp", HOST[family], 8080)[0] == "A"
    assert lab.client.ask("tcp", HOST2[family], 8080)[0] == "B"


@FAMILIES
@PROTOCOLS
def test_refused_after_delete(lab: Lab, family: int, proto: str) -> None:
    """After the mapping is gone the host refuses: at once, also on a flow that worked a moment ago."""
    lab.publish(A, mapping(proto=proto))
    assert lab.client.ask(proto, HOST[family], 8080, source_port=40001)[0] == "A"
    lab.publish(A, mapping(proto=proto), added=False)
    with pytest.raises(ConnectionRefusedError):
        lab.client.ask(proto, HOST[family], 8080, source_port=40001)
    lab.publish(A, mapping(proto=proto), added=False)  # once more is no error


@FAMILIES
def test_live_connection_is_reset_by_delete(lab: Lab, family: int) -> None:
    """A TCP connection that is open when its mapping goes is reset, not left hanging."""
    lab.publish(A, mapping())
    with lab.client.socket(family, "tcp") as sock:
        sock.connect((HOST[family], 8080))
        lab.publish(A, mapping(), added=False)
        with pytest.raises(ConnectionResetError):
            wait_until(lambda: sock.send(b"?") == 0, why="a reset")


@FAMILIES
def test_udp_follows_the_mapping_to_a_new_target(lab: Lab, family: int) -> None:
    """A UDP client that keeps its source port reaches the second sandbox, not the first one's ghost."""
    lab.publish(A, mapping(proto="udp"))
    assert lab.client.ask("udp", HOST[family], 8080, source_port=40002)[0] == "A"
    lab.nft.run(nat.port_elements_delete(lab.instance, [mapping(proto="udp")], A.values()))
    lab.nft.run(nat.port_elements_add(lab.instance, [mapping(proto="udp")], B.values()))
    assert lab.client.ask("udp", HOST[family], 8080, source_port=40002)[0] == "A"  # why a purge is needed
    assert lab.purge(publish.purges([mapping(proto="udp")], B.values(), added=True)) == 1
    assert lab.client.ask("udp", HOST[family], 8080, source_port=40002)[0] == "B"


@FAMILIES
def test_udp_entry_from_before_the_mapping(lab: Lab, family: int) -> None:
    """A client that sent before the port was published gets through once it is."""
    with pytest.raises(ConnectionRefusedError):
        lab.client.ask("udp", HOST[family], 8080, source_port=40003)
    lab.publish(A, mapping(proto="udp"))
    assert lab.client.ask("udp", HOST[family], 8080, source_port=40003)[0] == "A"


@FAMILIES
@PROTOCOLS
def test_masquerade(lab: Lab, family: int, proto: str) -> None:
    """A masqueraded subnet leaves as the host, another as itself; between ours nothing changes."""
    name, seen = lab.a.ask(proto, CLIENT[family], 80)
    assert (name, seen in (HOST[family], HOST2[family])) == ("client", True)
    assert lab.b.ask(proto, CLIENT[family], 80) == ("client", B[family])
    assert lab.a.ask(proto, B[family], 80) == ("B", A[family])
    assert lab.b.ask(proto, A[family], 80) == ("A", B[family])


def test_masquerade_leaves_link_local_alone(lab: Lab) -> None:
    """Traffic to a link-local destination keeps its source."""
    assert lab.a.ask("tcp", "169.254.77.77", 80) == ("client", A[4])


def test_subnets_change_while_running(lab: Lab) -> None:
    """Declaring other subnets takes effect with the next connection."""
    lab.nft.run(nat.subnets(lab.instance, ["10.88.0.0/16"], ["10.89.0.0/16"]))
    assert lab.a.ask("tcp", CLIENT[4], 80) == ("client", A[4])
    assert lab.b.ask("tcp", CLIENT[4], 80) == ("client", HOST[4])


def test_a_sandbox_cannot_reach_the_hosts_loopback(lab: Lab) -> None:
    """route_localnet on a representor lets no sandbox send to the host's 127.0.0.1 (CVE-2020-8558)."""
    lab.publish(A, mapping(), rep=lab.reps["a"])
    with lab.host.socket(4, "udp") as victim:
        victim.bind(("127.0.0.1", 0))
        victim.setblocking(False)
        _send_datagram(lab, 4, "127.0.0.1", victim.getsockname()[1])
        wait_until(lambda: _dropped(lab, "loopback destination") == 1, why="a drop of the guard")
        with pytest.raises(BlockingIOError):
            victim.recv(100)


def test_a_sandbox_cannot_reach_the_hosts_loopback6(lab: Lab) -> None:
    """The local route for ::1 on a representor lets nothing in: the kernel refuses ::1 on the wire."""
    lab.publish(A, mapping(), rep=lab.reps["a"])
    refused = _header_errors(lab)
    with lab.host.socket(6, "udp") as victim:
        victim.bind(("::1", 0))
        victim.setblocking(False)
        _send_datagram(lab, 6, "::1", victim.getsockname()[1])
        wait_until(lambda: _header_errors(lab) > refused, why="the kernel to refuse ::1 on the wire")
        with pytest.raises(BlockingIOError):
            victim.recv(100)


def test_sctp_is_translated(lab: Lab) -> None:
    """An SCTP INIT to the host port arrives at the sandbox's port, for SCTP has a header like the others'."""
    sctp = pytest.importorskip("scapy.layers.sctp")
    lab.publish(A, mapping(proto="sctp"))
    init = sctp.SCTP(sport=5000, dport=8080) / sctp.SCTPChunkInit(
        init_tag=1, a_rwnd=65535, n_out_streams=1, n_in_streams=1, init_tsn=1
    )
    with lab.a.entered():
        listener = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_SCTP)
    with lab.client.entered():
        sender = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_SCTP)
    with listener, sender:
        listener.settimeout(TIMEOUT)
        sender.sendto(bytes(init), (HOST[4], 0))
        packet, peer = listener.recvfrom(2000)
    assert peer[0] == CLIENT[4]
    assert struct.unpack_from("!HH", packet, 20) == (5000, 80)


def _send_datagram(lab: Lab, family: int, dst: str, port: int) -> None:
    """From sandbox a to the host, whatever the address: no stack of the sandbox's is asked."""
    scapy = pytest.importorskip("scapy.all")
    head = scapy.IP(src=A[4], dst=dst) if family == 4 else scapy.IPv6(src=A[6], dst=dst)
    frame = scapy.Ether(dst=GATEWAY_MAC, src="02:00:00:00:00:0a") / head / scapy.UDP(sport=9999, dport=port)
    _send_frame(lab, bytes(frame))


def _send_frame(lab: Lab, frame: bytes) -> None:
    """Send one Ethernet frame from sandbox A, past its routes."""
    with lab.a.entered():
        packet = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        with packet:
            packet.bind(("eth0", 0))
            packet.send(frame)


def _header_errors(lab: Lab) -> int:
    """Read Ip6InHdrErrors of the host's namespace."""
    with lab.host.entered():
        lines = Path("/proc/thread-self/net/snmp6").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Ip6InHdrErrors"))


def _dropped(lab: Lab, rule: str) -> int:
    """Read the packet counter of one rule of the chain ``guard``."""
    for entry in lab.nft.run_json(f"list chain inet {nat.table_name(lab.instance)} guard"):
        body = entry.get("rule")
        if isinstance(body, dict) and body.get("comment") == rule:
            return next(int(part["counter"]["packets"]) for part in body["expr"] if "counter" in part)
    raise AssertionError(rule)
