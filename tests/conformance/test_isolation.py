"""Cases 34 to 36 and 55: who reaches whom, and what a sandbox may send."""

from __future__ import annotations

import ipaddress

import pytest

from .kit.host import HOST4
from .kit.lab import Lab, assert_works, ips_of
from .kit.observe import links, mac_of
from .kit.traffic import echo, send_frame, tcp_ask, tcp_refused, udp_ask


def test_case_34_neighbours_in_one_network(lab: Lab) -> None:
    """Two sandboxes of one network reach each other in both families."""
    network = lab.network(ipam=lab.ipam(lab.subnet4(), lab.subnet6()))
    one, two = lab.sandbox(), lab.sandbox()
    lab.add(network, one)
    for address in ips_of(lab.add(network, two)):
        with echo(two.ns, address) as server:
            assert tcp_ask(one.ns, address, server.port) == b"hello"


def test_case_34_networks_are_apart(lab: Lab) -> None:
    """Sandboxes of two networks on one host cannot reach each other; the host reaches both."""
    one, two = lab.sandbox(), lab.sandbox()
    first, second = (lab.add(lab.network(), sandbox) for sandbox in (one, two))
    assert_works(lab, one, first)
    assert_works(lab, two, second)
    (address,) = ips_of(second)
    with echo(two.ns, address) as server:
        assert tcp_refused(one.ns, address, server.port)
        assert server.received == []


def test_case_55_ingress_policy(lab: Lab, ingress_policy: str) -> None:
    """Two sandboxes of a network and one of another, in both families: with ``open`` all reach each other,
    with ``same-bridge`` neighbours do, with ``isolated`` nobody does. The host reaches all of them.
    """
    networks = [
        lab.network(ipam=lab.ipam(lab.subnet4(), lab.subnet6()), ingress_policy=ingress_policy)
        for _ in range(2)
    ]
    boxes = [lab.sandbox() for _ in range(3)]
    homes = (0, 0, 1)
    addresses = [ips_of(lab.add(networks[home], box)) for home, box in zip(homes, boxes, strict=True)]
    for to, (box, given) in enumerate(zip(boxes, addresses, strict=True)):
        for address in given:
            with echo(box.ns, address) as server:
                assert tcp_ask(lab.host.ns, address, server.port) == b"hello"
                for by in {0, 1, 2} - {to}:
                    near = homes[by] == homes[to]
                    if ingress_policy == "open" or (ingress_policy == "same-bridge" and near):
                        assert tcp_ask(boxes[by].ns, address, server.port) == b"hello", (by, to)
                    else:
                        assert tcp_refused(boxes[by].ns, address, server.port), (by, to)


@pytest.mark.parametrize("mtu", [1000, 1279])
def test_case_35_combination_that_cannot_work(lab: Lab, mtu: int) -> None:
    """IPv6 needs an MTU of 1280 (RFC 8200, 5): less is refused, not accepted and half done."""
    network, sandbox = lab.network(ipam=lab.ipam(lab.subnet4(), lab.subnet6()), mtu=mtu), lab.sandbox()
    lab.refused(network, sandbox)
    assert set(links(sandbox.ns)) == {"lo"}
    assert lab.leaks(sandbox.id) == []


@pytest.mark.parametrize("mtu", [-1, "big", 10])
def test_case_35_nonsense_mtu(lab: Lab, mtu: object) -> None:
    """An MTU that cannot be is refused."""
    network, sandbox = lab.network(mtu=mtu), lab.sandbox()
    lab.refused(network, sandbox)
    lab.delete(lab.network(name=network["name"]), sandbox)  # a DEL need not understand the nonsense
    assert set(links(sandbox.ns)) == {"lo"}
    assert lab.leaks(sandbox.id) == []


def udp_frame(macs: tuple[str, str], source: str, target: str, port: int, payload: bytes) -> bytes:
    """An Ethernet frame, ``macs`` = (to, from), with a UDP datagram; no UDP checksum, as RFC 768 allows."""
    udp = (
        (40000).to_bytes(2, "big")
        + port.to_bytes(2, "big")
        + (8 + len(payload)).to_bytes(2, "big")
        + bytes(2)
    )
    header = (
        bytearray.fromhex("4500") + (28 + len(payload)).to_bytes(2, "big") + bytes.fromhex("0000000040110000")
    )
    header += ipaddress.IPv4Address(source).packed + ipaddress.IPv4Address(target).packed
    total = sum(int.from_bytes(header[at : at + 2], "big") for at in range(0, 20, 2))
    total = (total & 0xFFFF) + (total >> 16)
    header[10:12] = (~((total & 0xFFFF) + (total >> 16)) & 0xFFFF).to_bytes(2, "big")
    ethernet = bytes.fromhex("".join(macs).replace(":", ""))
    return ethernet + b"\x08\x00" + bytes(header) + udp + payload


@pytest.mark.parametrize("forged", ["mac", "neighbour", "host", "stranger"])
def test_case_36_forged_source(lab: Lab, forged: str) -> None:
    """Frames with another source MAC or IPv4 address are dropped; the sandbox's own pass."""
    network, sandbox = lab.network(), lab.sandbox()
    (own,) = ips_of(lab.add(network, sandbox))
    neighbour = lab.sandbox()
    (other,) = ips_of(lab.add(network, neighbour))
    with echo(lab.host.ns, HOST4, udp=True, tag=b"re:") as server:
        assert udp_ask(sandbox.ns, HOST4, server.port, b"first") == b"re:first"
        entries = sandbox.ns.run(["ip", "neigh", "show", "dev", "eth0"]).split()
        gateway_mac = entries[entries.index("lladdr") + 1]
        own_mac = mac_of(sandbox.ns, "eth0")
        mac = "02:00:00:12:34:56" if forged == "mac" else own_mac
        source = {"mac": own, "neighbour": other, "host": "192.0.2.77", "stranger": "203.0.113.5"}[forged]
        for text in (b"forged", b"forged again"):
            send_frame(sandbox.ns, "eth0", udp_frame((gateway_mac, mac), source, HOST4, server.port, text))
        # Frames of one link stay in order: what has not come before the honest one was dropped.
        honest = udp_frame((gateway_mac, own_mac), own, HOST4, server.port, b"honest")
        send_frame(sandbox.ns, "eth0", honest)
        assert server.wait_for(lambda data, _: data == b"honest")
        assert not [data for data, _ in server.received if data.startswith(b"forged")]
