"""Operations: the smallest steps that change the kernel, as values.

An operation has an ``inverse`` (what takes it back, or None where the inverse of an earlier one
does) and a ``render`` as the command that a person would have typed. Applying one is the node's
work; every inverse is idempotent: taking back what is not there succeeds.

``where`` names the namespace: ``host`` holds the representor, ``sandbox`` the device.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from portwright.model.network import Route
from portwright.model.port import Limits, PortAddress, PortMapping
from portwright.plan.adopt_operations import (
    AddWay,
    AnswerFor,
    AnswerNoMore,
    BorrowLink,
    CloseLink,
    DropWay,
    EnterBridge,
    LeaveBridge,
    ReturnLink,
)
from portwright.plan.clone_operations import JoinClone, RemoveClone
from portwright.plan.inner_operations import BypassBridge, DropBridge, MakeBridge, UseBridge
from portwright.plan.operation import Base, inside
from portwright.plan.tap_operations import (
    AdoptLink,
    CreateHostTap,
    CreateMacvtap,
    CreateTap,
    DeleteTap,
    JoinLinks,
    PartLinks,
)


class CreateVeth(Base, frozen=True, kw_only=True):
    """The pair: the representor here, the device straight in the sandbox under its final name."""

    rep: str
    ifname: str
    mac: str
    gateway_mac: str
    mtu: int
    sandbox: str
    alias: str

    def inverse(self) -> Operation:
        """Deletes the representor; the device goes with it."""
        return DeleteLink(rep=self.rep)

    def render(self) -> str:
        """``ip link add``, both ends in one."""
        return (
            f"ip link add {self.rep} address {self.gateway_mac} mtu {self.mtu} alias {self.alias!r} "
            f"type veth peer name {self.ifname} address {self.mac} mtu {self.mtu} netns {self.sandbox}"
        )


class DeleteLink(Base, frozen=True, kw_only=True):
    """Deletes the representor, and so the pair, if it is ours; another's link of the name stays."""

    rep: str

    def render(self) -> str:
        """``ip link delete``."""
        return f"ip link delete {self.rep}"


class NameLink(Base, frozen=True, kw_only=True):
    """Alternative names (up to 127 bytes each), and no IPv6 link-local of the host's own."""

    rep: str
    altnames: tuple[str, ...]

    def render(self) -> str:
        """``ip link property add``, and ``addrgenmode none``."""
        names = "".join(f" altname {name}" for name in self.altnames)
        return f"ip link property add dev {self.rep}{names}; ip link set {self.rep} addrgenmode none"


class SetSysctl(Base, frozen=True, kw_only=True):
    """``path`` below /proc/sys. Only for devices of ours: it goes when the device goes."""

    where: str
    path: str
    value: str

    def render(self) -> str:
        """``sysctl -w``, with dots for slashes."""
        return f"{inside(self.where)}sysctl -w {self.path.replace('/', '.')}={self.value}"


class SetLink(Base, frozen=True, kw_only=True):
    """Administrative state, MTU or both. Up in the host is what gives the sandbox its carrier."""

    where: str
    name: str
    up: bool | None = None
    mtu: int | None = None

    def render(self) -> str:
        """``ip link set``, with what changes."""
        words = [f"{inside(self.where)}ip link set {self.name}"]
        if self.mtu is not None:
            words.append(f"mtu {self.mtu}")
        if self.up is not None:
            words.append("up" if self.up else "down")
        return " ".join(words)


class AwaitLink(Base, frozen=True, kw_only=True):
    """Waits until the kernel transmits on the representor: what it is handed before is lost."""

    rep: str

    def render(self) -> str:
        """A loop on ``ip link show``."""
        return f"until ip -o link show {self.rep} | grep -q 'state UP'; do :; done"


class AddAddress(Base, frozen=True, kw_only=True):
    """An address of the device ``name``, without duplicate address detection: the record has no other."""

    name: str
    address: str  # with prefix length

    def render(self) -> str:
        """``ip address add``."""
        return f"{inside('sandbox')}ip address add {self.address} dev {self.name} nodad"


class AddRoute(Base, frozen=True, kw_only=True):
    """Goes with its device.

    ``shared``: another port of the sandbox may have made the same route; it then stays that one's.
    """

    where: str
    dev: str
    route: Route
    onlink: bool = False
    kind: str = "unicast"
    shared: bool = False

    def render(self) -> str:
        """``ip route add``, with what the route says."""
        r = self.route
        kind = "" if self.kind == "unicast" else f"{self.kind} "
        words = [f"{inside(self.where)}ip route add {kind}{r.dst}"]
        if r.gw:
            words.append(f"via {r.gw}")
        words.append(f"dev {self.dev}")
        words += [
            f"{word} {value}"
            for word, value in (
                ("metric", r.priority),
                ("table", r.table),
                ("scope", r.scope),
                ("mtu", r.mtu),
                ("advmss", r.advmss),
            )
            if value is not None
        ]
        if self.onlink:
            words.append("onlink")
        return " ".join(words)


class AddNeighbour(Base, frozen=True, kw_only=True):
    """A permanent neighbour: nobody asks for it by ARP or ND. Goes with its device."""

    where: str
    dev: str
    address: str
    mac: str

    def render(self) -> str:
        """``ip neighbour replace``."""
        entry = f"{self.address} lladdr {self.mac} dev {self.dev} nud permanent"
        return f"{inside(self.where)}ip neighbour replace {entry}"


class AttachProgram(Base, frozen=True, kw_only=True):
    """``direction`` of the representor: ingress = from the sandbox. It outlives the daemon either way."""

    rep: str
    port_id: str
    direction: str
    how: str = "clsact"
    lent: bool = False  # the device is somebody else's, and stays when the port goes

    def inverse(self) -> Operation:
        """Detaches it."""
        rep = self.rep if self.lent else ""
        return DetachProgram(port_id=self.port_id, direction=self.direction, rep=rep)

    def render(self) -> str:
        """``tc filter add`` or ``bpftool net attach``, by ``how``."""
        program = "pw_from_port" if self.direction == "ingress" else "pw_to_port"
        if self.how == "clsact":
            return f"tc filter add dev {self.rep} {self.direction} bpf da pinned progs/{program}"
        return f"bpftool net attach tcx_{self.direction} pinned progs/{program} dev {self.rep}"


class DetachProgram(Base, frozen=True, kw_only=True):
    """Removes the pin of a TCX link; a clsact filter went with its device, or is taken off ``rep``."""

    port_id: str
    direction: str
    rep: str = ""

    def render(self) -> str:
        """``rm`` of the pin, and ``tc filter del``."""
        unpin = f"rm links/{self.port_id}_{self.direction}"
        return f"{unpin}; tc filter del dev {self.rep} {self.direction}" if self.rep else unpin


class PutPort(Base, frozen=True, kw_only=True):
    """The port's entry in pw_ports, its limits and, if absent, its counters."""

    rep: str
    port_id: str
    net_id: int
    mac: str
    gateway_mac: str
    mtu: int
    sandbox: int  # cookie of the sandbox's namespace
    addresses: tuple[str, ...]
    gateways: tuple[str, ...]
    limits: Limits
    tap: bool = False  # the representor is a tap, which the sandbox's hypervisor holds
    onlink: bool = False  # the sandbox takes itself for one of a segment, as it came off a bridge

    def inverse(self) -> Operation:
        """Takes the entry away; counters that were made stay until ``ForgetPort``."""
        return RemovePort(rep=self.rep, port_id=self.port_id)

    def render(self) -> str:
        """``bpftool map update``; the value in words."""
        value = f"port {self.port_id} net {self.net_id}"
        return f"bpftool map update name pw_ports key ifindex({self.rep}) value {value}"


class RemovePort(Base, frozen=True, kw_only=True):
    """Takes the device's entry and limits away; counters stay until ``ForgetPort``.

    ``ifindex`` as recorded, 0 when the record never got to know it.
    """

    rep: str
    port_id: str
    ifindex: int = 0

    def render(self) -> str:
        """``bpftool map delete``."""
        return f"bpftool map delete name pw_ports key ifindex({self.rep})"


class ForgetPort(Base, frozen=True, kw_only=True):
    """Drops the counters of a port that is deleted."""

    port_id: str

    def render(self) -> str:
        """``bpftool map delete``."""
        return f"bpftool map delete name pw_counters key {self.port_id}"


class PutTargets(Base, frozen=True, kw_only=True):
    """Makes the addresses reachable on the fast path: the last step of an attach."""

    rep: str
    port_id: str
    net_id: int
    mac: str
    gateway_mac: str
    mtu: int
    sandbox: int
    addresses: tuple[str, ...]
    limited: bool
    down: bool = False  # the link is disabled: packets for it are dropped, with that reason
    tap: bool = False

    def inverse(self) -> Operation:
        """Takes the addresses away."""
        return RemoveTargets(port_id=self.port_id, addresses=self.addresses)

    def render(self) -> str:
        """``bpftool map update``; one for all addresses."""
        return f"bpftool map update name pw_addrs key {','.join(self.addresses)} value port {self.port_id}"


class RemoveTargets(Base, frozen=True, kw_only=True):
    """Takes the addresses off the fast path where they are the port's; another's entries stay."""

    port_id: str
    addresses: tuple[str, ...]

    def render(self) -> str:
        """``bpftool map delete``; one for all addresses."""
        return f"bpftool map delete name pw_addrs key {','.join(self.addresses)}"


class PublishPorts(Base, frozen=True, kw_only=True):
    """Port mappings as elements of our nft maps; stale conntrack of them is purged."""

    port_id: str
    mappings: tuple[PortMapping, ...]
    addresses: tuple[PortAddress, ...]

    def inverse(self) -> Operation:
        """Takes the elements away."""
        return UnpublishPorts(port_id=self.port_id, mappings=self.mappings, addresses=self.addresses)

    def render(self) -> str:
        """``nft create element``; one for all mappings."""
        each = ", ".join(
            f"{m.protocol} {m.host_ip or '*'}:{m.host_port} -> {m.container_port}" for m in self.mappings
        )
        return f"nft create element inet portwright dnat {{ {each} }}"


class UnpublishPorts(Base, frozen=True, kw_only=True):
    """Takes the elements of the mappings away, and the conntrack entries that they made."""

    port_id: str
    mappings: tuple[PortMapping, ...]
    addresses: tuple[PortAddress, ...]

    def render(self) -> str:
        """``nft delete element``; one for all mappings."""
        each = ", ".join(f"{m.protocol} {m.host_ip or '*'}:{m.host_port}" for m in self.mappings)
        return f"nft delete element inet portwright dnat {{ {each} }}"


Operation: TypeAlias = (
    CreateVeth
    | DeleteLink
    | NameLink
    | SetSysctl
    | SetLink
    | AwaitLink
    | AddAddress
    | AddRoute
    | AddNeighbour
    | AttachProgram
    | CreateTap
    | CreateHostTap
    | CreateMacvtap
    | DeleteTap
    | JoinLinks
    | JoinClone
    | RemoveClone
    | AdoptLink
    | PartLinks
    | BorrowLink
    | ReturnLink
    | AddWay
    | DropWay
    | LeaveBridge
    | EnterBridge
    | CloseLink
    | AnswerFor
    | AnswerNoMore
    | BypassBridge
    | UseBridge
    | DropBridge
    | MakeBridge
    | DetachProgram
    | PutPort
    | RemovePort
    | ForgetPort
    | PutTargets
    | RemoveTargets
    | PublishPorts
    | UnpublishPorts
)

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(tuple[Operation, ...])


def encode(plan: tuple[Operation, ...]) -> bytes:
    """A plan as the journal holds it."""
    return _encoder.encode(plan)


def decode(data: bytes) -> tuple[Operation, ...]:
    """The inverse of ``encode``; raises ``msgspec.ValidationError``."""
    return _decoder.decode(data)


def undo(plan: tuple[Operation, ...]) -> tuple[Operation, ...]:
    """What takes back a plan of which any prefix was applied: the inverses, last first."""
    inverses = (operation.inverse() for operation in reversed(plan))
    return tuple(inverse for inverse in inverses if inverse is not None)
