"""Generated policies of host endpoints, and real packets: the judge and the kernel say the same.

A host of two interfaces, both host endpoints: ``near``, a tun device by which packets come in, and ``far``.
Packets come in to the host itself, to addresses behind ``far``, and to one that somebody's NAT translates to
either; and the host sends some. A recorder of its own table, behind ours in each hook, notes the numbers of
those that passed. Nobody's destination is another's source, so that each packet is of its direction's first.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import itertools
import json
import os
import random
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import msgspec
import pytest

from portwright.kernel.nft import Nft
from portwright.plan import hosts as scripts
from portwright.policy.host.judge import Judge, Ruling
from portwright.policy.host.render import Rendered, render
from portwright.policy.host.stages import ON_LINK, bind
from portwright.policy.labels import EVERYTHING, Expr, In, Not
from portwright.policy.manifests.calico_hosts import HOST_INTERFACE, HOST_NODE
from portwright.policy.rules import (
    BUILT_IN_TIERS,
    ICMP,
    ICMP6,
    SCTP,
    TCP,
    UDP,
    Action,
    Direction,
    Endpoint,
    EndpointKind,
    Flow,
    NamedPort,
    Peer,
    Policy,
    PolicySet,
    PortRange,
    Rule,
    Snapshot,
    Tier,
    Traffic,
)
from portwright.policy.tables import PolicyTooLarge
from tests.dataplane import frames
from tests.fix_bpf import ip, own_netns

pytestmark = pytest.mark.netns

WORLDS, PACKETS = 60, 120
#: By family: who sends to the host, the host, who is behind it, what is translated, whom the host sends to.
PEERS: Final = {4: ("198.51.100.1", "198.51.100.2", "203.0.113.7"), 6: ("2001:db8:51::1", "2001:db8:113::7")}
HOST: Final = {4: "192.0.2.2", 6: "2001:db8::2"}
BEHIND: Final = {4: ("10.1.0.5", "10.1.0.6"), 6: ("fd01::5", "fd01::6")}
VIP: Final = {4: "10.9.9.9", 6: "fd09::9"}
OUTSIDE: Final = {4: ("198.51.100.101", "203.0.113.107"), 6: ("2001:db8:51::101", "2001:db8:113::107")}
#: What is translated: (port of VIP) -> (address, port).
TRANSLATED: Final = {family: {8080: (BEHIND[family][0], 80), 8081: (HOST[family], 81)} for family in (4, 6)}
NETS: Final = {
    4: ("198.51.100.0/24", "203.0.113.0/24", "192.0.2.2/32", "10.0.0.0/8", "10.9.9.9/32", "0.0.0.0/0"),
    6: ("2001:db8:51::/48", "2001:db8:113::/48", "2001:db8::2/128", "fd01::/16", "fd09::9/128", "::/0"),
}
PORTS: Final = (22, 53, 67, 68, 79, 80, 81, 179, 443, 6443, 8080, 8081)
SOURCES: Final = (22, 53, 68, 1000, 1010, 6443)
NAMES: Final = ("web", "dns")
#: That conntrack takes for the first of a connection, and the link's own.
ICMP_TYPES: Final = {4: (8, 13), 6: (128, 139, 135)}
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_Value = TypeVar("_Value")

_RECORDER: Final = """
table inet recorder {
  set passed4 { typeof ip id; size 65535; flags dynamic; }
  set passed6 { typeof ip6 flowlabel; size 65535; flags dynamic; }
  chain note { meta nfproto ipv4 add @passed4 { ip id }; meta nfproto ipv6 add @passed6 { ip6 flowlabel }; }
  chain in { type filter hook input priority 50; iifname "near" jump note; }
  chain on { type filter hook forward priority 50; iifname "near" jump note; }
  chain out {
    type filter hook output priority 50
    ip daddr { 198.51.100.101, 203.0.113.107 } jump note
    ip6 daddr { 2001:db8:51::101, 2001:db8:113::107 } jump note
  }
}
table inet users {
  chain translate {
    type nat hook prerouting priority -100
    meta l4proto { tcp, udp } ip daddr 10.9.9.9 dnat ip to \\
      th dport map { 8080 : 10.1.0.5 . 80, 8081 : 192.0.2.2 . 81 }
    meta l4proto { tcp, udp } ip6 daddr fd09::9 dnat ip6 to \\
      th dport map { 8080 : fd01::5 . 80, 8081 : 2001:db8::2 . 81 }
  }
}
"""


class World(NamedTuple):
    """What one seed gives."""

    policies: PolicySet
    snapshot: Snapshot
    table: Rendered


class Dice:
    """Draws a world."""

    def __init__(self, seed: str) -> None:
        self.dice = random.Random(seed)

    def one(self, values: tuple[_Value, ...]) -> _Value:
        """One of them."""
        return self.dice.choice(values)

    def chance(self, share: float) -> bool:
        """True in this share of cases."""
        return self.dice.random() < share

    def some(self, values: tuple[_Value, ...], most: int = 3) -> tuple[_Value, ...]:
        """One or more of them, in any order."""
        return tuple(self.dice.sample(values, self.dice.randint(1, min(most, len(values)))))

    def expression(self) -> Expr:
        """A selector."""
        found = In("app", frozenset(self.some(("near", "far", "pod", "set"), 2)))
        either: tuple[Expr, ...] = (EVERYTHING, found, found, Not(found))
        return self.one(either)

    def peer(self) -> Peer:
        """Addresses of one side."""
        both = (*NETS[4], *NETS[6])
        return Peer(
            selector=self.expression() if self.chance(0.25) else None,
            not_selector=self.expression() if self.chance(0.15) else None,
            nets=self.some(both, 5) if self.chance(0.5) else None,
            not_nets=self.some(both, 2) if self.chance(0.2) else (),
            nodes=self.expression() if self.chance(0.05) else None,
        )

    def traffic(self) -> Traffic:
        """What a packet is."""
        protocol = self.one((None, TCP, TCP, UDP, UDP, SCTP, ICMP, ICMP6, 99))
        ports = protocol in {None, TCP, UDP, SCTP}
        echo = protocol in {None, ICMP, ICMP6} and self.chance(0.4)
        ranges = tuple(sorted((PortRange(p, p) for p in PORTS), key=lambda r: r.first))
        several = (*ranges, PortRange(1, 100), PortRange(80, 8080), PortRange(8081, 65535))
        return Traffic(
            protocol=protocol,
            ports=self.some(several) if ports and not echo and self.chance(0.5) else (),
            names=self.some(NAMES) if ports and not echo and self.chance(0.2) else (),
            source_ports=(PortRange(1, 1005),) if ports and not echo and self.chance(0.2) else (),
            source_names=self.some(NAMES) if ports and not echo and self.chance(0.05) else (),
            icmp_type=self.one((*ICMP_TYPES[4], *ICMP_TYPES[6])) if echo else None,
            icmp_code=self.one((0, 1)) if echo and self.chance(0.4) else None,
            ip_version=self.one((4, 6)) if self.chance(0.15) else None,
        )

    def rule(self) -> Rule:
        """A rule of any field."""
        return Rule(
            action=self.one((Action.ALLOW, Action.ALLOW, Action.DENY, Action.DENY, Action.PASS, Action.LOG)),
            peers=tuple(self.peer() for _ in range(self.one((1, 1, 2)))) if self.chance(0.6) else None,
            local=self.peer() if self.chance(0.15) else None,
            traffic=tuple(self.traffic() for _ in range(self.one((1, 2)))) if self.chance(0.7) else None,
            not_traffic=tuple(self.traffic() for _ in range(self.one((1, 2)))) if self.chance(0.25) else (),
        )

    def policy(self, number: int) -> Policy:
        """A policy of any stage."""
        subjects: tuple[Expr, ...] = (EVERYTHING, *(In("app", frozenset({n})) for n in ("near", "far")))
        stage = self.one(("", "forward", "forward", "pre", "pre", "raw"))
        rules = [tuple(self.rule() for _ in range(self.dice.randint(0, 4))) for _ in Direction]
        ingress = stage == "pre" or self.chance(0.8)
        egress = stage != "pre" and (not ingress or self.chance(0.6))
        return Policy(
            kind="GlobalNetworkPolicy",
            name=f"p{number}",
            tier=self.one(("first", "default", "default", "last")),
            order=float(self.dice.randint(1, 3)),
            subject=self.one(subjects),
            ingress=rules[0] if ingress else None,
            egress=rules[1] if egress else None,
            apply_on_forward=bool(stage),
            pre_dnat=stage == "pre",
            do_not_track=stage == "raw",
        )

    def world(self) -> World:
        """One that fits into the kernel."""
        tiers = (
            *BUILT_IN_TIERS,
            Tier(name="first", order=1.0, default=self.one((Action.DENY, Action.PASS, Action.PASS))),
            Tier(name="last", order=2e7, default=self.one((Action.DENY, Action.PASS))),
        )
        snapshot = Snapshot(endpoints=(*HOSTS, *OTHERS))
        while True:
            policies = tuple(self.policy(n) for n in range(self.dice.randint(1, 7)))
            found = PolicySet(tiers=tiers, policies=policies)
            with contextlib.suppress(PolicyTooLarge):
                table = render(found, snapshot, bind(HOSTS, {}), told=scripts.told_group())
                return World(found, snapshot, table)

    def flow(self) -> Flow:
        """A packet to the host, through it, or of its own."""
        family = self.one((4, 6))
        source, destination = (
            self.one(PEERS[family]),
            self.one((HOST[family], *BEHIND[family], VIP[family], VIP[family])),
        )
        if self.chance(0.3):
            source, destination = HOST[family], self.one(OUTSIDE[family])
        flow = Flow(
            source=source, destination=destination, protocol=self.one((TCP, TCP, UDP, UDP, SCTP, 99, 0))
        )
        if flow.protocol == 0:
            kind, code = self.one(ICMP_TYPES[family]), self.one((0, 0, 1))
            number = ICMP if family == 4 else ICMP6
            return msgspec.structs.replace(flow, protocol=number, icmp_type=kind, icmp_code=code)
        if flow.protocol == 99:
            return flow
        sport = self.one(SOURCES) if self.chance(0.5) else self.dice.randint(20_000, 60_000)
        port = self.one(PORTS)
        if destination == VIP[family] and self.chance(0.8):
            port = self.one((8080, 8081))
        return msgspec.structs.replace(flow, source_port=sport, port=port)


def _host(name: str, addresses: tuple[str, ...]) -> Endpoint:
    return Endpoint(
        name=name,
        kind=EndpointKind.HOST,
        labels={"app": name, HOST_NODE: "n", HOST_INTERFACE: name},
        addresses=addresses,
        named_ports=(NamedPort("web", TCP, 80), NamedPort("dns", UDP, 53)),
    )


HOSTS: Final = (_host("near", (HOST[4], HOST[6])), _host("far", ()))
OTHERS: Final = (
    Endpoint(
        name="pod",
        labels={"app": "pod"},
        addresses=(BEHIND[4][0], BEHIND[6][0]),
        named_ports=(NamedPort("web", TCP, 443), NamedPort("web", UDP, 80)),
    ),
    Endpoint(
        name="peer",
        labels={"app": "far"},
        addresses=(PEERS[4][0], PEERS[6][0]),
        named_ports=(NamedPort("web", TCP, 1000),),
    ),
    Endpoint(
        name="set",
        kind=EndpointKind.NETWORK_SET,
        labels={"app": "set"},
        nets=("203.0.113.0/24", "2001:db8:113::/48"),
    ),
    Endpoint(name="node", kind=EndpointKind.NODE, labels={"app": "pod"}, addresses=(OUTSIDE[4][0],)),
)


def judged(judge: Judge, flow: Flow) -> Ruling:
    """What the specification says of a packet, by the way that it takes."""
    near, far = HOSTS
    family = 6 if ":" in flow.source else 4
    if flow.source == HOST[family]:
        return judge.local(near, Direction.EGRESS, flow)
    after = flow
    if flow.destination == VIP[family] and flow.protocol in {TCP, UDP}:
        address, port = TRANSLATED[family].get(flow.port or 0, (flow.destination, flow.port))
        after = msgspec.structs.replace(flow, destination=address, port=port)
    if after.destination == HOST[family]:
        return judge.local(near, Direction.INGRESS, after, before=flow)
    return judge.forwarded(near, far, after, before=flow)


def packet(flow: Flow, number: int) -> bytes:
    """The packet with its number as IPv4's identification or IPv6's flow label."""
    source, destination = ipaddress.ip_address(flow.source), ipaddress.ip_address(flow.destination)
    sport, dport = flow.source_port or 0, flow.port or 0
    if flow.protocol == TCP:
        body = frames.tcp(source, destination, sport, dport, b"", flags=0x02)
    elif flow.protocol == UDP:
        body = frames.udp(source, destination, sport, dport, b"x")
    elif flow.protocol == SCTP:  # an INIT, without which conntrack takes it for no connection's
        body = struct.pack("!HHII BBHIIHHI", sport, dport, 0, 0, 1, 0, 20, 1, 1500, 1, 1, 1)
    elif flow.protocol in {ICMP, ICMP6}:
        body = frames.icmp(
            source,
            destination,
            flow.icmp_type or 0,
            struct.pack("!HH", number, 1) + bytes(16),
            flow.icmp_code or 0,
        )
    else:
        body = bytes(8)
    if source.version == 4:
        return frames.ipv4(flow.source, flow.destination, flow.protocol, body, ident=number)
    hops = next((h for h, kinds in ON_LINK.items() if flow.icmp_type in kinds), 64)
    whole = frames.ipv6(flow.source, flow.destination, flow.protocol, body, ttl=hops)
    return struct.pack("!I", 6 << 28 | number) + whole[4:]


class Kernel:
    """The host, in this thread's namespace."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._there = scripts.Present()
        self._raw = {
            family: socket.socket(kind, socket.SOCK_RAW, socket.IPPROTO_RAW)
            for family, kind in ((4, socket.AF_INET), (6, socket.AF_INET6))
        }

    def close(self) -> None:
        """Lets go of its sockets."""
        for sock in self._raw.values():
            sock.close()

    def load(self, table: Rendered) -> None:
        """Put a table in the place of the one before, as the daemon does."""
        with Nft() as nft:
            nft.run(scripts.put_hosts("x", table, self._there))
        self._there = scripts.present(table)

    def passed(self, flows: list[Flow]) -> list[bool]:
        """Send them; which of them passed."""
        with Nft() as nft:
            nft.run("flush set inet recorder passed4\nflush set inet recorder passed6")
        for number, flow in enumerate(flows, 1):
            self._send(flow, packet(flow, number))
        found: set[int] = set()
        for name in ("passed4", "passed6"):
            listed = subprocess.run(
                ["nft", "-j", "list", "set", "inet", "recorder", name],
                capture_output=True,
                text=True,
                check=True,
            )
            for item in json.loads(listed.stdout)["nftables"]:
                found.update(item.get("set", {}).get("elem", ()))
        return [number in found for number in range(1, len(flows) + 1)]

    def _send(self, flow: Flow, data: bytes) -> None:
        family = 6 if ":" in flow.source else 4
        if flow.source != HOST[family]:
            os.write(self._device, data)
            return
        try:
            self._raw[family].sendto(data, (flow.destination, 0))
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOBUFS):
                raise


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    """One for the module; the thread is in its namespace until the end."""
    with own_netns():
        device, other = (os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC) for _ in range(2))
        try:
            for fd, name in ((device, b"near"), (other, b"far")):
                fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name, _IFF_TUN | _IFF_NO_PI))
            for switch, value in (
                ("ipv4/ip_forward", "1"),
                ("ipv6/conf/all/forwarding", "1"),
                ("ipv4/icmp_ratelimit", "0"),
            ):
                Path(f"/proc/sys/net/{switch}").write_text(value)
            for link in ("lo", "near", "far"):
                ip("link", "set", link, "up")
            ip("addr", "add", f"{HOST[4]}/32", "dev", "near")
            ip("addr", "add", f"{HOST[6]}/128", "dev", "near", "nodad")
            for net in (*NETS[4][:2], *NETS[6][:2]):
                ip("route", "add", net, "dev", "near")
            for net in ("10.0.0.0/8", "fd00::/8"):
                ip("route", "add", net, "dev", "far")
            subprocess.run(["nft", "-f", "-"], input=_RECORDER, text=True, check=True)
            # Of SCTP no sum is right; the table is there, so conntrack's switches are.
            Path("/proc/sys/net/netfilter/nf_conntrack_checksum").write_text("0")
            made = Kernel(device)
            try:
                yield made
            finally:
                made.close()
        finally:
            os.close(device)
            os.close(other)


def differences(kernel: Kernel, world: World, flows: list[Flow]) -> list[str]:
    """Where the two disagree, for people."""
    kernel.load(world.table)
    judge = Judge(world.policies, world.snapshot)
    meant = [judged(judge, flow) for flow in flows]
    return [
        f"{flow}\n  judge: {ruling.allowed} {ruling.stage} {ruling.reason}\n  kernel: {did}"
        for flow, ruling, did in zip(flows, meant, kernel.passed(flows), strict=True)
        if ruling.allowed is not did
    ]


@pytest.mark.parametrize("seed", range(WORLDS))
def test_the_judge_and_the_kernel_agree(kernel: Kernel, seed: int) -> None:
    """Of every packet of every world, in all stages, both families, both directions."""
    dice = Dice(f"hosts {seed}")
    world = dice.world()
    flows = [dice.flow() for _ in range(PACKETS)]
    found = differences(kernel, world, flows)
    assert not found, f"seed {seed}: {len(found)} differ\n" + "\n".join(found[:5])


def test_the_worlds_reach_every_stage() -> None:
    """Else agreement would mean little: each stage both allows and denies, and each reason is given."""
    seen: set[tuple[str, str, bool]] = set()
    for seed in range(WORLDS):
        dice = Dice(f"hosts {seed}")
        world = dice.world()
        judge = Judge(world.policies, world.snapshot)
        for ruling in (judged(judge, dice.flow()) for _ in range(PACKETS)):
            seen.add((ruling.stage.value, ruling.reason, ruling.allowed))
    policy = {
        (stage, "policy", way)
        for stage in ("untracked", "pre-dnat", "forward", "local")
        for way in (True, False)
    }
    rest = {("forward", "no-policy", True), ("local", "failsafe", True), ("local", "on-link", True)}
    assert policy | rest <= seen


def test_no_packet_meets_half_a_table(kernel: Kernel) -> None:
    """While tables that agree on some packets are exchanged, these have the one verdict all the time."""
    rules = {
        port: Rule(action=action, traffic=(Traffic(protocol=UDP, ports=(PortRange(port, port),)),))
        for port, action in ((80, Action.DENY), (81, Action.ALLOW), (82, Action.DENY))
    }

    def table(*those: int) -> Rendered:
        policy = Policy(
            kind="GlobalNetworkPolicy",
            name="x",
            tier="default",
            order=1.0,
            ingress=(*(rules[port] for port in those), Rule(action=Action.ALLOW)),
            apply_on_forward=True,
        )
        policies = PolicySet(
            policies=(policy, msgspec.structs.replace(policy, name="raw", do_not_track=True))
        )
        return render(policies, Snapshot(), bind(HOSTS, {}))

    both = itertools.cycle([table(80, 81), table(82, 80)])
    kernel.load(next(both))
    flow = Flow(source=PEERS[4][0], destination=HOST[4], protocol=UDP, source_port=1000)
    wanted = {80: False, 81: True}
    flows = [msgspec.structs.replace(flow, port=port) for port in wanted]
    done = threading.Event()

    def exchange() -> None:
        try:
            for _ in range(40):
                kernel.load(next(both))
        finally:
            done.set()

    thread = threading.Thread(target=exchange)
    thread.start()
    rounds = 0
    try:
        while not done.is_set():
            rounds += 1
            assert kernel.passed(flows * 500) == list(wanted.values()) * 500
    finally:
        thread.join()
    assert rounds > 1


@pytest.mark.parametrize("lost", ["a deny", "a pass", "an exclusion", "a stage"])
def test_a_wrong_table_is_found(kernel: Kernel, lost: str) -> None:
    """The comparison finds a table that leaves something out."""
    for seed in range(WORLDS):
        dice = Dice(f"hosts {seed}")
        world = dice.world()
        flows = [dice.flow() for _ in range(PACKETS)]

        def rules(those: tuple[Rule, ...] | None) -> tuple[Rule, ...] | None:
            if those is None:
                return None
            action = {"a deny": Action.DENY, "a pass": Action.PASS}.get(lost)
            kept = tuple(rule for rule in those if rule.action is not action)
            if lost == "an exclusion":
                kept = tuple(msgspec.structs.replace(rule, not_traffic=()) for rule in kept)
            return kept

        wrong = tuple(
            msgspec.structs.replace(p, ingress=rules(p.ingress), egress=rules(p.egress))
            for p in world.policies.policies
            if lost != "a stage" or not p.pre_dnat
        )
        try:
            table = render(
                msgspec.structs.replace(world.policies, policies=wrong), world.snapshot, bind(HOSTS, {})
            )
        except PolicyTooLarge:
            continue
        if differences(kernel, world._replace(table=table), flows):
            return
    raise AssertionError(f"nobody missed {lost}")
