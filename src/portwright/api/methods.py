"""The contract: every method's parameters and results. The daemon serves it, the clients call it.

Wherever a parameter is ``port``, it is a port_id, a unique prefix of one (at least four digits), the
port's name, or its representor's name. Packets are counted as on the wire, so a super-packet is
``gso_segs`` of them; ``bytes`` are those of layer 2, without FCS, with a super-packet's headers once, as
devices count them. Directions are named from the sandbox's view: ``from_port`` is what it sent.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from portwright.api.registry import Params, method
from portwright.model.network import AddressRange, Dns, Isolation, Network, Route
from portwright.model.port import MAX_QUEUES, End, Limits, Port, PortMapping, PortState

Mtu = Annotated[int, Meta(ge=68, le=65535, description="bytes, RFC 791's least to IP's most")]
Layer4Port = Annotated[int, Meta(ge=0, le=65535)]
Rate = Annotated[int, Meta(ge=0, description="bits per second, or bits for a burst; 0 is unlimited")]
Name = Annotated[str, Meta(min_length=1, max_length=253)]
Model = Annotated[str, Meta(max_length=32, description="attachment model")]
Queues = Annotated[int, Meta(ge=1, le=MAX_QUEUES, description="of a tap, Linux's MAX_TAP_QUEUES at most")]
IfName = Annotated[str, Meta(pattern=r"^[^/:\s]{1,15}$", description="IFNAMSIZ: at most 15 bytes")]
Direction = Literal["from_port", "to_port"]

_SANDBOX = "the sandbox's network namespace"


# --- node -----------------------------------------------------------------------------------------


class NodeStatus(msgspec.Struct, frozen=True, kw_only=True):
    """``ports`` counts by state. ``problems`` are sentences; none means healthy.

    ``alarms``: what someone else did to our side of the host since the start, the latest 32.
    ``node_name``: what HostEndpoints call this host.
    """

    version: str
    pid: int
    uptime_s: float
    run_dir: str
    state_dir: str
    ready: bool
    ports: dict[str, int]
    networks: int
    attach: str
    problems: tuple[str, ...] = ()
    alarms: tuple[str, ...] = ()
    node_name: str = ""


@method("node.status", NodeStatus)
class NodeStatusParams(Params[NodeStatus], frozen=True, kw_only=True):
    """Say how the daemon is."""


class NodeStopping(msgspec.Struct, frozen=True, kw_only=True):
    """``pid`` is the process that is about to end."""

    pid: int


@method("node.stop", NodeStopping)
class NodeStopParams(Params[NodeStopping], frozen=True, kw_only=True):
    """Stop the daemon. The answer comes first; ports keep their traffic and policy."""


# --- network --------------------------------------------------------------------------------------


@method("network.create", Network)
class NetworkCreateParams(Params[Network], frozen=True, kw_only=True):
    """Create a network.

    ``subnets`` is short for ``ranges``: each makes a range set of its own. A port gets one
    address from each set. Without either, its ports name their addresses.
    ``isolation`` is what holds for its ports where no policy decides (docs/policy.md).
    """

    name: Name
    subnets: tuple[str, ...] = ()
    ranges: tuple[tuple[AddressRange, ...], ...] = ()
    mtu: Mtu | None = None
    masquerade: bool = False
    reach: tuple[str, ...] = ()
    isolation: Isolation = "open"
    routes: tuple[Route, ...] = ()
    dns: Dns = Dns()
    reserved: tuple[str, ...] = ()


@method("network.list", tuple[Network, ...])
class NetworkListParams(Params[tuple[Network, ...]], frozen=True, kw_only=True):
    """List the networks, by name."""


class PoolUsage(msgspec.Struct, frozen=True, kw_only=True):
    """One range set: addresses in all, in use, and released but resting."""

    ranges: str
    size: int
    used: int
    resting: int


class NetworkView(msgspec.Struct, frozen=True, kw_only=True):
    """A network with how much of it is in use."""

    network: Network
    ports: int
    usage: tuple[PoolUsage, ...] = ()


@method("network.show", NetworkView)
class NetworkShowParams(Params[NetworkView], frozen=True, kw_only=True):
    """Show one network and its usage."""

    name: Name


class NetworkDeleted(msgspec.Struct, frozen=True, kw_only=True):
    """The network is gone."""

    name: str


@method("network.delete", NetworkDeleted)
class NetworkDeleteParams(Params[NetworkDeleted], frozen=True, kw_only=True):
    """Delete a network. Refused (conflict) while a port is on it."""

    name: Name


# --- port -----------------------------------------------------------------------------------------


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One operation of a plan, and the command that a person would have typed for it."""

    op: str
    command: str


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What would be done, in order. Nothing was."""

    plan: tuple[Step, ...]


@method("port.create", Port, Plan, fds=(_SANDBOX,))
class PortCreateParams(Params[Port], frozen=True, kw_only=True):
    """Create a port, and its device in the sandbox. With ``dry_run`` return the plan alone.

    ``netns`` names the namespace for people; the descriptor decides. ``ips`` are addresses to have; none
    means one from each of the network's range sets. ``inner_addresses``: what a clone's guest has instead.
    ``join``: of the model tcfilter, None is ``bpf``.
    """

    network: Name
    netns: str
    ifname: IfName = "eth0"
    name: Name | None = None
    mac: str | None = None
    ips: tuple[str, ...] = ()
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    port_mappings: tuple[PortMapping, ...] = ()
    limits: Limits = Limits()
    mtu: Mtu | None = None
    attach: Literal["clsact", "tcx"] | None = None
    model: Model = "veth"
    queues: Queues = 1
    join: Literal["bpf", "peer", "mirred"] | None = None
    inner_addresses: tuple[str, ...] = ()
    dry_run: bool = False


@method("port.list", tuple[Port, ...])
class PortListParams(Params[tuple[Port, ...]], frozen=True, kw_only=True):
    """List ports, oldest first. ``label`` is ``key`` or ``key=value``. All conditions have to hold."""

    network: str | None = None
    state: PortState | None = None
    label: str | None = None


@method("port.show", Port)
class PortShowParams(Params[Port], frozen=True, kw_only=True):
    """Show one port."""

    port: Name


class PortLink(msgspec.Struct, frozen=True, kw_only=True):
    """How a port's link stands: three things, and none of them is another.

    ``admin`` is the owner's will, by the representor. ``link`` is the carrier: the sandbox may take it
    away by setting its end down, so it is no sign of health. ``opstate`` is whether there is a device.
    ``ends``: of a port with a tap, from the guest outwards.
    """

    port_id: str
    rep: str
    admin: Literal["up", "down"]
    link: Literal["up", "down"]
    opstate: Literal["attached", "detached"]
    ends: tuple[End, ...] = ()


@method("port.link", PortLink)
class PortLinkParams(Params[PortLink], frozen=True, kw_only=True):
    """Say how a port's link stands."""

    port: Name


class PortDeleted(msgspec.Struct, frozen=True, kw_only=True):
    """The port, its device and its record are gone."""

    port_id: str


@method("port.delete", PortDeleted)
class PortDeleteParams(Params[PortDeleted], frozen=True, kw_only=True):
    """Delete a port, whether its device is there or not."""

    port: Name


class LimitsChange(msgspec.Struct, frozen=True, kw_only=True):
    """As model.Limits; None leaves a value as it is."""

    egress_rate: Rate | None = None
    egress_burst: Rate | None = None
    ingress_rate: Rate | None = None
    ingress_burst: Rate | None = None


@method("port.set", Port)
class PortSetParams(Params[Port], frozen=True, kw_only=True):
    """Change a port; None leaves a value as it is. ``labels`` are merged in; a null value removes its key."""

    port: Name
    admin: Literal["up", "down"] | None = None
    limits: LimitsChange | None = None
    mtu: Mtu | None = None
    labels: dict[str, str | None] | None = None


@method("port.plug", Port, fds=(_SANDBOX,))
class PortPlugParams(Params[Port], frozen=True, kw_only=True):
    """Give a detached port a device in a sandbox. ``ifname`` None: the name it had."""

    port: Name
    netns: str
    ifname: IfName | None = None


@method("port.unplug", Port)
class PortUnplugParams(Params[Port], frozen=True, kw_only=True):
    """Take a port's device out of its sandbox. The port stays, detached."""

    port: Name


# --- what it carried, what it dropped, and why ----------------------------------------------------


class Count(msgspec.Struct, frozen=True, kw_only=True):
    """Packets and bytes since the port was created."""

    packets: int
    bytes: int


class DirectionStats(msgspec.Struct, frozen=True, kw_only=True):
    """``total``: all that was delivered or sent on. ``slow_path``: what of it the host's stack saw."""

    total: Count
    slow_path: Count


class DropTotals(msgspec.Struct, frozen=True, kw_only=True):
    """Packets dropped, by direction."""

    from_port: int
    to_port: int


class PortStats(msgspec.Struct, frozen=True, kw_only=True):
    """The counters of one port."""

    port_id: str
    rep: str
    name: str
    from_port: DirectionStats
    to_port: DirectionStats
    drops: DropTotals


@method("stats", tuple[PortStats, ...])
class StatsParams(Params[tuple[PortStats, ...]], frozen=True, kw_only=True):
    """Return the counters of every port, or of one."""

    port: Name | None = None


class DropCount(msgspec.Struct, frozen=True, kw_only=True):
    """Drops of one port, in one direction, for one reason.

    Of a host endpoint: ``port_id`` is ``host:`` and its interfaces, ``rep`` its name, ``direction`` the
    policy's, ``reason`` the stage (``host-local``), and ``rule`` what decided.
    """

    port_id: str
    rep: str
    direction: Direction | Literal["ingress", "egress"]
    reason: str
    packets: int
    bytes: int
    rule: str = ""


@method("drops", tuple[DropCount, ...])
class DropsParams(Params[tuple[DropCount, ...]], frozen=True, kw_only=True):
    """Return drop counters that are not zero, of every port or of one."""

    port: Name | None = None


class DropEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One dropped packet. ``time`` is unix seconds. ``rule`` decided it, '' if none did.

    ``lost`` counts the events before this one that nobody could be told of: the kernel's ring
    buffer or the reader's socket was full. Of a host endpoint the fields are as in DropCount, with
    the packet's own interface; XDP's drops are told of together, by source net.
    """

    time: float
    port_id: str
    rep: str
    direction: Direction | Literal["ingress", "egress"]
    reason: str
    rule: str = ""
    summary: str = ""
    lost: int = 0


@method("drops.follow", DropEvent, stream=True)
class DropsFollowParams(Params[DropEvent], frozen=True, kw_only=True):
    """Stream dropped packets as they happen, of every port or of one.

    ``logged``: and the first packets of connections that pass and that a policy's rule logs.
    """

    port: Name | None = None
    logged: bool = False


class WhyStep(msgspec.Struct, frozen=True, kw_only=True):
    """One step of the packet's way: a short name, a sentence, and what it rests on."""

    step: str
    text: str
    detail: str = ""


class Why(msgspec.Struct, frozen=True, kw_only=True):
    """What would happen to the packet. ``delivered_to`` is a representor, ``host``, ``uplink`` or ''."""

    verdict: str
    steps: tuple[WhyStep, ...]
    delivered_to: str = ""
    path: Literal["fast", "slow", ""] = ""


@method("why", Why)
class WhyParams(Params[Why], frozen=True, kw_only=True):
    """Explain what happens to a packet from ``src`` to ``dst``: each a port, an address or ``host``.

    ``family`` (4 or 6) decides where both have addresses of both kinds; None prefers 4.
    """

    src: Name
    dst: Name
    proto: Literal["tcp", "udp", "sctp", "icmp"] = "tcp"
    sport: Layer4Port | None = None
    dport: Layer4Port | None = None
    family: Literal[4, 6] | None = None
