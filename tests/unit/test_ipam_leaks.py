"""The comparison of the record with the kernel names every difference, and nothing else."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import msgspec

from portwright.ipam.leaks import Leak, ObservedLink, find_leaks
from portwright.model.port import NetnsRef, Owner, Port, PortAddress, PortState

HOST = NetnsRef(path="/proc/1/ns/net", cookie=1, boot_id="now")
PORT = Port(
    port_id="00aa00aa00000000",
    network="n",
    net_id=1,
    owner=Owner(kind="name", name="web"),
    model="veth",
    state=PortState.ATTACHED,
    ifname="eth0",
    rep_name="pw00aa00aa",
    mac="02:00:00:00:00:01",
    mtu=1500,
    host=HOST,
    sandbox=NetnsRef(path="/run/netns/web", cookie=7, boot_id="now"),
    rep_ifindex=42,
    addresses=(PortAddress(address="10.1.2.2", gateway="169.254.1.1"),),
)
LINK = ObservedLink(netns=1, name="pw00aa00aa", ifindex=42)


def leaks(
    *,
    ports: Iterable[Port] = (PORT,),
    living: Collection[int] = (1, 7),
    links: Iterable[ObservedLink] = (LINK, ObservedLink(1, "eth0", 2)),
    held: Mapping[str, str] | None = None,
    routed: Mapping[str, str] | None = None,
    pending: Collection[str] = (),
) -> list[tuple[str, str]]:
    """Compare a healthy picture, but for what is given; return (kind, what)."""
    found = find_leaks(
        ports,
        boot_id="now",
        living=living,
        links=links,
        held={"10.1.2.2": PORT.port_id} if held is None else held,
        routed={"10.1.2.2": "pw00aa00aa", "192.0.2.9": "eth0"} if routed is None else routed,
        pending=pending,
    )
    assert found == sorted(found)
    assert all(isinstance(each, Leak) and each.why for each in found)
    return [(each.kind, each.what) for each in found]


def change(**fields: object) -> Port:
    """Return the port with other fields."""
    return msgspec.structs.replace(PORT, **fields)


def test_health() -> None:
    """Record and kernel agree: nothing is reported, whatever else is on the host."""
    assert leaks() == []


def test_sandbox_gone() -> None:
    """An attached port whose namespace died, or lived in an earlier boot."""
    assert leaks(living=[1]) == [("port-without-sandbox", PORT.port_id)]
    old = NetnsRef(path="/run/netns/web", cookie=7, boot_id="before")
    assert leaks(ports=[change(sandbox=old)]) == [("port-without-sandbox", PORT.port_id)]
    assert leaks(ports=[change(sandbox=old, state=PortState.DETACHED)], links=[], routed={}) == []


def test_host_gone() -> None:
    """The namespace that held the representor is gone."""
    elsewhere = NetnsRef(path="/run/netns/h", cookie=99, boot_id="now")
    assert leaks(ports=[change(host=elsewhere)], links=[]) == [("port-without-host", PORT.port_id)]


def test_representors() -> None:
    """Missing, replaced, without a port, or in another namespace than the record says."""
    assert leaks(links=[]) == [("port-without-representor", PORT.port_id)]
    assert leaks(links=[ObservedLink(1, "pw00aa00aa", 43)]) == [("representor-replaced", PORT.port_id)]
    assert leaks(links=[LINK, ObservedLink(1, "pwdeadbeef", 50)]) == [("link-without-port", "pwdeadbeef")]
    assert leaks(links=[ObservedLink(5, "pw00aa00aa", 42)]) == [
        ("link-without-port", "pw00aa00aa"),
        ("port-without-representor", PORT.port_id),
    ]
    assert leaks(links=[LINK, ObservedLink(1, "pwlan0", 3), ObservedLink(1, "pw123456789", 4)]) == []


def test_unfinished() -> None:
    """A port in a passing state is a leak, unless the journal is about to finish it."""
    creating = change(state=PortState.CREATING)
    assert leaks(ports=[creating]) == [("port-unfinished", PORT.port_id)]
    assert leaks(ports=[creating], links=[], held={}, routed={}, pending=[PORT.port_id]) == []


def test_addresses() -> None:
    """Held for nobody, held in vain, listed but not held, listed twice."""
    gone = "ffff000000000000"
    assert leaks(held={"10.1.2.2": PORT.port_id, "10.1.2.3": gone}) == [("address-without-port", "10.1.2.3")]
    assert leaks(held={"10.1.2.2": PORT.port_id, "10.1.2.3": PORT.port_id}) == [
        ("address-unused", "10.1.2.3")
    ]
    assert leaks(held={}) == [("address-not-held", "10.1.2.2")]
    assert leaks(ports=[change(ipam="host-local")], held={}) == []
    twin = change(port_id="11bb00aa00000000", rep_name="pw11bb00aa", rep_ifindex=0)
    links = [LINK, ObservedLink(1, "pw11bb00aa", 44)]
    assert leaks(ports=[PORT, twin], links=links, routed={}) == [
        ("address-duplicate", "10.1.2.2"),
        ("address-not-held", "10.1.2.2"),
    ]


def test_routes() -> None:
    """The kernel delivers an address to the wrong link, or to a representor though no port has it."""
    assert leaks(routed={"10.1.2.2": "eth0"}) == [("route-wrong", "10.1.2.2")]
    assert leaks(routed={"10.1.2.9": "pw00aa00aa"}) == [("route-without-port", "10.1.2.9")]
    assert leaks(routed={"10.1.2.9": "pwdeadbeef"}) == [("route-without-port", "10.1.2.9")]
