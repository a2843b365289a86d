"""The network configuration of one CNI call, as values of the model.

Sources: CNI SPEC 1.1.0, "Network configuration format" and "Plugin configuration objects";
host-local for the shape of ``ipam``. Keys match in any letter case. A key that is unknown
is ignored, as the specification wants; a key that is known is honoured or refused by name.

Keys of Portwright's own, beside the specification's::

    network   name of the network to join, if it is not the configuration's name
    model     attachment model, "veth" unless said
    queues    of the tap of a model that has one, 1 unless said
    join      what joins a tcfilter's device and tap: "bpf" (the default), "peer" or "mirred"
    innerAddresses  what the guest has inside, one of many restored from a snapshot; the port has its own
    interfaces  names of prevResult's devices to put a tap on; all of them unless said (:mod:`.chain`)
    attach    how our programs sit on the representor: "clsact" (quick to make, the default) or "tcx"
              (leaves the ingress qdisc to others: for the reference bandwidth plugin after ours)
    mtu       of the port, 0 or absent = the network's
    reach     names of networks whose ports may exchange traffic with this one's
    isolation what holds for the network's ports where no policy decides: "open" (the default), "tenant"
              or "strict"
    mac, bandwidth, portMappings   as the capabilities of these names, for every port
    ipam      {"type": "portwright", subnet/rangeStart/rangeEnd/gateway or ranges,
               routes, reserved}; a configuration with ranges needs no type
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Final

import msgspec

from portwright.cni import requested
from portwright.cni.errors import CniCode, CniError, unsupported
from portwright.cni.fields import Fields, address
from portwright.cni.requested import Requested
from portwright.cni.result import Result, dns_in, from_fields, route_in
from portwright.cni.version import SUPPORTED, UNNAMED, at_least
from portwright.model.errors import InvalidInput
from portwright.model.network import AddressRange, Dns, Isolation, Network, Route
from portwright.model.port import MAX_QUEUES

#: The IPAM type that Portwright's daemon serves itself.
BUILTIN_IPAM: Final = "portwright"

#: Attachment models by name. Which of them this host can make is the daemon's answer.
MODELS: Final = ("veth", "netkit", "tap", "tcfilter", "macvtap", "macvlan", "ipvlan", "sriov", "adopt")

_NAME: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*", re.ASCII)
#: As everywhere else in the API, or nobody could delete the network again.
_MAX_NAME: Final = 253
#: RFC 791: a host must accept 68 bytes; rtnetlink holds MTU in 32 bits, IP in 16.
_MIN_MTU: Final = 68
_MAX_MTU: Final = 65535

#: Keys of the reference's IPAM plugins that change what an address means and that we don't have.
_REFUSED_IPAM: Final = {
    "addresses": 'name addresses in runtimeConfig.ips, or use ipam.type "static"',
    "resolvConf": "put the servers into dns",
    "dataDir": "the daemon keeps addresses in its own state directory",
}


class IpamConf(msgspec.Struct, frozen=True, kw_only=True):
    """``type`` is :data:`BUILTIN_IPAM` or a plugin to execute; the rest is the built-in one's."""

    type: str
    ranges: tuple[tuple[AddressRange, ...], ...] = ()
    routes: tuple[Route, ...] = ()
    reserved: tuple[str, ...] = ()

    @property
    def foreign(self) -> bool:
        """Tell whether a plugin of this type must be executed (:mod:`portwright.cni.delegate`)."""
        return self.type != BUILTIN_IPAM


class Attachment(msgspec.Struct, frozen=True, kw_only=True):
    """A member of GC's list of what must stay."""

    container_id: str
    ifname: str


class NetConf(msgspec.Struct, frozen=True, kw_only=True):
    """A configuration. ``network`` is the network to join; ``ipam`` None means no addresses from here.

    ``dns`` None means unsaid (an IPAM plugin's stays), an empty one overrides. ``isolation`` None is
    unsaid too: open for a network that is made by this.
    ``valid_attachments`` is GC's: None means that no list was given, and GC must refuse; () means
    that nothing is valid. For DEL and GC only ``name``, ``cni_version``, ``network``, ``type``,
    ``ipam.type`` and ``valid_attachments`` are read (see :func:`read_leniently`).
    """

    name: str
    cni_version: str
    type: str = ""
    network: str = ""
    mtu: int | None = None
    ip_masq: bool = False
    model: str = "veth"
    queues: int = 1
    join: str = ""
    inner_addresses: tuple[str, ...] = ()
    interfaces: tuple[str, ...] = ()
    attach: str = ""
    reach: tuple[str, ...] = ()
    isolation: Isolation | None = None
    ipam: IpamConf | None = None
    routes: tuple[Route, ...] = ()
    dns: Dns | None = None
    requested: Requested = Requested()
    prev_result: Result | None = None
    valid_attachments: tuple[Attachment, ...] | None = None

    @property
    def pools(self) -> tuple[tuple[AddressRange, ...], ...]:
        """The range sets of this attachment: runtimeConfig.ipRanges first, then ipam's."""
        return self.requested.ip_ranges + (self.ipam.ranges if self.ipam else ())

    def as_network(self, net_id: int) -> Network:
        """Return the network that this configuration describes, with its static ranges only."""
        return Network(
            name=self.network,
            net_id=net_id,
            pools=self.ipam.ranges if self.ipam else (),
            reserved=self.ipam.reserved if self.ipam else (),
            mtu=self.mtu,
            masquerade=self.ip_masq,
            reach=self.reach,
            isolation=self.isolation or "open",
            routes=self.all_routes,
            dns=self.dns or Dns(),
            source="cni",
        )

    @property
    def all_routes(self) -> tuple[Route, ...]:
        """Routes of the configuration, then of the built-in IPAM."""
        return self.routes + (self.ipam.routes if self.ipam else ())

    def resolve_dns(self, ipam_dns: Dns) -> Dns:
        """Return the dns of the result: runtimeConfig's, else the configuration's, else ``ipam_dns``."""
        for said in (self.requested.dns, self.dns):
            if said is not None:
                return said
        return ipam_dns


def identity(top: Fields) -> tuple[str, str]:
    """Return (name, cniVersion); the version is not judged here.

    Raises :class:`CniError` 6 if one is no string, 7 for a missing or malformed name.
    """
    try:
        version = top.text("cniVersion") or UNNAMED
        name = top.text("name")
    except InvalidInput as error:
        raise CniError(CniCode.DECODE, f"error unmarshal network config: {error}") from None
    if not name:
        raise CniError(CniCode.INVALID_CONFIG, "missing network name")
    return _network_name("name", name), version


def read(top: Fields, args: Mapping[str, str]) -> NetConf:
    """Read a whole configuration, strictly; ``args`` are the parsed CNI_ARGS.

    Raises :class:`InvalidInput` or :class:`CniError`; every message names the field and value.
    """
    name, version = identity(top)
    model = top.text("model") or "veth"
    if model not in {*MODELS, "bridge"}:  # which the daemon refuses with what to use instead
        raise unsupported("model", model, f"must be one of {', '.join(MODELS)}")
    mtu = top.number("mtu", 0, _MAX_MTU) or None
    if mtu is not None and mtu < _MIN_MTU:
        raise InvalidInput("mtu", mtu, f"must be 0 (the network's) or {_MIN_MTU} to {_MAX_MTU}")
    prev = top.child("prevResult")
    conf = NetConf(
        name=name,
        cni_version=version,
        type=top.text("type"),
        network=_network(top, name),
        mtu=mtu,
        ip_masq=top.flag("ipMasq"),
        model=model,
        queues=top.number("queues", 1, MAX_QUEUES) or 1,
        join=top.text("join"),
        inner_addresses=top.texts("innerAddresses"),
        interfaces=top.texts("interfaces"),
        attach=_attach(top),
        reach=tuple(one if one == "*" else _network_name("reach", one) for one in top.texts("reach")),
        isolation=_isolation(top),
        ipam=_ipam(top),
        routes=tuple(route_in(one, exact=True) for one in top.children("routes")),
        dns=dns_in(top.child("dns"), exact=True),
        requested=requested.read(top, args),
        prev_result=from_fields(prev, default_version=version) if prev else None,
    )
    _check_old_version(conf)
    return conf


def read_leniently(top: Fields, command: str) -> NetConf:
    """Read what ``command``, DEL or GC, needs, and let nothing else be a reason to fail.

    The record of the attachment is the truth for them; the configuration may have changed since
    ADD, or be half empty. ``ipam`` keeps its type only. GC's list is read strictly all the same:
    an entry that is skipped would be a pod that loses its network.
    """
    name, version = identity(top)
    ipam_raw = top.get("ipam")
    ipam_type = Fields(ipam_raw, "ipam").get("type") if isinstance(ipam_raw, dict) else None
    kind = top.get("type")
    network = top.get("network")
    return NetConf(
        name=name,
        cni_version=version,
        type=kind if isinstance(kind, str) else "",
        network=network if isinstance(network, str) and _NAME.fullmatch(network) else name,
        ipam=IpamConf(type=ipam_type or BUILTIN_IPAM) if isinstance(ipam_type, str) else None,
        valid_attachments=_valid_attachments(top) if command == "GC" else None,
    )


def _attach(top: Fields) -> str:
    text = top.text("attach")
    if text not in ("", "clsact", "tcx"):
        raise InvalidInput("attach", text, "must be clsact or tcx")
    return text


def _isolation(top: Fields) -> Isolation | None:
    match top.text("isolation"):
        case "":
            return None
        case "open" | "tenant" | "strict" as known:
            return known
        case text:
            raise InvalidInput("isolation", text, "must be open, tenant or strict")


def _network_name(at: str, text: str) -> str:
    if not _NAME.fullmatch(text):
        raise InvalidInput(at, text, "invalid characters found in network name")
    if len(text) > _MAX_NAME:
        raise InvalidInput(at, f"{text[:40]}…", f"a network name has at most {_MAX_NAME} characters")
    return text


def _network(top: Fields, name: str) -> str:
    text = top.text("network")
    return _network_name("network", text) if text else name


def _ipam(top: Fields) -> IpamConf | None:
    """Read ``ipam``. None if absent or empty: an attachment without addresses from us."""
    fields = top.child("ipam")
    if fields is None or not fields.raw:
        return None
    kind = fields.text("type") or BUILTIN_IPAM
    if kind != BUILTIN_IPAM:
        # The plugin reads its part of stdin itself; judging it here would only add a second opinion.
        return IpamConf(type=kind)
    for key, way_out in _REFUSED_IPAM.items():
        value = fields.get(key)
        if value not in (None, "", [], {}):
            raise unsupported(fields.at(key), value, way_out)
    single = ((requested.range_in(fields),),) if fields.get("subnet") is not None else ()
    if not single and any(fields.get(key) is not None for key in ("rangeStart", "rangeEnd", "gateway")):
        raise InvalidInput(
            fields.at("subnet"), None, "no IP ranges specified: rangeStart, rangeEnd need a subnet"
        )
    return IpamConf(
        type=kind,
        ranges=single + requested.range_sets(fields.at("ranges"), fields.get("ranges")),
        routes=tuple(route_in(one, exact=True) for one in fields.children("routes")),
        reserved=tuple(
            _reserved(fields.at(f"reserved[{i}]"), one) for i, one in enumerate(fields.texts("reserved"))
        ),
    )


def _reserved(at: str, text: str) -> str:
    """Return an address or a subnet in canonical form."""
    if "/" not in text:
        return str(address(at, text))
    try:
        return str(ipaddress.ip_network(text))
    except ValueError as error:
        raise InvalidInput(at, text, f"must be an address or a subnet: {error}") from None


def _valid_attachments(top: Fields) -> tuple[Attachment, ...] | None:
    """Read GC's list under its name and its older one (libcni sends both); their union if both are there."""
    found: dict[Attachment, None] = {}
    given = False
    for key in ("cni.dev/valid-attachments", "cni.dev/attachments"):
        if top.get(key) is None:
            continue
        given = True
        for entry in top.children(key):
            one = Attachment(container_id=entry.text("containerID"), ifname=entry.text("ifname"))
            if not one.container_id or not one.ifname:
                raise InvalidInput(entry.at("containerID"), one.container_id, "needs containerID and ifname")
            found[one] = None
    return tuple(found) if given else None


def _check_old_version(conf: NetConf) -> None:
    """Refuse two addresses of one family where the result has room for one (0.1.0, 0.2.0)."""
    if conf.cni_version not in SUPPORTED or at_least(conf.cni_version, "0.3.0"):
        return
    families = [":" in ranges[0].subnet for ranges in conf.pools]
    wanted = [":" in one for one in conf.requested.ips]
    for many in (families, wanted):
        if len(many) != len(set(many)):
            raise InvalidInput(
                "cniVersion",
                conf.cni_version,
                f"CNI version {conf.cni_version} does not support more than 1 address per family",
            )
