"""Rules of Calico's policies: from the fields of a manifest to the rule model (reference/policy.md, 1.4).

A rule's ``source`` and ``destination`` are the packet's. Of the two, one is the selected endpoint itself
(``Rule.local``) and one is the other side (``Rule.peers``), by the rule's direction.

What Calico's API refuses is refused; what a text means is what Calico's own conversion makes of it, odd as it
may be, so that a policy has the same verdicts here:

- in a policy of a namespace, ``notSelector`` alone confines the rule to that namespace's endpoints;
- a rule whose nets are of one IP version says nothing of the other, ``notNets`` included.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final, TypeAlias

import msgspec

from portwright.model.errors import InvalidInput
from portwright.policy import selector as selectors
from portwright.policy.labels import Expr, In, both
from portwright.policy.manifests.documents import Document, dotted
from portwright.policy.manifests.fields import Field, address, network
from portwright.policy.rules import (
    ICMP,
    ICMP6,
    PORT_PROTOCOLS,
    SCTP,
    TCP,
    UDP,
    Action,
    Direction,
    Peer,
    PortRange,
    Rule,
    Traffic,
)

#: Calico's own bounds: rules of a policy in one direction, nets and ports of one field.
MAX_RULES: Final = 1024
MAX_NETS: Final = 256
MAX_PORTS: Final = 50

Net: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

_ACTIONS: Final = {"Allow": Action.ALLOW, "Deny": Action.DENY, "Pass": Action.PASS, "Log": Action.LOG}
#: Calico's names of protocols, in lower case.
_PROTOCOLS: Final = {"tcp": TCP, "udp": UDP, "sctp": SCTP, "icmp": ICMP, "icmpv6": ICMP6, "udplite": 136}
_RANGE = re.compile(r"([0-9]{1,5})(?::([0-9]{1,5}))?", re.ASCII)
_PORT_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}", re.ASCII)
_DOMAIN = re.compile(
    r"(?:\*\.)?(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
)


class _Ports(msgspec.Struct, frozen=True):
    """A list of ports: numbers, and names that an endpoint has for them."""

    ranges: tuple[PortRange, ...] = ()
    names: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.ranges or self.names)


class _Entity(msgspec.Struct, frozen=True):
    """What a rule says of one side. ``nets`` and ``not_nets`` are as in ``peer``, with their fields."""

    peer: Peer | None = None
    ports: _Ports = _Ports()
    not_ports: _Ports = _Ports()
    nets: tuple[tuple[Field, Net], ...] = ()
    not_nets: tuple[tuple[Field, Net], ...] = ()


class _Icmp(msgspec.Struct, frozen=True):
    type: int | None = None
    code: int | None = None

    def __bool__(self) -> bool:
        return self.type is not None


def read_rules(spec: Field, direction: Direction, namespace: str) -> tuple[Rule, ...]:
    """The rules of ``spec.ingress`` or ``spec.egress``.

    ``namespace`` is the policy's, '' if it has none. Raises InvalidInput with the path of what is wrong or
    of what we can't do.
    """
    listed = spec.get(direction.value)
    if listed is None:
        return ()
    return tuple(_rule(field, direction, namespace) for field in listed.items(MAX_RULES))


def protocol_number(field: Field) -> int:
    """A protocol by name or number, 1 to 255."""
    value = field.value
    if isinstance(value, str):
        value = _PROTOCOLS.get(value.lower()) or (int(value) if re.fullmatch("[0-9]{1,3}", value) else None)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 255:
        raise field.refuse("expected TCP, UDP, SCTP, ICMP, ICMPv6, UDPLite or a number from 1 to 255")
    return value


def no_namespace(document: Document) -> None:
    """Raise if an object that belongs to no namespace names one."""
    if document.namespace:
        why = f"a {document.kind} belongs to no namespace: leave it out"
        raise InvalidInput("metadata.namespace", document.namespace, why)


def text(parent: Field, name: str) -> str:
    """A field that is text; '' where it is absent."""
    field = parent.get(name)
    return field.text() if field is not None else ""


def path(parent: Field, name: str) -> str:
    """The dotted path of a field."""
    return dotted((*parent.path, name))


def _rule(field: Field, direction: Direction, namespace: str) -> Rule:
    field.only(
        *("action", "protocol", "notProtocol", "ipVersion", "icmp", "notICMP"),
        *("source", "destination", "http", "metadata"),
    )
    http = field.get("http")
    if http is not None:
        raise http.refuse("we look at packets, not at HTTP: leave it out, and allow by port if that will do")
    action = _ACTIONS[field.need("action").choice(*_ACTIONS)]
    protocol = _protocol(field, "protocol")
    not_protocol = _protocol(field, "notProtocol")
    icmp = _icmp(field.get("icmp"), protocol)
    not_icmp = _icmp(field.get("notICMP"), protocol)
    ingress = direction is Direction.INGRESS
    source = _entity(field.get("source"), namespace, protocol, domains=False)
    resolves = not ingress and action is Action.ALLOW
    destination = _entity(field.get("destination"), namespace, protocol, domains=resolves)
    version = _version(field, protocol, not_protocol, source, destination)
    other, local = (source, destination) if ingress else (destination, source)
    return Rule(
        action=action,
        peers=None if other.peer is None else (other.peer,),
        local=local.peer,
        traffic=_traffic(protocol, version, icmp, source, destination),
        not_traffic=_not_traffic(protocol, not_protocol, not_icmp, source, destination),
        name=_name(field.get("metadata")),
        where=field.where,
    )


def _protocol(parent: Field, name: str) -> int | None:
    field = parent.get(name)
    return protocol_number(field) if field is not None else None


def _name(field: Field | None) -> str:
    """What ``metadata.annotations.name`` calls the rule; other annotations are for other programs."""
    if field is None:
        return ""
    annotations = field.only("annotations").get("annotations")
    if annotations is None:
        return ""
    for key in annotations.mapping():
        annotations.need(key, "text is needed here: quote it").text()
    return text(annotations, "name")


def _icmp(field: Field | None, protocol: int | None) -> _Icmp:
    if field is None:
        return _Icmp()
    of_type, of_code = field.only("type", "code").get("type"), field.get("code")
    if of_code is not None and of_type is None:
        raise of_code.refuse("a code belongs to a type: give the type too")
    if of_type is None:
        return _Icmp()
    if protocol not in {ICMP, ICMP6}:
        raise field.refuse("this needs protocol: ICMP or protocol: ICMPv6 in the same rule")
    return _Icmp(of_type.integer(0, 254), of_code.integer(0, 255) if of_code is not None else None)


def _entity(field: Field | None, namespace: str, protocol: int | None, *, domains: bool) -> _Entity:
    if field is None:
        return _Entity()
    field.only(
        *("nets", "notNets", "selector", "notSelector", "namespaceSelector", "serviceAccounts"),
        *("ports", "notPorts", "services", "domains"),
    )
    services = field.get("services")
    if services is not None:
        raise services.refuse("there are no Kubernetes services here: select their pods, and name the ports")
    nets, not_nets = _nets(field.get("nets")), _nets(field.get("notNets"))
    for place, net in not_nets:
        if net.prefixlen == 0:
            raise place.refuse("nothing lies outside of it, so no packet would match: leave the rule out")
    selector, not_selector = _selectors(field, namespace)
    names = _domains(field.get("domains"), allowed=domains)
    if names and (nets or not_nets or selector is not None or not_selector is not None):
        raise field.need("domains").refuse(
            "domains stand alone in a destination: write the rest as a rule of its own"
        )
    peer = Peer(
        selector=selector,
        not_selector=not_selector,
        nets=tuple(dict.fromkeys(str(net) for _, net in nets)) or None,
        not_nets=tuple(dict.fromkeys(str(net) for _, net in not_nets)),
        domains=names or None,
    )
    return _Entity(
        peer=None if peer == Peer() else peer,
        ports=_ports(field.get("ports"), protocol),
        not_ports=_ports(field.get("notPorts"), protocol),
        nets=nets,
        not_nets=not_nets,
    )


def _nets(field: Field | None) -> tuple[tuple[Field, Net], ...]:
    """Nets, and addresses, which are nets of one; none with bits set outside its mask."""
    found: list[tuple[Field, Net]] = []
    for item in field.items(MAX_NETS) if field is not None else []:
        given, slash, _ = item.text().partition("/")
        net = ipaddress.ip_network(network(item) if slash else address(item))
        if net.network_address != ipaddress.ip_address(given):
            raise item.refuse(f"bits are set outside its mask; write {net} if all of it is meant")
        found.append((item, net))
    return tuple(found)


def _selectors(field: Field, namespace: str) -> tuple[Expr | None, Expr | None]:
    """The endpoints that the entity means, and those that it excludes."""
    plain, excluded = text(field, "selector"), text(field, "notSelector")
    of_namespace = text(field, "namespaceSelector")
    terms: list[Expr] = []
    if of_namespace:
        terms.append(selectors.parse_namespace(of_namespace, path(field, "namespaceSelector")))
    terms += _service_accounts(field.get("serviceAccounts"))
    if plain:
        terms.append(selectors.parse(plain, path(field, "selector")))
    if namespace and not of_namespace and (terms or excluded):
        terms.insert(0, In(selectors.NAMESPACE_KEY, frozenset({namespace})))
    return (
        both(*terms) if terms else None,
        selectors.parse(excluded, path(field, "notSelector")) if excluded else None,
    )


def _service_accounts(field: Field | None) -> list[Expr]:
    if field is None:
        return []
    names, chosen = field.only("names", "selector").get("names"), text(field, "selector")
    terms: list[Expr] = []
    if chosen:
        terms.append(selectors.parse_service_account(chosen, path(field, "selector")))
    if names is not None and (values := [item.text() for item in names.items(MAX_RULES)]):
        terms.append(In(selectors.CALICO_SERVICE_ACCOUNT, frozenset(values)))
    return terms


def _domains(field: Field | None, *, allowed: bool) -> tuple[str, ...]:
    """Domain names, a field of Calico's commercial kinds."""
    if field is None or not (items := field.items(MAX_NETS)):
        return ()
    if not allowed:
        raise field.refuse("domains belong to the destination of an egress rule whose action is Allow")
    found: dict[str, None] = {}
    for item in items:
        name = item.text().lower().removesuffix(".")
        if len(name) > 253 or not _DOMAIN.fullmatch(name):
            raise item.refuse("a name is needed here, like api.example.com; * may only be its first label")
        if name.rpartition(".")[2].isdigit():
            raise item.refuse("an address is no domain name: give it as one of nets, in a rule of its own")
        found[name] = None
    return tuple(found)


def _ports(field: Field | None, protocol: int | None) -> _Ports:
    ranges: list[PortRange] = []
    names: list[str] = []
    items = field.items(MAX_PORTS) if field is not None else []
    for item in items:
        given = str(item.value) if type(item.value) is int else item.value
        if not isinstance(given, str) or not _PORT_NAME.fullmatch(given.replace(":", ".", 1)):
            raise item.refuse('a port (80), a range ("1:1024") or a name is needed here')
        found = _RANGE.fullmatch(given)
        if found:
            first, last = int(found[1]), int(found[2] or found[1])
            if not 1 <= first <= last <= 65535:
                raise item.refuse('ports go from 1 to 65535; a range is "80:90", the lower first')
            ranges.append(PortRange(first, last))
        elif ":" in given or not re.search("[A-Za-z]", given):
            raise item.refuse('ports go from 1 to 65535; a range is "80:90"')
        else:
            names.append(given)
    if field is not None and items:
        if ranges and protocol not in PORT_PROTOCOLS:
            raise field.refuse("ports by number need protocol: TCP, UDP or SCTP in the same rule")
        if protocol is not None and protocol not in PORT_PROTOCOLS:
            raise field.refuse("this rule's protocol has no ports: leave them out")
    return _Ports(tuple(ranges), tuple(names))


def _version(
    field: Field, protocol: int | None, not_protocol: int | None, source: _Entity, destination: _Entity
) -> int | None:
    """The IP version that the rule is confined to, unless the nets it wants do so anyway."""
    given = field.get("ipVersion")
    version = given.integer(4, 6) if given is not None else None
    if given is not None and version == 5:
        raise given.refuse("4 or 6 is needed here")
    for name, number in (("protocol", protocol), ("notProtocol", not_protocol)):
        if version is not None and {ICMP: 4, ICMP6: 6}.get(number or 0, version) != version:
            raise field.need(name).refuse(f"there is no such protocol in IPv{version}: mend one of the two")
    implied = version
    for place, net in (*source.nets, *source.not_nets, *destination.nets, *destination.not_nets):
        if implied not in {None, net.version}:
            raise place.refuse(f"this rule is about IPv{implied} already: write one rule for each IP version")
        implied = net.version
    return version if source.nets or destination.nets else implied


def _traffic(
    protocol: int | None, version: int | None, icmp: _Icmp, source: _Entity, destination: _Entity
) -> tuple[Traffic, ...] | None:
    found = tuple(
        Traffic(
            protocol=number,
            ports=destination.ports.ranges,
            names=destination.ports.names,
            source_ports=source.ports.ranges,
            source_names=source.ports.names,
            icmp_type=icmp.type,
            icmp_code=icmp.code,
            ip_version=version,
        )
        for number in _protocols(protocol, ports=bool(source.ports or destination.ports))
    )
    return None if found == (Traffic(),) else found


def _not_traffic(
    protocol: int | None, not_protocol: int | None, not_icmp: _Icmp, source: _Entity, destination: _Entity
) -> tuple[Traffic, ...]:
    found: list[Traffic] = []
    if not_protocol is not None:
        found.append(Traffic(protocol=not_protocol))
    if not_icmp:
        found.append(Traffic(protocol=protocol, icmp_type=not_icmp.type, icmp_code=not_icmp.code))
    for number in _protocols(protocol, ports=True):
        if ports := source.not_ports:
            found.append(Traffic(protocol=number, source_ports=ports.ranges, source_names=ports.names))
        if ports := destination.not_ports:
            found.append(Traffic(protocol=number, ports=ports.ranges, names=ports.names))
    return tuple(found)


def _protocols(protocol: int | None, *, ports: bool) -> tuple[int | None, ...]:
    """The protocols to write traffic for: without one, names of ports are those of each that has ports."""
    return (TCP, UDP, SCTP) if protocol is None and ports else (protocol,)
