"""Egress by domain name, with real name servers and packets: what a name opens, for whom, how long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import dns.exception
import pytest

from portwright.api.methods import LimitsChange
from portwright.dataplane.abi import PwPort, PwPortFlag
from portwright.kernel.bpf import Map, features
from portwright.model.errors import InvalidInput
from portwright.node.entries import port_key
from portwright.node.faults import Faults
from portwright.node.policies import Policies
from portwright.store import Store
from tests.deadline import wait_until
from tests.fix_daemon import HOST4, HOST6, WORLD4, WORLD6, Daemon, Sandbox, SandboxFactory
from tests.fix_netns import NetnsFactory, TestNetns
from tests.netns.dns_lab import (
    NAMES,
    address,
    answer_to,
    ask,
    denied,
    dnsmasq,
    give_addresses,
    look_ups,
    lying,
    reaches,
    said,
    under_policy,
)
from tests.netns.policy_lab import connect, listening

pytestmark = pytest.mark.netns

SHOP, OTHER, EDGE, DEEP = 10, 20, 30, 31
#: As NAMES, with pods app=resolver in the place of the world's name server.
TO_A_PORT = NAMES.replace(
    'to: [{networks: [192.0.2.1/32, "2001:db8::1/128"]}]',
    "to: [{pods: {namespaceSelector: {}, podSelector: {matchLabels: {app: resolver}}}}]",
)
#: Pods app=resolver answer port 53 of friends, and open nothing.
FRIENDS = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: friends}
spec:
  podSelector: {matchLabels: {app: resolver}}
  policyTypes: [Ingress, Egress]
  ingress:
  - from: [{podSelector: {matchLabels: {friend: "yes"}}}]
    ports: [{port: 53, protocol: UDP}, {port: 53, protocol: TCP}]
"""
#: Counts what sandboxes send to port 53 by the host's stack.
COUNT = """
add table inet test
add counter inet test look_ups
add chain inet test before { type filter hook prerouting priority -400; }
add rule inet test before iifname "pw*" meta l4proto { tcp, udp } th dport 53 counter name look_ups
"""


@pytest.fixture
def shop(world: TestNetns) -> Iterator[None]:
    """The world's servers and the names that they have."""
    give_addresses(world, SHOP, OTHER, EDGE, DEEP)
    with ExitStack() as stack:
        stack.enter_context(listening(world, 80))
        stack.enter_context(
            dnsmasq(
                world,
                f"host-record=www.shop.example,{address(SHOP)},{address(SHOP, 6)},300",
                f"host-record=other.example,{address(OTHER)},{address(OTHER, 6)},300",
                f"host-record=edge.cdn.example,{address(EDGE)},{address(EDGE, 6)},300",
                f"host-record=a.b.cdn.example,{address(DEEP)},{address(DEEP, 6)},300",
                f"host-record=cdn.example,{address(OTHER)},{address(OTHER, 6)},300",
            )
        )
        yield


@contextmanager
def resolver(sandboxes: SandboxFactory) -> Iterator[Sandbox]:
    """A sandbox with app=resolver, in which a name server has the shop's name."""
    made = sandboxes(labels={"app": "resolver"})
    record = f"host-record=www.shop.example,{address(SHOP)},{address(SHOP, 6)},60"
    with dnsmasq(made.ns, record, listen=(made.ip4, made.ip6)):
        yield made


@pytest.fixture
def client(daemon: Daemon, sandboxes: SandboxFactory, shop: None) -> Sandbox:
    """A sandbox under the policy."""
    return under_policy(daemon, sandboxes)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("tcp", [False, True])
def test_a_name_is_open_once_it_was_asked_for(
    daemon: Daemon, client: Sandbox, family: int, tcp: bool
) -> None:
    """Before the look-up its address is denied, after it the very next connection passes; an address that no
    name of the policy stands for stays denied, and so does the name's under another port."""
    where, kind = address(SHOP, family), "A" if family == 4 else "AAAA"
    assert not reaches(daemon, client, where)
    assert said(ask(client, "www.shop.example", kind, tcp=tcp)) == [where]
    assert reaches(daemon, client, where)
    assert not reaches(daemon, client, where, 443)
    assert said(ask(client, "other.example", kind, tcp=tcp)) == [address(OTHER, family)]
    assert not reaches(daemon, client, address(OTHER, family))
    assert said(ask(client, "other.example", kind, resolver=WORLD6, tcp=tcp)) == [address(OTHER, family)]


@pytest.mark.parametrize("family", [4, 6])
def test_a_pattern_opens_what_is_below_it(daemon: Daemon, client: Sandbox, family: int) -> None:
    """One label below or several; not the apex, which is a name of its own."""
    kind = "A" if family == 4 else "AAAA"
    for name, number in (("edge.cdn.example", EDGE), ("a.b.CDN.example", DEEP)):
        assert not reaches(daemon, client, address(number, family))
        assert said(ask(client, name, kind)) == [address(number, family)]
        assert reaches(daemon, client, address(number, family))
    assert said(ask(client, "cdn.example", kind)) == [address(OTHER, family)]
    assert not reaches(daemon, client, address(OTHER, family))


def test_the_name_that_is_asked_for_decides(
    daemon: Daemon, sandboxes: SandboxFactory, world: TestNetns
) -> None:
    """Through aliases the address of a name is open; not so that of an alias of the name, which nobody
    allowed, nor what an answer holds besides."""
    give_addresses(world, SHOP, OTHER, EDGE)
    box = under_policy(daemon, sandboxes)

    def say(wire: bytes) -> list[bytes]:
        return [
            answer_to(
                wire,
                "www.shop.example. 60 CNAME shop.hoster.example.",
                "shop.hoster.example. 60 CNAME n7.hoster.example.",
                f"n7.hoster.example. 60 A {address(SHOP)}",
                "bad.example. 60 CNAME edge.cdn.example.",
                f"edge.cdn.example. 60 A {address(EDGE)}",
            )
        ]

    with listening(world, 80), lying(world, say):
        assert address(EDGE) in said(ask(box, "bad.example"))
        assert not reaches(daemon, box, address(EDGE))
        assert not reaches(daemon, box, address(SHOP))
        ask(box, "www.shop.example")
        assert reaches(daemon, box, address(SHOP))
        assert not reaches(daemon, box, address(EDGE))


def test_an_answer_counts_for_its_time(daemon: Daemon, sandboxes: SandboxFactory, world: TestNetns) -> None:
    """When the TTL is over and nothing uses it, the address is closed again; the next look-up opens it."""
    give_addresses(world, SHOP)
    box = under_policy(daemon, sandboxes)
    with listening(world, 80), dnsmasq(world, f"host-record=www.shop.example,{address(SHOP)},2"):
        assert _open_addresses(daemon) == 0
        ask(box, "www.shop.example")
        assert _open_addresses(daemon) == 1
        wait_until(lambda: _open_addresses(daemon) == 0, 10, "the answer's end")
        assert not reaches(daemon, box, address(SHOP))
        ask(box, "www.shop.example")
        assert reaches(daemon, box, address(SHOP))


@pytest.mark.alone
@pytest.mark.slow
def test_a_connection_outlives_the_answer_that_opened_it(
    daemon: Daemon, sandboxes: SandboxFactory, world: TestNetns
) -> None:
    """A connection goes on after the TTL and through changes of policy; with it the address ends."""
    give_addresses(world, SHOP)
    box = under_policy(daemon, sandboxes)
    with (
        listening(world, 80) as server,
        dnsmasq(world, f"host-record=www.shop.example,{address(SHOP)},1"),
        daemon.client() as api,
    ):
        ask(box, "www.shop.example")
        with closing(connect(box.ns, address(SHOP), 80)) as sock:
            peer, _ = server.accept()
            with closing(peer):
                wait_until(lambda: _kept(daemon), 15, "the answer's time to be over")
                for more in (True, False):
                    if more:
                        api.policy_apply([("more.yaml", NAMES.replace("name: names", "name: more"))])
                    else:
                        api.policy_delete(["more.yaml"])
                    sock.sendall(b"still here")
                    assert peer.recv(64) == b"still here"
                assert _open_addresses(daemon) == 1
        wait_until(lambda: _open_addresses(daemon) == 0, 40, "the connection to be forgotten")
        assert not reaches(daemon, box, address(SHOP))


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("tcp", [False, True])
def test_a_resolver_in_another_sandbox(
    daemon: Daemon, sandboxes: SandboxFactory, world: TestNetns, family: int, tcp: bool
) -> None:
    """What it answers opens as from anywhere, though it may open nothing itself; and its own policy still
    says who may ask it."""
    give_addresses(world, SHOP)
    where, kind = address(SHOP, family), "A" if family == 4 else "AAAA"
    with listening(world, 80), resolver(sandboxes) as server:
        box = under_policy(daemon, sandboxes, TO_A_PORT)
        their = server.ip4 if family == 4 else server.ip6
        assert not reaches(daemon, box, where)
        assert said(ask(box, "www.shop.example", kind, resolver=their, tcp=tcp)) == [where]
        assert reaches(daemon, box, where)
        with daemon.client() as api:
            api.policy_apply([("friends.yaml", FRIENDS)])
        before = denied(daemon, server)
        with pytest.raises((dns.exception.Timeout, TimeoutError)):
            ask(box, "www.shop.example", kind, resolver=their, tcp=tcp, timeout=0.2)
        assert denied(daemon, server) > before
        friend = under_policy(daemon, sandboxes, TO_A_PORT, friend="yes")
        assert said(ask(friend, "www.shop.example", kind, resolver=their, tcp=tcp)) == [where]
        assert reaches(daemon, friend, where)


def test_look_ups_between_sandboxes_are_fast_unless_names_count(
    daemon: Daemon, sandboxes: SandboxFactory, host: TestNetns
) -> None:
    """They pass the host only if the policy of who asks names domains: as policies and the port change, and
    through a SIGKILL."""
    host.run(["nft", "-f", "-"], input=COUNT)

    def by_the_host(one: Sandbox) -> set[bool]:
        """Whether its look-ups pass the host's stack, of both families, by UDP and TCP; and what why says."""
        found = set[bool]()
        for where in (server.ip4, server.ip6):
            for proto in ("udp", "tcp"):
                before = _counted(host)
                answer = ask(one, "www.shop.example", resolver=where, tcp=proto == "tcp")
                assert said(answer) == [address(SHOP)]
                found.add(_counted(host) > before)
                with daemon.client() as api:
                    why = api.why(one.port.port_id, where, proto=proto, dport=53)
                assert any("proxy of domain names" in s.text for s in why.steps) == (why.path == "slow")
                found.add(why.path == "slow")
        return found

    with resolver(sandboxes) as server, daemon.client() as api:
        box, other = under_policy(daemon, sandboxes, TO_A_PORT), sandboxes(labels={"app": "other"})
        assert by_the_host(box) == {True}
        assert by_the_host(other) == {False}
        api.port_set(box.port.port_id, limits=LimitsChange(egress_rate=10**9))
        assert by_the_host(box) == {True}
        api.port_unplug(box.port.port_id)
        box = Sandbox(box.ns, api.port_plug(box.port.port_id, box.ns.path))
        assert by_the_host(box) == {True}
        daemon.kill()
        daemon.start()
        assert "on record" not in daemon.tail()  # nothing had to be repaired
        assert by_the_host(box) == {True}
        daemon.kill()
        _swap(daemon, box, other)  # as of a daemon that died before it got to it
        daemon.start()
        assert by_the_host(box) == {True}
        assert by_the_host(other) == {False}
        api.policy_delete(["names.yaml"])
        assert by_the_host(box) == {False}
        api.policy_apply([("names.yaml", TO_A_PORT)])
        assert by_the_host(box) == {True}


def test_whatever_resolver_the_sandbox_uses(
    daemon: Daemon, sandboxes: SandboxFactory, host: TestNetns, world: TestNetns
) -> None:
    """The host's own name server, which listens on every address, serves as any other; and one that policy
    denies is not asked."""
    give_addresses(world, SHOP, OTHER)
    policy = NAMES.replace("192.0.2.1/32", f"{HOST4}/32").replace("2001:db8::1/128", f"{HOST6}/128")
    box = under_policy(daemon, sandboxes, policy)
    records = f"host-record=www.shop.example,{address(SHOP)},{address(SHOP, 6)},60"
    with listening(world, 80), dnsmasq(host, records, listen=(HOST4, HOST6), everywhere=True):
        assert said(ask(box, "www.shop.example", resolver=HOST4)) == [address(SHOP)]
        assert reaches(daemon, box, address(SHOP))
        assert said(ask(box, "www.shop.example", "AAAA", resolver=HOST6, tcp=True)) == [address(SHOP, 6)]
        assert reaches(daemon, box, address(SHOP, 6))
        before = denied(daemon, box)
        with pytest.raises(dns.exception.Timeout):
            ask(box, "www.shop.example", resolver=WORLD4, timeout=0.2)
        assert denied(daemon, box) > before


def test_a_host_that_looks_at_the_way_back(daemon: Daemon, client: Sandbox, host: TestNetns) -> None:
    """Strict reverse path filters, with marks in account as VPNs set it, and nft's as firewalld has them, let
    look-ups pass."""
    host.run(["sysctl", "-qw", "net.ipv4.conf.all.rp_filter=1", "net.ipv4.conf.all.src_valid_mark=1"])
    host.run(
        ["nft", "-f", "-"],
        input="add table inet theirs\n"
        "add chain inet theirs back { type filter hook prerouting priority -140; }\n"
        "add rule inet theirs back fib saddr . mark . iif oif missing drop\n",
    )
    for where, kind in ((WORLD4, "A"), (WORLD6, "AAAA")):
        for tcp in (False, True):
            assert len(said(ask(client, "www.shop.example", kind, resolver=where, tcp=tcp))) == 1
    assert reaches(daemon, client, address(SHOP))


def test_a_kernel_that_can_not_is_told_at_apply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without nftables' tproxy a policy that names domains is refused, with what it needs."""
    missing = features.Feature("tproxy", "Linux 4.19 (CONFIG_NFT_TPROXY)", "6.1", False, "ENOENT")
    monkeypatch.setitem(features._found, "tproxy", missing)
    with Store.open(tmp_path) as store:
        policies = Policies(store, {}, Faults())
        with pytest.raises(
            InvalidInput, match=r"names: domain names: needs Linux 4\.19 \(CONFIG_NFT_TPROXY\)"
        ):
            policies.apply([("names.yaml", NAMES)])
        assert store.manifests() == []


def test_a_host_without_ipv6(
    daemon: Daemon, netns_factory: NetnsFactory, shop: None, host: TestNetns
) -> None:
    """Where the host has switched IPv6 off, names work in a network of IPv4."""
    host.run(["sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1"])
    ns = netns_factory()
    with daemon.client() as api:
        api.policy_apply([("names.yaml", NAMES)])
        api.network_create("old", subnets=["10.70.0.0/24"], masquerade=True)
        box = Sandbox(ns, api.port_create("old", ns.path, name="box", labels={"app": "client"}))
        assert api.node_status().alarms == ()
        assert said(ask(box, "www.shop.example")) == [address(SHOP)]
        assert reaches(daemon, box, address(SHOP))
        api.port_delete(box.port.port_id)
    assert "still steered" not in daemon.tail()


def test_doctor_names_a_chain_that_would_drop_look_ups(
    daemon: Daemon, client: Sandbox, host: TestNetns
) -> None:
    """A firewall that takes nothing in by default is named, with what to accept; then look-ups work."""
    host.run(
        ["nft", "-f", "-"],
        input="add table inet theirs\n"
        "add chain inet theirs input { type filter hook input priority 0; policy drop; }\n",
    )
    with daemon.client() as api:
        check = next(c for c in api.doctor().checks if c.name == "input policy")
    assert "inet theirs input" in check.detail
    with pytest.raises(dns.exception.Timeout):
        ask(client, "www.shop.example", timeout=0.3)
    host.run(
        ["nft", "-f", "-"],
        input='add rule inet theirs input iifname "pw*" meta l4proto { tcp, udp } th dport 53 accept\n'
        'add rule inet theirs input iifname "up0" accept\n',
    )
    assert said(ask(client, "www.shop.example")) == [address(SHOP)]


def test_others_look_up_as_ever(daemon: Daemon, client: Sandbox, sandboxes: SandboxFactory) -> None:
    """A port whose policy names no domain goes its own way to the resolver, and nothing is counted."""
    other = sandboxes(labels={"app": "other"})
    before = look_ups(daemon)
    assert said(ask(other, "www.shop.example")) == [address(SHOP)]
    assert look_ups(daemon) == before


def test_a_large_answer_arrives_whole(daemon: Daemon, sandboxes: SandboxFactory, world: TestNetns) -> None:
    """More than the link's MTU by UDP, both families: fragments, as from the resolver itself."""
    box = under_policy(daemon, sandboxes)
    text = [f'big.example. 60 TXT "{chr(97 + number) * 250}"' for number in range(14)]

    def say(wire: bytes) -> list[bytes]:
        return [answer_to(wire, *text)]

    for where in (WORLD4, WORLD6):
        with lying(world, say, where):
            assert len(ask(box, "big.example", "TXT", resolver=where).answer[0]) == 14


def _swap(daemon: Daemon, *boxes: Sandbox) -> None:
    """Has the data path take these for what they are not: ports whose policy names domains, or others."""
    with closing(Map.from_pin(next((daemon.run_dir / "bpf").glob("*/maps/pw_ports")))) as ports:
        for box in boxes:
            key = port_key(box.port.rep_ifindex)
            entry = PwPort.unpack(ports.lookup(key) or b"")
            ports.update(key, entry._replace(flags=entry.flags ^ PwPortFlag.PF_NAMES).pack())


def _counted(host: TestNetns) -> int:
    """Packets for port 53 that sandboxes had the host's stack look at, by COUNT."""
    listed = host.run(["nft", "list", "counter", "inet", "test", "look_ups"]).stdout
    return int(listed.split("packets")[1].split()[0])


def _open_addresses(daemon: Daemon) -> int:
    return int(look_ups(daemon).split()[0])


def _kept(daemon: Daemon) -> bool:
    return "1 kept for a connection" in look_ups(daemon)
