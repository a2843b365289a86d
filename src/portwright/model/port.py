"""Ports as values. A port is durable and known by ``port_id``, never by an ifindex."""

from __future__ import annotations

import enum

import msgspec

from portwright.model.network import Dns, Route

#: Of a tap: Linux's MAX_TAP_QUEUES.
MAX_QUEUES = 256


class PortState(enum.StrEnum):
    """creating -> attached <-> detached -> deleting -> (gone)."""

    CREATING = "creating"
    ATTACHED = "attached"
    DETACHED = "detached"
    PLUGGING = "plugging"
    DELETING = "deleting"


class NetnsRef(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A network namespace, identified beyond its path.

    ``cookie`` is SO_NETNS_COOKIE: unique within one boot (``boot_id``), never reused.
    ``path`` is what the caller named, for humans and for results; it may be gone.
    """

    path: str
    cookie: int
    boot_id: str


class PortAddress(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One address of a port: ``address`` without prefix, ``gateway`` the router the sandbox uses."""

    address: str
    gateway: str


class PortMapping(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A host port published to a port of the sandbox. ``host_ip`` '' = every host address."""

    host_port: int
    container_port: int
    protocol: str = "tcp"
    host_ip: str = ""


class Limits(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Rates in bits per second, bursts in bits; 0 = unlimited. Egress = what the sandbox sends."""

    egress_rate: int = 0
    egress_burst: int = 0
    ingress_rate: int = 0
    ingress_burst: int = 0


class Owner(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Who asked for the port: the CNI attachment key, or a name given on the CLI.

    CNI: ``kind='cni'`` and (network, container_id, ifname) is unique.
    Otherwise ``kind='name'`` and ``name`` is unique.
    """

    kind: str
    network: str = ""
    container_id: str = ""
    ifname: str = ""
    name: str = ""

    def key(self) -> str:
        """A unique, stable key of the owner."""
        if self.kind == "cni":
            return f"cni/{self.network}/{self.container_id}/{self.ifname}"
        return f"name/{self.name}"


class InnerBridge(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A bridge in a sandbox's namespace with its device and a hypervisor's tap on it, as Kata 1.x makes it.

    ``*_clsact``: whether it has one that is not ours.
    """

    bridge: str
    bridge_mac: str
    device: str
    device_index: int
    tap: str
    tap_index: int
    device_clsact: bool = False
    tap_clsact: bool = False


class Adopted(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A device that somebody else made, and what it was before it came off its bridge to be a representor.

    It keeps its name, ``link``, by which its maker finds it; the representor's name is an altname of it.
    """

    link: str
    bridge: str
    bridge_mac: str  # what the sandbox takes for its gateway's
    sources: tuple[str, ...] = ()  # the bridge's addresses: what the host speaks to the sandbox from
    tap: bool = False  # of a hypervisor, else a veth's end
    clsact: bool = False  # whether it had one that is not ours
    settings: dict[str, int] = {}  # as a port of the bridge (kernel.rtnl_bridge)
    inner: InnerBridge | None = None


class Port(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The record of a port: all that DEL, CHECK, GC and re-plug need, with no other input."""

    port_id: str  # 16 lower-case hex digits
    network: str
    net_id: int
    owner: Owner
    model: str
    state: PortState
    ifname: str  # the device's name in the sandbox
    attach: str = "clsact"  # how the programs sit on the representor: clsact or tcx
    rep_name: str  # the representor's name in the host: pw + first 8 digits of port_id
    mac: str  # the device's
    mtu: int
    host: NetnsRef  # the namespace that holds the representor
    sandbox: NetnsRef
    tap: str = ""  # of models for VMs: the tap in the sandbox's namespace that the device is joined with
    queues: int = 1  # of the tap
    join: str = ""  # of tcfilter, device and tap: by "bpf" ('' in older records), "peer" or "mirred"
    inner_addresses: tuple[str, ...] = ()  # of a clone: what its guest has where the port has its own
    clone: int = 0  # its number in the map of clones
    rep_ifindex: int = 0
    admin: str = "up"  # or "down": what `link disable` left, for the next device too
    addresses: tuple[PortAddress, ...] = ()
    routes: tuple[Route, ...] = ()
    dns: Dns = Dns()
    port_mappings: tuple[PortMapping, ...] = ()
    limits: Limits = Limits()
    labels: dict[str, str] = {}
    ipam: str = "portwright"  # or the type of a foreign IPAM plugin that must be called on DEL
    cni: dict[str, object] = {}  # what DEL of a foreign IPAM needs: config, path, args
    adopted: Adopted | None = None  # of the model adopt alone
    created: float = 0.0  # unix seconds


class End(msgspec.Struct, frozen=True, kw_only=True):
    """A place that a microVM's packets pass: ``guest`` as it is to be set, the others as the kernel has them.

    ``end``: guest, tap, device or representor. ``queues`` of a tap: those that a hypervisor has open.
    ``vnet_hdr``: frames carry a virtio-net header there; None where there is no such question. ``offloads``:
    of ``checksum`` and ``tso``; of a tap what its guest takes.
    """

    end: str
    name: str = ""
    mac: str = ""
    mtu: int = 0
    queues: int = 0
    vnet_hdr: bool | None = None
    offloads: tuple[str, ...] | None = None


class Chained(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A tap of ours on a device that another plugin made: a way into a guest, and no port in the full sense.

    ``port`` is how it is shown: ``ifname`` is the device, ``rep_name`` is '', for there is no representor and
    so nothing that a port is held by. Several may have one owner: a CNI attachment with several devices.
    """

    port: Port
    index: int  # of the device
    clsact: bool = False  # whether the device's is ours


def tap_name(port_id: str) -> str:
    """The name of a port's tap: ``tap`` + 8 hex digits."""
    return "tap" + port_id[:8]


def rep_name(port_id: str) -> str:
    """The representor's name, at most 15 bytes (IFNAMSIZ): ``pw`` + 8 hex digits."""
    return "pw" + port_id[:8]
