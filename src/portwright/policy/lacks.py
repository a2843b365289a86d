"""What a rule asks of a packet that the packet hasn't, in words that name labels, nets and ports.

Each function gives the sentences of what lacks; none means that it holds. They agree with the engine: a
condition lacks nothing exactly if the engine's function of it is true (tests/unit/test_policy_explain.py).
"""

from __future__ import annotations

from collections.abc import Iterable

from portwright.policy.labels import (
    NAMESPACE_NAME,
    NAMESPACE_PREFIX,
    SERVICE_ACCOUNT_PREFIX,
    And,
    Contains,
    EndsWith,
    Everything,
    Expr,
    Has,
    In,
    Labels,
    Not,
    Or,
    StartsWith,
    matches,
)
from portwright.policy.matching import World, in_net, in_nets, named_ports, peer_matches, traffic_matches
from portwright.policy.rules import (
    ICMP,
    ICMP6,
    PORT_PROTOCOLS,
    SCTP,
    TCP,
    UDP,
    Endpoint,
    Flow,
    Peer,
    PortRange,
    Rule,
    Traffic,
)

PROTOCOL_NAMES = {TCP: "tcp", UDP: "udp", SCTP: "sctp", ICMP: "icmp", ICMP6: "icmp6"}


def protocol_name(protocol: int) -> str:
    """``tcp``, or ``protocol 47`` of one that has no name here."""
    return PROTOCOL_NAMES.get(protocol, f"protocol {protocol}")


def flow_text(flow: Flow) -> str:
    """The packet's service: ``tcp/80``, ``icmp 8/0``, ``tcp without ports (a later fragment)``."""
    name = protocol_name(flow.protocol)
    if flow.port is not None:
        return f"{name}/{flow.port}"
    if flow.icmp_type is not None:
        return f"{name} {flow.icmp_type}/{flow.icmp_code or 0}"
    return f"{name} without ports (a later fragment)" if flow.protocol in PORT_PROTOCOLS else name


def label_text(key: str, value: str | None = None) -> str:
    """A label as its owner writes it: ``app=web``, ``namespace label team=a``."""
    text = key
    for prefix, owner in ((NAMESPACE_PREFIX, "namespace label "), (SERVICE_ACCOUNT_PREFIX, "account label ")):
        if key.startswith(prefix):
            text = owner + key.removeprefix(prefix)
    return text if value is None else f"{text}={value}"


def _has(key: str, labels: Labels) -> str:
    return f"has {label_text(key, labels[key])}" if key in labels else "has no such label"


def _namespace(key: str, labels: Labels) -> str:
    return f"is in {labels[key]}" if key in labels else "is in none"


def expr_lacks(expr: Expr, labels: Labels) -> tuple[str, ...]:
    """What ``expr`` asks of ``labels`` that they have not."""
    if matches(expr, labels):
        return ()
    match expr:
        case In(key, values) if key == NAMESPACE_PREFIX + NAMESPACE_NAME:
            return (f"needs namespace {' or '.join(sorted(values))}, {_namespace(key, labels)}",)
        case In(key, values):
            wanted = " or ".join(label_text(key, value) for value in sorted(values))
            return (f"needs {wanted}, {_has(key, labels)}",)
        case Has(key):
            return (f"needs {label_text(key)}, has no such label",)
        case Contains(key, text):
            return (f"needs {label_text(key)} with {text!r} in it, {_has(key, labels)}",)
        case StartsWith(key, text):
            return (f"needs {label_text(key)} that starts with {text!r}, {_has(key, labels)}",)
        case EndsWith(key, text):
            return (f"needs {label_text(key)} that ends with {text!r}, {_has(key, labels)}",)
        case And(terms):
            return tuple(lack for term in terms for lack in expr_lacks(term, labels))
        case Or(terms):
            ways = [", ".join(expr_lacks(term, labels)) for term in terms]
            return (" or ".join(ways) or "is true of nobody",)
        case Not(term):
            return (f"must not have {_unwanted(term, labels)}",)
        case Everything():  # always matches, so it never comes here
            return ()


def _unwanted(term: Expr, labels: Labels) -> str:
    """What is there, which makes ``term`` true."""
    match term:
        case In(key) if key == NAMESPACE_PREFIX + NAMESPACE_NAME:
            return f"namespace {labels.get(key)}"
        case In(key) | Has(key) | Contains(key) | StartsWith(key) | EndsWith(key):
            return label_text(key, labels.get(key))
        case And(terms):
            return " with ".join(_unwanted(each, labels) for each in terms)
        case Or(terms):
            return " nor ".join(_unwanted(each, labels) for each in terms if matches(each, labels))
        case Not(inner):
            return f"the lack of what {', '.join(expr_lacks(inner, labels))}"
        case Everything():
            return "any label at all"


def _nearest(ways: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """The way that lacks least; the first of several."""
    return min(ways, key=len)


def _selector_lacks(selector: Expr, address: str, world: World) -> tuple[str, ...]:
    known = tuple(world.known(address))
    if known:
        return _nearest(expr_lacks(selector, endpoint.labels) for endpoint in known)
    if world.nodes(address):
        node = world.nodes(address)[0]
        return (f"is node {node.name}: selectors find no node and no host-network pod",)
    return ("is no pod: selectors find no address outside",)


def peer_lacks(peer: Peer, address: str, world: World) -> tuple[str, ...]:
    """What ``address`` lacks to be one of ``peer``."""
    if peer_matches(peer, address, world):
        return ()
    lacks: list[str] = []
    if peer.nets is not None and not in_nets(address, peer.nets):
        lacks.append(f"{address} is not in {_some(peer.nets)}")
    lacks += [f"{address} is in the exception {net}" for net in peer.not_nets if in_net(address, net)]
    if peer.selector is not None and not world.found(address, peer.selector):
        lacks += _selector_lacks(peer.selector, address, world)
    if peer.not_selector is not None and world.found(address, peer.not_selector):
        lacks.append("is found by the selector that excludes")
    if peer.nodes is not None and not world.is_node(address, peer.nodes):
        nodes = world.nodes(address)
        lacks += _nearest(expr_lacks(peer.nodes, node.labels) for node in nodes) if nodes else ("is no node",)
    if peer.domains is not None and not any(address in world.resolved(name) for name in peer.domains):
        lacks.append(f"{address} is no address of {_some(peer.domains)} that was asked for")
    return tuple(lacks)


def _some(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} or {len(names) - 3} more" if len(names) > 3 else shown or "no net at all"


def rule_peer_lacks(rule: Rule, own: str, other: str, world: World) -> tuple[str, ...]:
    """What the pair lacks: of the nearest of the rule's peers, and of what it asks of its own side."""
    lacks: tuple[str, ...] = ()
    if rule.peers is not None:
        ways = [peer_lacks(peer, other, world) for peer in rule.peers]
        lacks = _nearest(ways) if ways else (rule.note or "the rule names nobody",)
    if rule.local is not None:
        lacks += tuple(f"its own side {lack}" for lack in peer_lacks(rule.local, own, world))
    return lacks


def _range_text(ports: PortRange) -> str:
    return str(ports.first) if ports.first == ports.last else f"{ports.first}-{ports.last}"


def _name_text(name: str, endpoints: tuple[Endpoint, ...], protocol: int) -> str:
    if not endpoints:
        return f"port {name}, which only a pod can have"
    there = sorted(named_ports(endpoints, (name,), protocol))
    if not there:
        return f"port {name}, which {endpoints[0].title} has not under {protocol_name(protocol)}"
    return f"port {name}, which is {' and '.join(map(str, there))} of {endpoints[0].title}"


def traffic_lacks(traffic: Traffic, flow: Flow, world: World) -> tuple[str, ...]:
    """What the packet lacks to be what ``traffic`` describes."""
    if traffic_matches(traffic, flow, world):
        return ()
    protocol = flow.protocol if traffic.protocol is None else traffic.protocol
    service = protocol_name(protocol)
    if traffic.ports:
        service += f"/{' or '.join(_range_text(ports) for ports in traffic.ports)}"
    names = [_name_text(name, world.at(flow.destination), protocol) for name in traffic.names]
    service += (" or " if traffic.ports and names else " " if names else "") + " or ".join(names)
    lacks: list[str] = []
    only = Traffic(protocol=traffic.protocol, ports=traffic.ports, names=traffic.names)
    if not traffic_matches(only, flow, world):
        lacks.append(f"needs {service}")
    if not traffic_matches(Traffic(icmp_type=traffic.icmp_type, icmp_code=traffic.icmp_code), flow, world):
        code = "" if traffic.icmp_code is None else f" code {traffic.icmp_code}"
        lacks.append(f"needs ICMP type {traffic.icmp_type}{code}")
    if not traffic_matches(Traffic(ip_version=traffic.ip_version), flow, world):
        lacks.append(f"needs IPv{traffic.ip_version}")
    source = Traffic(source_ports=traffic.source_ports, source_names=traffic.source_names)
    if not traffic_matches(source, flow, world):
        ports = [_range_text(ports) for ports in traffic.source_ports]
        lacks.append(f"needs source port {' or '.join((*ports, *traffic.source_names))}")
    return tuple(lacks)


def rule_traffic_lacks(rule: Rule, flow: Flow, world: World) -> tuple[str, ...]:
    """What the packet lacks: of the nearest description, and where one that is not meant holds."""
    lacks: tuple[str, ...] = ()
    if rule.traffic is not None:
        ways = [traffic_lacks(each, flow, world) for each in rule.traffic]
        lacks = _nearest(ways) if ways else (rule.note or "the rule names no traffic",)
        if lacks and len(ways) > 1 and all(len(way) == 1 for way in ways):
            lacks = (" or ".join(dict.fromkeys(way[0] for way in ways[:5])),)
    if any(traffic_matches(each, flow, world) for each in rule.not_traffic):
        lacks += (f"{flow_text(flow)} is excluded",)
    return lacks
