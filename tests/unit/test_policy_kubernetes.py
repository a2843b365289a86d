from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from portwright.model.errors import InvalidInput
from portwright.policy.labels import EVERYTHING, Has, In, Not, both, matches
from portwright.policy.manifests.cluster import WORKLOADS, workload_labels
from portwright.policy.manifests.read import Manifests, read
from portwright.policy.rules import (
    DEFAULT,
    KUBERNETES_ORDER,
    SCTP,
    TCP,
    UDP,
    Action,
    Endpoint,
    EndpointKind,
    NamedPort,
    OnChange,
    Peer,
    Policy,
    PortRange,
    Traffic,
)
from tests.fix_manifests import survives_anything

NS = "ns:kubernetes.io/metadata.name"


def manifest(spec: str, name: str = "p", extra: str = "") -> str:
    """A NetworkPolicy of namespace x; its spec in flow style."""
    return (
        f"apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n"
        f"metadata: {{name: {name}, namespace: x{extra}}}\nspec: {spec}\n"
    )


def policy(spec: str, extra: str = "") -> Policy:
    """The policy of that spec."""
    (found,) = read([("f.yaml", manifest(spec, extra=extra))]).policy_set.policies
    return found


def refused(spec: str) -> InvalidInput:
    """The error of that spec."""
    with pytest.raises(InvalidInput) as caught:
        read([("f.yaml", manifest(spec))])
    return caught.value


def peer(text: str) -> Peer:
    """The one peer of an ingress rule."""
    rules = policy(f"{{ingress: [{{from: [{text}]}}]}}").ingress
    assert rules is not None
    assert rules[0].peers is not None
    (found,) = rules[0].peers
    return found


def traffic(text: str) -> Traffic:
    """The one port of an egress rule."""
    rules = policy(f"{{egress: [{{ports: [{text}]}}]}}").egress
    assert rules is not None
    assert rules[0].traffic is not None
    (found,) = rules[0].traffic
    return found


ONE_RULE = "[{}]"
# spec, number of ingress rules (None: not isolated), number of egress rules
TYPES = [
    # policyTypes absent, null, empty: Ingress always, Egress where there is an egress rule
    ("{podSelector: {}}", 0, None),
    ("{}", 0, None),
    ("", 0, None),
    ("{policyTypes: []}", 0, None),
    ("{policyTypes: }", 0, None),
    ("{ingress: [{}]}", 1, None),
    ("{ingress: [{}, {}]}", 2, None),
    ("{egress: [{}]}", 0, 1),
    ("{egress: []}", 0, None),
    ("{egress: }", 0, None),
    ("{ingress: [{}], egress: [{}, {}]}", 1, 2),
    # absent, null and empty lists of rules are all no rule
    ("{policyTypes: [Ingress]}", 0, None),
    ("{policyTypes: [Ingress], ingress: }", 0, None),
    ("{policyTypes: [Ingress], ingress: []}", 0, None),
    ("{policyTypes: [Egress]}", None, 0),
    ("{policyTypes: [Egress], egress: }", None, 0),
    ("{policyTypes: [Egress], egress: []}", None, 0),
    ("{policyTypes: [Ingress, Egress]}", 0, 0),
    ("{policyTypes: [Egress, Ingress, Egress]}", 0, 0),
    # rules of a direction that policyTypes leaves out do nothing
    ("{policyTypes: [Ingress], egress: [{}]}", 0, None),
    ("{policyTypes: [Egress], ingress: [{}]}", None, 0),
]


@pytest.mark.parametrize(("spec", "ingress", "egress"), TYPES)
def test_which_directions_are_isolated(spec: str, ingress: int | None, egress: int | None) -> None:
    """``policyTypes`` decides which directions a policy isolates; left out, the rules do."""
    found = policy(spec)

    assert (found.ingress is None, found.egress is None) == (ingress is None, egress is None)
    assert (len(found.ingress or ()), len(found.egress or ())) == (ingress or 0, egress or 0)


@pytest.mark.parametrize("side", ["from", "to"])
@pytest.mark.parametrize(
    "form", ["{}", "{SIDE: }", "{SIDE: []}", "{ports: }", "{ports: []}", "{SIDE: [], ports: []}"]
)
def test_an_absent_null_or_empty_list_is_anything(side: str, form: str) -> None:
    """A rule whose peers or ports are absent, null or an empty list is about any."""
    direction = "ingress" if side == "from" else "egress"
    found = policy(f"{{{direction}: [{form.replace('SIDE', side)}]}}")
    (rule,) = (found.ingress if side == "from" else found.egress) or ()

    assert (rule.action, rule.peers, rule.traffic) == (Action.ALLOW, None, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("podSelector: {}", In(NS, frozenset({"x"}))),
        ("podSelector: {matchLabels: {a: b}}", both(In(NS, frozenset({"x"})), In("a", frozenset({"b"})))),
        ("namespaceSelector: {}", EVERYTHING),
        ("namespaceSelector: {matchLabels: {a: b}}", In("ns:a", frozenset({"b"}))),
        (
            "namespaceSelector: {matchLabels: {a: b}}, podSelector: {matchLabels: {c: d}}",
            both(In("ns:a", frozenset({"b"})), In("c", frozenset({"d"}))),
        ),
        ("namespaceSelector: {}, podSelector: {matchLabels: {c: d}}", In("c", frozenset({"d"}))),
        ("namespaceSelector: {}, podSelector: {}", EVERYTHING),
        ("namespaceSelector: {matchLabels: {a: b}}, podSelector: ", In("ns:a", frozenset({"b"}))),
        ("namespaceSelector: , podSelector: {}", In(NS, frozenset({"x"}))),
    ],
)
def test_selectors_of_a_peer(text: str, expected: Any) -> None:
    """Pods alone are of the policy's namespace, namespaces alone all their pods, both in one item an AND."""
    found = peer(f"{{{text}}}")
    selector = found.selector

    assert found == Peer(selector=selector)
    for labels in (
        {"a": "b"},
        {"c": "d"},
        {},
    ):
        for namespace, of_namespace in (("x", {}), ("x", {"a": "b"}), ("y", {}), ("y", {"a": "b"})):
            effective = workload_labels(labels, namespace, of_namespace)
            assert selector is not None
            assert matches(selector, effective) == matches(expected, effective), effective


def test_two_items_are_two_peers() -> None:
    """Two dashes are an OR: either peer is enough."""
    rules = policy("{ingress: [{from: [{namespaceSelector: {}}, {podSelector: {}}]}]}").ingress

    assert rules is not None
    assert rules[0].peers is not None
    assert len(rules[0].peers) == 2


def test_selectors_find_only_workloads() -> None:
    """No selector of a Kubernetes policy is true of a network set or of a host, whatever their labels are."""
    everybody = peer("{namespaceSelector: {}}").selector

    assert everybody is not None
    assert matches(everybody, workload_labels({}, "y", {}))
    assert not matches(everybody, {NS: "y", "a": "b"})
    assert not matches(everybody, {})


def test_a_policy_selects_in_its_own_namespace() -> None:
    """The subject is the pod selector within the namespace; absent, null and ``{}`` are the whole of it."""
    whole = In(NS, frozenset({"x"}))

    assert (
        policy("{}").subject
        == policy("{podSelector: }").subject
        == policy("{podSelector: {}}").subject
        == whole
    )
    assert policy("{podSelector: {matchLabels: {a: b}}}").subject == both(whole, In("a", frozenset({"b"})))


OPERATORS = [
    ("In, values: [v, w]", {"absent": False, "empty": False, "equal": True, "other": False}),
    ("NotIn, values: [v, w]", {"absent": True, "empty": True, "equal": False, "other": True}),
    ("In, values: ['']", {"absent": False, "empty": True, "equal": False, "other": False}),
    ("NotIn, values: ['']", {"absent": True, "empty": False, "equal": True, "other": True}),
    ("Exists", {"absent": False, "empty": True, "equal": True, "other": True}),
    ("Exists, values: []", {"absent": False, "empty": True, "equal": True, "other": True}),
    ("DoesNotExist", {"absent": True, "empty": False, "equal": False, "other": False}),
    ("DoesNotExist, values: ", {"absent": True, "empty": False, "equal": False, "other": False}),
]


@pytest.mark.parametrize(("operator", "expected"), OPERATORS)
@pytest.mark.parametrize("of", ["pod", "namespace"])
def test_operators(operator: str, expected: dict[str, bool], of: str) -> None:
    """The four operators on a label that is absent, empty, one of the values, another: as in apimachinery."""
    selector = f"{{matchExpressions: [{{key: k, operator: {operator}}}]}}"
    found = peer(
        f"{{namespaceSelector: {{}}, podSelector: {selector}}}"
        if of == "pod"
        else f"{{namespaceSelector: {selector}}}"
    )
    labels: dict[str, dict[str, str]] = {
        "absent": {},
        "empty": {"k": ""},
        "equal": {"k": "w"},
        "other": {"k": "z"},
    }
    assert found.selector is not None

    for case, given_labels in labels.items():
        pod, namespace = (given_labels, {}) if of == "pod" else ({}, given_labels)
        assert matches(found.selector, workload_labels(pod, "y", namespace)) is expected[case], case


def test_requirements_are_anded() -> None:
    """All of matchLabels and all of matchExpressions must hold."""
    selector = policy(
        "{podSelector: {matchLabels: {a: b, c: d}, matchExpressions: "
        "[{key: e, operator: Exists}, {key: f, operator: NotIn, values: [g, h]}]}}"
    ).subject

    assert selector == both(
        In(NS, frozenset({"x"})),
        both(
            In("a", frozenset({"b"})),
            In("c", frozenset({"d"})),
            Has("e"),
            Not(In("f", frozenset({"g", "h"}))),
        ),
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", Traffic(protocol=TCP)),
        ("{protocol: UDP}", Traffic(protocol=UDP)),
        ("{protocol: SCTP, port: 7}", Traffic(protocol=SCTP, ports=(PortRange(7, 7),))),
        ("{port: 80}", Traffic(protocol=TCP, ports=(PortRange(80, 80),))),
        ("{port: 1, endPort: 65535}", Traffic(protocol=TCP, ports=(PortRange(1, 65535),))),
        ("{port: 80, endPort: 80}", Traffic(protocol=TCP, ports=(PortRange(80, 80),))),
        ("{port: 80, endPort: }", Traffic(protocol=TCP, ports=(PortRange(80, 80),))),
        ("{port: http}", Traffic(protocol=TCP, names=("http",))),
        ("{port: dns-udp, protocol: UDP}", Traffic(protocol=UDP, names=("dns-udp",))),
        ("{protocol: UDP, port: }", Traffic(protocol=UDP)),
    ],
)
def test_ports(text: str, expected: Traffic) -> None:
    """A port is TCP where no protocol is said, every port where none is, a range inclusive, or a name."""
    assert traffic(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{cidr: 10.0.0.0/8}", Peer(nets=("10.0.0.0/8",))),
        (
            "{cidr: 0.0.0.0/0, except: [10.0.0.0/8, 192.168.0.0/16]}",
            Peer(nets=("0.0.0.0/0",), not_nets=("10.0.0.0/8", "192.168.0.0/16")),
        ),
        ("{cidr: 10.1.2.3/16}", Peer(nets=("10.1.0.0/16",))),
        (
            "{cidr: '2001:DB8::/32', except: ['2001:db8:0:0:1::/80']}",
            Peer(nets=("2001:db8::/32",), not_nets=("2001:db8:0:0:1::/80",)),
        ),
        ("{cidr: '::/0', except: []}", Peer(nets=("::/0",))),
        ("{cidr: 10.0.0.1/32, except: }", Peer(nets=("10.0.0.1/32",))),
    ],
)
def test_ip_blocks(text: str, expected: Peer) -> None:
    """A block is a net of either family in canonical form, without what it excepts."""
    assert peer(f"{{ipBlock: {text}}}") == expected


REFUSED = [
    ("[]", "spec", "a mapping"),
    ("{podselector: {}}", "spec.podselector", "unknown field"),
    ("{podSelector: []}", "spec.podSelector", "a mapping"),
    ("{podSelector: {app: web}}", "spec.podSelector.app", "unknown field"),
    ("{podSelector: {matchLabels: {app: 1}}}", "spec.podSelector.matchLabels.app", "quote it"),
    ("{podSelector: {matchLabels: {app: yes}}}", "spec.podSelector.matchLabels.app", "quote it"),
    ("{podSelector: {matchLabels: {app: 'a b'}}}", "spec.podSelector.matchLabels.app", "up to 63"),
    ("{podSelector: {matchLabels: {app: -a}}}", "spec.podSelector.matchLabels.app", "up to 63"),
    (
        f"{{podSelector: {{matchLabels: {{app: {'a' * 64}}}}}}}",
        "spec.podSelector.matchLabels.app",
        "up to 63",
    ),
    (
        f"{{podSelector: {{matchLabels: {{{'a' * 64}: b}}}}}}",
        f"spec.podSelector.matchLabels.{'a' * 64}",
        "key",
    ),
    ("{podSelector: {matchLabels: {'ns:a': b}}}", "spec.podSelector.matchLabels.ns:a", "key"),
    ("{podSelector: {matchLabels: {'/a': b}}}", "spec.podSelector.matchLabels./a", "key"),
    ("{podSelector: {matchLabels: {'A.b/a': b}}}", "spec.podSelector.matchLabels.A.b/a", "key"),
    ("{podSelector: {matchLabels: {'a/b/c': b}}}", "spec.podSelector.matchLabels.a/b/c", "key"),
    ("{podSelector: {matchLabels: {'': b}}}", "spec.podSelector.matchLabels.", "key"),
    (
        "{podSelector: {matchExpressions: [{operator: Exists}]}}",
        "spec.podSelector.matchExpressions[0].key",
        "required",
    ),
    (
        "{podSelector: {matchExpressions: [{key: a}]}}",
        "spec.podSelector.matchExpressions[0].operator",
        "required",
    ),
    (
        "{podSelector: {matchExpressions: [{key: a, operator: in, values: [b]}]}}",
        "spec.podSelector.matchExpressions[0].operator",
        "one of: In, NotIn, Exists, DoesNotExist",
    ),
    (
        "{podSelector: {matchExpressions: [{key: a, operator: Gt, values: ['1']}]}}",
        "spec.podSelector.matchExpressions[0].operator",
        "one of",
    ),
    (
        "{podSelector: {matchExpressions: [{key: a, operator: In}]}}",
        "spec.podSelector.matchExpressions[0].values",
        "In needs values",
    ),
    (
        "{podSelector: {matchExpressions: [{key: a, operator: NotIn, values: []}]}}",
        "spec.podSelector.matchExpressions[0].values",
        "NotIn needs values",
    ),
    (
        "{podSelector: {matchExpressions: [{key: a, operator: Exists, values: [b]}]}}",
        "spec.podSelector.matchExpressions[0].values",
        "takes no values",
    ),
    (
        "{podSelector: {matchExpressions: [{key: a, operator: In, values: [1]}]}}",
        "spec.podSelector.matchExpressions[0].values[0]",
        "quote it",
    ),
    (
        "{podSelector: {matchExpressions: [{key: a b, operator: Exists}]}}",
        "spec.podSelector.matchExpressions[0].key",
        "key",
    ),
    ("{policyTypes: Ingress}", "spec.policyTypes", "a list"),
    ("{policyTypes: [ingress]}", "spec.policyTypes[0]", "one of: Ingress, Egress"),
    ("{ingress: {}}", "spec.ingress", "a list"),
    ("{ingress: [~]}", "spec.ingress[0]", "empty item"),
    ("{ingress: [{to: []}]}", "spec.ingress[0].to", "unknown field"),
    ("{egress: [{from: []}]}", "spec.egress[0].from", "unknown field"),
    ("{ingress: [{from: {podSelector: {}}}]}", "spec.ingress[0].from", "a list"),
    ("{ingress: [{from: [{}]}]}", "spec.ingress[0].from[0]", "a peer needs"),
    ("{ingress: [{from: [{podSelector: }]}]}", "spec.ingress[0].from[0]", "a peer needs"),
    (
        "{ingress: [{from: [{podSelector: {}, ipBlock: {cidr: 10.0.0.0/8}}]}]}",
        "spec.ingress[0].from[0]",
        "stands alone",
    ),
    (
        "{ingress: [{from: [{namespaceSelector: {}, ipBlock: {cidr: 10.0.0.0/8}}]}]}",
        "spec.ingress[0].from[0]",
        "stands alone",
    ),
    (
        "{ingress: [{from: [{serviceSelector: {}}]}]}",
        "spec.ingress[0].from[0].serviceSelector",
        "unknown field",
    ),
    ("{ingress: [{from: [{ipBlock: {}}]}]}", "spec.ingress[0].from[0].ipBlock.cidr", "required"),
    (
        "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.1}}]}]}",
        "spec.ingress[0].from[0].ipBlock.cidr",
        "a network",
    ),
    (
        "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/33}}]}]}",
        "spec.ingress[0].from[0].ipBlock.cidr",
        "a network",
    ),
    (
        "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/08}}]}]}",
        "spec.ingress[0].from[0].ipBlock.cidr",
        "a network",
    ),
    (
        "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/255.0.0.0}}]}]}",
        "spec.ingress[0].from[0].ipBlock.cidr",
        "a network",
    ),
    (
        "{ingress: [{from: [{ipBlock: {cidr: 010.0.0.0/8}}]}]}",
        "spec.ingress[0].from[0].ipBlock.cidr",
        "a network",
    ),
    (
        "{ingress: [{from: [{ipBlock: {cidr: 'fe80::%eth0/64'}}]}]}",
        "spec.ingress[0].from[0].ipBlock.cidr",
        "a network",
    ),
    (
        "{ingress: [{from: [{ipBlock: {cidr: '::ffff:10.0.0.0/104'}}]}]}",
        "spec.ingress[0].from[0].ipBlock.cidr",
        "mapped",
    ),
    (
        "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: 10.1.0.0/16}}]}]}",
        "spec.ingress[0].from[0].ipBlock.except",
        "a list",
    ),
    (
        "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [11.0.0.0/16]}}]}]}",
        "spec.ingress[0].from[0].ipBlock.except[0]",
        "inside 10.0.0.0/8",
    ),
    (
        "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/8]}}]}]}",
        "spec.ingress[0].from[0].ipBlock.except[0]",
        "smaller",
    ),
    (
        "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16, 0.0.0.0/0]}}]}]}",
        "spec.ingress[0].from[0].ipBlock.except[1]",
        "inside",
    ),
    (
        "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: ['fd00::/16']}}]}]}",
        "spec.ingress[0].from[0].ipBlock.except[0]",
        "inside",
    ),
    ("{ingress: [{ports: [80]}]}", "spec.ingress[0].ports[0]", "a mapping"),
    ("{ingress: [{ports: [{port: 0}]}]}", "spec.ingress[0].ports[0].port", "from 1 to 65535"),
    ("{ingress: [{ports: [{port: 65536}]}]}", "spec.ingress[0].ports[0].port", "from 1 to 65535"),
    ("{ingress: [{ports: [{port: 80.5}]}]}", "spec.ingress[0].ports[0].port", "whole number"),
    ("{ingress: [{ports: [{port: true}]}]}", "spec.ingress[0].ports[0].port", "whole number"),
    ("{ingress: [{ports: [{port: '80'}]}]}", "spec.ingress[0].ports[0].port", "a number is not quoted"),
    ("{ingress: [{ports: [{port: HTTP}]}]}", "spec.ingress[0].ports[0].port", "a port's name"),
    ("{ingress: [{ports: [{port: a--b}]}]}", "spec.ingress[0].ports[0].port", "a port's name"),
    ("{ingress: [{ports: [{port: abcdefghijklmnop}]}]}", "spec.ingress[0].ports[0].port", "a port's name"),
    (
        "{ingress: [{ports: [{protocol: tcp}]}]}",
        "spec.ingress[0].ports[0].protocol",
        "one of: TCP, UDP, SCTP",
    ),
    ("{ingress: [{ports: [{protocol: ICMP}]}]}", "spec.ingress[0].ports[0].protocol", "one of"),
    ("{ingress: [{ports: [{protocol: [TCP]}]}]}", "spec.ingress[0].ports[0].protocol", "one of"),
    ("{ingress: [{ports: [{endPort: 90}]}]}", "spec.ingress[0].ports[0].endPort", "numeric port"),
    ("{ingress: [{ports: [{port: http, endPort: 90}]}]}", "spec.ingress[0].ports[0].endPort", "numeric port"),
    ("{ingress: [{ports: [{port: 80, endPort: 79}]}]}", "spec.ingress[0].ports[0].endPort", "80 or more"),
    ("{ingress: [{ports: [{port: 80, endport: 90}]}]}", "spec.ingress[0].ports[0].endport", "unknown field"),
]


@pytest.mark.parametrize(("spec", "field", "why"), REFUSED)
def test_what_the_api_refuses_is_refused(spec: str, field: str, why: str) -> None:
    """Each field that can't be honoured is InvalidInput with its path, its value's fault and the way out."""
    error = refused(spec)

    assert error.field == f"f.yaml:4: NetworkPolicy x/p: {field}"
    assert why in error.why


def test_an_error_names_its_line() -> None:
    """The line of an error is the field's own, or of the nearest field around one that is missing."""
    text = manifest("").rstrip() + "\n  ingress:\n  - from:\n    - ipBlock:\n        cidr: nonsense\n"
    with pytest.raises(
        InvalidInput, match=r"^f.yaml:8: NetworkPolicy x/p: spec.ingress\[0\].from\[0\].ipBlock.cidr: "
    ):
        read([("f.yaml", text)])


def test_a_rule_knows_its_place() -> None:
    """Policies and rules carry file, line and path."""
    text = manifest("").rstrip() + "\n  ingress:\n  - {}\n  - ports:\n    - port: 80\n"
    (found,) = read([("other.yaml", "---\n"), ("f.yaml", text)]).policy_set.policies

    assert str(found.where) == "f.yaml:1"
    assert [(str(rule.where), rule.where.path) for rule in found.ingress or ()] == [
        ("f.yaml:6", "spec.ingress[0]"),
        ("f.yaml:7", "spec.ingress[1]"),
    ]
    assert (found.kind, found.title, found.tier, found.order) == (
        "NetworkPolicy",
        "x/p",
        DEFAULT.name,
        KUBERNETES_ORDER,
    )


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("", OnChange.RECHECK),
        (", annotations: {a: b}", OnChange.RECHECK),
        (", annotations: {portwright.dev/on-change: keep}", OnChange.KEEP),
        (", annotations: {portwright.dev/on-change: recheck}", OnChange.RECHECK),
        (", annotations: {portwright.dev/on-change: reset}", OnChange.RESET),
    ],
)
def test_on_change_is_an_annotation(extra: str, expected: OnChange) -> None:
    """What a change means for open flows is an annotation; without it they are decided anew."""
    assert policy("{}", extra).on_change is expected


@pytest.mark.parametrize("value", ["drop", "[keep]", "{a: b}", "1", "''"])
def test_an_unknown_on_change_is_refused(value: str) -> None:
    """Any other word for it is an error that lists the words."""
    with pytest.raises(InvalidInput, match=r"portwright\.dev/on-change: one of: keep, recheck, reset"):
        policy("{}", f", annotations: {{portwright.dev/on-change: {value}}}")


# The cluster around the policies.

POD = """
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: x, labels: {app: web, projectcalico.org/namespace: other}}
spec:
  serviceAccountName: runner
  nodeName: n1
  containers:
  - name: a
    image: nginx
    ports: [{name: http, containerPort: 80}, {containerPort: 81},
      {name: dns, containerPort: 53, protocol: UDP}]
  - name: b
    ports: [{name: http, containerPort: 8080}]
  initContainers:
  - {name: once, ports: [{name: once, containerPort: 1}]}
  - {name: ends, restartPolicy: Never, ports: [{name: ends, containerPort: 2}]}
  - {name: side, restartPolicy: Always, ports: [{name: side, containerPort: 9}]}
status:
  phase: Running
  podIP: 10.0.0.7
  podIPs: [{ip: 10.0.0.7}, {ip: "FD00::0007"}]
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: runner, namespace: x, labels: {role: r}}
---
apiVersion: v1
kind: Namespace
metadata: {name: x, labels: {team: t}}
---
apiVersion: v1
kind: Node
metadata: {name: n1, labels: {zone: z}}
status:
  addresses: [{type: InternalIP, address: 192.0.2.1}, {type: Hostname, address: n1},
    {type: ExternalIP, address: "2001:db8::1"}]
"""


def test_a_pod_is_an_endpoint_with_effective_labels() -> None:
    """A pod's labels, its namespace's, its account's and the implied ones, which it can't claim."""
    found = read([("f", POD)])
    node, pod = sorted(found.snapshot.endpoints, key=lambda endpoint: endpoint.kind)

    assert pod == Endpoint(
        name="web",
        namespace="x",
        labels={
            "app": "web",
            "ns:team": "t",
            NS: "x",
            "ns:projectcalico.org/name": "x",
            "sa:role": "r",
            "sa:projectcalico.org/name": "runner",
            "projectcalico.org/namespace": "x",
            "projectcalico.org/orchestrator": "k8s",
            "projectcalico.org/serviceaccount": "runner",
        },
        addresses=("10.0.0.7", "fd00::7"),
        named_ports=(
            NamedPort("http", TCP, 80),
            NamedPort("dns", UDP, 53),
            NamedPort("http", TCP, 8080),
            NamedPort("side", TCP, 9),
        ),
        unnamed_ports=((TCP, 81),),
    )
    assert node == Endpoint(
        name="n1", kind=EndpointKind.NODE, labels={"zone": "z"}, addresses=("192.0.2.1", "2001:db8::1")
    )
    assert found.namespaces == {"x": {"team": "t", "kubernetes.io/metadata.name": "x"}}


def bare(name: str, rest: str = "", namespace: str = "x") -> str:
    """A pod in one line."""
    return f"---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}}}\n{rest}\n"


@pytest.mark.parametrize(
    ("rest", "addresses", "host"),
    [
        ("", (), False),
        ("status: {}", (), False),
        ("status: {podIP: ''}", (), False),
        ("status: {podIP: 10.0.0.1}", ("10.0.0.1",), False),
        ("status: {podIPs: [{ip: 10.0.0.1}]}", ("10.0.0.1",), False),
        ("status: {phase: Succeeded, podIP: 10.0.0.1}", (), False),
        ("status: {phase: Failed, podIP: 10.0.0.1}", (), False),
        ("spec: {hostNetwork: true}\nstatus: {podIP: 192.0.2.1}", ("192.0.2.1",), True),
        ("spec: {hostNetwork: false}", (), False),
    ],
)
def test_addresses_of_a_pod(rest: str, addresses: tuple[str, ...], host: bool) -> None:
    """A pod has the addresses of its status; one that has ended has none; host network is said."""
    (found,) = read([("f", bare("a", rest))]).snapshot.endpoints

    assert (found.addresses, found.host_network) == (addresses, host)


def test_a_pod_without_an_account_has_the_default_one() -> None:
    """A pod that names no service account runs under ``default`` with that one's labels, as in clusters."""
    account = (
        "---\napiVersion: v1\nkind: ServiceAccount\nmetadata: {name: default, namespace: x, labels: {r: s}}\n"
    )
    (found,) = read([("f", bare("a") + account)]).snapshot.endpoints

    assert found.labels["projectcalico.org/serviceaccount"] == "default"
    assert found.labels["sa:r"] == "s"


def test_a_policy_is_of_a_tier_that_there_is() -> None:
    """A policy of a tier that no manifest gives is refused, and the error says which there are."""
    text = (
        "apiVersion: projectcalico.org/v3\nkind: GlobalNetworkPolicy\nmetadata: {name: mine.p}\n"
        "spec:\n  tier: mine\n  selector: all()\n"
    )
    tier = "---\napiVersion: projectcalico.org/v3\nkind: Tier\nmetadata: {name: mine}\nspec: {order: 5}\n"

    assert read([("f", text + tier)]).policy_set.tiers[0].name == "mine"
    with pytest.raises(
        InvalidInput, match=r"f:5: .*spec.tier: no such tier; there are kube-admin, default, kube"
    ):
        read([("f", text)])


def test_a_namespace_that_is_only_named_exists() -> None:
    """Namespaces of pods and policies that no manifest gives have only their name; default is one of them."""
    text = bare("a") + "---\n" + manifest("{}").replace("namespace: x", "namespace: y")
    text += "---\napiVersion: v1\nkind: Pod\nmetadata: {name: b}\n"
    found = read([("f", text)])

    assert found.namespaces == {name: {"kubernetes.io/metadata.name": name} for name in ("default", "x", "y")}
    assert [endpoint.title for endpoint in found.snapshot.endpoints] == ["default/b", "x/a"]


def test_order_of_files_and_documents_does_not_matter() -> None:
    """The result is sorted: the same manifests in another order give the same policies and endpoints."""
    parts = [POD, manifest("{}", "a"), manifest("{ingress: [{}]}", "b"), bare("z"), bare("y", namespace="a")]
    forward = read([(f"f{place}", part) for place, part in enumerate(parts)])
    backward = read([(f"f{place}", part) for place, part in reversed(list(enumerate(parts)))])

    assert forward == backward
    assert [policy.title for policy in forward.policy_set.policies] == ["x/a", "x/b"]


TWO = [
    (bare("a") + bare("a"), "metadata.name: it stands in f:2 too; keep one"),
    (manifest("{}") + "---\n" + manifest("{}"), "metadata.name: it stands in f:1 too"),
    (
        manifest("{}").replace(", namespace: x", "") + "---\n" + manifest("{}").replace("x}", "default}"),
        "too; keep one",
    ),
    (
        bare("a", "status: {podIP: 10.0.0.1}") + bare("b", "status: {podIP: 10.0.0.1}"),
        "x/a has this address too",
    ),
    (
        bare("a", "status: {podIP: 'fd00::1'}") + bare("b", "status: {podIPs: [{ip: 'FD00:0::1'}]}"),
        "x/a has this address too",
    ),
    ("apiVersion: v1\nkind: Namespace\nmetadata: {name: a, namespace: b}", "has no namespace; leave it out"),
    (
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: a, labels: {kubernetes.io/metadata.name: b}}",
        "always the namespace's name, a",
    ),
    ("apiVersion: v1\nkind: Namespace\nmetadata: {name: a, labels: {a: 1}}", "labels.a: a label's value"),
    ("apiVersion: v1\nkind: Service\nmetadata: {name: a}", "kind: understood are AdminNetworkPolicy, "),
    ("apiVersion: apps/v1\nkind: Pod\nmetadata: {name: a}", "apiVersion: Pod is understood as v1"),
    (
        manifest("{}").replace("networking.k8s.io/v1", "extensions/v1beta1"),
        "apiVersion: NetworkPolicy is understood as ",
    ),
    (manifest("{}") + "rules: []\n", "rules: unknown field"),
    (bare("a", "spec: {hostNetwork: 1}"), "spec.hostNetwork: true or false"),
    (
        bare("a", "spec: {containers: [{ports: [{containerPort: 0}]}]}"),
        "containers[0].ports[0].containerPort",
    ),
    (bare("a", "spec: {containers: [{ports: [{name: x}]}]}"), "containers[0].ports[0].containerPort"),
    (bare("a", "status: {podIP: nonsense}"), "status.podIP: an address"),
    (bare("a", "status: {podIP: '::ffff:10.0.0.1'}"), "status.podIP: an address"),
    (bare("a", "status: {podIP: 'fe80::1%eth0'}"), "status.podIP: an address"),
    (bare("a").replace("x}", "x, labels: {'ns:team': t}}"), "metadata.labels.ns:team: a label's key"),
    (bare("a").replace("x}", "x, labels: [a]}"), "metadata.labels: a mapping"),
]


@pytest.mark.parametrize(("text", "why"), TWO)
def test_the_cluster_is_read_strictly_where_it_counts(text: str, why: str) -> None:
    """What would leave open who somebody is, or what a manifest means, is refused with its place."""
    with pytest.raises(InvalidInput) as caught:
        read([("f", text)])

    assert why in str(caught.value)
    assert caught.value.field.startswith("f:")


def test_host_network_pods_share_their_nodes_address() -> None:
    """Pods on the host's network have one address between them, and nobody minds."""
    rest = "spec: {hostNetwork: true}\nstatus: {podIP: 192.0.2.1}"

    assert len(read([("f", bare("a", rest) + bare("b", rest))]).snapshot.endpoints) == 2


def test_a_workload_claims_nothing() -> None:
    """A port's own labels lose to the implied ones, and an account it does not have is not its own."""
    claimed = {"projectcalico.org/serviceaccount": "root", "projectcalico.org/orchestrator": "x", "a": "b"}
    found = workload_labels(claimed, "x", {"kubernetes.io/metadata.name": "y", "projectcalico.org/name": "y"})

    assert found == {
        "a": "b",
        "projectcalico.org/namespace": "x",
        "projectcalico.org/orchestrator": "k8s",
        NS: "x",
        "ns:projectcalico.org/name": "x",
    }
    assert matches(WORKLOADS, found)


# Generated: some writers leave out what is empty, which may not change what a policy means.

port_items = st.fixed_dictionaries(
    {},
    optional={
        "port": st.integers(1, 65535) | st.just("http"),
        "protocol": st.sampled_from(["TCP", "UDP", "SCTP"]),
    },
)
selectors = st.fixed_dictionaries(
    {},
    optional={
        "matchLabels": st.dictionaries(st.sampled_from("ab"), st.sampled_from(["", "v", "w"]), max_size=2)
    },
)
peers = st.fixed_dictionaries({"podSelector": selectors}, optional={"namespaceSelector": selectors})
specs = st.fixed_dictionaries(
    {"podSelector": selectors},
    optional={
        "policyTypes": st.lists(st.sampled_from(["Ingress", "Egress"]), unique=True),
        "ingress": st.lists(
            st.fixed_dictionaries({}, optional={"from": st.lists(peers), "ports": st.lists(port_items)})
        ),
        "egress": st.lists(
            st.fixed_dictionaries({}, optional={"to": st.lists(peers), "ports": st.lists(port_items)})
        ),
    },
)


def pruned(value: Any) -> Any:
    """The same without lists that are empty, as a writer that omits them would have it."""
    if isinstance(value, dict):
        return {key: pruned(inner) for key, inner in value.items() if inner != []}
    return [pruned(item) for item in value] if isinstance(value, list) else value


def unplaced(found: Manifests) -> list[Any]:
    """The policies without their lines, which differ."""
    return [
        [(rule.peers, rule.traffic, rule.action) for rule in rules] if rules is not None else None
        for policy in found.policy_set.policies
        for rules in (policy.ingress, policy.egress)
    ]


@settings(deadline=None)
@given(specs)
def test_empty_is_absent(spec: dict[str, Any]) -> None:
    """A policy means the same in JSON and YAML, and without the empty lists that a writer may leave out."""
    whole = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "p", "namespace": "x"},
        "spec": spec,
    }
    texts = [json.dumps(whole), yaml.safe_dump(whole), json.dumps(pruned(whole))]
    found = [unplaced(read([("f", text)])) for text in texts]

    assert found[0] == found[1] == found[2]


FULL = """
podSelector: {matchLabels: {a: b}, matchExpressions: [{key: k, operator: In, values: [v]}]}
policyTypes: [Ingress, Egress]
ingress:
- from: [{namespaceSelector: {matchLabels: {a: b}}}, {podSelector: {}}]
  ports: [{port: http, protocol: UDP}]
egress:
- to: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}}]
  ports: [{port: 1, endPort: 2}]
"""


def test_any_value_anywhere_is_read_or_refused() -> None:
    """Whatever stands at any place of a manifest, it is a policy or InvalidInput, often the latter."""
    documents = [*yaml.safe_load_all(POD), yaml.safe_load(manifest("{}"))]
    documents[-1]["spec"] = yaml.safe_load(FULL)

    assert survives_anything(*documents) > 300
