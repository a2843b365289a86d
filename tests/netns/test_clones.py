"""Clones: guests with one MAC and one address each family, told apart by a rewrite at their ports."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Literal

import pytest

from portwright.model.errors import InvalidInput, NotSupported
from portwright.model.network import AddressRange
from tests.deadline import wait_readable, wait_until
from tests.faults.cni import Cni
from tests.fix_daemon import HOST4, HOST6, WORLD4, WORLD6, Daemon, Networks, Sandbox, SandboxFactory
from tests.fix_netns import NetnsFactory, TestNetns
from tests.netns.clone_lab import CLONE, INNER, INNER4, INNER6, MAC, clones, entries, frozen, table
from tests.netns.guest_lab import guest
from tests.netns.policy_lab import WEB, Probe, connect, listening

pytestmark = pytest.mark.netns

BOTH = pytest.mark.parametrize("family", [4, 6])
#: linux/in.h, linux/in6.h
_IP_RECVERR, _IPV6_RECVERR = 11, 25


@pytest.fixture
def three(daemon: Daemon, netns_factory: NetnsFactory, networks: Networks) -> Iterator[list[Sandbox]]:
    """Clones that run."""
    networks("n1")
    with clones(daemon, netns_factory, 3) as made:
        yield made


def address(box: Sandbox, family: int) -> str:
    """The port's, of a family."""
    return box.ip4 if family == 4 else box.ip6


@contextmanager
def datagrams(ns: TestNetns, family: int, port: int = 0) -> Iterator[socket.socket]:
    """A UDP socket inside, which is told of ICMP errors at once."""
    with ns.entered():
        sock = socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
    with closing(sock):
        level = (socket.IPPROTO_IP, _IP_RECVERR) if family == 4 else (socket.IPPROTO_IPV6, _IPV6_RECVERR)
        sock.setsockopt(*level, 1)
        sock.bind(("", port))
        yield sock


def error(sock: socket.socket, wanted: int) -> None:
    """Wait for the error that ICMP brings."""
    wait_until(lambda: sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == wanted, why=os.strerror(wanted))


def reasons(daemon: Daemon, box: Sandbox) -> set[str]:
    """Why packets of the port's were dropped."""
    with daemon.client() as client:
        return {d.reason for d in client.drops(box.port.port_id)}


def test_clones_reach_each_other_the_host_and_the_world(three: list[Sandbox], daemon: Daemon) -> None:
    """Each by the address of its port, in both families; inside they are all the same."""
    addresses = {a for one in three for a in (one.ip4, one.ip6)}
    assert len(addresses) == 6
    for one in three:
        held = one.run(["ip", "-br", "addr", "show", "eth0"]).stdout
        assert all(f"{a}/" in held for a in INNER)
        assert one.port.mac in one.run(["ip", "link", "show", "eth0"]).stdout
        for there in addresses - {one.ip4, one.ip6} | {HOST4, HOST6, WORLD4, WORLD6, "169.254.1.1"}:
            assert one.ping(there), f"{one.port.owner.name} to {there}"
        for mine in (one.ip4, one.ip6):
            assert daemon.host.run(["ping", "-n", "-c1", "-W1", mine]).returncode == 0
        assert reasons(daemon, one) == set()


@BOTH
def test_each_is_seen_by_its_own_address(
    three: list[Sandbox], sandboxes: SandboxFactory, daemon: Daemon, family: int
) -> None:
    """Who hears from a clone, another port, another clone or the host, hears the port's address, and an
    answer to it reaches that guest alone, which takes it for one to its own."""
    box = sandboxes()
    homes = {
        address(box, family): box.ns,
        address(three[0], family): three[0].ns,
        HOST4 if family == 4 else HOST6: daemon.host,
    }
    for there, home in homes.items():
        with datagrams(home, family, 7000) as server:
            for one in three[1:]:
                with datagrams(one.ns, family) as sock:
                    sock.connect((there, 7000))
                    assert sock.getsockname()[0] == (INNER4 if family == 4 else INNER6)
                    sock.send(one.port.port_id.encode())
                    wait_readable(server.fileno())
                    said, peer = server.recvfrom(100)
                    assert (said.decode(), peer[0]) == (one.port.port_id, address(one, family))
                    server.sendto(b"heard", peer)
                    wait_readable(sock.fileno())
                    assert sock.recv(100) == b"heard"


@BOTH
def test_tcp_with_offloads(three: list[Sandbox], sandboxes: SandboxFactory, family: int) -> None:
    """A megabyte each way arrives whole, of super-packets whose checksums are still to be made, between two
    clones and between one and a container."""
    one, two, _ = three
    said = bytes(range(256)) * 4000
    for near, far in ((one, two), (one, other := sandboxes()), (other, one)):
        with listening(far.ns, 80) as server:
            sock = connect(near.ns, address(far, family), 80)
            accepted, peer = server.accept()
            with sock, accepted:
                assert peer[0].removeprefix("::ffff:") == address(near, family)
                accepted.settimeout(20)
                sock.setblocking(False)
                heard, left = b"", said
                while len(heard) < len(said):
                    with suppress(BlockingIOError):
                        left = left[sock.send(left) :] if left else left
                    with suppress(TimeoutError):
                        accepted.settimeout(0.05 if left else 20)
                        heard += accepted.recv(1 << 18)
                assert heard == said


@BOTH
@pytest.mark.parametrize("size", [1, 4000])
def test_datagrams_whole_and_in_fragments(three: list[Sandbox], family: int, size: int) -> None:
    """Between clones each way, by UDP with its checksum and by echo."""
    one, two, _ = three
    with datagrams(one.ns, family, 7000) as here, datagrams(two.ns, family, 7000) as there:
        for near, far, to in ((here, there, two), (there, here, one)):
            near.sendto(bytes(size), (address(to, family), 7000))
            wait_readable(far.fileno())
            assert far.recv(size + 1) == bytes(size)
    assert one.run(["ping", "-n", "-c1", "-W1", "-s", str(size), address(two, family)]).returncode == 0


@BOTH
def test_datagrams_without_a_checksum(three: list[Sandbox], family: int) -> None:
    """What UDP says is not summed stays so: none is made of a 0."""
    one, two, _ = three
    with datagrams(one.ns, family) as near, datagrams(two.ns, family, 7000) as far:
        no_check = (socket.SOL_SOCKET, 11) if family == 4 else (socket.IPPROTO_UDP, 101)  # SO_NO_CHECK, …6_TX
        far.setsockopt(socket.IPPROTO_UDP, 102, 1)  # UDP_NO_CHECK6_RX
        near.setsockopt(*no_check, 1)
        near.sendto(b"unsummed", (address(two, family), 7000))
        wait_readable(far.fileno())
        assert far.recv(100) == b"unsummed"


@BOTH
def test_neighbours_are_found(three: list[Sandbox], daemon: Daemon, family: int) -> None:
    """A clone asks for its gateway anew, and is itself found by who asks for the port's address."""
    one = three[0]
    one.run(["ip", f"-{family}", "neigh", "flush", "all"])
    assert one.ping(WORLD4 if family == 4 else WORLD6)
    mine, rep = address(one, family), one.port.rep_name
    daemon.host.run(["ip", "neigh", "del", mine, "dev", rep])
    # A representor has no address to ask from, and IPv6 asks from no other device's.
    daemon.host.run(["ip", "addr", "add", "fe80::99/64", "dev", rep, "nodad"])
    assert daemon.host.run(["ping", "-n", "-c1", "-W2", mine]).returncode == 0
    (found,) = json.loads(daemon.host.run(["ip", "-j", "neigh", "show", mine, "dev", rep]).stdout)
    assert found["lladdr"] == one.port.mac
    assert "PERMANENT" not in found["state"]
    assert reasons(daemon, one) == set()


def test_a_clone_may_make_sure_of_its_address(three: list[Sandbox], daemon: Daemon) -> None:
    """Duplicate address detection and a gratuitous ARP ask for the port's address, and nobody has it."""
    one = three[0]
    one.run(["ip", "addr", "del", f"{INNER6}/128", "dev", "eth0"])
    one.run(["ip", "addr", "add", f"{INNER6}/128", "dev", "eth0"])

    def detected() -> bool:
        shown = one.run(["ip", "-6", "addr", "show", "dev", "eth0", "to", INNER6]).stdout
        assert "dadfailed" not in shown
        return "tentative" not in shown

    wait_until(detected, 10, "duplicate address detection to end")
    with one.ns.entered(), closing(socket.socket(socket.AF_PACKET, socket.SOCK_RAW)) as raw:
        raw.bind(("eth0", 0))
        mac = bytes.fromhex(one.port.mac.replace(":", ""))
        inner = socket.inet_aton(INNER4)
        head = b"\xff" * 6 + mac + b"\x08\x06\x00\x01\x08\x00\x06\x04\x00\x01"
        raw.send(head + mac + inner + bytes(6) + inner)
    assert one.ping(WORLD6)
    assert reasons(daemon, one) == set()


@BOTH
def test_icmp_errors_find_the_socket(three: list[Sandbox], family: int) -> None:
    """What an error quotes is what its receiver sent: that nobody listens, told by a clone, by the world and
    to a clone; and that a packet's time is over, as traceroute asks."""
    one, two, _ = three
    for there in (address(two, family), WORLD4 if family == 4 else WORLD6):
        with datagrams(one.ns, family) as sock:
            sock.connect((there, 7001))
            sock.send(b"anybody?")
            error(sock, errno.ECONNREFUSED)
    with datagrams(one.ns, family) as sock:
        hops = (
            (socket.IPPROTO_IP, socket.IP_TTL) if family == 4 else (socket.IPPROTO_IPV6, 16)
        )  # UNICAST_HOPS
        sock.setsockopt(*hops, 1)
        sock.connect((WORLD4 if family == 4 else WORLD6, 7001))
        sock.send(b"how far?")
        error(sock, errno.EHOSTUNREACH)


@BOTH
def test_the_mtu_of_a_path_is_found(three: list[Sandbox], daemon: Daemon, family: int) -> None:
    """The host says that a packet is too big for its uplink, and the guest believes it."""
    one, there = three[0], WORLD4 if family == 4 else WORLD6
    daemon.host.run(["ip", "link", "set", "up0", "mtu", "1400"])
    size = 1450 - (28 if family == 4 else 48)
    one.run(["ping", "-n", "-c1", "-W1", "-M", "do", "-s", str(size), there], check=False)

    def learned() -> bool:
        return "mtu 1400" in one.run(["ip", "route", "get", there]).stdout

    wait_until(learned, why="the guest to learn it")


def test_the_guard_knows_the_ports_addresses_alone(three: list[Sandbox], daemon: Daemon) -> None:
    """Another clone's address, a foreign one, and any other MAC are refused as ever."""
    one, two, three_ = three
    assert one.ping(three_.ip4)
    assert one.ping(three_.ip6)
    for stolen, to in (
        (two.ip4, three_.ip4),
        ("192.0.2.77", three_.ip4),
        (two.ip6, three_.ip6),
        ("2001:db8::77", three_.ip6),
    ):
        bits = 128 if ":" in stolen else 32
        one.run(["ip", "addr", "add", f"{stolen}/{bits}", "dev", "eth0", *(["nodad"] if bits == 128 else [])])
        before = _dropped(daemon, one, "src_ip")
        assert one.run(["ping", "-n", "-c1", "-W1", "-I", stolen, to], check=False).returncode != 0
        assert _dropped(daemon, one, "src_ip") > before, stolen
        one.run(["ip", "addr", "del", f"{stolen}/{bits}", "dev", "eth0"])
    assert _dropped(daemon, one, "src_mac") == 0
    one.run(["ip", "link", "set", "eth0", "address", "02:00:00:00:00:06"])
    assert not one.ping(WORLD4)
    assert _dropped(daemon, one, "src_mac") > 0


def _dropped(daemon: Daemon, box: Sandbox, reason: str) -> int:
    with daemon.client() as client:
        return sum(d.packets for d in client.drops(box.port.port_id) if d.reason == reason)


def test_policy_tells_clones_apart(daemon: Daemon, netns_factory: NetnsFactory, networks: Networks) -> None:
    """One of them may connect to another, by its port's labels, and a third may not."""
    networks("n1")
    with (
        clones(daemon, netns_factory, 1, name="web", labels={"app": "web"}) as (web,),
        clones(daemon, netns_factory, 1, name="client", labels={"app": "client"}) as (client,),
        clones(daemon, netns_factory, 1, name="other", labels={"app": "other"}) as (other,),
        daemon.client() as api,
        listening(web.ns, 80),
    ):
        api.policy_apply([("web.yaml", WEB)])
        probe = Probe(daemon)
        for there in (web.ip4, web.ip6):
            assert probe.reaches(client, there, 80)
            assert not probe.reaches(other, there, 80)


def test_unplug_and_plug(daemon: Daemon, netns_factory: NetnsFactory, three: list[Sandbox]) -> None:
    """Without its device it has no entry in the map; a new device in another namespace has one again."""
    other = three[0]
    with daemon.client() as client:
        box, inside = netns_factory(), netns_factory()
        port = client.port_create("n1", box.path, name="moves", **CLONE)  # type: ignore[arg-type]
        client.port_unplug(port.port_id)
        assert port.clone not in entries(daemon)
        plugged = client.port_plug(port.port_id, (elsewhere := netns_factory()).path)
        assert (plugged.clone, plugged.inner_addresses) == (port.clone, INNER)
        with guest(elsewhere, inside, frozen(plugged)):
            moved = Sandbox(inside, plugged)
            for there in (other.ip4, other.ip6, WORLD4, WORLD6):
                assert moved.ping(there), there
        client.port_delete(port.port_id)
    assert entries(daemon) == {one.port.clone: one.port.port_id for one in three}
    assert other.ping(three[1].ip4)


def test_a_killed_daemon_drops_no_packet(
    three: list[Sandbox], daemon: Daemon, netns_factory: NetnsFactory
) -> None:
    """The map is pinned: while no daemon runs clones go on, and the next one takes up from there; an entry
    of no port is taken away."""
    one, two, _ = three
    with table(daemon) as found:
        _, held = next(iter(found.items()))
        found.update((60000).to_bytes(4, sys.byteorder), (0xABCDEF).to_bytes(8, sys.byteorder) + held[8:])
    daemon.kill()
    for there in (two.ip4, two.ip6, WORLD4, WORLD6):
        assert one.ping(there), there
    daemon.start()
    assert entries(daemon) == {box.port.clone: box.port.port_id for box in three}
    with clones(daemon, netns_factory, 1, name="late") as (late,):
        assert late.port.clone not in {box.port.clone for box in three}
        for there in (two.ip4, one.ip6, WORLD4):
            assert late.ping(there), there


def test_what_cannot_be_is_refused(daemon: Daemon, networks: Networks, netns_factory: NetnsFactory) -> None:
    """By name, before anything is made: another model, a family twice or that the port lacks, what is no
    guest's address, and the gateway."""
    networks("n1")
    ns = netns_factory()
    with daemon.client() as client:
        client.network_create("only4", subnets=["10.90.0.0/24"])
        client.network_create("twice", ranges=[[AddressRange(subnet=f"10.9{n}.0.0/24")] for n in (1, 2)])
        for network, model, inner, said in (
            ("n1", "veth", [INNER4], "veth does not support inner addresses: .* use tcfilter"),
            ("n1", "tcfilter", [INNER4, "198.51.100.3"], r"inner_addresses\[1\]: .* IPv4's is 198.51.100.2"),
            ("only4", "tcfilter", [INNER6], "inner_addresses: the port has no IPv6 address"),
            ("twice", "tcfilter", [INNER4], "inner_addresses: the port has 2 IPv4 addresses"),
            ("n1", "tcfilter", ["twelve"], r"inner_addresses\[0\]: is not an IP address \(got 'twelve'\)"),
            ("n1", "tcfilter", ["224.0.0.1"], "no device has such an address"),
            ("n1", "tcfilter", ["::1"], "no device has such an address"),
            ("n1", "tcfilter", ["::ffff:198.51.100.2"], "no device has such an address"),
            ("n1", "tcfilter", ["fe80::5"], "each link has its own"),
            ("n1", "tcfilter", ["169.254.1.1"], "is the port's gateway"),
        ):
            with pytest.raises((InvalidInput, NotSupported), match=said):
                client.port_create(network, ns.path, name="bad", model=model, inner_addresses=inner)
        assert client.port_list() == ()
    assert ns.run(["ip", "-br", "link"]).stdout.split()[0] == "lo"
    assert len(ns.run(["ip", "-br", "link"]).stdout.splitlines()) == 1


def test_it_is_said_what_a_guest_has_inside(
    daemon: Daemon, networks: Networks, netns_factory: NetnsFactory, sandboxes: SandboxFactory
) -> None:
    """By ``port create``, ``port show``, ``why``, both ways, and a dry run; a prefix length may be there."""
    other, ns = sandboxes(), netns_factory()
    create = ["port", "create", "--network", "n1", "--netns", ns.path, "--name", "frozen", "--mac", MAC]
    create += ["--model", "tcfilter", "--inner-address", f"{INNER4}/24", "--inner-address", INNER6]
    planned = daemon.cli(*create, "--dry-run").stdout
    assert "clone.bpf.o classid" in planned
    assert f"{INNER4} = 10.77.0." in planned
    assert f"inner        {INNER4}\n             {INNER6}\n" in daemon.cli(*create).stdout
    shown = json.loads(daemon.cli("port", "show", "frozen", "--json").stdout)
    assert (shown["inner_addresses"], shown["mac"]) == ([INNER4, INNER6], MAC)
    mine = {":" in a["address"]: a["address"] for a in shown["addresses"]}
    for src, dst, which in (
        ("frozen", "host", "source"),
        ("frozen", other.port.port_id, "source"),
        ("host", "frozen", "destination"),
        (other.port.port_id, "frozen", "destination"),
    ):
        with daemon.client() as client:
            families: tuple[tuple[Literal[4, 6], str], ...] = ((4, INNER4), (6, INNER6))
            for family, inner in families:
                said = [s for s in client.why(src, dst, family=family).steps if s.step == "clone"]
                assert [(s.text, s.detail) for s in said] == [
                    (
                        f"on the guest's side of {shown['tap']} the {which} is {inner}",
                        f"{inner} = {mine[family == 6]}",
                    )
                ]


def test_cni_makes_clones(daemon: Daemon, netns_factory: NetnsFactory) -> None:
    """By ``innerAddresses`` and ``mac``. The result has the port's addresses, CHECK sees whether the map says
    what the record says, and DEL takes the entry."""
    cni = Cni(daemon, "vms", model="tcfilter")
    cni.conf |= {"innerAddresses": list(INNER), "mac": MAC}
    spaces = [netns_factory(), netns_factory()]
    added = [cni.add(f"vm-{number}", ns) for number, ns in enumerate(spaces)]
    assert all(one.ok for one in added), added
    assert len({ip["address"] for one in added for ip in one.answer["ips"]}) == 4
    assert {one.answer["interfaces"][3]["mac"] for one in added} == {MAC}
    with daemon.client() as client:
        ports = {port.owner.container_id: port for port in client.port_list()}
    with ExitStack() as running:
        guests = []
        for number, ns in enumerate(spaces):
            port = ports[f"vm-{number}"]
            running.enter_context(guest(ns, inside := netns_factory(), frozen(port)))
            guests.append(Sandbox(inside, port))
        assert guests[0].ping(guests[1].ip4)
        assert guests[1].ping(guests[0].ip6)

    def check() -> str:
        found = cni.run("CHECK", "vm-0", spaces[0].path, prevResult=added[0].answer)
        return "" if found.ok else f"{found.answer['msg']} {found.answer.get('details', '')}"

    assert check() == ""
    its = ports["vm-0"].clone.to_bytes(4, sys.byteorder)
    with table(daemon) as found:
        held = found.lookup(its) or b""
        found.update(its, held[:-1] + b"\xff")
        assert "pw_clones has other addresses" in check()
        found.delete(its)
        assert "pw_clones has no entry" in check()
    for at, ns in enumerate(spaces):
        assert cni.delete(f"vm-{at}", ns).ok
    assert entries(daemon) == {}
    cni.conf["model"] = "veth"
    assert "use tcfilter" in cni.add("vm-2", spaces[0]).answer["msg"]
