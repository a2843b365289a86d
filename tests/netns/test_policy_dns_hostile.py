"""Look-ups by name against sandboxes and resolvers that mean ill, and against a daemon that dies."""

from __future__ import annotations

import json
import socket
import struct
from contextlib import ExitStack, closing

import dns.exception
import dns.message
import dns.name
import dns.rcode
import pytest

from portwright.api.errors import ConnectionLost
from portwright.model.port import PortMapping
from portwright.node.dns_places import MAX_CONNECTIONS, MAX_QUERIES
from tests.deadline import wait_until
from tests.faults.cni import Cni
from tests.fix_daemon import (
    HOST4,
    HOST6,
    WORLD4,
    WORLD6,
    Daemon,
    Sandbox,
    SandboxFactory,
    make_world,
)
from tests.fix_netns import NetnsFactory, TestNetns
from tests.netns.dns_lab import (
    NAMES,
    address,
    answer_to,
    ask,
    dnsmasq,
    give_addresses,
    look_ups,
    lying,
    nothing_is_steered,
    reaches,
    said,
    under_policy,
)
from tests.netns.policy_lab import connect, listening

pytestmark = pytest.mark.netns

SHOP, OTHER = 10, 20
HEADER = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00"


@pytest.fixture
def box(daemon: Daemon, sandboxes: SandboxFactory, world: TestNetns) -> Sandbox:
    """A sandbox under the policy, beside a world that has two servers."""
    give_addresses(world, SHOP, OTHER)
    return under_policy(daemon, sandboxes)


@pytest.mark.parametrize("where", [WORLD4, WORLD6])
def test_only_the_answer_to_the_question_counts(
    daemon: Daemon, box: Sandbox, world: TestNetns, where: str
) -> None:
    """Answers under another id, to another question, and noise are passed over; the true one is passed on."""

    def say(wire: bytes) -> list[bytes]:
        false = answer_to(wire, f"www.shop.example. 60 A {address(OTHER)}")
        true = answer_to(wire, f"www.shop.example. 60 A {address(SHOP)}")
        other = dns.message.make_query("bank.example", "A", id=int.from_bytes(wire[:2], "big")).to_wire()
        return [
            bytes([false[0] ^ 1]) + false[1:],
            answer_to(other, f"bank.example. 60 A {address(OTHER)}"),
            b"\xff" * 40,
            b"",
            wire,
            true,
        ]

    with listening(world, 80), lying(world, say, where) as liar:
        assert said(ask(box, "www.shop.example", resolver=where)) == [address(SHOP)]
        assert reaches(daemon, box, address(SHOP))
        assert not reaches(daemon, box, address(OTHER))
        assert "5 bad answers" in look_ups(daemon)
        asked = dns.message.from_wire(liar.asked[0])
        assert asked.question[0].name == dns.name.from_text("www.shop.example")


def test_a_name_opens_nothing_of_this_host(
    daemon: Daemon, box: Sandbox, sandboxes: SandboxFactory, host: TestNetns, world: TestNetns
) -> None:
    """An answer that names another sandbox, the host, loopback, a link's or a mapped address is passed on,
    and these stay closed, whoever answers for the name (rebinding). So does what nobody has yet."""
    other = sandboxes(labels={"app": "web"})
    named = [other.ip4, HOST4, "127.0.0.1", "169.254.169.254", "10.77.0.200", "224.0.0.5"]
    named6 = [other.ip6, HOST6, "::1", "fe80::99", "fd00:77::200", f"::ffff:{address(OTHER)}"]

    def say(wire: bytes) -> list[bytes]:
        kind = dns.message.from_wire(wire).question[0].rdtype
        one, many = ("A", named) if kind == 1 else ("AAAA", named6)
        return [answer_to(wire, *(f"www.shop.example. 60 {one} {name}" for name in many))]

    with listening(host, 80), listening(other.ns, 80), lying(world, say):
        assert len(said(ask(box, "www.shop.example"))) == len(named)
        assert len(said(ask(box, "www.shop.example", "AAAA"))) == len(named6)
        assert look_ups(daemon).startswith("0 addresses")
        assert "12 not opened" in look_ups(daemon)
        for where in (other.ip4, other.ip6, HOST4, HOST6):
            assert not reaches(daemon, box, where)


@pytest.mark.parametrize(
    "bad",
    [
        b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 60, 400) + b"\1\2\3\4",  # a length past the end
        b"\xc0\x1c" + struct.pack("!HHIH", 5, 1, 60, 2) + b"\xc0\x0c",  # a name that points at itself
        b"\xc0\xff" + struct.pack("!HHIH", 1, 1, 60, 4) + b"\1\2\3\4",  # a pointer forward
        b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 60, 4) + b"\1\2\3\4" + b"junk" * 9,
    ],
)
def test_an_answer_that_cannot_be_read_is_none(
    daemon: Daemon, box: Sandbox, world: TestNetns, bad: bytes
) -> None:
    """SERVFAIL, and nothing is open: what a sandbox's own resolver would make of it is not known."""

    def say(wire: bytes) -> list[bytes]:
        end = 12 + len(b"\3www\4shop\7example\0") + 4
        return [wire[:2] + b"\x81\x80\0\1\0\1\0\0\0\0" + wire[12:end] + bad]

    with lying(world, say):
        assert ask(box, "www.shop.example").rcode() == dns.rcode.SERVFAIL
    assert look_ups(daemon).startswith("0 addresses")
    assert "1 bad answers" in look_ups(daemon)


def test_an_answer_with_too_many_addresses_opens_none(daemon: Daemon, box: Sandbox, world: TestNetns) -> None:
    """65 addresses are one more than there is room for: SERVFAIL, counted, and each of them stays closed."""

    def say(wire: bytes) -> list[bytes]:
        return [answer_to(wire, *(f"www.shop.example. 60 A 198.51.100.{number}" for number in range(1, 66)))]

    with listening(world, 80), lying(world, say):
        assert ask(box, "www.shop.example").rcode() == dns.rcode.SERVFAIL
        assert not reaches(daemon, box, address(SHOP))
    assert "1 refused" in look_ups(daemon)


@pytest.mark.parametrize("where", [WORLD4, WORLD6])
def test_noise_from_a_sandbox_harms_nobody(
    daemon: Daemon, box: Sandbox, world: TestNetns, where: str
) -> None:
    """Cut, looped, huge, empty and answering messages by UDP get an error or nothing; look-ups go on."""
    family = socket.AF_INET6 if ":" in where else socket.AF_INET
    noise = [
        b"",
        b"\0" * 11,
        HEADER,
        HEADER + b"\xc0\x0c\0\1\0\1",
        HEADER + b"\x3f" + b"a" * 20,
        HEADER[:2] + b"\x81" + HEADER[3:] + b"\1a\0\0\1\0\1",
        HEADER[:2] + b"\x29" + HEADER[3:] + b"\1a\0\0\6\0\1",
        HEADER + b"\1a\0\0\xfc\0\1",
        HEADER + b"\1a\0\0\1\0\1" + b"x" * 5000,
        HEADER + b"\1a\0\0\1\0\1" + b"x" * 1000,
    ]
    with dnsmasq(world, f"host-record=www.shop.example,{address(SHOP)},60"):
        with box.ns.entered():
            sock = socket.socket(family, socket.SOCK_DGRAM)
        with closing(sock):
            sock.settimeout(5)
            for one in noise:
                sock.sendto(one, (where, 53))
            # three FORMERR, NOTIMP, REFUSED, and whatever the resolver says of the last
            answers = [sock.recv(65535) for _ in range(6)]
        assert {answer[:2] for answer in answers} == {b"\x12\x34"}
        assert said(ask(box, "www.shop.example", resolver=where)) == [address(SHOP)]


def test_slow_and_broken_streams_are_ended(daemon: Daemon, box: Sandbox, world: TestNetns) -> None:
    """One port has so many connections and no more; one with a false length, or that ends in the middle of a
    message, is closed, and frees its place for the next."""
    with dnsmasq(world, f"host-record=www.shop.example,{address(SHOP)},60"), ExitStack() as stack:
        held = [stack.enter_context(closing(connect(box.ns, WORLD4, 53))) for _ in range(MAX_CONNECTIONS)]
        for sock in held:
            sock.sendall(b"\0")
        over = stack.enter_context(closing(connect(box.ns, WORLD4, 53)))
        assert over.recv(1) == b""
        assert "1 refused" in look_ups(daemon)
        held[0].sendall(b"\xff" + b"x")  # 255 bytes are said, one comes
        held[0].shutdown(socket.SHUT_WR)
        assert held[0].recv(1) == b""
        held[1].sendall(b"\x05" + b"abcde")
        assert held[1].recv(1) == b""
        wait_until(
            lambda: said(ask(box, "www.shop.example", tcp=True)) == [address(SHOP)], 5, "a free connection"
        )


@pytest.mark.slow
def test_a_stream_that_says_nothing_is_ended(daemon: Daemon, box: Sandbox, world: TestNetns) -> None:
    """A message that does not go on for five seconds, and a connection that is idle for ten."""
    with dnsmasq(world, f"host-record=www.shop.example,{address(SHOP)},60"):
        slow, idle = (connect(box.ns, WORLD4, 53, timeout=15) for _ in range(2))
        with closing(slow), closing(idle):
            slow.sendall(b"\0")
            assert slow.recv(1) == b""
            assert idle.recv(1) == b""


def test_a_port_has_so_many_look_ups_under_way(daemon: Daemon, box: Sandbox, world: TestNetns) -> None:
    """While a resolver is silent the next look-up is refused at once, and counted; another port's is not."""
    with box.ns.entered():
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with closing(sock):
        sock.settimeout(5)
        with lying(world, lambda _wire: []) as liar:
            query = dns.message.make_query("www.shop.example", "A").to_wire()
            for _ in range(MAX_QUERIES):
                sock.sendto(query, (WORLD4, 53))
            wait_until(lambda: len(liar.asked) == MAX_QUERIES, 5, "the queries to be under way")
            assert ask(box, "www.shop.example").rcode() == dns.rcode.SERVFAIL
            assert len(liar.asked) == MAX_QUERIES
        assert "1 refused" in look_ups(daemon)


def test_a_flood_is_cut_in_the_kernel(
    daemon: Daemon, box: Sandbox, host: TestNetns, world: TestNetns
) -> None:
    """Beyond 500 a second a port's queries are dropped before the daemon hears of them."""
    with dnsmasq(world, f"host-record=www.shop.example,{address(SHOP)},60"):
        with box.ns.entered():
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with closing(sock):
            for _ in range(3000):
                sock.sendto(b"x", (WORLD4, 53))
        rules = host.run(["nft", "list", "ruleset"]).stdout
        dropped = next(line for line in rules.splitlines() if '"too many"' in line)
        assert int(dropped.split("packets ")[-1].split()[0]) > 100
        with daemon.client() as api:
            assert api.node_status().ready


@pytest.mark.parametrize("family", [4, 6])
def test_a_killed_daemon_cuts_nobody_off(
    daemon: Daemon, box: Sandbox, host: TestNetns, world: TestNetns, family: int
) -> None:
    """Without the daemon what is open stays open, and look-ups get no answer; its next start remembers. With
    the policy everything of it goes."""
    where, resolver, kind = (
        (address(SHOP), WORLD4, "A") if family == 4 else (address(SHOP, 6), WORLD6, "AAAA")
    )
    record = f"host-record=www.shop.example,{address(SHOP)},{address(SHOP, 6)},60"
    with listening(world, 80) as server, dnsmasq(world, record):
        ask(box, "www.shop.example", kind, resolver=resolver)
        with closing(connect(box.ns, where, 80)) as sock, closing(server.accept()[0]) as peer:
            daemon.kill()
            with pytest.raises(dns.exception.Timeout):
                ask(box, "www.shop.example", kind, resolver=resolver, timeout=0.3)
            connect(box.ns, where, 80).close()
            daemon.start()
            sock.sendall(b"still here")
            assert peer.recv(64) == b"still here"
        connect(box.ns, where, 80).close()
        assert look_ups(daemon).startswith("1 addresses")
        assert said(ask(box, "www.shop.example", kind, resolver=resolver, tcp=True)) == [where]
        with daemon.client() as api:
            api.policy_delete(["names.yaml"])
        nothing_is_steered(host)
        assert look_ups(daemon).startswith("0 addresses")
        assert said(ask(box, "www.shop.example", kind, resolver=resolver)) == [where]


@pytest.mark.parametrize("point", ["dns:steered", "dns:open"])
def test_a_kill_in_the_middle_leaves_nothing(
    host: TestNetns,
    daemon: Daemon,
    sandboxes: SandboxFactory,
    world: TestNetns,
    point: str,
) -> None:
    """Killed when look-ups have just been steered, or when an address is open that no record has yet: the
    next start carries on, and with the last port all is gone."""
    give_addresses(world, SHOP)
    with listening(world, 80), dnsmasq(world, f"host-record=www.shop.example,{address(SHOP)},60"):
        box = sandboxes(labels={"app": "client"})
        daemon.stop()
        daemon.start(PORTWRIGHT_DIE_AT=point)
        with daemon.client() as api, ExitStack() as stack:
            if point == "dns:steered":
                stack.enter_context(pytest.raises(ConnectionLost))
            api.policy_apply([("names.yaml", NAMES)])
        if point == "dns:open":
            with pytest.raises(dns.exception.Timeout):
                ask(box, "www.shop.example", timeout=1)
        daemon.wait()
        daemon.start()
        assert said(ask(box, "www.shop.example")) == [address(SHOP)]
        assert reaches(daemon, box, address(SHOP))
        with daemon.client() as api:
            api.port_delete(box.port.port_id)
        nothing_is_steered(host)


@pytest.mark.parametrize("place", ["", "close:steer"])
def test_another_namespaces_ports_are_served_there(
    daemon: Daemon, netns_factory: NetnsFactory, place: str
) -> None:
    """A port whose host is not the daemon's asks by its own host's ways; with it all goes."""
    other, beyond, ns = (netns_factory() for _ in range(3))
    make_world(other, beyond)
    give_addresses(beyond, SHOP)
    cni = Cni(daemon)
    if place:
        daemon.stop()
        daemon.start(PORTWRIGHT_DIE_AT=place)
    with daemon.client() as api:
        api.policy_apply([("names.yaml", NAMES)])
    added = cni.add("c", ns, {}, host=other)
    assert added.ok, added
    with daemon.client() as api:
        port = api.port_set(api.port_list()[0].port_id, labels={"app": "client"})
    box = Sandbox(ns, port)
    with listening(beyond, 80), dnsmasq(beyond, f"host-record=www.shop.example,{address(SHOP)},60"):
        assert not reaches(daemon, box, address(SHOP))
        assert said(ask(box, "www.shop.example")) == [address(SHOP)]
        assert reaches(daemon, box, address(SHOP))
    assert "steered" in other.run(["nft", "list", "ruleset"]).stdout
    nothing_is_steered(daemon.host)
    cni.delete("c", ns, host=other)
    if place:
        assert daemon.wait() == -9
        daemon.start()
    nothing_is_steered(other)


def test_ports_come_and_go_and_a_flush_is_mended(
    daemon: Daemon, box: Sandbox, sandboxes: SandboxFactory, host: TestNetns, world: TestNetns
) -> None:
    """What is steered are the ports of the moment; after a flush of the ruleset the next change mends it."""
    with dnsmasq(world, f"host-record=www.shop.example,{address(SHOP)},60"):
        second = under_policy(daemon, sandboxes)
        assert _steered(host) == {box.port.rep_name, second.port.rep_name}
        with daemon.client() as api:
            api.port_delete(second.port.port_id)
        assert _steered(host) == {box.port.rep_name}
        host.run(["nft", "flush", "ruleset"])
        third = under_policy(daemon, sandboxes)
        assert _steered(host) == {box.port.rep_name, third.port.rep_name}
        for one in (box, third):
            with daemon.client() as api:
                api.port_set(one.port.port_id, labels={"app": "other"})
        nothing_is_steered(host)


def _steered(host: TestNetns) -> set[str]:
    """The representors whose look-ups come to the proxy."""
    found = json.loads(host.run(["nft", "-j", "list", "ruleset"]).stdout)["nftables"]
    return {
        name
        for entry in found
        if entry.get("set", {}).get("name") == "steered"
        for name in entry["set"].get("elem", ())
    }


def test_a_resolver_behind_the_hosts_port_is_held_to_its_policy(
    daemon: Daemon, sandboxes: SandboxFactory, world: TestNetns
) -> None:
    """Where the host's port 53 leads to a sandbox, the proxy asks it for those whom its policy lets in."""
    behind = (
        "  - action: Accept\n"
        "    to: [{pods: {namespaceSelector: {}, podSelector: {matchLabels: {app: dns}}}}]"
    )
    policy = NAMES.replace("192.0.2.1/32", f"{HOST4}/32")
    policy = policy.replace("  - action: Deny", f"{behind}\n  - action: Deny")
    policy += (
        "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: dns}\n"
        "spec: {podSelector: {matchLabels: {app: dns}}, policyTypes: [Ingress],"
        " ingress: [{from: [{podSelector: {matchLabels: {friend: 'yes'}}}]}]}\n"
    )
    mapping = PortMapping(host_port=53, container_port=53, protocol="udp")
    server = sandboxes(labels={"app": "dns"}, port_mappings=(mapping,))
    friend, other = (under_policy(daemon, sandboxes, policy, friend=word) for word in ("yes", "no"))
    record = f"host-record=www.shop.example,{address(SHOP)},60"
    with dnsmasq(server.ns, record, listen=(server.ip4,)):
        assert said(ask(friend, "www.shop.example", resolver=HOST4)) == [address(SHOP)]
        assert ask(other, "www.shop.example", resolver=HOST4).rcode() == dns.rcode.SERVFAIL
    assert "1 refused" in look_ups(daemon)


@pytest.mark.parametrize("tcp", [False, True])
def test_a_resolver_of_a_network_that_is_not_reached(
    daemon: Daemon, sandboxes: SandboxFactory, tcp: bool
) -> None:
    """The proxy is the host, and would reach it; the sandbox must not: its look-up ends at its own port."""
    server = sandboxes(network="n2", labels={"app": "dns"})
    allowed = f"  - action: Accept\n    to: [{{networks: [{server.ip4}/32]}}]\n  - action: Deny"
    box = under_policy(daemon, sandboxes, NAMES.replace("  - action: Deny", allowed))
    with (
        dnsmasq(server.ns, f"host-record=www.shop.example,{address(SHOP)},60", listen=(server.ip4,)),
        pytest.raises((dns.exception.Timeout, TimeoutError)),
    ):
        ask(box, "www.shop.example", resolver=server.ip4, tcp=tcp, timeout=0.2)
    with daemon.client() as api:
        assert [d.reason for d in api.drops(box.port.port_id)] == ["isolation"]
    assert look_ups(daemon) == "0 addresses open by 0 names; no look-ups"
