"""The CNI result: one value, read from and written for every version of the specification.

Source: CNI SPEC 1.1.0, "Result Types", and the older specifications for their shapes:

- 1.1.0 has everything; 1.0.0 has no ``mtu``, ``socketPath``, ``pciID`` and only ``dst`` and
  ``gw`` in routes;
- 0.3.0 to 0.4.0 also want ``version`` ("4" or "6") in ``ips``;
- 0.1.0 and 0.2.0 have ``ip4`` and ``ip6`` (the first address of each family, with that
  family's routes) and no interfaces; without any address they cannot be written.
"""

from __future__ import annotations

import ipaddress
import json
from typing import Final

import msgspec

from portwright.cni.errors import CniCode, CniError
from portwright.cni.fields import MAX_BYTES, Fields, address, interface, loads
from portwright.cni.version import SUPPORTED, at_least
from portwright.ipam import parse_gateway
from portwright.model.errors import InvalidInput
from portwright.model.network import Dns, Route

_MAX_U32: Final = (1 << 32) - 1
#: Scopes of a route are eight bits (rtnetlink(7), struct rtmsg).
_MAX_SCOPE: Final = 255
#: Route fields of 1.1 beside dst and gw. ``priority`` 0 is the kernel's default; table and scope 0 are not.
_ROUTE_NUMBERS: Final = (
    ("mtu", _MAX_U32),
    ("advmss", _MAX_U32),
    ("priority", _MAX_U32),
    ("table", _MAX_U32),
    ("scope", _MAX_SCOPE),
)
_ZERO_IS_DEFAULT: Final = frozenset({"mtu", "advmss", "priority"})


class ResultInterface(msgspec.Struct, frozen=True, kw_only=True):
    """A device: ``sandbox`` is the caller's CNI_NETNS, '' for a device of the host."""

    name: str
    mac: str = ""
    mtu: int = 0
    sandbox: str = ""
    socket_path: str = ""
    pci_id: str = ""


class ResultIp(msgspec.Struct, frozen=True, kw_only=True):
    """An address with prefix length; ``interface`` indexes the result's interfaces, or is None."""

    address: str
    gateway: str | None = None
    interface: int | None = None


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What ADD returns, without a version: :meth:`to_json` writes any."""

    interfaces: tuple[ResultInterface, ...] = ()
    ips: tuple[ResultIp, ...] = ()
    routes: tuple[Route, ...] = ()
    dns: Dns = Dns()

    def to_json(self, version: str) -> bytes:
        """Return the result in the shape of ``version``, one line, always with ``cniVersion``.

        Empty parts are omitted, ``dns`` too. Raises :class:`CniError` 1 for an unknown version and
        for a result without addresses in 0.1.0 or 0.2.0 ("cannot convert: no valid IP addresses").
        """
        return json.dumps(self.to_dict(version), ensure_ascii=False).encode() + b"\n"

    def to_dict(self, version: str) -> dict[str, object]:
        """Return what :meth:`to_json` writes, as plain values."""
        _check_version(version, "no result has version")
        shape: dict[str, object] = {"cniVersion": version}
        if not at_least(version, "0.3.0"):
            shape.update(self._families(version))
        else:
            newest = at_least(version, "1.1.0")
            if self.interfaces:
                shape["interfaces"] = [_interface_out(one, newest=newest) for one in self.interfaces]
            if self.ips:
                shape["ips"] = [_ip_out(one, with_version=not at_least(version, "1.0.0")) for one in self.ips]
            if self.routes:
                shape["routes"] = [_route_out(one, newest=newest) for one in self.routes]
        if self.dns != Dns():
            shape["dns"] = _dns_out(self.dns)
        return shape

    def _families(self, version: str) -> dict[str, object]:
        """Return ``ip4`` and ``ip6`` of 0.1.0 and 0.2.0."""
        shape: dict[str, object] = {}
        for key, family in (("ip4", 4), ("ip6", 6)):
            first = next((one for one in self.ips if _family(one.address) == family), None)
            if first is None:
                continue
            entry: dict[str, object] = {"ip": first.address}
            if first.gateway is not None:
                entry["gateway"] = first.gateway
            routes = [_route_out(one, newest=False) for one in self.routes if _family(one.dst) == family]
            if routes:
                entry["routes"] = routes
            shape[key] = entry
        if not shape:
            raise CniError(
                CniCode.INCOMPATIBLE_VERSION,
                "cannot convert: no valid IP addresses",
                f"cniVersion {version} has no shape for a result without addresses; use 0.3.0 or newer",
            )
        return shape


def from_json(data: bytes, *, default_version: str) -> Result:
    """Return the result in ``data``; one without ``cniVersion`` has ``default_version``.

    Raises :class:`CniError`: 6 if it is not a JSON object, 1 for an unknown version, 7 (through
    ``InvalidInput``, see :func:`from_fields`) for a wrong value.
    """
    return from_fields(
        Fields(loads(data[: MAX_BYTES + 1], "result"), "result"), default_version=default_version
    )


def from_fields(fields: Fields, *, default_version: str) -> Result:
    """Return the result in ``fields``, in any version.

    An ``interface`` index is kept as it is, also one that points nowhere: other plugins write -1.
    Raises :class:`InvalidInput` naming the field of a wrong value.
    """
    version = fields.text("cniVersion") or default_version
    _check_version(version, f"{fields.at('cniVersion')} is")
    dns = dns_in(fields.child("dns")) or Dns()
    if not at_least(version, "0.3.0"):
        ips: list[ResultIp] = []
        routes: list[Route] = []
        for key in ("ip4", "ip6"):
            entry = fields.child(key)
            if entry is not None:
                ips.append(_ip_in(entry, "ip"))
                routes.extend(route_in(one) for one in entry.children("routes"))
        return Result(ips=tuple(ips), routes=tuple(routes), dns=dns)
    return Result(
        interfaces=tuple(_interface_in(one) for one in fields.children("interfaces")),
        ips=tuple(_ip_in(one, "address") for one in fields.children("ips")),
        routes=tuple(route_in(one) for one in fields.children("routes")),
        dns=dns,
    )


def merge_with_prev(prev: Result | None, own: Result) -> Result:
    """Return ``prev`` with ``own`` appended: positions of earlier plugins never shift.

    Indices in ``own.ips`` are moved by the number of interfaces before them. Own ``dns`` wins if
    it says anything.
    """
    if prev is None:
        return own
    shift = len(prev.interfaces)
    moved = tuple(
        msgspec.structs.replace(one, interface=one.interface + shift)
        if one.interface is not None and one.interface >= 0
        else one
        for one in own.ips
    )
    return Result(
        interfaces=prev.interfaces + own.interfaces,
        ips=prev.ips + moved,
        routes=prev.routes + own.routes,
        dns=own.dns if own.dns != Dns() else prev.dns,
    )


def route_in(fields: Fields, *, exact: bool = False) -> Route:
    """Read a route.

    ``exact`` (a configuration's) also refuses what our own kernel calls would: host bits in ``dst``
    and a gateway of the other family. Other plugins' results may have both.
    """
    dst = interface(fields.at("dst"), fields.text("dst"))
    if exact and dst.ip != dst.network.network_address:
        raise InvalidInput(fields.at("dst"), str(dst), f"has host bits set; the network is {dst.network}")
    gw_text = fields.text("gw")
    gw = None
    if gw_text:
        found = address(fields.at("gw"), gw_text)
        if exact and found.version != dst.version:
            raise InvalidInput(fields.at("gw"), gw_text, f"must be of the family of dst {dst}")
        if exact:
            parse_gateway(fields.at("gw"), gw_text)
        gw = str(found)
    numbers: dict[str, int | None] = {}
    for key, high in _ROUTE_NUMBERS:
        value = fields.number(key, 0, high)
        numbers[key] = None if value == 0 and key in _ZERO_IS_DEFAULT else value
    return Route(dst=str(dst), gw=gw, **numbers)


def dns_in(fields: Fields | None, *, exact: bool = False) -> Dns | None:
    """Read ``dns``; None if it is absent or has none of the four keys.

    An empty list that is present counts as said: it overrides (reference: bridge's ``dnsConfSet``).
    ``exact`` (a configuration's) refuses a nameserver that is not an IP address.
    """
    if fields is None:
        return None
    if not fields.text("domain") and all(
        fields.get(key) is None for key in ("nameservers", "search", "options")
    ):
        return None
    nameservers = fields.texts("nameservers")
    if exact:
        at = fields.at("nameservers")
        nameservers = tuple(str(address(f"{at}[{i}]", text)) for i, text in enumerate(nameservers))
    return Dns(
        nameservers=nameservers,
        domain=fields.text("domain"),
        search=fields.texts("search"),
        options=fields.texts("options"),
    )


def _check_version(version: str, what: str) -> None:
    if version not in SUPPORTED:
        raise CniError(CniCode.INCOMPATIBLE_VERSION, "incompatible CNI versions", f"{what} {version!r:.80}")


def _family(text: str) -> int:
    return ipaddress.ip_interface(text).version


def _interface_in(fields: Fields) -> ResultInterface:
    return ResultInterface(
        name=fields.text("name"),
        mac=fields.text("mac"),
        mtu=fields.number("mtu", 0, _MAX_U32) or 0,
        sandbox=fields.text("sandbox"),
        socket_path=fields.text("socketPath"),
        pci_id=fields.text("pciID"),
    )


def _ip_in(fields: Fields, key: str) -> ResultIp:
    gateway = fields.text("gateway")
    return ResultIp(
        address=str(interface(fields.at(key), fields.text(key))),
        gateway=str(address(fields.at("gateway"), gateway)) if gateway else None,
        interface=fields.number("interface", -_MAX_U32, _MAX_U32),
    )


def _interface_out(one: ResultInterface, *, newest: bool) -> dict[str, object]:
    shape: dict[str, object] = {"name": one.name}
    optional: list[tuple[str, object]] = [("mac", one.mac), ("sandbox", one.sandbox)]
    if newest:
        optional += [("mtu", one.mtu), ("socketPath", one.socket_path), ("pciID", one.pci_id)]
    shape.update((key, value) for key, value in optional if value)
    return shape


def _ip_out(one: ResultIp, *, with_version: bool) -> dict[str, object]:
    shape: dict[str, object] = {"version": str(_family(one.address))} if with_version else {}
    shape["address"] = one.address
    if one.gateway is not None:
        shape["gateway"] = one.gateway
    if one.interface is not None:
        shape["interface"] = one.interface
    return shape


def _route_out(one: Route, *, newest: bool) -> dict[str, object]:
    shape: dict[str, object] = {"dst": one.dst}
    if one.gw is not None:
        shape["gw"] = one.gw
    if newest:
        for key, _ in _ROUTE_NUMBERS:
            value: int | None = getattr(one, key)
            if value is not None:
                shape[key] = value
    return shape


def _dns_out(dns: Dns) -> dict[str, object]:
    parts: tuple[tuple[str, object], ...] = (
        ("nameservers", list(dns.nameservers)),
        ("domain", dns.domain),
        ("search", list(dns.search)),
        ("options", list(dns.options)),
    )
    return {key: value for key, value in parts if value}
