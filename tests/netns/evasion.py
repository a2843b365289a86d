"""Packets by which root in a sandbox tries to slip by a policy: who there is, and how a frame's fate is seen.

``evil`` may open TCP 80 and UDP 80 of ``web`` and echo requests to ``pinged``; nothing else of theirs, and
nothing at all of ``vault``, which takes all from ``client``. That is one policy written in two ways: by what
the receivers take, or by what evil may send.

A frame's fate is one of:

- ``arrives``: whoever it is for receives it, nobody else receives anything, and nothing is dropped;
- ``world``: the same, of the world behind the uplink;
- ``host``: the switch leaves it to the host's stack, by which it reaches nobody (its sender may be told);
- ``held``: the switch lets a piece of a datagram pass, and the host's stack waits for the rest;
- else the reason for which the switch drops it (``one or another`` where both are right); then nothing
  arrives anywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import json
import os
import struct
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portwright import Client
from portwright.kernel.bpf import Map
from portwright.model.port import PortMapping
from tests.dataplane import frames
from tests.dataplane.model import FRAGMENT, ICMP, ICMP6, IP4, IP6, TCP, UDP, Address, checksum
from tests.fix_daemon import HOST4, HOST6, WORLD4, WORLD6, Daemon, Sandbox, make_world
from tests.fix_netns import TestNetns
from tests.netns.wires import PLAIN, Wires, is_noise, wired

SYN, ACK, SYN_ACK = 0x02, 0x10, 0x12
#: An ICMP error of each family: port unreachable.
UNREACHABLE = {4: (3, 3), 6: (1, 4)}
#: Echo request and reply.
ECHO = {4: (8, 0), 6: (128, 129)}

#: The host's port that leads to port 80 of vault.
PUBLISHED = 8080

_NAMES = ("evil", "web", "vault", "client", "pinged")
_FILE = "evasion.yaml"
_PING = """
---
apiVersion: projectcalico.org/v3
kind: NetworkPolicy
metadata: {{name: ping, namespace: default}}
spec:
  order: 500
  selector: app == '{subject}'
  types: [{type}]
  {way}:
  - {{action: Allow, protocol: ICMP, icmp: {{type: 8}}, destination: {{selector: app == 'pinged'}}}}
  - {{action: Allow, protocol: ICMPv6, icmp: {{type: 128}}, destination: {{selector: app == 'pinged'}}}}
"""
_HEAD = "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n"
_PORTS = "ports: [{port: 80}, {port: 80, protocol: UDP}]"
#: What each side's owner would write.
POLICY = {
    "receiver": f"""{_HEAD}
metadata: {{name: web}}
spec:
  podSelector: {{matchLabels: {{app: web}}}}
  ingress: [{{from: [{{podSelector: {{}}}}], {_PORTS}}}]
{_HEAD}
metadata: {{name: vault}}
spec:
  podSelector: {{matchLabels: {{app: vault}}}}
  ingress: [{{from: [{{podSelector: {{matchLabels: {{app: client}}}}}}]}}]
"""
    + _PING.format(subject="pinged", type="Ingress", way="ingress"),
    "sender": f"""{_HEAD}
metadata: {{name: evil}}
spec:
  podSelector: {{matchLabels: {{app: evil}}}}
  policyTypes: [Egress]
  egress: [{{to: [{{podSelector: {{matchLabels: {{app: web}}}}}}], {_PORTS}}}]
"""
    + _PING.format(subject="evil", type="Egress", way="egress"),
}
#: The same, but for the ports: evil may open nothing of web that it may under POLICY.
CLOSED = {side: manifests.replace(_PORTS, "ports: [{port: 8080}]") for side, manifests in POLICY.items()}
#: The same, but that what is open stays.
KEPT = {
    side: manifests.replace("metadata: {", "metadata: {annotations: {portwright.dev/on-change: keep}, ")
    for side, manifests in CLOSED.items()
}


@dataclass(frozen=True)
class Sent:
    """A frame on its way: who sends it, for whom it is ("": for no port), and its fate.

    ``packets``: of a super-packet. ``drop``: (port, direction) that the drop counts for, where it is not the
    usual one. ``last``: the piece with which a datagram is whole.
    """

    who: str
    to: str
    frame: bytes
    fate: str
    header: bytes = PLAIN
    packets: int = 1
    drop: tuple[str, str] | None = None
    last: bool = False


class Cast:
    """The sandboxes in one family, and the frames that they send. Each cast has its own identifications."""

    def __init__(self, wires: Wires, version: int, number: int, uplink: bytes) -> None:
        """``number`` is of no other cast of the stage; ``uplink`` is the MAC of the host's."""
        self.version = version
        self._uplink = uplink
        self._ports = wires.ports
        self._number = number

    def at(self, name: str, version: int = 0) -> str:
        """The address of one of the cast, in its family or another; an address stands for itself."""
        version = version or self.version
        if name in ("world", "host"):
            places = {"world": (WORLD4, WORLD6), "host": (HOST4, HOST6)}
            return places[name][version == 6]
        if name not in self._ports:
            return name
        return next(str(a) for a in self._ports[name].addresses if a.version == version)

    def ends(self, one: str, two: str) -> tuple[Address, Address]:
        """Two addresses."""
        return ipaddress.ip_address(self.at(one)), ipaddress.ip_address(self.at(two))

    def link_local(self, name: str) -> str:
        """The address that a sandbox's kernel makes of its MAC."""
        return str(self._ports[name].link_local)

    def tcp(
        self, to: str, dport: int, flags: int, *, who: str = "evil", sport: int = 6000, data: bytes = b""
    ) -> bytes:
        """A TCP segment."""
        return frames.tcp(*self.ends(who, to), sport, dport, data, flags)

    def udp(
        self, to: str, dport: int, *, who: str = "evil", sport: int = 6000, data: bytes = b"data"
    ) -> bytes:
        """A UDP datagram."""
        return frames.udp(*self.ends(who, to), sport, dport, data)

    def icmp(self, to: str, kind: int, body: bytes, *, who: str = "evil", code: int = 0) -> bytes:
        """An ICMP message; ``body`` is what follows the checksum."""
        return frames.icmp(*self.ends(who, to), kind, body, code)

    @property
    def icmp_proto(self) -> int:
        """ICMP's number."""
        return ICMP if self.version == 4 else ICMP6

    def packet(self, to: str, proto: int, payload: bytes, *, who: str = "evil", **fields: Any) -> bytes:
        """An IP packet; ``fields`` are those of frames.ipv4 or frames.ipv6."""
        make = frames.ipv4 if self.version == 4 else frames.ipv6
        return make(self.at(who), self.at(to), proto, payload, **fields)

    def framed(self, who: str, packet: bytes, *, to_mac: bytes | None = None) -> bytes:
        """To the sender's gateway, or the host's own MAC."""
        kind = IP4 if self.version == 4 else IP6
        if who == "world":
            return frames.ethernet(b"\2\0\0\0\0\1", to_mac or self._uplink, kind, packet)
        port = self._ports[who]
        return frames.ethernet(port.mac, to_mac or port.gateway_mac, kind, packet)

    def mac(self, name: str) -> bytes:
        """A device's."""
        return self._ports[name].mac

    def send(
        self,
        to: str,
        proto: int,
        payload: bytes,
        fate: str,
        *,
        who: str = "evil",
        **fields: Any,
    ) -> Sent:
        """One whole packet."""
        packet = self.packet(to, proto, payload, who=who, **fields)
        return Sent(who, to, self.framed(who, packet), fate)

    def opens(
        self, to: str, dport: int, fate: str, flags: int = SYN, *, who: str = "evil", sport: int = 6000
    ) -> Sent:
        """A TCP segment, a SYN if nothing else is said."""
        return self.send(to, TCP, self.tcp(to, dport, flags, who=who, sport=sport), fate, who=who)

    def says(self, to: str, dport: int, fate: str, *, who: str = "evil", sport: int = 6000) -> Sent:
        """A UDP datagram."""
        return self.send(to, UDP, self.udp(to, dport, who=who, sport=sport), fate, who=who)

    def fragment_header(self, following: int, offset: int, more: bool, ident: int = 0) -> bytes:
        """RFC 8200, 4.5; ``offset`` in bytes."""
        return struct.pack("!BBHI", following, 0, offset | more, self._number << 8 | ident)

    def piece(
        self,
        to: str,
        proto: int,
        data: bytes,
        offset: int,
        fate: str,
        *,
        more: bool = True,
        who: str = "evil",
        ident: int = 0,
    ) -> Sent:
        """A fragment: ``data`` at ``offset`` bytes of datagram ``ident`` (below 4)."""
        assert offset % 8 == 0
        if self.version == 6:
            payload = self.fragment_header(proto, offset, more, ident) + data
            sent = self.send(to, FRAGMENT, payload, fate, who=who)
        else:
            # The casts are few enough for 16 bits.
            number, place = self._number * 4 + ident, more << 13 | offset // 8
            sent = self.send(to, proto, data, fate, who=who, frag=place, ident=number)
        return dataclasses.replace(sent, last=not more)

    def quoting(self, to: str, quote: bytes, fate: str, *, who: str = "evil", kind: int = -1) -> Sent:
        """An ICMP error about ``quote``: port unreachable, or of another type."""
        known, code = UNREACHABLE[self.version]
        body = bytes(4) + quote
        message = self.icmp(to, known if kind < 0 else kind, body, who=who, code=code if kind < 0 else 0)
        return self.send(to, self.icmp_proto, message, fate, who=who)


class Stage:
    """A daemon with the cast's ports and one of the two policies, and a hand on every wire."""

    def __init__(self, daemon: Daemon, wires: Wires, policy: str, conns: Map, frags: Map) -> None:
        """All of it is the caller's; ``policy`` names one of POLICY."""
        self.daemon, self.wires, self.policy = daemon, wires, policy
        self._flows = (conns, frags)
        self._casts = 0
        told = daemon.host.run(["ip", "-j", "link", "show", "up0"]).stdout
        self._uplink = bytes.fromhex(json.loads(told)[0]["address"].replace(":", ""))

    def cast(self, version: int) -> Cast:
        """A cast of which nothing is remembered, by the switch or by the host."""
        for table in self._flows:
            for key in list(table.keys()):
                table.delete(key)
        self.wires.forget_connections()
        self._casts += 1
        return Cast(self.wires, version, self._casts, self._uplink)

    def apply(self, manifests: str) -> None:
        """Put these in the place of the policy in force."""
        with self.daemon.client() as client:
            client.policy_apply([(_FILE, manifests)])

    def fate(self, sent: Sent) -> str:
        """What becomes of a frame, in the words of a row; AssertionError for what has no word."""
        before = self.wires.drops()
        self.wires.settle()
        assert self.wires.taps[sent.who].send(sent.frame, sent.header), "the sender's own kernel refused it"
        came = {
            name: [frame for _, frame in frames if not is_noise(frame)]
            for name, frames in self.wires.settle().items()
            if name != sent.who
        }
        drops = {
            key: packets - before.get(key, (0, 0))[0]
            for key, (packets, _) in self.wires.drops().items()
            if packets != before.get(key, (0, 0))[0]
        }
        arrived = {name: frames for name, frames in came.items() if frames}
        if drops:
            ((port, way, reason), packets), *more = drops.items()
            assert not more, drops
            assert not arrived, (drops, arrived)
            assert packets == sent.packets, drops
            assert (port, way) == self._place(sent, reason), drops
            return reason
        if not arrived:
            return "host"
        (name, frames), *rest = arrived.items()
        assert not rest, arrived
        # What the host has put together it may send on in pieces again.
        assert sent.last or len(frames) == 1, arrived
        if name == "world":
            return "world"
        assert sent.last or frames[0].endswith(sent.frame[-4:]), f"another packet: {frames[0].hex()}"
        return "arrives" if name == sent.to else f"strays to {name}"

    def expected(self, sent: Sent) -> list[str]:
        """The fates that the specification gives, in the words of fate(): any of them."""
        fate = sent.fate
        if self.policy == "sender":
            # It binds evil, on its way to anybody, and nobody else.
            stray = not sent.to and fate in ("world", "host") and sent.who == "evil"
            free = fate == "policy" and sent.who == "world"
            fate = "policy" if stray else "arrives" if free else fate
        return ["host"] if fate == "held" else fate.split(" or ")

    def _place(self, sent: Sent, reason: str) -> tuple[str, str]:
        """Who is charged with a drop: the receiver for its policy, else the sender."""
        if sent.drop is not None:
            return sent.drop
        if reason == "policy" and (self.policy == "receiver" or sent.who != "evil"):
            return sent.to, "to_port"
        return sent.who, "from_port"


@contextlib.contextmanager
def staged(policy: str, *, masquerade: bool) -> Iterator[Stage]:
    """A stage of its own: host, world, daemon, five sandboxes; gone at the end."""
    with contextlib.ExitStack() as stack:

        def namespace() -> TestNetns:
            made = TestNetns(f"pwt-{os.getpid()}-{uuid.uuid4().hex[:8]}")
            stack.callback(made.close)
            return made

        world, host = namespace(), namespace()
        make_world(host, world)
        # Nobody but the switch is to refuse: neither the host's filter of sources nor its of source routes.
        for knob in ("rp_filter=0", "accept_source_route=1"):
            for device in ("all", "default", "up0"):
                host.run(["sysctl", "-qw", f"net.ipv4.conf.{device}.{knob}"])
        daemon = Daemon(host, Path(tempfile.mkdtemp(prefix=f"pwt-{os.getpid()}-")))
        stack.callback(daemon.close)
        daemon.start()
        boxes = {}
        with daemon.client() as client:
            client.network_create("n1", subnets=["10.77.0.0/24", "fd00:77::/64"], masquerade=masquerade)
            for name in _NAMES:
                boxes[name] = _box(client, namespace(), name)
            client.policy_apply([(_FILE, POLICY[policy])])
        wires = stack.enter_context(wired(daemon, world, boxes, frozenset()))
        maps = next(Path(daemon.run_dir, "bpf").glob("*/maps"))
        tables = [
            stack.enter_context(contextlib.closing(Map.from_pin(maps / name)))
            for name in ("pw_conns", "pw_frags")
        ]
        yield Stage(daemon, wires, policy, *tables)


def _box(client: Client, ns: TestNetns, name: str) -> Sandbox:
    published = [PortMapping(host_port=PUBLISHED, container_port=80)] if name == "vault" else []
    port = client.port_create("n1", ns.path, name=name, labels={"app": name}, port_mappings=published)
    return Sandbox(ns, port)


def quoted4(
    source: str,
    destination: str,
    l4: bytes,
    *,
    proto: int = TCP,
    words: int = 5,
    ident: int = 0,
    frag: int = 0,
) -> bytes:
    """An IPv4 header as an ICMP error quotes it, whose length field says ``words``; no options follow."""
    addresses = [ipaddress.IPv4Address(a).packed for a in (source, destination)]
    head = struct.pack("!BBHHHBBH", 0x40 | words, 0, 40, ident, frag, 63, proto, 0) + b"".join(addresses)
    check = checksum(head)
    return head[:10] + struct.pack("!H", check) + head[12:] + l4
