from __future__ import annotations

from typing import Any

import pytest
import yaml

from portwright.model.errors import InvalidInput
from portwright.policy.labels import In, Not, both, matches
from portwright.policy.manifests.cluster import WORKLOADS, workload_labels
from portwright.policy.manifests.read import read
from portwright.policy.rules import (
    ADMIN,
    BASELINE,
    SCTP,
    TCP,
    UDP,
    Action,
    OnChange,
    Peer,
    Policy,
    PortRange,
    Rule,
    Traffic,
)
from tests.fix_manifests import survives_anything

SUBJECT = "subject: {namespaces: {}}"
CLUSTER = "policy.networking.k8s.io/v1alpha2"
OLD = "policy.networking.k8s.io/v1alpha1"
PEER = "{namespaces: {}}"


def manifest(spec: str, kind: str = "ClusterNetworkPolicy", version: str = CLUSTER, name: str = "p") -> str:
    """A manifest of one of the admin kinds; its spec in flow style."""
    return f"apiVersion: {version}\nkind: {kind}\nmetadata: {{name: {name}}}\nspec: {spec}\n"


def policies(text: str) -> tuple[Policy, ...]:
    """What a text becomes."""
    return read([("f.yaml", text)]).policy_set.policies


def cnp(rest: str, tier: str = "Admin", priority: int = 5) -> Policy:
    """A ClusterNetworkPolicy over all pods."""
    (found,) = policies(manifest(f"{{tier: {tier}, priority: {priority}, {SUBJECT}, {rest}}}"))
    return found


def egress(rest: str, peers: str = PEER) -> Rule:
    """The one egress rule of a ClusterNetworkPolicy that accepts."""
    rules = cnp(f"egress: [{{action: Accept, to: [{peers}], {rest}}}]").egress
    assert rules is not None
    return rules[0]


def old(rest: str) -> Policy:
    """An AdminNetworkPolicy over all pods."""
    (found,) = policies(manifest(f"{{priority: 5, {SUBJECT}, {rest}}}", "AdminNetworkPolicy", OLD))
    return found


@pytest.mark.parametrize(
    ("text", "tier", "order"),
    [
        (manifest(f"{{tier: Admin, priority: 0, {SUBJECT}}}"), ADMIN, 0),
        (manifest(f"{{tier: Admin, priority: 1000, {SUBJECT}}}"), ADMIN, 1000),
        (manifest(f"{{tier: Baseline, priority: 7, {SUBJECT}}}"), BASELINE, 7),
        (manifest(f"{{priority: 7, {SUBJECT}}}", "AdminNetworkPolicy", OLD), ADMIN, 7),
        (manifest(f"{{{SUBJECT}}}", "BaselineAdminNetworkPolicy", OLD, "default"), BASELINE, 1001),
    ],
)
def test_each_kind_has_its_tier(text: str, tier: Any, order: float) -> None:
    """Admin policies come first and by priority, the old baseline after all of the new one's."""
    (found,) = policies(text)

    assert (found.tier, found.order, found.namespace) == (tier.name, order, "")
    assert (found.ingress, found.egress) == (None, None)
    assert found.on_change is OnChange.RECHECK


def test_policies_are_in_the_order_of_their_priorities() -> None:
    """Admin tier before Kubernetes' before baseline, and within a tier the lower priority first."""
    texts = [
        manifest(f"{{tier: Baseline, priority: 1, {SUBJECT}}}", name="d"),
        manifest(f"{{tier: Admin, priority: 9, {SUBJECT}}}", name="a"),
        manifest(f"{{tier: Admin, priority: 2, {SUBJECT}}}", name="b"),
        manifest(f"{{priority: 5, {SUBJECT}}}", "AdminNetworkPolicy", OLD, "e"),
        manifest("{}", "NetworkPolicy", "networking.k8s.io/v1", "c"),
    ]

    assert [policy.name for policy in policies("---\n".join(texts))] == ["b", "e", "a", "c", "d"]


@pytest.mark.parametrize(
    ("subject", "selected"),
    [
        ("{namespaces: {}}", {"xa", "xb", "ya", "yb"}),
        ("{namespaces: {matchLabels: {ns: x}}}", {"xa", "xb"}),
        ("{namespaces: {matchExpressions: [{key: ns, operator: NotIn, values: [x]}]}}", {"ya", "yb"}),
        ("{pods: {podSelector: {}}}", {"xa", "xb", "ya", "yb"}),
        ("{pods: {podSelector: {matchLabels: {pod: a}}}}", {"xa", "ya"}),
        ("{pods: {namespaceSelector: {}, podSelector: {matchLabels: {pod: a}}}}", {"xa", "ya"}),
        ("{pods: {namespaceSelector: {matchLabels: {ns: y}}, podSelector: {matchLabels: {pod: a}}}}", {"ya"}),
        ("{pods: {namespaceSelector: {matchLabels: {ns: y}}, podSelector: {}}}", {"ya", "yb"}),
    ],
)
@pytest.mark.parametrize("place", ["subject", "from", "to"])
def test_namespaces_and_pods(subject: str, selected: set[str], place: str) -> None:
    """Subjects and peers choose pods by namespace or by namespace and pod, and nothing that is no pod."""
    rules = {"subject": "", "from": f"ingress: [{{action: Deny, from: [{subject}]}}]"}
    rules["to"] = rules["from"].replace("ingress", "egress").replace("from", "to")
    whole = subject if place == "subject" else "{namespaces: {}}"
    (found,) = policies(manifest(f"{{tier: Admin, priority: 5, subject: {whole}, {rules[place]}}}"))
    expr = found.subject
    if place != "subject":
        (rule,) = (found.ingress if place == "from" else found.egress) or ()
        (peer,) = rule.peers or ()
        assert peer.selector is not None
        expr = peer.selector
    pods = {ns + pod: workload_labels({"pod": pod}, ns, {"ns": ns}) for ns in "xy" for pod in "ab"}

    assert {name for name, labels in pods.items() if matches(expr, labels)} == selected
    assert not matches(expr, {"pod": "a", "ns:ns": "y"})


def test_actions() -> None:
    """Accept, Deny and Pass in the new kind, Allow for the first in the old ones; rules keep their order."""
    one = cnp(
        "ingress: ["
        + ", ".join(f"{{action: {a}, from: [{PEER}], name: {a}}}" for a in ("Pass", "Deny", "Accept"))
        + "]"
    )
    two = old(
        f"ingress: [{', '.join(f'{{action: {a}, from: [{PEER}]}}' for a in ('Allow', 'Pass', 'Deny'))}]"
    )

    assert [(rule.action, rule.name, rule.where.path) for rule in one.ingress or ()] == [
        (Action.PASS, "Pass", "spec.ingress[0]"),
        (Action.DENY, "Deny", "spec.ingress[1]"),
        (Action.ALLOW, "Accept", "spec.ingress[2]"),
    ]
    assert [rule.action for rule in two.ingress or ()] == [Action.ALLOW, Action.PASS, Action.DENY]
    assert one.egress is None


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        ("{networks: [10.0.0.0/8, 'FD00::/8', 10.0.0.0/8]}", Peer(nets=("10.0.0.0/8", "fd00::/8"))),
        ("{nodes: {}}", Peer(nodes=both())),
        ("{nodes: {matchLabels: {a: b}}}", Peer(nodes=In("a", frozenset({"b"})))),
        (
            "{nodes: {matchExpressions: [{key: a, operator: NotIn, values: [b]}]}}",
            Peer(nodes=Not(In("a", frozenset({"b"})))),
        ),
        (
            "{domainNames: [Example.com., '*.example.com', a_b.example.com]}",
            Peer(domains=("example.com", "*.example.com", "a_b.example.com")),
        ),
        ("{namespaces: {matchLabels: {a: b}}}", Peer(selector=both(WORKLOADS, In("ns:a", frozenset({"b"}))))),
    ],
)
def test_peers_of_egress(peer: str, expected: Peer) -> None:
    """Egress reaches networks, nodes and domain names too, in canonical form."""
    assert egress("", peer).peers == (expected,)


@pytest.mark.parametrize(
    ("protocols", "expected"),
    [
        ("", None),
        ("protocols: ", None),
        (
            "protocols: [{tcp: {destinationPort: {number: 80}}}]",
            (Traffic(protocol=TCP, ports=(PortRange(80, 80),)),),
        ),
        (
            "protocols: [{udp: {destinationPort: {range: {start: 1, end: 65535}}}}, "
            "{sctp: {destinationPort: {number: 9}}}]",
            (
                Traffic(protocol=UDP, ports=(PortRange(1, 65535),)),
                Traffic(protocol=SCTP, ports=(PortRange(9, 9),)),
            ),
        ),
        (
            "protocols: [{destinationNamedPort: web}]",
            tuple(Traffic(protocol=protocol, names=("web",)) for protocol in (TCP, UDP, SCTP)),
        ),
    ],
)
def test_protocols(protocols: str, expected: Any) -> None:
    """Protocols say which services; without them a rule is about all; a name is of whichever protocol."""
    assert egress(protocols).traffic == expected


@pytest.mark.parametrize(
    ("ports", "expected"),
    [
        ("", None),
        ("ports: [{portNumber: {port: 80}}]", (Traffic(protocol=TCP, ports=(PortRange(80, 80),)),)),
        (
            "ports: [{portNumber: {protocol: UDP, port: 53}}]",
            (Traffic(protocol=UDP, ports=(PortRange(53, 53),)),),
        ),
        (
            "ports: [{portRange: {start: 1, end: 9}}, {portRange: {protocol: SCTP, start: 2, end: 3}}]",
            (
                Traffic(protocol=TCP, ports=(PortRange(1, 9),)),
                Traffic(protocol=SCTP, ports=(PortRange(2, 3),)),
            ),
        ),
        (
            "ports: [{namedPort: web}]",
            tuple(Traffic(protocol=protocol, names=("web",)) for protocol in (TCP, UDP, SCTP)),
        ),
    ],
)
def test_ports_of_the_old_kinds(ports: str, expected: Any) -> None:
    """The old kinds say ports with their protocol, TCP by default."""
    (rule,) = old(f"egress: [{{action: Allow, to: [{PEER}], {ports}}}]").egress or ()

    assert rule.traffic == expected


@pytest.mark.parametrize(
    ("early", "late"),
    [
        ("{namespaces: {namespaceSelector: {}}}", "{namespaces: {}}"),
        ("{namespaces: {namespaceSelector: {matchLabels: {a: b}}}}", "{namespaces: {matchLabels: {a: b}}}"),
        (
            "{pods: {namespaces: {namespaceSelector: {matchLabels: {a: b}}}, podSelector: {}}}",
            "{pods: {namespaceSelector: {matchLabels: {a: b}}, podSelector: {}}}",
        ),
        (
            "{pods: {namespaces: {}, podSelector: {matchLabels: {c: d}}}}",
            "{pods: {podSelector: {matchLabels: {c: d}}}}",
        ),
    ],
)
def test_peers_of_the_first_releases(early: str, late: str) -> None:
    """Peers of v1alpha1's first releases, with their one layer more, mean what they became."""

    def peers(text: str) -> Any:
        (rule,) = old(f"ingress: [{{action: Deny, from: [{text}]}}]").ingress or ()
        return rule.peers

    assert peers(early) == peers(late)
    with pytest.raises(InvalidInput, match="unknown field"):
        cnp(f"ingress: [{{action: Deny, from: [{early}]}}]")


@pytest.mark.parametrize(
    ("peer", "field"),
    [
        ("{namespaces: {sameLabels: [tenant]}}", "namespaces.sameLabels"),
        ("{namespaces: {notSameLabels: [tenant]}}", "namespaces.notSameLabels"),
        ("{pods: {namespaces: {sameLabels: [tenant]}, podSelector: {}}}", "pods.namespaces.sameLabels"),
    ],
)
def test_what_left_the_api_is_refused(peer: str, field: str) -> None:
    """Comparing labels of both sides left the API, and is refused by name with what to write instead."""
    with pytest.raises(InvalidInput, match="write a policy for each value") as caught:
        old(f"ingress: [{{action: Deny, from: [{peer}]}}]")

    assert caught.value.field.endswith(f"spec.ingress[0].from[0].{field}")


def many(count: int, item: str) -> str:
    """A list of that item again and again."""
    return "[" + ", ".join([item] * count) + "]"


def test_the_most_that_is_allowed() -> None:
    """The limits of the API are met from below: 25 rules, peers, protocols, networks; 100 in old kinds."""
    networks = "[" + ", ".join(f"10.{n}.0.0/16" for n in range(25)) + "]"
    rule = (
        f"{{action: Accept, name: {'n' * 100}, to: {many(25, f'{{networks: {networks}}}')}, "
        f"protocols: {many(25, '{tcp: {destinationPort: {number: 80}}}')}}}"
    )
    (found, *others) = cnp(f"egress: {many(25, rule)}").egress or ()

    assert len(others) == 24
    assert len(found.peers or ()) == len(found.traffic or ()) == 25
    assert found.peers is not None
    assert len(found.peers[0].nets or ()) == 25
    assert len(old(f"ingress: {many(100, f'{{action: Deny, from: [{PEER}]}}')}").ingress or ()) == 100


A = f"action: Accept, from: [{PEER}]"
E = f"action: Accept, to: [{PEER}]"
NAMED = "protocols: [{destinationNamedPort: web}]"
REFUSED = [
    # field below spec, spec's part beside tier, priority and subject, the fault
    ("ingres", "ingres: []", "unknown field"),
    ("ingress[0].ports", f"ingress: [{{{A}, ports: []}}]", "unknown field"),
    ("ingress[0].action", f"ingress: [{{from: [{PEER}]}}]", "required"),
    ("ingress[0].action", f"ingress: [{{action: Allow, from: [{PEER}]}}]", "one of: Accept, Deny, Pass"),
    ("ingress[0].from", "ingress: [{action: Deny}]", "required, one peer at least"),
    ("ingress[0].from", "ingress: [{action: Deny, from: }]", "required, one peer at least"),
    ("ingress[0].from", "ingress: [{action: Deny, from: []}]", "from 1 to 25 items"),
    ("ingress[0].from", f"ingress: [{{action: Deny, from: {many(26, PEER)}}}]", "from 1 to 25 items"),
    ("ingress[0].from[0]", "ingress: [{action: Deny, from: [{}]}]", "exactly one of namespaces, pods"),
    (
        "ingress[0].from[0]",
        "ingress: [{action: Deny, from: [{namespaces: {}, pods: {podSelector: {}}}]}]",
        "exactly one",
    ),
    (
        "ingress[0].from[0].networks",
        "ingress: [{action: Deny, from: [{networks: [10.0.0.0/8]}]}]",
        "unknown field",
    ),
    ("ingress[0].from[0].nodes", "ingress: [{action: Deny, from: [{nodes: {}}]}]", "unknown field"),
    ("egress[0].to[0].services", "egress: [{action: Deny, to: [{services: {}}]}]", "unknown field"),
    (
        "ingress[0].from[0].pods.podSelector",
        "ingress: [{action: Deny, from: [{pods: {}}]}]",
        "required; {} is all pods",
    ),
    (
        "ingress[0].from[0].pods.sameLabels",
        "ingress: [{action: Deny, from: [{pods: {podSelector: {}, sameLabels: [a]}}]}]",
        "unknown field",
    ),
    ("ingress", f"ingress: {many(26, f'{{{A}}}')}", "from 0 to 25 items"),
    ("egress", f"egress: {many(26, f'{{{E}}}')}", "from 0 to 25 items"),
    ("ingress[0].name", f"ingress: [{{{A}, name: {'n' * 101}}}]", "at most 100"),
    ("ingress[0].name", f"ingress: [{{{A}, name: 1}}]", "quote it"),
    ("ingress[0].protocols", f"ingress: [{{{A}, protocols: []}}]", "from 1 to 25 items"),
    ("ingress[0].protocols[0]", f"ingress: [{{{A}, protocols: [{{}}]}}]", "exactly one of tcp, udp, sctp"),
    ("ingress[0].protocols[0].icmp", f"ingress: [{{{A}, protocols: [{{icmp: {{}}}}]}}]", "unknown field"),
    (
        "ingress[0].protocols[0].tcp.destinationPort",
        f"ingress: [{{{A}, protocols: [{{tcp: {{}}}}]}}]",
        "range: {start: 1, end: 65535}",
    ),
    (
        "ingress[0].protocols[0].tcp.sourcePort",
        f"ingress: [{{{A}, protocols: [{{tcp: {{sourcePort: 1}}}}]}}]",
        "unknown field",
    ),
    (
        "ingress[0].protocols[0].tcp.destinationPort",
        f"ingress: [{{{A}, protocols: [{{tcp: {{destinationPort: {{}}}}}}]}}]",
        "exactly one of number, range",
    ),
    (
        "ingress[0].protocols[0].tcp.destinationPort",
        f"ingress: [{{{A}, protocols: [{{tcp: {{destinationPort: 80}}}}]}}]",
        "a mapping",
    ),
    (
        "ingress[0].protocols[0].tcp.destinationPort.number",
        f"ingress: [{{{A}, protocols: [{{tcp: {{destinationPort: {{number: 0}}}}}}]}}]",
        "1 to 65535",
    ),
    (
        "ingress[0].protocols[0].tcp.destinationPort.range.end",
        f"ingress: [{{{A}, protocols: [{{tcp: {{destinationPort: {{range: {{start: 5, end: 5}}}}}}}}]}}]",
        "6 or more",
    ),
    (
        "ingress[0].protocols[0].tcp.destinationPort.range.end",
        f"ingress: [{{{A}, protocols: [{{tcp: {{destinationPort: {{range: {{start: 5}}}}}}}}]}}]",
        "required",
    ),
    (
        "ingress[0].protocols[0].destinationNamedPort",
        f"ingress: [{{{A}, protocols: [{{destinationNamedPort: 80}}]}}]",
        "quote it",
    ),
    ("egress[0].to[0].networks", "egress: [{action: Deny, to: [{networks: []}]}]", "from 1 to 25"),
    ("egress[0].to[0].networks[0]", "egress: [{action: Deny, to: [{networks: [10.0.0.1]}]}]", "a network"),
    (
        "egress[0].to[0].networks",
        f"egress: [{{action: Deny, to: [{{networks: {many(26, '10.0.0.0/8')}}}]}}]",
        "from 1 to 25",
    ),
    (
        "egress[0].to[0].domainNames",
        "egress: [{action: Deny, to: [{domainNames: [a.b]}]}]",
        "for rules that accept",
    ),
    (
        "egress[0].to[0].domainNames",
        "egress: [{action: Pass, to: [{domainNames: [a.b]}]}]",
        "for rules that accept",
    ),
    (
        "egress[0].to[0].domainNames",
        f"egress: [{{action: Accept, to: [{{domainNames: {many(26, 'a.b')}}}]}}]",
        "from 1 to 25",
    ),
    *(
        (
            "egress[0].to[0].domainNames[0]",
            f"egress: [{{action: Accept, to: [{{domainNames: ['{name}']}}]}}]",
            "a domain name",
        )
        for name in (
            "com",
            "*",
            "*.com",
            "a.*.com",
            "*a.com",
            "a..com",
            ".com",
            "-a.com",
            "a b.com",
            "a" * 64 + ".com",
            "a." * 127 + "com",
            "é.com",
        )
    ),
    (
        "egress[0].protocols",
        f"egress: [{{action: Accept, to: [{{networks: [10.0.0.0/8]}}], {NAMED}}}]",
        "no named ports",
    ),
    (
        "egress[0].protocols",
        f"egress: [{{action: Accept, to: [{PEER}, {{nodes: {{}}}}], {NAMED}}}]",
        "no named ports",
    ),
    (
        "egress[0].protocols",
        f"egress: [{{action: Accept, to: [{{domainNames: [a.b]}}], {NAMED}}}]",
        "no named ports",
    ),
]


@pytest.mark.parametrize(("field", "rest", "why"), REFUSED)
def test_what_the_api_refuses_is_refused(field: str, rest: str, why: str) -> None:
    """Each field that can't be honoured is InvalidInput with its path and the way out."""
    with pytest.raises(InvalidInput) as caught:
        cnp(rest)

    assert caught.value.field == f"f.yaml:4: ClusterNetworkPolicy p: spec.{field}"
    assert why in caught.value.why


WHOLE = [
    (manifest(f"{{priority: 5, {SUBJECT}}}"), "spec.tier", "required"),
    (manifest(f"{{tier: admin, priority: 5, {SUBJECT}}}"), "spec.tier", "one of: Admin, Baseline"),
    (manifest(f"{{tier: Admin, {SUBJECT}}}"), "spec.priority", "required"),
    (manifest(f"{{tier: Admin, priority: 1001, {SUBJECT}}}"), "spec.priority", "from 0 to 1000"),
    (manifest(f"{{tier: Admin, priority: -1, {SUBJECT}}}"), "spec.priority", "from 0 to 1000"),
    (manifest("{tier: Admin, priority: 5}"), "spec.subject", "required"),
    (manifest("{tier: Admin, priority: 5, subject: {}}"), "spec.subject", "exactly one of namespaces, pods"),
    (
        manifest("{tier: Admin, priority: 5, subject: {namespaces: {}, pods: {podSelector: {}}}}"),
        "spec.subject",
        "exactly one",
    ),
    (manifest("", name="p, namespace: x"), "metadata.namespace", "has no namespace"),
    (
        manifest(f"{{tier: Admin, priority: 5, {SUBJECT}}}", version=OLD),
        "apiVersion",
        f"understood as {CLUSTER}",
    ),
    (manifest(f"{{priority: 5, {SUBJECT}}}", "AdminNetworkPolicy"), "apiVersion", f"understood as {OLD}"),
    (
        manifest(f"{{tier: Admin, priority: 5, {SUBJECT}}}", "AdminNetworkPolicy", OLD),
        "spec.tier",
        "unknown field",
    ),
    (manifest(f"{{{SUBJECT}}}", "BaselineAdminNetworkPolicy", OLD), "metadata.name", "called default"),
    (
        manifest(f"{{priority: 5, {SUBJECT}}}", "BaselineAdminNetworkPolicy", OLD, "default"),
        "spec.priority",
        "unknown field",
    ),
    (
        manifest(
            f"{{{SUBJECT}, ingress: [{{action: Pass, from: [{PEER}]}}]}}",
            "BaselineAdminNetworkPolicy",
            OLD,
            "default",
        ),
        "spec.ingress[0].action",
        "one of: Allow, Deny",
    ),
    (
        manifest(
            f"{{{SUBJECT}, egress: [{{action: Allow, to: [{{domainNames: [a.b]}}]}}]}}",
            "BaselineAdminNetworkPolicy",
            OLD,
            "default",
        ),
        "spec.egress[0].to[0].domainNames",
        "unknown field",
    ),
    (
        manifest(
            f"{{priority: 5, {SUBJECT}, egress: {many(101, f'{{action: Allow, to: [{PEER}]}}')}}}",
            "AdminNetworkPolicy",
            OLD,
        ),
        "spec.egress",
        "from 0 to 100 items",
    ),
    (
        manifest(
            f"{{priority: 5, {SUBJECT}, egress: [{{action: Allow, to: [{PEER}], ports: [{{}}]}}]}}",
            "AdminNetworkPolicy",
            OLD,
        ),
        "spec.egress[0].ports[0]",
        "exactly one of portNumber, portRange, namedPort",
    ),
    (
        manifest(
            f"{{priority: 5, {SUBJECT}, egress: [{{action: Allow, to: [{{nodes: {{}}}}], "
            "ports: [{namedPort: web}]}]}",
            "AdminNetworkPolicy",
            OLD,
        ),
        "spec.egress[0].ports",
        "no named ports",
    ),
]


@pytest.mark.parametrize(("text", "field", "why"), WHOLE)
def test_what_each_kind_needs(text: str, field: str, why: str) -> None:
    """What a kind needs, what only another has, and its version are checked with their place."""
    with pytest.raises(InvalidInput) as caught:
        policies(text)

    assert caught.value.field.endswith(f": {field}")
    assert why in caught.value.why


FULL = """
tier: Admin
priority: 3
subject: {pods: {namespaceSelector: {matchLabels: {a: b}}, podSelector: {}}}
ingress:
- {name: n, action: Pass, from: [{namespaces: {}}], protocols: [{destinationNamedPort: web}]}
egress:
- action: Accept
  to: [{networks: [10.0.0.0/8]}, {nodes: {}}, {domainNames: [a.b]}]
  protocols: [{tcp: {destinationPort: {number: 80}}}, {udp: {destinationPort: {range: {start: 1, end: 9}}}}]
"""
FULL_OLD = """
subject: {namespaces: {}}
ingress:
- {action: Deny, from: [{namespaces: {}}], ports: [{portRange: {start: 1, end: 9}}, {namedPort: web}]}
"""


def test_any_value_anywhere_is_read_or_refused() -> None:
    """Whatever stands at any place of these manifests, the answer is a policy or InvalidInput."""
    new = yaml.safe_load(manifest("{}"))
    baseline = yaml.safe_load(manifest("{}", "BaselineAdminNetworkPolicy", OLD, "default"))
    new["spec"], baseline["spec"] = yaml.safe_load(FULL), yaml.safe_load(FULL_OLD)

    assert survives_anything(new, baseline) > 300
