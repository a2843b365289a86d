"""Rules to be pasted: what a port is labelled with says nothing in them that it was not asked."""

from __future__ import annotations

import pytest

from portwright.policy.engine import Engine
from portwright.policy.explain import explain
from portwright.policy.manifests.cluster import workload_labels
from portwright.policy.manifests.read import read
from portwright.policy.matching import World
from portwright.policy.rules import TCP, Direction, Endpoint, Flow, PolicySet, Snapshot
from portwright.policy.snippets import allowing, flow_style

KINDS = (
    "NetworkPolicy",
    "ClusterNetworkPolicy",
    "AdminNetworkPolicy",
    "CalicoNetworkPolicy",
    "GlobalNetworkPolicy",
)
#: What a tenant may have as labels of a port, or as its namespace: each would be more than itself, unquoted.
HOSTILE = ("x' || all() || app == 'x", 'x"} , {', "x\n- action: Allow", "two words", "", "-", "x" * 64)
FLOW = Flow(source="10.0.0.1", destination="10.0.0.2", protocol=TCP, source_port=50_000, port=80)
DENIED = """
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: web}
spec: {selector: app == 'web', ingress: [{action: Deny}]}
"""


def world(labels: dict[str, str], namespace: str = "x") -> Snapshot:
    """A sandbox with these labels, a web server, and a third one that nobody means."""
    ends = [("c", namespace, labels), ("web", "x", {"app": "web"}), ("z", "y", {"app": "x"})]
    return Snapshot(
        endpoints=tuple(
            Endpoint(name=name, namespace=of, labels=workload_labels(own, of, {}), addresses=(f"10.0.0.{n}",))
            for n, (name, of, own) in enumerate(ends, 1)
        )
    )


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("where", ["value", "key", "namespace"])
def test_no_label_is_more_than_itself(text: str, where: str) -> None:
    """In no kind does a hostile key, value or namespace stand in the rule or in its words, unless it is such
    as manifests have; and the other labels do."""
    odd = {"value": {"odd": text}, "key": {text: "odd"}, "namespace": {}}[where]
    seen = world({"app": "client"} | odd, text if where == "namespace" else "x")
    for kind in KINDS:
        snippet = allowing(kind, Direction.INGRESS, "10.0.0.1", FLOW, World(seen))
        told = flow_style(snippet.body) + snippet.says
        if where == "namespace":
            assert "10.0.0.1/32" in told
            assert "all pods" not in told
        else:
            assert "client" in told
        if text:
            assert text not in told
            assert "all()" not in told
        elif where == "value":
            assert "odd" in told


@pytest.mark.parametrize("text", HOSTILE)
def test_what_why_proposes_lets_nobody_else_in(text: str) -> None:
    """The rule, pasted into the policy that denied, lets the asker in and no other."""
    seen = world({"app": "client", "odd": text, text: "odd"})
    policies = read([("w.yaml", DENIED)]).policy_set
    assert not Engine(policies, seen).connect(FLOW).allowed
    (line,) = (line.strip() for line in str(explain(policies, seen, FLOW)).splitlines() if "- {" in line)
    mended = read(
        [("w.yaml", DENIED.replace("[{action: Deny}]", f"[{line[2:]}, {{action: Deny}}]"))]
    ).policy_set
    assert Engine(mended, seen).connect(FLOW).allowed
    other = Flow(source="10.0.0.3", destination="10.0.0.2", protocol=TCP, source_port=50_000, port=80)
    assert not Engine(mended, seen).connect(other).allowed
    assert isinstance(mended, PolicySet)
