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
from portwright.model.port import PortAddress, PortMapping
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
from portwright.plan.path_operations import (
    AttachProgram,
    DetachProgram,
    ForgetPort,
    PutPort,
    PutTargets,
    RemovePort,
    RemoveTargets,
)
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
