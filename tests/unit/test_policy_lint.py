from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portwright.policy.labels import (
    EVERYTHING,
    NOTHING,
    And,
    Contains,
    EndsWith,
    Expr,
    Has,
    In,
    Not,
    Or,
    StartsWith,
    matches,
)
from portwright.policy.lint import Lint
from portwright.policy.manifests.cluster import workload_labels
from portwright.policy.manifests.read import read
from portwright.policy.population import Population, covers, describe, may_overlap
from portwright.policy.rules import Endpoint

WORLD = """
apiVersion: v1
kind: Namespace
metadata: {name: x, labels: {team: a}}
---
apiVersion: v1
kind: Namespace
metadata: {name: y, labels: {team: b}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: x, labels: {app: web}}
spec: {containers: [{ports: [{name: http, containerPort: 80}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: db, namespace: y, labels: {app: db}}
spec: {containers: [{ports: [{name: sql, containerPort: 5432}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: agent, namespace: y, labels: {app: agent}}
spec: {hostNetwork: true}
"""


def policy(spec: str, name: str = "p") -> str:
    """A NetworkPolicy of namespace x; its spec begins at line 5 of this text."""
    return (
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n"
        f"metadata: {{name: {name}, namespace: x}}\nspec:\n{spec}\n"
    )


def admin(name: str, rest: str) -> str:
    """A ClusterNetworkPolicy of the Admin tier."""
    return (
        f"apiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\n"
        f"metadata: {{name: {name}}}\nspec:\n  tier: Admin\n{rest}\n"
    )


def lints(*texts: str, world: str = WORLD) -> tuple[Lint, ...]:
    """What is said of these policies, each in its own file f0, f1, in that world."""
    return read([("world", world), *((f"f{place}", text) for place, text in enumerate(texts))]).warnings


def codes(*texts: str, world: str = WORLD) -> list[tuple[str, str]]:
    """Codes with their places."""
    return [(lint.code, str(lint.where)) for lint in lints(*texts, world=world)]


TO_B = "  egress:\n  - {}\n  - to: [{namespaceSelector: {matchLabels: {team: b}}}]\n"
HOLE = "  ingress:\n  - from:\n    - ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}\n"
# code, what is written, where the finding stands, what it must say, the same mended
CASES = [
    (
        "two-dashes",
        "  podSelector: {}\n  ingress:\n  - from:\n    - namespaceSelector: {matchLabels: {team: b}}\n"
        "    - podSelector: {matchLabels: {app: web}}\n",
        "f0:9",
        "(namespace label team=b) or (namespace x and app=web)",
        "  podSelector: {}\n  ingress:\n  - from:\n    - namespaceSelector: {matchLabels: {team: b}}\n"
        "      podSelector: {matchLabels: {app: db}}\n",
    ),
    (
        "two-dashes",
        "  egress:\n  - {}\n  - to:\n    - podSelector: {}\n    - namespaceSelector: {}\n",
        "f0:9",
        "remove the dash on line 9",
        "  egress:\n  - {}\n  - to:\n    - namespaceSelector: {}\n      podSelector: {}\n",
    ),
    (
        "dead-rules",
        "  policyTypes: [Ingress]\n  egress:\n  - {}\n",
        "f0:6",
        "policyTypes does not have Egress. Add Egress",
        "  policyTypes: [Ingress, Egress]\n  egress:\n  - {}\n",
    ),
    (
        "dead-rules",
        "  policyTypes: [Egress]\n  ingress:\n  - {}\n  egress:\n  - {}\n",
        "f0:6",
        "policyTypes does not have Ingress",
        "  policyTypes: [Egress]\n  egress:\n  - {}\n",
    ),
    (
        "empty-list",
        "  ingress:\n  - from: []\n",
        "f0:6",
        "`from: []` means anybody",
        "  ingress: []\n",
    ),
    (
        "empty-list",
        "  ingress:\n  - from: [{podSelector: {}}]\n    ports: []\n",
        "f0:7",
        "`ports: []` means every port",
        "  ingress:\n  - from: [{podSelector: {}}]\n",
    ),
    ("empty-list", "  egress:\n  - to: []\n", "f0:6", "`to: []` means anybody", "  egress:\n  - {}\n"),
    (
        "host-bits",
        "  ingress:\n  - from:\n    - ipBlock: {cidr: 10.1.2.3/8}\n",
        "f0:7",
        "Write 10.0.0.0/8, or 10.1.2.3/32",
        "  ingress:\n  - from:\n    - ipBlock: {cidr: 10.1.2.3/32}\n",
    ),
    (
        "host-bits",
        "  ingress:\n  - from:\n    - ipBlock:\n        cidr: fd00::/8\n        except: ['fd00::1/64']\n",
        "f0:9",
        "Write fd00::/64, or fd00::1/128",
        "  ingress:\n  - from:\n    - ipBlock:\n        cidr: fd00::/8\n        except: ['FD00:0::/64']\n",
    ),
    (
        "selects-nothing",
        "  podSelector: {matchLabels: {app: wbe}}\n",
        "f0:5",
        "Of app there is web, not wbe",
        "  podSelector: {matchLabels: {app: web}}\n",
    ),
    (
        "selects-nothing",
        "  podSelector: {matchLabels: {ap: web}}\n",
        "f0:5",
        "Nobody has a label ap; is app meant?",
        "  podSelector: {matchExpressions: [{key: ap, operator: DoesNotExist}]}\n",
    ),
    (
        "selects-nothing",
        "  podSelector: {matchLabels: {app: db}}\n",
        "f0:5",
        "Each label is somebody's, but nobody has all of them",
        "  podSelector: {matchLabels: {app: web}}\n",
    ),
    (
        "selects-nothing",
        "  podSelector: {matchExpressions: [{key: app, operator: DoesNotExist}]}\n",
        "f0:5",
        "Nobody has it that without app",
        "  podSelector: {matchExpressions: [{key: app, operator: Exists}]}\n",
    ),
    (
        "peer-matches-nothing",
        "  ingress:\n  - {}\n  - from:\n    - podSelector: {matchLabels: {app: web}}\n"
        "    - namespaceSelector: {matchLabels: {team: c}}\n",
        "f0:9",
        "ingress rule 2 is for namespace label team=c, which nothing is",
        "  ingress:\n  - {}\n  - from:\n    - namespaceSelector: {matchLabels: {team: b}}\n",
    ),
    (
        "named-port",
        "  ingress:\n  - ports: [{port: htpp}]\n",
        "f0:6",
        "Use one of the names that they have (http)",
        "  ingress:\n  - ports: [{port: http}]\n",
    ),
    (
        "named-port",
        "  ingress:\n  - ports: [{port: http, protocol: UDP}]\n",
        "f0:6",
        "Say protocol: TCP",
        "  ingress:\n  - ports: [{port: http, protocol: TCP}]\n",
    ),
    (
        "named-port",
        TO_B + "    ports: [{port: http}]\n",
        "f0:8",
        "no destination of egress rule 2 has a port called http (TCP)",
        TO_B + "    ports: [{port: sql}]\n",
    ),
    (
        "no-dns",
        "  policyTypes: [Egress]\n",
        "f0:4",
        "Add an egress rule: {ports: [{protocol: UDP, port: 53}, {protocol: TCP, port: 53}]}",
        "  egress:\n  - {ports: [{protocol: UDP, port: 53}, {protocol: TCP, port: 53}]}\n",
    ),
    (
        "no-dns",
        "  egress:\n  - ports: [{port: 443}, {port: 53}]\n",
        "f0:5",
        "pods of namespace x reach no name server",
        "  egress:\n  - ports: [{port: 443}, {port: 53}, {port: 50, endPort: 60, protocol: UDP}]\n",
    ),
    (
        "no-dns-tcp",
        "  egress:\n  - ports: [{protocol: UDP}]\n",
        "f0:5",
        "Add an egress rule: {ports: [{protocol: TCP, port: 53}]}",
        "  egress:\n  - ports: [{protocol: UDP}, {port: 53}]\n",
    ),
    (
        "except-allowed",
        HOLE + "    - ipBlock: {cidr: 10.1.2.0/24}\n",
        "f0:7",
        "10.1.0.0/16 is left out of this block only; ingress rule 1 of x/p (f0:6) lets it in again",
        HOLE + "    - ipBlock: {cidr: 10.1.0.0/15, except: [10.1.0.0/16]}\n",
    ),
    (
        "except-allowed",
        HOLE + "    ports: [{port: 80}]\n  - ports: [{port: 70, endPort: 80}]\n",
        "f0:7",
        "ingress rule 2 of x/p (f0:9)",
        HOLE + "    ports: [{port: 80}]\n  - ports: [{port: 70, endPort: 79}, {port: 80, protocol: UDP}]\n",
    ),
]


@pytest.mark.parametrize(("code", "wrong", "where", "says", "mended"), CASES)
def test_each_mistake_is_found_and_its_mending_accepted(
    code: str, wrong: str, where: str, says: str, mended: str
) -> None:
    """Each mistake is found once, at its line, with its meaning and the fix, which makes it go away."""
    found = [lint for lint in lints(policy(wrong)) if lint.code == code]

    assert [str(lint.where) for lint in found] == [where]
    assert says in str(found[0])
    assert str(found[0]).startswith(f"{where}: NetworkPolicy x/p: ")
    assert code not in [lint.code for lint in lints(policy(mended))]


SOUND = [
    "  podSelector: {}",
    "  podSelector: {matchLabels: {app: web}}\n  ingress: [{from: [{podSelector: {}}], ports: [{port: 80}]}]",
    "  ingress:\n  - from:\n    - podSelector: {matchLabels: {app: web}}\n    - podSelector: {}",
    "  ingress:\n  - from:\n    - namespaceSelector: {matchLabels: {team: a}}\n    - namespaceSelector: {}",
    "  ingress:\n  - from: [{namespaceSelector: {}}, {ipBlock: {cidr: 10.0.0.0/8}}, {podSelector: {}}]",
    "  policyTypes: [Ingress, Egress]\n  ingress: []\n  egress: [{ports: [{protocol: UDP}, {port: 53}]}]",
    "  egress: [{to: [{ipBlock: {cidr: 10.0.0.1/32}}], ports: [{protocol: UDP, port: dns}, {port: dns-t}]}]",
    "  ingress:\n  - from: [{ipBlock: {cidr: 0.0.0.0/0, except: [10.0.0.0/8]}}, {ipBlock: {cidr: '::/0'}}]",
    "  ingress:\n  - from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}}, {podSelector: {}}]",
]


@pytest.mark.parametrize("spec", SOUND)
def test_sound_policies_are_left_alone(spec: str) -> None:
    """A policy that makes no mistake gets no word, among them what looks like one."""
    assert lints(policy(spec)) == ()


def test_nobody_is_missed_where_nobody_is_known() -> None:
    """Without pods nothing is said of whom selectors find; forms are still looked at."""
    text = policy(
        "  podSelector: {matchLabels: {a: w}}\n  ingress:\n  - from: [{podSelector: {matchLabels: {a: b}}}]\n"
        "    ports: [{port: nope}]\n  - ports: []\n"
    )

    assert codes(text, world="") == [("empty-list", "f0:9")]


def test_live_ports_count_as_there() -> None:
    """Endpoints that no manifest gives but that are known count for the lints, and are not in the result."""
    text = policy("  podSelector: {matchLabels: {app: job}}\n")
    live = Endpoint(name="port-1", namespace="x", labels=workload_labels({"app": "job"}, "x", {}))

    assert [lint.code for lint in read([("f", text)], [live]).warnings] == []
    assert read([("f", text)], [live]).snapshot.endpoints == ()
    other = Endpoint(name="port-2", namespace="x", labels=workload_labels({"app": "other"}, "x", {}))
    assert [lint.code for lint in read([("f", text)], [other]).warnings] == ["selects-nothing"]


def test_pods_on_the_host_are_told() -> None:
    """A policy for pods on their host's network alone is told, since it does not hold for them."""
    agents = policy("  podSelector: {matchLabels: {app: agent}}\n").replace("namespace: x", "namespace: y")
    everybody = policy("  podSelector: {}\n").replace("namespace: x", "namespace: y")
    (found,) = lints(agents)

    assert (found.code, str(found.where)) == ("host-network", "f0:5")
    assert "(y/agent)" in found.text
    assert lints(everybody) == ()


DENY_EGRESS = "  podSelector: {SELECTOR}\n  policyTypes: [Egress]\n"
DNS = "  podSelector: {SELECTOR}\n  egress:\n  - ports: [{port: 53, protocol: UDP}, {port: 53}]\n"


@pytest.mark.parametrize("world", [WORLD, ""])
@pytest.mark.parametrize(
    ("denied", "served", "quiet"),
    [
        ("", "", True),
        ("matchLabels: {app: web}", "", True),
        ("matchLabels: {app: web}", "matchLabels: {app: web}", True),
        ("matchLabels: {app: web}", "matchLabels: {app: other}", False),
        ("matchLabels: {app: web}", "matchExpressions: [{key: app, operator: In, values: [web, db]}]", True),
        ("matchLabels: {app: web}", "matchExpressions: [{key: app, operator: Exists}]", True),
    ],
)
def test_another_policy_may_serve_names(world: str, denied: str, served: str, quiet: bool) -> None:
    """Egress that one policy isolates and another opens for names is in order, if it is for the same pods."""
    found = codes(
        policy(DENY_EGRESS.replace("SELECTOR", denied), "deny"),
        policy(DNS.replace("SELECTOR", served), "dns"),
        world=world,
    )

    assert (("no-dns", "f0:4") not in found) == quiet


def test_a_staged_policy_serves_nobody() -> None:
    """A dry run opens nothing, so it serves no names."""
    staged = policy(DNS.replace("SELECTOR", ""), "dns")
    staged = staged.replace("networking.k8s.io", "projectcalico.org").replace("/v1", "/v3")
    staged = staged.replace("kind: ", "kind: StagedKubernetes")

    assert ("no-dns", "f0:4") in codes(policy(DENY_EGRESS.replace("SELECTOR", "")), staged)


def test_a_network_set_is_no_subject() -> None:
    """A policy that would select only a network set selects nothing."""
    text = (
        "apiVersion: projectcalico.org/v3\nkind: GlobalNetworkSet\nmetadata: {name: s, labels: {net: a}}\n"
        "spec: {nets: [10.0.0.0/8]}\n---\napiVersion: projectcalico.org/v3\nkind: GlobalNetworkPolicy\n"
        "metadata: {name: p}\nspec:\n  selector: net == 'a'\n"
    )

    assert codes(text) == [("selects-nothing", "f0:10")]


def test_an_admin_policy_may_serve_names() -> None:
    """So is what an admin policy accepts; what it denies or leaves to others serves nobody."""
    rule = (
        "  priority: 1\n  subject: {namespaces: {}}\n  egress:\n  - action: ACTION\n"
        "    to: [{networks: [10.0.0.10/32]}]\n    protocols:\n"
        "    - udp: {destinationPort: {number: 53}}\n    - tcp: {destinationPort: {number: 53}}\n"
    )
    deny = policy(DENY_EGRESS.replace("SELECTOR", ""))

    assert codes(deny, admin("a", rule.replace("ACTION", "Accept"))) == []
    for action in ("Deny", "Pass"):
        assert codes(deny, admin("a", rule.replace("ACTION", action))) == [("no-dns", "f0:4")]


@pytest.mark.parametrize("world", [WORLD, ""])
@pytest.mark.parametrize(
    ("asked", "subject", "told"),
    [
        ("networks: [0.0.0.0/0]", "namespaces: {}", True),
        ("networks: [10.0.0.10/32, '::/0']", "namespaces: {matchLabels: {team: a}}", True),
        ("networks: [10.0.0.10/32]", "namespaces: {}", False),
        ("networks: [0.0.0.0/0]", "namespaces: {matchLabels: {team: b}}", False),
    ],
)
def test_names_are_as_good_as_who_says_them(world: str, asked: str, subject: str, told: bool) -> None:
    """Domain names for pods that may ask any name server are told, whichever policy lets them ask."""
    names = admin(
        "names",
        "  priority: 1\n  subject: {namespaces: {matchLabels: {team: a}}}\n  egress:\n"
        "  - {action: Accept, to: [{domainNames: [a.example]}]}\n",
    )
    dns = admin(
        "dns",
        f"  priority: 2\n  subject: {{{subject}}}\n  egress:\n  - action: Accept\n"
        f"    to: [{{{asked}}}]\n    protocols: [{{udp: {{destinationPort: {{number: 53}}}}}}]\n",
    )

    assert (("names-any-server", "f0:9") in codes(names, dns, world=world)) == told


def test_an_except_is_compared_with_policies_of_the_same_pods() -> None:
    """What one policy leaves out and another lets in is told only if both select a pod, now or ever."""
    hole = "  podSelector: {SELECTOR}\n" + HOLE
    wide = policy(
        "  podSelector: {matchLabels: {app: web}}\n  ingress:\n  - from: [{ipBlock: {cidr: 10.0.0.0/8}}]", "q"
    )

    for world in (WORLD, ""):
        same = codes(policy(hole.replace("SELECTOR", "")), wide, world=world)
        other = codes(policy(hole.replace("SELECTOR", "matchLabels: {app: db}")), wide, world=world)
        assert ("except-allowed", "f0:8") in same
        assert ("except-allowed", "f0:8") in codes(
            policy(hole.replace("SELECTOR", "matchLabels: {a: none}") + "  - {}\n"), world=world
        )
        assert ("except-allowed", "f0:8") not in codes(
            policy(hole.replace("SELECTOR", "") + "  egress:\n  - {}\n"), world=world
        )
        assert ("except-allowed", "f0:8") not in other


RULE = "  ingress: [{action: Deny, from: [{namespaces: {}}]}]\n"


@pytest.mark.parametrize("world", [WORLD, ""])
@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ("{namespaces: {}}", "{namespaces: {}}", True),
        ("{namespaces: {matchLabels: {team: a}}}", "{namespaces: {matchLabels: {team: b}}}", False),
        ("{namespaces: {matchLabels: {team: a}}}", "{pods: {podSelector: {matchLabels: {app: web}}}}", True),
    ],
)
def test_equal_priorities(world: str, first: str, second: str, told: bool) -> None:
    """Admin policies of one priority are told if a pod is selected by both in one direction, now or ever."""

    def found(priority: int, rule: str) -> list[Lint]:
        one = admin("a", f"  priority: 5\n  subject: {first}\n{RULE}")
        other = admin("b", f"  priority: {priority}\n  subject: {second}\n{rule}")
        return [lint for lint in lints(one, other, world=world) if lint.code == "equal-priority"]

    same = found(5, RULE)
    assert [str(lint.where) for lint in same] == (["f1:6"] if told else [])
    if told:
        assert "a (f0:1) has priority 5 in kube-admin too" in same[0].text
        assert "selects the same pods for ingress" in same[0].text
    assert found(6, RULE) == found(5, RULE.replace("ingress", "egress").replace("from", "to")) == []


def test_lints_are_sorted_by_place() -> None:
    """Findings come in the order of files and lines, each once."""
    texts = [policy("  ingress:\n  - ports: []\n    from: []\n  - from: []\n", name) for name in ("b", "a")]
    found = lints(*texts)

    assert [str(lint.where) for lint in found] == ["f0:6", "f0:7", "f0:8", "f1:6", "f1:7", "f1:8"]


@pytest.mark.parametrize(
    ("expr", "words"),
    [
        (EVERYTHING, "every pod"),
        (NOTHING, "nobody"),
        (In("a", frozenset({"c", "b"})), "a=b|c"),
        (In("a", frozenset({""})), "a=''"),
        (Not(In("ns:a", frozenset({"b"}))), "namespace label a!=b"),
        (
            And((In("ns:kubernetes.io/metadata.name", frozenset({"x"})), Has("sa:r"))),
            "namespace x and with service account label r",
        ),
        (Not(Has("a")), "without a"),
        (
            Or((Contains("a", "b"), Not(StartsWith("c", "d")), EndsWith("e", "f"))),
            "(a contains b) or (not (c starts with d)) or (e ends with f)",
        ),
    ],
)
def test_expressions_in_words(expr: Expr, words: str) -> None:
    """An expression reads as the labels it asks for."""
    assert describe(expr) == words


keys = st.sampled_from(["a", "b", "ns:a"])
values = st.sampled_from(["", "v", "w", "vw"])
exprs = st.recursive(
    st.just(EVERYTHING)
    | st.builds(Has, keys)
    | st.builds(In, keys, st.frozensets(values, max_size=3))
    | st.builds(Contains, keys, values)
    | st.builds(StartsWith, keys, values)
    | st.builds(EndsWith, keys, values),
    lambda inner: (
        st.builds(Not, inner)
        | st.builds(And, st.lists(inner, max_size=3).map(tuple))
        | st.builds(Or, st.lists(inner, max_size=3).map(tuple))
    ),
    max_leaves=6,
)
label_sets = st.lists(st.dictionaries(keys, values), max_size=8)


@settings(deadline=None)
@given(exprs, label_sets)
def test_a_population_answers_as_matches_does(expr: Expr, world: list[dict[str, str]]) -> None:
    """The set of an expression is those endpoints of whose labels it is true, each by itself."""
    endpoints = [Endpoint(name=str(place), labels=labels) for place, labels in enumerate(world)]
    population = Population(endpoints)

    expected = [str(place) for place, labels in enumerate(world) if matches(expr, labels)]
    assert population.names(population.of(expr)) == expected


V, W, VW = (In("a", frozenset(values)) for values in ("v", "w", "vw"))


@pytest.mark.parametrize(
    ("wide", "narrow", "covered", "overlap"),
    [
        (EVERYTHING, V, True, True),
        (V, EVERYTHING, False, True),
        (V, V, True, True),
        (VW, V, True, True),
        (V, VW, False, True),
        (V, W, False, False),
        (V, In("b", frozenset("w")), False, True),
        (Has("a"), V, True, True),
        (V, Has("a"), False, True),
        (V, And((V, Has("b"))), True, True),
        (And((V, Has("b"))), V, False, True),
        (V, Not(Has("a")), False, False),
        (Has("a"), Not(Has("a")), False, False),
        (V, Not(VW), False, False),
        (VW, Not(V), False, True),
        (V, Not(W), False, True),
        (Not(V), Not(W), False, True),
    ],
)
def test_what_is_known_of_two_expressions(wide: Expr, narrow: Expr, covered: bool, overlap: bool) -> None:
    """Single terms are compared: which is sure to hold where another does, and which never do together."""
    assert covers(wide, narrow) is covered
    assert may_overlap(wide, narrow) is may_overlap(narrow, wide) is overlap


@settings(deadline=None)
@given(exprs, exprs, label_sets)
def test_what_is_said_of_expressions_holds_for_all_labels(
    left: Expr, right: Expr, world: list[dict[str, str]]
) -> None:
    """One that covers another is true wherever that is; two that can't overlap are never true together."""
    for labels in world:
        if covers(left, right):
            assert matches(left, labels) or not matches(right, labels)
        if not may_overlap(left, right):
            assert not (matches(left, labels) and matches(right, labels))
