"""Calico's kinds: what manifests become, what they mean (calico_cases.yaml), what is refused, and where."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from portwright.model.errors import InvalidInput
from portwright.policy.compile import compile_policies
from portwright.policy.engine import Engine
from portwright.policy.labels import EVERYTHING, And, Has, In, Not
from portwright.policy.manifests.calico import KINDS, STORED, V3
from portwright.policy.manifests.read import Manifests, read
from portwright.policy.rules import (
    BUILT_IN_TIERS,
    Action,
    Direction,
    EndpointKind,
    Flow,
    NamedPort,
    OnChange,
    Peer,
    Policy,
    PortRange,
    Rule,
    StagedAction,
    Tier,
    Traffic,
)
from portwright.policy.selector import CALICO_SERVICE_ACCOUNT, NAMESPACE_KEY
from portwright.policy.tables import Tables

DATA: dict[str, Any] = yaml.safe_load(
    (Path(__file__).parents[1] / "data" / "policy" / "calico_cases.yaml").read_text()
)

CONNECTION = re.compile(
    r"(?P<source>\S+) > (?P<target>\S+) (?P<protocol>\S+)"
    r"(?: (?P<first>[0-9]+)(?:/(?P<second>[0-9]+))?)?(?P<six> @6)?"
)
PROTOCOLS: Final = {"tcp": 6, "udp": 17, "sctp": 132, "icmp": 1, "icmp6": 58}


def flow(text: str) -> Flow:
    """The connection that a line of the cases is."""
    found = CONNECTION.fullmatch(text)
    assert found is not None, text
    place = 1 if found["six"] else 0
    protocol = PROTOCOLS.get(found["protocol"]) or int(found["protocol"])
    first, second = (int(found[name]) if found[name] else None for name in ("first", "second"))
    ports = protocol in {6, 17, 132}
    return Flow(
        source=DATA["addresses"][found["source"]][place],
        destination=DATA["addresses"][found["target"]][place],
        protocol=protocol,
        source_port=40000 if ports else None,
        port=first if ports else None,
        icmp_type=None if ports else first,
        icmp_code=None if ports else second,
    )


@pytest.mark.parametrize("case", DATA["cases"], ids=lambda case: case["name"])
def test_meaning(case: dict[str, Any]) -> None:
    """Of the connections of a case exactly those pass that it says pass."""
    manifests = read([("world.yaml", DATA["world"]), ("case.yaml", case["policies"])])
    engine = Engine(manifests.policy_set, manifests.snapshot)
    lines = [*case.get("allowed", []), *case.get("denied", [])]

    assert [line for line in lines if engine.connect(flow(line)).allowed] == case.get("allowed", [])


@pytest.mark.parametrize("case", DATA["cases"], ids=lambda case: case["name"])
def test_meaning_in_tables(case: dict[str, Any]) -> None:
    """Compiled to the data path's tables, a case lets pass exactly what it says, too."""
    manifests = read([("world.yaml", DATA["world"]), ("case.yaml", case["policies"])])
    tables = Tables(compile_policies(manifests.policy_set, manifests.snapshot))
    lines = [*case.get("allowed", []), *case.get("denied", [])]

    assert [line for line in lines if tables.lookup(flow(line)).allowed] == case.get("allowed", [])


def test_cases_are_free_of_lints() -> None:
    """Rules as Calico's users write them draw no warning: it would be a false one."""
    warned = {
        case["name"]: manifests.warnings
        for case in DATA["cases"]
        if (manifests := read([("world.yaml", DATA["world"]), ("case.yaml", case["policies"])])).warnings
    }

    assert warned == {}


def manifest(kind: str, spec: dict[str, Any], *, version: str = V3, **metadata: Any) -> str:
    """One manifest's text."""
    return json.dumps(
        {"apiVersion": version, "kind": kind, "metadata": {"name": "it", **metadata}, "spec": spec}
    )


def load(kind: str, spec: dict[str, Any], **metadata: Any) -> Manifests:
    """One manifest, read."""
    return read([("it.json", manifest(kind, spec, **metadata))])


def policy(kind: str, spec: dict[str, Any], **metadata: Any) -> Policy:
    """The policy that one manifest becomes."""
    [found] = load(kind, spec, **metadata).policy_set.policies
    return found


def rule(fields: dict[str, Any], direction: str = "ingress", kind: str = "GlobalNetworkPolicy") -> Rule:
    """What a rule becomes, without its place."""
    found = policy(kind, {"types": [direction.capitalize()], direction: [{"action": "Allow", **fields}]})
    [only] = found.rules(Direction(direction)) or ()
    return msgspec.structs.replace(only, where=Rule(action=Action.ALLOW).where)


TCP_80: Final = Traffic(protocol=6, ports=(PortRange(80, 80),))
OF_DEFAULT: Final = In(NAMESPACE_KEY, frozenset({"default"}))
WEB: Final = In("app", frozenset({"web"}))

RULES: list[tuple[dict[str, Any], str, str, Rule]] = [
    ({}, "ingress", "GlobalNetworkPolicy", Rule(action=Action.ALLOW)),
    ({"source": {}, "destination": {}}, "ingress", "NetworkPolicy", Rule(action=Action.ALLOW)),
    ({"source": None, "protocol": None}, "egress", "NetworkPolicy", Rule(action=Action.ALLOW)),
    (
        {"protocol": "TCP", "destination": {"ports": [80]}},
        "ingress",
        "NetworkPolicy",
        Rule(action=Action.ALLOW, traffic=(TCP_80,)),
    ),
    (
        {"protocol": "6", "destination": {"ports": ["80"], "selector": "app == 'web'"}},
        "egress",
        "GlobalNetworkPolicy",
        Rule(action=Action.ALLOW, peers=(Peer(selector=WEB),), traffic=(TCP_80,)),
    ),
    (
        {"source": {"selector": "app == 'web'"}, "destination": {"notNets": ["10.0.0.0/8"]}},
        "ingress",
        "NetworkPolicy",
        Rule(
            action=Action.ALLOW,
            peers=(Peer(selector=And((OF_DEFAULT, WEB))),),
            local=Peer(not_nets=("10.0.0.0/8",)),
            traffic=(Traffic(ip_version=4),),
        ),
    ),
    (
        {"source": {"selector": "all()", "nets": ["fd00::/8", "FD00:0::/8", "::1"]}},
        "ingress",
        "GlobalNetworkPolicy",
        Rule(action=Action.ALLOW, peers=(Peer(selector=EVERYTHING, nets=("fd00::/8", "::1/128")),)),
    ),
    (
        {"source": {"notSelector": "app == 'web'"}},
        "ingress",
        "NetworkPolicy",
        Rule(action=Action.ALLOW, peers=(Peer(selector=OF_DEFAULT, not_selector=WEB),)),
    ),
    (
        {"source": {"notSelector": "app == 'web'"}},
        "ingress",
        "GlobalNetworkPolicy",
        Rule(action=Action.ALLOW, peers=(Peer(not_selector=WEB),)),
    ),
    (
        {
            "source": {
                "serviceAccounts": {"names": ["a", "b"], "selector": "has(role)"},
                "namespaceSelector": "all()",
            }
        },
        "ingress",
        "NetworkPolicy",
        Rule(
            action=Action.ALLOW,
            peers=(
                Peer(
                    selector=And(
                        (
                            Has(NAMESPACE_KEY),
                            Has("sa:role"),
                            In(CALICO_SERVICE_ACCOUNT, frozenset({"a", "b"})),
                        )
                    )
                ),
            ),
        ),
    ),
    (
        {"destination": {"namespaceSelector": "global()", "serviceAccounts": {}}},
        "egress",
        "NetworkPolicy",
        Rule(action=Action.ALLOW, peers=(Peer(selector=Not(Has(NAMESPACE_KEY))),)),
    ),
    (
        {"destination": {"domains": ["API.example.com.", "*.example.org", "api.example.com"]}},
        "egress",
        "GlobalNetworkPolicy",
        Rule(action=Action.ALLOW, peers=(Peer(domains=("api.example.com", "*.example.org")),)),
    ),
    (
        {
            "protocol": "UDP",
            "source": {"ports": ["1:9", "dns"]},
            "destination": {"notPorts": [7]},
            "ipVersion": 4,
        },
        "ingress",
        "GlobalNetworkPolicy",
        Rule(
            action=Action.ALLOW,
            traffic=(
                Traffic(protocol=17, source_ports=(PortRange(1, 9),), source_names=("dns",), ip_version=4),
            ),
            not_traffic=(Traffic(protocol=17, ports=(PortRange(7, 7),)),),
        ),
    ),
    (
        {"destination": {"ports": ["dns"]}, "source": {"notPorts": ["ntp"]}, "notProtocol": "SCTP"},
        "ingress",
        "GlobalNetworkPolicy",
        Rule(
            action=Action.ALLOW,
            traffic=tuple(Traffic(protocol=number, names=("dns",)) for number in (6, 17, 132)),
            not_traffic=(
                Traffic(protocol=132),
                *(Traffic(protocol=number, source_names=("ntp",)) for number in (6, 17, 132)),
            ),
        ),
    ),
    (
        {"protocol": "ICMPv6", "icmp": {"type": 128}, "notICMP": {"type": 128, "code": 1}, "ipVersion": 6},
        "ingress",
        "GlobalNetworkPolicy",
        Rule(
            action=Action.ALLOW,
            traffic=(Traffic(protocol=58, icmp_type=128, ip_version=6),),
            not_traffic=(Traffic(protocol=58, icmp_type=128, icmp_code=1),),
        ),
    ),
    (
        {"protocol": "UDPLite", "action": "Log", "metadata": {"annotations": {"name": "look", "x": "y"}}},
        "ingress",
        "GlobalNetworkPolicy",
        Rule(action=Action.LOG, traffic=(Traffic(protocol=136),), name="look"),
    ),
    (
        {"action": "Pass", "icmp": {}, "notICMP": None},
        "egress",
        "GlobalNetworkPolicy",
        Rule(action=Action.PASS),
    ),
]


@pytest.mark.parametrize(("fields", "direction", "kind", "expected"), RULES)
def test_rule(fields: dict[str, Any], direction: str, kind: str, expected: Rule) -> None:
    """A rule's fields become this rule, no more and no less."""
    assert rule(fields, direction, kind) == expected


# (fields of an ingress rule of a global policy, the path below it that is named, words of the reason)
BAD_RULES: list[tuple[dict[str, Any], str, str]] = [
    ({"action": None}, "action", "required"),
    ({"action": "allow"}, "action", "Allow, Deny, Pass, Log"),
    ({"http": {"methods": ["GET"]}}, "http", "not at HTTP"),
    ({"source": {"services": {"name": "x"}}}, "source.services", "select their pods"),
    ({"sources": {}}, "sources", "unknown field"),
    ({"source": {"net": []}}, "source.net", "unknown field"),
    ({"source": []}, "source", "mapping"),
    ({"protocol": "TPC"}, "protocol", "TCP, UDP"),
    ({"protocol": 0}, "protocol", "1 to 255"),
    ({"protocol": 256}, "protocol", "1 to 255"),
    ({"protocol": True}, "protocol", "1 to 255"),
    ({"notProtocol": -1}, "notProtocol", "1 to 255"),
    ({"ipVersion": 5}, "ipVersion", "4 or 6"),
    ({"ipVersion": "4"}, "ipVersion", "4 to 6"),
    ({"ipVersion": 6, "protocol": "ICMP"}, "protocol", "IPv6"),
    ({"ipVersion": 4, "notProtocol": "ICMPv6"}, "notProtocol", "IPv4"),
    ({"icmp": {"type": 8}}, "icmp", "protocol: ICMP"),
    ({"notICMP": {"type": 8}, "protocol": "TCP"}, "notICMP", "protocol: ICMP"),
    ({"icmp": {"code": 8}, "protocol": "ICMP"}, "icmp.code", "type too"),
    ({"icmp": {"type": 255}, "protocol": "ICMP"}, "icmp.type", "0 to 254"),
    ({"icmp": {"type": 3, "code": 256}, "protocol": 1}, "icmp.code", "0 to 255"),
    ({"icmp": {"kind": 3}, "protocol": 1}, "icmp.kind", "unknown field"),
    ({"destination": {"ports": [80]}}, "destination.ports", "TCP, UDP or SCTP"),
    ({"protocol": "ICMP", "destination": {"ports": ["web"]}}, "destination.ports", "no ports"),
    ({"protocol": "UDPLite", "source": {"notPorts": [1]}}, "source.notPorts", "TCP, UDP or SCTP"),
    ({"protocol": "TCP", "source": {"ports": [0]}}, "source.ports[0]", "1 to 65535"),
    ({"protocol": "TCP", "source": {"ports": ["0:80"]}}, "source.ports[0]", "1 to 65535"),
    ({"protocol": "TCP", "source": {"ports": [1, 65536]}}, "source.ports[1]", "1 to 65535"),
    ({"protocol": "TCP", "source": {"ports": ["9:8"]}}, "source.ports[0]", "lower first"),
    ({"protocol": "TCP", "source": {"ports": [-1]}}, "source.ports[0]", "1 to 65535"),
    ({"protocol": "TCP", "source": {"ports": ["123456789"]}}, "source.ports[0]", "1 to 65535"),
    ({"protocol": "TCP", "source": {"ports": ["a:b"]}}, "source.ports[0]", "range"),
    ({"protocol": "TCP", "source": {"ports": ["80-90"]}}, "source.ports[0]", "range"),
    ({"protocol": "TCP", "source": {"ports": ["a b"]}}, "source.ports[0]", "range"),
    ({"protocol": "TCP", "source": {"ports": [1.5]}}, "source.ports[0]", "range"),
    ({"protocol": "TCP", "source": {"ports": [True]}}, "source.ports[0]", "range"),
    ({"protocol": "TCP", "source": {"ports": 80}}, "source.ports", "list"),
    ({"protocol": "TCP", "source": {"ports": list(range(1, 52))}}, "source.ports", "0 to 50"),
    ({"source": {"nets": ["10.0.0.1/8"]}}, "source.nets[0]", r"write 10\.0\.0\.0/8"),
    ({"source": {"nets": ["10.0.0.0/33"]}}, "source.nets[0]", "network"),
    ({"source": {"nets": ["example.com"]}}, "source.nets[0]", "address"),
    ({"source": {"nets": [10]}}, "source.nets[0]", "text"),
    ({"source": {"nets": ["10.0.0.0/8"] * 257}}, "source.nets", "0 to 256"),
    ({"source": {"nets": ["10.0.0.0/8", "fd00::/8"]}}, "source.nets[1]", "one rule for each"),
    (
        {"source": {"nets": ["::1"]}, "destination": {"notNets": ["1.2.3.4"]}},
        "destination.notNets[0]",
        "each",
    ),
    ({"source": {"nets": ["::1"]}, "ipVersion": 4}, "source.nets[0]", "about IPv4"),
    ({"destination": {"notNets": ["0.0.0.0/0"]}}, "destination.notNets[0]", "leave the rule out"),
    ({"destination": {"notNets": ["::/0"]}}, "destination.notNets[0]", "leave the rule out"),
    ({"source": {"selector": "app = 'x'"}}, "source.selector", "at character 5"),
    ({"source": {"selector": "global()"}}, "source.selector", "namespaceSelector"),
    ({"source": {"notSelector": "app"}}, "source.notSelector", "at its end"),
    ({"source": {"namespaceSelector": "x y"}}, "source.namespaceSelector", "at character 3"),
    ({"source": {"namespaceSelector": "all() || global()"}}, "source.namespaceSelector", "alone"),
    ({"source": {"selector": True}}, "source.selector", "quote"),
    ({"source": {"serviceAccounts": {"selector": "("}}}, "source.serviceAccounts.selector", "at its end"),
    ({"source": {"serviceAccounts": {"names": [1]}}}, "source.serviceAccounts.names[0]", "quote"),
    ({"destination": {"domains": ["a.b"]}}, "destination.domains", "egress"),
    ({"metadata": {"annotations": {"a": 1}}}, "metadata.annotations.a", "quote"),
    ({"metadata": {"labels": {}}}, "metadata.labels", "unknown field"),
]


@pytest.mark.parametrize(("fields", "path", "why"), BAD_RULES)
def test_bad_rule_is_refused_by_its_field(fields: dict[str, Any], path: str, why: str) -> None:
    """What is wrong in a rule, or can't be done, is InvalidInput that names the field and the way out."""
    spec = {"ingress": [{"action": "Deny"}, {"action": "Allow", **fields}]}

    with pytest.raises(InvalidInput, match=why) as raised:
        load("GlobalNetworkPolicy", spec)

    assert raised.value.field == f"it.json:1: GlobalNetworkPolicy it: spec.ingress[1].{path}"


@pytest.mark.parametrize(
    ("fields", "path", "why"),
    [
        ({"domains": ["a.*.b"]}, "domains[0]", "first label"),
        ({"domains": ["*"]}, "domains[0]", "first label"),
        ({"domains": ["a..b"]}, "domains[0]", "name"),
        ({"domains": ["a b"]}, "domains[0]", "name"),
        ({"domains": ["192.0.2.1"]}, "domains[0]", "one of nets"),
        ({"domains": ["a." * 127 + "a"]}, "domains[0]", "name"),
        ({"domains": ["a.b"], "nets": ["1.2.3.4"]}, "domains", "rule of its own"),
        ({"domains": ["a.b"], "selector": "all()"}, "domains", "rule of its own"),
    ],
)
def test_bad_domains_are_refused(fields: dict[str, Any], path: str, why: str) -> None:
    """Domain names stand alone, and a wildcard is their first label."""
    with pytest.raises(InvalidInput, match=why) as raised:
        load("GlobalNetworkPolicy", {"egress": [{"action": "Allow", "destination": fields}]})

    assert raised.value.field.endswith(f": spec.egress[0].destination.{path}")


def test_domains_allow_only() -> None:
    """A name's addresses are never all known, so nothing is denied or passed on by name."""
    for action in ("Deny", "Pass", "Log"):
        with pytest.raises(InvalidInput, match="Allow"):
            load("GlobalNetworkPolicy", {"egress": [{"action": action, "destination": {"domains": ["a.b"]}}]})


# (kind, spec, the path that is named, words of the reason)
BAD_SPECS: list[tuple[str, dict[str, Any], str, str]] = [
    ("NetworkPolicy", {"namespaceSelector": "all()"}, "spec.namespaceSelector", "unknown field"),
    ("NetworkPolicy", {"applyOnForward": True}, "spec.applyOnForward", "unknown field"),
    ("NetworkPolicy", {"stagedAction": "Set"}, "spec.stagedAction", "unknown field"),
    ("NetworkPolicy", {"order": "1"}, "spec.order", "number"),
    ("NetworkPolicy", {"order": True}, "spec.order", "number"),
    ("NetworkPolicy", {"selector": "a b"}, "spec.selector", "at character 3"),
    ("NetworkPolicy", {"serviceAccountSelector": "a b"}, "spec.serviceAccountSelector", "at character 3"),
    ("NetworkPolicy", {"serviceAccountSelector": "global()"}, "spec.serviceAccountSelector", "leave it out"),
    ("NetworkPolicy", {"types": ["ingress"]}, "spec.types[0]", "Ingress, Egress"),
    ("NetworkPolicy", {"types": ["Egress", "Egress"]}, "spec.types[1]", "twice"),
    (
        "NetworkPolicy",
        {"types": ["Egress"], "ingress": [{"action": "Deny"}]},
        "spec.ingress",
        "types lacks Ingress",
    ),
    (
        "NetworkPolicy",
        {"types": ["Ingress"], "egress": [{"action": "Deny"}]},
        "spec.egress",
        "types lacks Egress",
    ),
    ("NetworkPolicy", {"ingress": [{"action": "Deny"}] * 1025}, "spec.ingress", "0 to 1024"),
    ("NetworkPolicy", {"ingress": {}}, "spec.ingress", "list"),
    (
        "NetworkPolicy",
        {"performanceHints": ["Faster"]},
        "spec.performanceHints[0]",
        "AssumeNeededOnEveryNode",
    ),
    ("NetworkPolicy", {"tier": "none"}, "spec.tier", "no such tier"),
    ("NetworkPolicy", {"tier": []}, "spec.tier", "text"),
    ("GlobalNetworkPolicy", {"namespaceSelector": "global()"}, "spec.namespaceSelector", "labels"),
    ("GlobalNetworkPolicy", {"namespaceSelector": "a b"}, "spec.namespaceSelector", "at character 3"),
    ("GlobalNetworkPolicy", {"preDNAT": True}, "spec.preDNAT", "applyOnForward: true"),
    ("GlobalNetworkPolicy", {"doNotTrack": True}, "spec.doNotTrack", "applyOnForward: true"),
    ("GlobalNetworkPolicy", {"doNotTrack": "yes"}, "spec.doNotTrack", "true or false"),
    (
        "GlobalNetworkPolicy",
        {"doNotTrack": True, "preDNAT": True, "applyOnForward": True},
        "spec.preDNAT",
        "exclude each other",
    ),
    (
        "GlobalNetworkPolicy",
        {"preDNAT": True, "applyOnForward": True, "egress": [{"action": "Deny"}]},
        "spec.preDNAT",
        "ingress only",
    ),
    (
        "GlobalNetworkPolicy",
        {"preDNAT": True, "applyOnForward": True, "types": ["Ingress", "Egress"]},
        "spec.preDNAT",
        "ingress only",
    ),
    ("StagedNetworkPolicy", {"stagedAction": "Delete", "order": 3}, "spec.order", "name alone"),
    ("StagedGlobalNetworkPolicy", {"stagedAction": "set"}, "spec.stagedAction", "Set, Delete"),
    (
        "StagedKubernetesNetworkPolicy",
        {"stagedAction": "Delete", "podSelector": {}},
        "spec.podSelector",
        "name alone",
    ),
    ("StagedKubernetesNetworkPolicy", {"order": 3}, "spec.order", "unknown field"),
    ("StagedKubernetesNetworkPolicy", {"ingress": [{"from": [{}]}]}, "spec.ingress[0].from[0]", "needs"),
    ("Tier", {"order": None, "defaultAction": "Allow"}, "spec.defaultAction", "Deny, Pass"),
    ("Tier", {"order": "first"}, "spec.order", "number"),
    ("NetworkSet", {"nets": ["x"]}, "spec.nets[0]", "address"),
    ("NetworkSet", {"nets": ["10.0.0.0/40"]}, "spec.nets[0]", "network"),
    (
        "GlobalNetworkSet",
        {"allowedEgressDomains": ["a.b"]},
        "spec.allowedEgressDomains",
        "destination.domains",
    ),
    ("GlobalNetworkSet", {"net": []}, "spec.net", "unknown field"),
    ("HostEndpoint", {"interfaceName": "eth0"}, "spec.node", "required"),
    ("HostEndpoint", {"node": "", "interfaceName": "eth0"}, "spec.node", "required"),
    ("HostEndpoint", {"node": "n"}, "spec", "which interface"),
    ("HostEndpoint", {"node": "n", "interfaceName": "e" * 16}, "spec.interfaceName", "15"),
    ("HostEndpoint", {"node": "n", "expectedIPs": ["10.0.0.0/8"]}, "spec.expectedIPs[0]", "address"),
    (
        "HostEndpoint",
        {"node": "n", "interfaceName": "*", "profiles": ["p"]},
        "spec.profiles",
        "GlobalNetworkPolicy",
    ),
    (
        "HostEndpoint",
        {"node": "n", "interfaceName": "*", "ports": [{"name": "a", "protocol": "ICMP", "port": 1}]},
        "spec.ports[0].protocol",
        "has ports",
    ),
    (
        "HostEndpoint",
        {"node": "n", "interfaceName": "*", "ports": [{"name": "a", "protocol": "TCP", "port": 0}]},
        "spec.ports[0].port",
        "65535",
    ),
    (
        "HostEndpoint",
        {"node": "n", "interfaceName": "*", "ports": [{"name": "", "protocol": "TCP", "port": 1}]},
        "spec.ports[0].name",
        "name",
    ),
]


@pytest.mark.parametrize(("kind", "spec", "path", "why"), BAD_SPECS)
def test_bad_spec_is_refused_by_its_field(kind: str, spec: dict[str, Any], path: str, why: str) -> None:
    """What is wrong in a spec, or can't be done, is InvalidInput that names the field and the way out."""
    with pytest.raises(InvalidInput, match=why) as raised:
        load(kind, spec)

    assert raised.value.field == f"it.json:1: {kind} it: {path}"


@pytest.mark.parametrize(
    "kind", ["GlobalNetworkPolicy", "StagedGlobalNetworkPolicy", "Tier", "GlobalNetworkSet", "HostEndpoint"]
)
def test_what_has_no_namespace_names_none(kind: str) -> None:
    """A namespace on a kind that belongs to none is refused, since its author meant something by it."""
    with pytest.raises(InvalidInput, match="no namespace") as raised:
        load(kind, {"node": "n", "interfaceName": "*"} if kind == "HostEndpoint" else {}, namespace="shop")

    assert raised.value.field.endswith(": metadata.namespace")


def test_policy_of_a_namespace() -> None:
    """It selects in its namespace, by labels and by service account, and keeps its place and its order."""
    found = policy(
        "NetworkPolicy",
        {"selector": "app == 'web'", "serviceAccountSelector": "has(role)", "order": 10, "tier": "default"},
        namespace="shop",
        annotations={"portwright.dev/on-change": "reset"},
    )

    assert found.subject == And((In(NAMESPACE_KEY, frozenset({"shop"})), WEB, Has("sa:role")))
    assert (found.kind, found.name, found.namespace) == ("CalicoNetworkPolicy", "it", "shop")
    assert (found.tier, found.order, found.ingress, found.egress) == ("default", 10.0, (), None)
    assert (found.on_change, found.staged, str(found.where)) == (OnChange.RESET, False, "it.json:1")


def test_policy_of_all() -> None:
    """It selects everywhere; ``all()`` of namespaces or service accounts is who is in one, or has one."""
    assert policy("GlobalNetworkPolicy", {}).subject == EVERYTHING
    assert policy("GlobalNetworkPolicy", {}).order == math.inf
    found = policy(
        "GlobalNetworkPolicy",
        {
            "namespaceSelector": "all()",
            "serviceAccountSelector": "all()",
            "performanceHints": ["AssumeNeededOnEveryNode"],
        },
    )

    assert found.subject == And((Has(NAMESPACE_KEY), Has(CALICO_SERVICE_ACCOUNT)))


@pytest.mark.parametrize("flag", ["preDNAT", "doNotTrack"])
def test_flags_of_host_policies(flag: str) -> None:
    """The flags that Calico has for host endpoints are kept, each for itself."""
    found = policy(
        "GlobalNetworkPolicy", {flag: True, "applyOnForward": True, "ingress": [{"action": "Deny"}]}
    )

    assert (found.pre_dnat, found.do_not_track) == (flag == "preDNAT", flag == "doNotTrack")
    assert found.apply_on_forward
    assert policy("GlobalNetworkPolicy", {}).apply_on_forward is False


@pytest.mark.parametrize("action", [None, "Set", "Learn", "Ignore"])
@pytest.mark.parametrize("kind", ["NetworkPolicy", "GlobalNetworkPolicy", "KubernetesNetworkPolicy"])
def test_staged_policies_are_the_same_but_staged(kind: str, action: str | None) -> None:
    """A staged policy is what the enforced one would be, marked as staged."""
    rules = [{}] if kind == "KubernetesNetworkPolicy" else [{"action": "Allow"}]
    staged = policy(f"Staged{kind}", {"stagedAction": action, "ingress": rules})
    if kind == "KubernetesNetworkPolicy":
        text = manifest("NetworkPolicy", {"ingress": rules}, version="networking.k8s.io/v1")
        [enforced] = read([("it.json", text)]).policy_set.policies
    else:
        enforced = policy(kind, {"ingress": rules})

    assert staged.staged
    assert staged.kind == f"Staged{kind}"
    assert staged.staged_action == (action or "Set")
    unstaged = msgspec.structs.replace(
        staged, staged=False, staged_action=StagedAction.SET, kind=enforced.kind
    )
    assert unstaged == enforced


@pytest.mark.parametrize("kind", ["NetworkPolicy", "GlobalNetworkPolicy", "KubernetesNetworkPolicy"])
def test_a_deletion_is_staged_by_its_name(kind: str) -> None:
    """A stagedAction of Delete says which policy is meant, and is of no direction itself."""
    staged = policy(f"Staged{kind}", {"stagedAction": "Delete"})

    assert (staged.staged, staged.staged_action) == (True, StagedAction.DELETE)
    assert (staged.ingress, staged.egress) == (None, None)


def test_tiers() -> None:
    """A tier has its order, last without one, and denies by default; built-in ones may be repeated."""
    given: list[tuple[str, dict[str, Any]]] = [
        ("a", {"order": 5, "defaultAction": "Pass"}),
        ("b", {}),
        ("c", {"order": -0.5}),
    ]
    texts = [("it.json", manifest("Tier", spec, name=name)) for name, spec in given]
    built_in = [
        (
            "it.json",
            manifest(
                "Tier", {"order": tier.order, "defaultAction": tier.default.capitalize()}, name=tier.name
            ),
        )
        for tier in BUILT_IN_TIERS
    ]

    assert read([*texts, *built_in]).policy_set.tiers == (
        Tier(name="c", order=-0.5),
        Tier(name="a", order=5.0, default=Action.PASS),
        *BUILT_IN_TIERS,
        Tier(name="b", order=math.inf),
    )


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("default", {"order": 1_000_000, "defaultAction": "Pass"}),
        ("default", {"defaultAction": "Deny"}),
        ("kube-admin", {"order": 1_000}),
        ("kube-baseline", {"order": 1, "defaultAction": "Pass"}),
    ],
)
def test_built_in_tiers_are_fixed(name: str, spec: dict[str, Any]) -> None:
    """Order and default of a built-in tier can't be changed; the error says what they are."""
    with pytest.raises(InvalidInput, match=f"tier {name} always has order"):
        load("Tier", spec, name=name)


def test_a_tiers_name_has_no_dot() -> None:
    """A tier's name is one label."""
    with pytest.raises(InvalidInput, match="lower case"):
        load("Tier", {}, name="a.b")


def test_network_sets() -> None:
    """Nets in canonical form, with the set's own labels and, if it has one, its namespace's."""
    world = json.dumps(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop", "labels": {"team": "pay"}}}
    )
    nets = ["10.1.2.3/8", "192.0.2.1", "FD00::1/8", "10.9.9.9/8"]
    own = manifest("NetworkSet", {"nets": nets}, namespace="shop", labels={"kind": "office"})
    everywhere = manifest("GlobalNetworkSet", {"nets": nets}, labels={"kind": "partner"})
    found = {
        endpoint.title: endpoint
        for endpoint in read([("a", world), ("b", own), ("c", everywhere)]).snapshot.endpoints
    }

    assert {endpoint.kind for endpoint in found.values()} == {EndpointKind.NETWORK_SET}
    assert found["it"].nets == found["shop/it"].nets == ("10.0.0.0/8", "192.0.2.1/32", "fd00::/8")
    assert found["it"].labels == {"kind": "partner"}
    assert found["shop/it"].labels["kind"] == "office"
    assert found["shop/it"].labels["ns:team"] == "pay"
    assert found["shop/it"].labels[NAMESPACE_KEY] == "shop"


def test_host_endpoints() -> None:
    """Addresses, labels and named ports; interface and node stand where no selector can name them."""
    ports = [{"name": "ssh", "protocol": "TCP", "port": 22}, {"name": "ntp", "protocol": 17, "port": 123}]
    spec = {"node": "n1", "interfaceName": "eth0", "expectedIPs": ["10.0.0.1", "FD00::1"], "ports": ports}
    [found] = load("HostEndpoint", spec, labels={"kind": "gateway"}).snapshot.endpoints

    assert (found.kind, found.name, found.namespace) == (EndpointKind.HOST, "it", "")
    assert found.addresses == ("10.0.0.1", "fd00::1")
    assert found.named_ports == (NamedPort("ssh", 6, 22), NamedPort("ntp", 17, 123))
    assert found.labels == {"kind": "gateway", "host:node": "n1", "host:interface": "eth0"}


@pytest.mark.parametrize("kind", ["NetworkSet", "GlobalNetworkSet", "HostEndpoint"])
@pytest.mark.parametrize("label", ["namespace", "serviceaccount", "orchestrator"])
def test_nothing_claims_to_be_a_workload(kind: str, label: str) -> None:
    """Labels that say what an endpoint is are not its author's to set."""
    with pytest.raises(InvalidInput, match="Calico's own"):
        load(kind, {}, labels={f"projectcalico.org/{label}": "x"}) if kind != "HostEndpoint" else load(
            kind, {"node": "n", "interfaceName": "*"}, labels={f"projectcalico.org/{label}": "x"}
        )


def test_every_kind_is_understood_as_stored() -> None:
    """Each kind of projectcalico.org/v3 is one of crd.projectcalico.org/v1 too."""
    kinds = {kind for version, kind in KINDS if version == V3}

    assert kinds == {kind for version, kind in KINDS if version == STORED}
    assert len(kinds) == 9


def test_stored_objects_are_what_their_user_wrote() -> None:
    """Name, labels and annotations come from the annotation that keeps them, and ``default.`` goes."""
    kept = {"name": "open", "labels": {"kind": "x"}, "annotations": {"portwright.dev/on-change": "keep"}}
    annotations = {"projectcalico.org/metadata": json.dumps(kept)}
    found = policy(
        "NetworkPolicy", {}, version=STORED, name="default.open", namespace="shop", annotations=annotations
    )
    [stored_set] = load("GlobalNetworkSet", {}, version=STORED, annotations=annotations).snapshot.endpoints

    assert (found.name, found.on_change) == ("open", OnChange.KEEP)
    assert stored_set.labels == {"kind": "x"}
    assert policy("GlobalNetworkPolicy", {}, version=STORED, name="default.old").name == "old"
    assert policy("GlobalNetworkPolicy", {}, version=V3, name="default.old").name == "default.old"


def test_a_stored_tier_is_read_as_strictly() -> None:
    """A tier that is no text is InvalidInput in a stored object too, where it tells the policy's name."""
    with pytest.raises(InvalidInput, match="text"):
        load("GlobalNetworkPolicy", {"tier": []}, version=STORED)


@pytest.mark.parametrize(
    "kept", ["{", "[]", "3", '{"labels": 3}', '{"annotations": []}', '{"name": 3}', "[" * 5000, 7, None]
)
def test_a_broken_annotation_is_invalid_input(kept: object) -> None:
    """What is no JSON of metadata is refused by the annotation's name, or, if absent, not needed."""
    if kept is None:
        assert policy("NetworkPolicy", {}, version=STORED, annotations={}).name == "it"
        return
    with pytest.raises(InvalidInput, match="metadata"):
        load("NetworkPolicy", {}, version=STORED, annotations={"projectcalico.org/metadata": kept})


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 70000)
    | st.sampled_from(["", "all()", "x == 'y'", "TCP", "1:9", "::1"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(
                [
                    "action",
                    "source",
                    "destination",
                    "ports",
                    "nets",
                    "selector",
                    "protocol",
                    "icmp",
                    "type",
                    "order",
                    "tier",
                ]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
SPEC_FIELDS = [
    *(
        "ingress",
        "egress",
        "types",
        "selector",
        "order",
        "tier",
        "namespaceSelector",
        "stagedAction",
        "podSelector",
    ),
    *("preDNAT", "nets", "node", "interfaceName", "expectedIPs", "ports", "profiles", "defaultAction"),
]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(KINDS)),
    st.dictionaries(st.sampled_from(SPEC_FIELDS), JUNK, max_size=3) | JUNK,
    JUNK,
)
def test_any_document_is_read_or_invalid_input(kind: tuple[str, str], spec: Any, annotations: Any) -> None:
    """Whatever stands in a manifest of Calico's, reading it gives values or InvalidInput, nothing else."""
    try:
        found = load(kind[1], spec, version=kind[0], annotations=annotations)
    except InvalidInput:
        return

    assert (
        msgspec.json.decode(msgspec.json.encode(found.snapshot), type=type(found.snapshot)) == found.snapshot
    )
