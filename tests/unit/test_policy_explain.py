"""`why`: what nearly matched, in words that agree with the engine, and mends that do flip the verdict."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from portwright.policy.engine import Engine, Implicit, sides
from portwright.policy.explain import Explanation, explain, explained
from portwright.policy.labels import (
    EVERYTHING,
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
from portwright.policy.lacks import expr_lacks, rule_peer_lacks, rule_traffic_lacks
from portwright.policy.manifests.documents import Document, parse
from portwright.policy.manifests.read import read
from portwright.policy.matching import World, rule_peers_match, rule_traffic_matches
from portwright.policy.mend import AddPolicy, AddRule, Change, ChangeLabels, LiftRule, applied, wished
from portwright.policy.rules import (
    ICMP,
    SCTP,
    TCP,
    UDP,
    Action,
    Direction,
    EndpointKind,
    Flow,
    Policy,
    PolicySet,
    Rule,
    Snapshot,
)
from portwright.policy.snippets import Snippet, allowing, flow_style
from tests.fix_policy import (
    CORPORA,
    Step,
    corpus,
    cyclonus,
    cyclonus_policies,
    state,
    states,
    texts,
)

WORLD = """
apiVersion: v1
kind: Namespace
metadata: {name: web}
---
apiVersion: v1
kind: Namespace
metadata: {name: db}
---
apiVersion: v1
kind: Pod
metadata: {name: a, namespace: web, labels: {app: web}}
status: {podIP: 10.0.0.1}
---
apiVersion: v1
kind: Pod
metadata: {name: "0", namespace: db, labels: {app: db}}
spec: {containers: [{name: main, ports: [{name: sql, containerPort: 5432}]}]}
status: {podIP: 10.0.0.2}
---
apiVersion: v1
kind: Node
metadata: {name: n1}
status: {addresses: [{type: InternalIP, address: 192.0.2.1}]}
"""

METRICS = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: allow-metrics, namespace: db}
spec:
  podSelector: {}
  ingress:
  - ports: [{port: 9187}]
"""

API = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: allow-api, namespace: db}
spec:
  podSelector: {matchLabels: {app: db}}
  ingress:
  - from:
    - namespaceSelector: {}
      podSelector: {matchLabels: {app: api}}
    ports: [{port: sql}]
"""

EGRESS = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: default-egress, namespace: web}
spec:
  podSelector: {}
  policyTypes: [Egress]
  egress:
  - ports: [{port: 53, protocol: UDP}]
  - to: [{namespaceSelector: {}}]
"""

TO_DB = Flow(source="10.0.0.1", destination="10.0.0.2", protocol=TCP, source_port=40_000, port=5432)


def world(*policies: str) -> tuple[PolicySet, Snapshot]:
    """The two pods and the node, with these policies, each a file p1.yaml, p2.yaml ..."""
    files = [("world.yaml", WORLD), *((f"p{n}.yaml", text) for n, text in enumerate(policies, start=1))]
    manifests = read(files)
    return manifests.policy_set, manifests.snapshot


def lines(*policies: str, flow: Flow = TO_DB) -> list[str]:
    """The explanation as text."""
    return str(explain(*world(*policies), flow)).splitlines()


# --- the claim: every deny has a reason that, mended as it says, flips ---


def check_mends(told: Explanation, policies: PolicySet, snapshot: Snapshot, where: str, most: int) -> None:
    """A denied flow has mends, and an engine that knows nothing of them but the result allows it."""
    assert told.mends, where
    for mend in told.mends[:most]:
        assert Engine(*applied(mend.changes, policies, snapshot)).connect(told.flow).allowed, (
            f"{where}: {mend}"
        )
    assert "to mend it: " in str(told), where


@pytest.mark.parametrize("name", CORPORA)
def test_every_deny_is_mended(name: str, record_property: Callable[[str, object], None]) -> None:
    """Each deny of a corpus has a reason, and each of its mends flips the verdict."""
    denies = 0
    for asked in states(name):
        engine = Engine(asked.policies, asked.snapshot)
        for flow, row in asked.asked:
            told = explained(engine, asked.policies, flow)
            assert told.allowed is row.allowed
            if row.allowed:
                assert told.mends == ()
                continue
            denies += 1
            check_mends(told, asked.policies, asked.snapshot, f"{asked.title}: {row}", most=3)

    record_property("denies", denies)
    assert denies > 0


def cyclonus_denies(step: Step) -> int:
    """How many denies a step has; each is checked."""
    policies = cyclonus_policies(step.policies)
    engine = Engine(policies, step.snapshot)
    denies = index = 0
    for source in step.addresses:
        for destination in step.addresses:
            for protocol, port in step.ports:
                index += 1
                if source == destination or step.expected[index - 1] == "1":
                    continue
                flow = Flow(source=source, destination=destination, protocol=protocol, port=port)
                told = explained(engine, policies, flow)
                check_mends(told, policies, step.snapshot, step.title, most=1)
                denies += 1
    return denies


def edited(documents: list[Document], change: Change) -> list[dict[str, Any]]:
    """The manifests as a person would change them who does what the text says."""
    bodies = copy.deepcopy([document.body for document in documents])
    for body in bodies:
        meta = body["metadata"]
        name, namespace = meta["name"], meta.get("namespace", "")
        if isinstance(change, ChangeLabels):
            if body["kind"] == "Pod" and f"{namespace}/{name}" == change.endpoint:
                labels = {**(meta.get("labels") or {}), **change.labels}
                meta["labels"] = {key: value for key, value in labels.items() if value is not None}
            continue
        assert not isinstance(change, AddPolicy), "no corpus has a network that is not open"
        policy = change.policy
        calico = "projectcalico" in body["apiVersion"]
        kind = "CalicoNetworkPolicy" if calico and body["kind"] == "NetworkPolicy" else body["kind"]
        if (kind, namespace, name) != (policy.kind, policy.namespace, policy.name):
            continue
        rules = body["spec"].get(change.direction.value) or []
        body["spec"][change.direction.value] = rules
        if isinstance(change, LiftRule):
            del rules[change.index]
        else:
            rules.insert(change.index, yaml.safe_load(flow_style(change.snippet.body)))
    return bodies


@pytest.mark.slow
@pytest.mark.parametrize("name", CORPORA)
def test_manifests_mended_as_it_says(name: str) -> None:
    """Who edits the manifests as a mend says, its rule pasted as it is printed, gets the flow."""
    for case in corpus(name).cases:
        asked = state(name, case)
        documents = [document for file, text in texts(name, case) for document in parse(text, file)]
        engine = Engine(asked.policies, asked.snapshot)
        # One edit is tried once, however many rows it would mend alike.
        tried: set[str] = set()
        for flow, row in asked.asked:
            for mend in explained(engine, asked.policies, flow).mends:
                if str(mend) in tried:
                    continue
                tried.add(str(mend))
                bodies = [document.body for document in documents]
                for change in mend.changes:
                    pairs = zip(documents, bodies, strict=True)
                    bodies = edited([structs.replace(d, body=body) for d, body in pairs], change)
                text = json.dumps({"apiVersion": "v1", "kind": "List", "items": bodies})
                after = state(name, case, [("edited.json", text)])
                found = Engine(after.policies, after.snapshot).connect(flow)
                assert found.allowed, f"{asked.title}: {row}: {mend}"


@pytest.mark.slow
def test_every_deny_of_cyclonus_is_mended(record_property: Callable[[str, object], None]) -> None:
    """The same of each of its denies but those of a pod to itself, which the specification allows."""
    denies = sum(cyclonus_denies(step) for step in cyclonus())

    record_property("denies", denies)
    print(f"{denies} denies explained and mended")
    assert denies > 20_000


# --- words agree with the engine ---


@pytest.mark.parametrize("name", CORPORA)
def test_words_agree_with_the_engine(name: str) -> None:
    """A rule's condition lacks nothing exactly if the engine says that it holds."""
    for asked in states(name):
        engine = Engine(asked.policies, asked.snapshot)
        for flow, _ in asked.asked:
            for direction in Direction:
                own, other = sides(flow, direction)
                for policy in asked.policies.policies:
                    for rule in policy.rules(direction) or ():
                        peers = rule_peers_match(rule, own, other, engine.world)
                        assert (not rule_peer_lacks(rule, own, other, engine.world)) is peers
                        traffic = rule_traffic_matches(rule, flow, engine.world)
                        assert (not rule_traffic_lacks(rule, flow, engine.world)) is traffic


KEYS, VALUES = st.sampled_from(["a", "b", "ns:a"]), st.sampled_from(["x", "y", "xy"])
ATOMS: st.SearchStrategy[Expr] = st.one_of(
    st.just(EVERYTHING),
    st.builds(Has, KEYS),
    st.builds(In, KEYS, st.frozensets(VALUES, max_size=2)),
    st.builds(Contains, KEYS, VALUES),
    st.builds(StartsWith, KEYS, VALUES),
    st.builds(EndsWith, KEYS, VALUES),
)
EXPRESSIONS: st.SearchStrategy[Expr] = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.builds(Not, inner),
        st.builds(And, st.lists(inner, max_size=3).map(tuple)),
        st.builds(Or, st.lists(inner, max_size=3).map(tuple)),
    ),
    max_leaves=6,
)
LABELS = st.dictionaries(KEYS, VALUES)


@given(EXPRESSIONS, LABELS)
@settings(max_examples=400, deadline=None)
def test_what_an_expression_lacks(expr: Expr, labels: dict[str, str]) -> None:
    """Labels lack nothing exactly if the expression is true of them."""
    assert (expr_lacks(expr, labels) == ()) is matches(expr, labels)


@given(EXPRESSIONS, LABELS, st.booleans())
@settings(max_examples=400, deadline=None)
def test_what_is_wished_is_the_endpoints_own(expr: Expr, labels: dict[str, str], want: bool) -> None:
    """Wishes never touch a namespace's labels, and one for a plain condition makes it so."""
    wish = wished(expr, labels, want)

    assert wish is None or not any(":" in key for key in wish)
    if wish is not None and not isinstance(expr, And | Or | Not):
        after = {key: value for key, value in {**labels, **wish}.items() if value is not None}
        assert matches(expr, after) is want


# --- the text ---


def test_implicit_deny_in_full() -> None:
    """The example of the specification: both sides, both policies, the nearest first, and what to do."""
    assert lines(API, METRICS, EGRESS) == [
        "DENY  web/a -> db/0 tcp/5432",
        "  egress of web/a: ALLOW by web/default-egress rule 2 p3.yaml:10, tier default",
        "  ingress of db/0: DENY, tier default, no rule matched (implicit deny because 2 policies select it)",
        "    db/allow-api rule 1 p1.yaml:8      peer NO (needs app=api, has app=web)  port OK",
        "    db/allow-metrics rule 1 p2.yaml:8  peer OK  port NO (needs tcp/9187)",
        "  to mend it: give web/a the label app=api",
        "          or: add to NetworkPolicy db/allow-api (p1.yaml:2) an ingress rule: "
        "allow from pods app=web of namespace web, tcp/5432",
        "              - {from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: web}}, "
        "podSelector: {matchLabels: {app: web}}}], ports: [{protocol: TCP, port: 5432}]}",
    ]


def test_file_and_line_are_the_manifests() -> None:
    """Each place that the text names is a line of the file that holds the rule."""
    assert API.splitlines()[8 - 1].startswith("  - from:")
    assert METRICS.splitlines()[8 - 1].startswith("  - ports:")
    assert EGRESS.splitlines()[10 - 1].startswith("  - to:")


def test_nearest_comes_first() -> None:
    """A rule that lacks one thing stands before one that lacks two, whatever their policies' order."""
    far = API.replace("allow-api", "aaa").replace("port: sql", "port: 1")

    shown = [line for line in lines(far, METRICS) if " rule 1 " in line]

    assert [line.split()[0] for line in shown] == ["db/allow-metrics", "db/aaa"]
    assert "peer NO" in shown[1]
    assert "port NO" in shown[1]


def test_deciding_tier_comes_first() -> None:
    """The rules of the tier that denied stand before those of a tier that passed, however near these are."""
    admin = """
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: aaa}
spec:
  tier: Admin
  priority: 1
  subject: {namespaces: {}}
  ingress:
  - {action: Accept, from: [{namespaces: {matchLabels: {kubernetes.io/metadata.name: db}}}]}
"""
    shown = [line for line in lines(admin, API.replace("port: sql", "port: 1")) if " rule 1 " in line]

    assert [line.split()[0] for line in shown] == ["db/allow-api", "aaa"]


def test_named_port_tells_its_number() -> None:
    """A port's name is explained by the number that the destination gives it, or by its lack."""
    other = API.replace("app: api", "app: web").replace("name: allow-api", "name: b")

    text = "\n".join(lines(other, flow=Flow(source="10.0.0.1", destination="10.0.0.2", protocol=TCP, port=1)))
    missing = "\n".join(lines(other.replace("port: sql", "port: admin")))

    assert "port NO (needs tcp port sql, which is 5432 of db/0)" in text
    assert "port NO (needs tcp port admin, which db/0 has not under tcp)" in missing


def test_explicit_deny_names_its_line() -> None:
    """A rule that denies is named with its file and line, and lifting it or going before it mends."""
    deny = """
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: stop}
spec:
  tier: Admin
  priority: 1
  subject: {namespaces: {}}
  ingress:
  - {action: Accept, from: [{namespaces: {matchLabels: {kubernetes.io/metadata.name: db}}}]}
  - {action: Deny, from: [{namespaces: {}}]}
"""
    told = explain(*world(deny), TO_DB)

    assert "ingress of db/0: DENY by stop rule 2 p1.yaml:11 (deny), tier kube-admin" in str(told)
    assert [type(mend.changes[0]) for mend in told.mends] == [LiftRule, AddRule]
    assert str(told.mends[0]) == "lift ingress rule 2 (p1.yaml:11) of ClusterNetworkPolicy stop (p1.yaml:2)"
    assert "before ingress rule 2" in str(told.mends[1])


def test_both_sides_are_mended_together() -> None:
    """Where both sides deny, a mend has a change for each."""
    closed = EGRESS.replace("  - to: [{namespaceSelector: {}}]\n", "")
    told = explain(*world(METRICS, closed), TO_DB)

    assert told.egress is not None
    assert told.ingress is not None
    assert not told.egress.decision.allowed
    assert not told.ingress.decision.allowed
    assert [len(mend.changes) for mend in told.mends] == [2]
    assert "; and add to NetworkPolicy db/allow-metrics" in str(told)


def test_policy_without_rules_is_named() -> None:
    """A policy that selects and has no rule is named as such, with its place."""
    bare = METRICS.replace("  ingress:\n  - ports: [{port: 9187}]\n", "")

    assert "    NetworkPolicy db/allow-metrics (p1.yaml:2) has no ingress rule" in lines(bare)


def test_label_that_is_too_much_is_taken() -> None:
    """A rule that a label excludes from is mended by taking the label."""
    exclude = API.replace(
        "{matchLabels: {app: api}}", "{matchExpressions: [{key: app, operator: DoesNotExist}]}"
    )
    told = explain(*world(exclude), TO_DB)

    assert told.mends[0].changes == (ChangeLabels(endpoint="web/a", labels={"app": None}),)
    assert "peer NO (must not have app=web)" in str(told)
    assert str(told.mends[0]) == "take the label app from web/a"


def test_no_label_is_invented_for_a_namespace() -> None:
    """A pod cannot be given its namespace's labels: the mend is a rule then."""
    told = explain(*world(API.replace("namespaceSelector: {}\n      podSelector", "podSelector")), TO_DB)

    assert "needs namespace db, is in web; needs app=api, has app=web" in str(told)
    assert [type(change) for mend in told.mends for change in mend.changes] == [AddRule]


def test_outside_is_told_apart() -> None:
    """Addresses outside, and nodes, are named as what they are, since no selector finds them."""
    outside = Flow(source="198.51.100.1", destination="10.0.0.2", protocol=TCP, port=5432)
    node = Flow(source="192.0.2.1", destination="10.0.0.2", protocol=TCP, port=5432)

    assert "is no pod: selectors find no address outside" in "\n".join(lines(API, flow=outside))
    assert "egress of 198.51.100.1: no policy holds there" in "\n".join(lines(API, flow=outside))
    text = "\n".join(lines(API, flow=node))
    assert "DENY  node n1 -> db/0" in text
    assert "is node n1: selectors find no node and no host-network pod" in text


def test_built_in_rules_are_named() -> None:
    """What a built-in rule allows is told by its name, and what the policies would have said."""
    policies, snapshot = world(METRICS)
    own = Flow(source="10.0.0.2", destination="10.0.0.2", protocol=TCP, port=1)
    local = Snapshot(
        endpoints=tuple(
            type(e)(**{f: getattr(e, f) for f in e.__struct_fields__} | {"local_node": e.name == "n1"})
            for e in snapshot.endpoints
        )
    )
    probe = Flow(source="192.0.2.1", destination="10.0.0.2", protocol=TCP, port=1)

    assert "ALLOW, built-in rule own-address" in str(explain(policies, snapshot, own))
    told = explain(policies, local, probe)
    assert told.allowed
    assert told.ingress is not None
    assert told.ingress.decision.implicit is Implicit.LOCAL_NODE
    assert "ALLOW, built-in rule local-node: the node reaches" in str(told)
    assert "policies alone would deny it" in str(told)


def test_icmp_is_mended_by_what_the_kind_can_say() -> None:
    """A NetworkPolicy has no word for ICMP: the rule allows all traffic, and says so."""
    ping = Flow(source="10.0.0.1", destination="10.0.0.2", protocol=ICMP, icmp_type=8, icmp_code=0)
    told = explain(*world(METRICS), ping)

    assert "DENY  web/a -> db/0 icmp 8/0" in str(told)
    assert "all traffic (a NetworkPolicy cannot name icmp 8/0)" in str(told.mends[-1])


def test_long_lists_are_cut() -> None:
    """The text shows the ten nearest rules and how many more there are; the value has them all."""
    many = METRICS + "".join(f"  - ports: [{{port: {port}}}]\n" for port in range(1, 31))
    told = explain(*world(many), TO_DB)

    assert told.ingress is not None
    assert len(told.ingress.near) == 31
    assert sum("port NO" in line for line in str(told).splitlines()) == 10
    assert "    and 21 rules further off" in str(told)


def test_mends_change_nothing() -> None:
    """Applying a mend gives new values and leaves the old ones as they were."""
    policies, snapshot = world(API, METRICS)
    before = (str(policies), str(snapshot))

    for mend in explain(policies, snapshot, TO_DB).mends:
        assert applied(mend.changes, policies, snapshot) != (policies, snapshot)

    assert (str(policies), str(snapshot)) == before


@pytest.mark.parametrize("direction", Direction)
def test_changes_hit_the_rule_that_they_name(direction: Direction) -> None:
    """A rule is put before, or taken from, exactly the place that is named, in its direction only."""
    rules = tuple(Rule(action=Action.DENY, name=name) for name in "abc")
    policy = Policy(kind="T", name="p", tier="default", order=1.0, ingress=rules, egress=rules)
    other = Direction.EGRESS if direction is Direction.INGRESS else Direction.INGRESS
    snippet = Snippet(rule=Rule(action=Action.ALLOW, name="new"), says="", body=None)

    def names(change: Change, where: Direction) -> str:
        found, _ = applied((change,), PolicySet(policies=(policy,)), Snapshot())
        return " ".join(rule.name for rule in found.policies[0].rules(where) or ())

    lift = LiftRule(policy=policy, direction=direction, index=1)
    assert (names(lift, direction), names(lift, other)) == ("a c", "a b c")
    add = AddRule(policy=policy, direction=direction, index=1, snippet=snippet)
    assert (names(add, direction), names(add, other)) == ("a new b c", "a b c")


KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "NetworkPolicy": (
        "networking.k8s.io/v1",
        "web",
        {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]},
    ),
    "CalicoNetworkPolicy": ("projectcalico.org/v3", "web", {"types": ["Ingress", "Egress"]}),
    "GlobalNetworkPolicy": ("projectcalico.org/v3", "", {"types": ["Ingress", "Egress"]}),
    "ClusterNetworkPolicy": (
        "policy.networking.k8s.io/v1alpha2",
        "",
        {"tier": "Admin", "priority": 1, "subject": {"namespaces": {}}},
    ),
    "AdminNetworkPolicy": (
        "policy.networking.k8s.io/v1alpha1",
        "",
        {"priority": 1, "subject": {"namespaces": {}}},
    ),
    "BaselineAdminNetworkPolicy": ("policy.networking.k8s.io/v1alpha1", "", {"subject": {"namespaces": {}}}),
}
#: A pod with the labels of db/0 in another namespace.
TWIN = """
apiVersion: v1
kind: Pod
metadata: {name: twin, namespace: web, labels: {app: db}}
status: {podIP: 10.0.0.9}
"""
SERVICES = [
    Flow(
        source="10.0.0.1",
        destination="10.0.0.2",
        protocol=protocol,
        port=port,
        icmp_type=kind,
        icmp_code=code,
    )
    for protocol, port, kind, code in (
        (TCP, 80, None, None),
        (TCP, 81, None, None),
        (TCP, None, None, None),
        (UDP, 80, None, None),
        (SCTP, 80, None, None),
        (ICMP, None, 8, 0),
        (ICMP, None, 8, 1),
        (ICMP, None, 0, 0),
        (47, None, None, None),
    )
]


@pytest.mark.parametrize(
    ("kind", "direction", "other"),
    [
        (kind, direction, other)
        for kind in KINDS
        for direction in Direction
        for other in ("10.0.0.2", "192.0.2.1", "198.51.100.7")
        # Admin kinds have no ingress peer outside, nor do they deny any.
        if other == "10.0.0.2" or direction is Direction.EGRESS or not KINDS[kind][0].startswith("policy.")
    ],
)
def test_snippet_is_what_the_reader_makes_of_it(kind: str, direction: Direction, other: str) -> None:
    """A rule as it is printed, read back, matches the packets and peers of the rule that was tried."""
    version, namespace, spec = KINDS[kind]
    _, snapshot = world(TWIN)
    seen = World(snapshot)
    for flow in SERVICES:
        snippet = allowing(kind, direction, other, flow, seen)
        meta = {"name": "default" if kind.startswith("Baseline") else "p", "namespace": namespace}
        body = {
            "apiVersion": version,
            "kind": kind.removeprefix("Calico"),
            "metadata": {key: value for key, value in meta.items() if value},
            "spec": spec | {direction.value: [yaml.safe_load(flow_style(snippet.body))]},
        }
        rule = (read([("p.json", json.dumps(body))]).policy_set.policies[0].rules(direction) or ())[0]

        assert rule.action is Action.ALLOW
        for asked in SERVICES:
            found = rule_traffic_matches(rule, asked, seen)
            assert found is rule_traffic_matches(snippet.rule, asked, seen), (flow, asked)
        assert rule_traffic_matches(rule, flow, seen)
        for address in ("10.0.0.1", "10.0.0.2", "10.0.0.9", "192.0.2.1", "198.51.100.7", "198.51.100.8"):
            assert rule_peers_match(rule, "10.0.0.1", address, seen) is (address == other)
            assert rule_peers_match(snippet.rule, "10.0.0.1", address, seen) is (address == other)


def test_a_mend_is_found_behind_many_that_do_not_help() -> None:
    """Where each label that lets in at one side shuts out at the other, the mend is a rule."""
    rules = "".join(
        f"  - from: [{{namespaceSelector: {{}}, podSelector: {{matchLabels: {{app: x{n}}}}}}}]\n"
        for n in range(100)
    )
    many = API[: API.index("  - from")] + rules
    shut = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: only-web, namespace: web}
spec:
  podSelector: {matchExpressions: [{key: app, operator: NotIn, values: [web]}]}
  policyTypes: [Egress]
"""
    told = explain(*world(many, shut), TO_DB)

    assert [type(change) for mend in told.mends for change in mend.changes] == [AddRule]


def test_allowed_flow_names_its_rule() -> None:
    """An allowed flow says by which rule, or that no policy selects."""
    text = lines(EGRESS)

    assert text[0] == "ALLOW  web/a -> db/0 tcp/5432"
    assert text[1] == "  egress of web/a: ALLOW by web/default-egress rule 2 p1.yaml:10, tier default"
    assert text[2] == "  ingress of db/0: ALLOW, no policy selects it in this direction"


def test_logged_rules_are_told() -> None:
    """A rule that only logs is no near miss; it is told that it logged."""
    name = "calico log goes on"
    case = next(case for case in corpus("own").cases if case.name == name)
    asked = state("own", case)
    denied = next(flow for flow, row in asked.asked if not row.allowed)
    told = explain(asked.policies, asked.snapshot, denied)

    assert sum("logged by a rule" in line for line in str(told).splitlines()) == 2
    assert told.ingress is not None
    assert [near.index for near in told.ingress.near] == [1]


def test_explanation_is_json() -> None:
    """What is told can be told to programs: every part of it has a JSON form."""
    told = explain(*world(API, METRICS, EGRESS), TO_DB)

    found = json.loads(msgspec.json.encode(told))

    assert found["allowed"] is False
    assert found["ingress"]["near"][0]["peer"] == ["needs app=api, has app=web"]
    assert found["mends"][0]["changes"] == [{"type": "labels", "endpoint": "web/a", "labels": {"app": "api"}}]


def test_names_are_kept_apart() -> None:
    """A label is changed at the pod, not at a node that has the same name."""
    policies, snapshot = world(API)
    pod = next(e for e in snapshot.endpoints if e.title == "web/a")
    node = structs.replace(pod, kind=EndpointKind.NODE, addresses=("192.0.2.7",))
    both = Snapshot(endpoints=(*snapshot.endpoints, node))

    _, after = applied((ChangeLabels(endpoint="web/a", labels={"app": "api"}),), policies, both)

    assert [e.labels["app"] for e in after.endpoints if e.title == "web/a"] == ["api", "web"]
