"""Staged policies: what each would do, and that it does nothing."""

from __future__ import annotations

import pytest

from portwright.model.errors import InvalidInput, NotFound
from portwright.policy.change import changes
from portwright.policy.manifests.read import Manifests, read
from portwright.policy.staged import MOST_AT_ONCE, DryRun, chosen, dry_runs, effect, enforced, staged

PODS = """
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {containers: [{name: c, ports: [{containerPort: 80}]}]}
status: {podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}, {ip: "fd00::1"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop, labels: {app: client}}
spec: {containers: [{name: c}]}
status: {podIP: 10.0.0.2, podIPs: [{ip: 10.0.0.2}, {ip: "fd00::2"}]}
---
"""
#: By staged kind: the enforced one, its name for people, and a spec that denies web all that comes in.
KINDS = {
    "StagedKubernetesNetworkPolicy": (
        "networking.k8s.io/v1",
        "NetworkPolicy",
        "NetworkPolicy shop/web",
        "{podSelector: {matchLabels: {app: web}}, policyTypes: [Ingress]",
    ),
    "StagedNetworkPolicy": (
        "projectcalico.org/v3",
        "NetworkPolicy",
        "CalicoNetworkPolicy shop/web",
        "{selector: app == 'web', types: [Ingress]",
    ),
    "StagedGlobalNetworkPolicy": (
        "projectcalico.org/v3",
        "GlobalNetworkPolicy",
        "GlobalNetworkPolicy web",
        "{selector: app == 'web', types: [Ingress]",
    ),
}


def manifest(version: str, kind: str, spec: str) -> str:
    """One policy called web."""
    namespace = "" if "Global" in kind else ", namespace: shop"
    return f"apiVersion: {version}\nkind: {kind}\nmetadata: {{name: web{namespace}}}\nspec: {spec}\n---\n"


def told(manifests: Manifests) -> DryRun:
    """The dry run of the one staged policy."""
    policies, snapshot = manifests.policy_set, manifests.snapshot
    [found] = dry_runs(policies, snapshot, chosen(policies, ()))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_staged_and_what_is_enforced_then(kind: str) -> None:
    """Without an enforced policy of its name it adds one, with one it takes its place; either way the dry run
    says what the change from the one set of manifests to the other does."""
    version, enforced_kind, name, spec = KINDS[kind]
    everything = "{}" if enforced_kind == name.split()[0] == "NetworkPolicy" else "{action: Allow}"
    denied, opened = f"{spec}}}", f"{spec}, ingress: [{everything}]}}"
    nothing = read([("f", PODS)])
    now = read([("f", PODS + manifest(version, enforced_kind, opened))])
    then = read([("f", PODS + manifest(version, enforced_kind, denied))])
    stage = manifest("projectcalico.org/v3", kind, denied)

    for before, what in ((nothing, "adds"), (now, "replaces")):
        text = PODS + (manifest(version, enforced_kind, opened) if before is now else "")
        both = read([("f", text + stage)])
        found = told(both)
        assert found.effect == f"{what} {name}"
        assert changes((before.policy_set, before.snapshot), (both.policy_set, both.snapshot)).rows == ()
        wanted = changes((before.policy_set, before.snapshot), (then.policy_set, then.snapshot)).rows
        assert [(r.sources, r.targets, r.services, r.allowed, r.pairs) for r in found.changes.rows] == [
            (r.sources, r.targets, r.services, r.allowed, r.pairs) for r in wanted
        ]
        assert wanted


@pytest.mark.parametrize("kind", KINDS)
def test_a_staged_deletion(kind: str) -> None:
    """It says what would change if the enforced policy were gone; where there is none, that there is none."""
    version, enforced_kind, name, spec = KINDS[kind]
    stage = manifest("projectcalico.org/v3", kind, "{stagedAction: Delete}")
    text = PODS + manifest(version, enforced_kind, f"{spec}}}")
    there, nothing = told(read([("f", text + stage)])), told(read([("f", PODS + stage)]))

    assert there.effect == f"deletes {name}"
    assert {(r.targets, r.allowed, r.after) for r in there.changes.rows} == {
        (("shop/web",), True, "no policy")
    }
    elsewhere = PODS.replace("shop", "other")
    assert read([("f", elsewhere + stage)]).warnings == ()
    assert (nothing.effect, nothing.changes.rows) == (f"deletes {name}, which there is not", ())


def test_other_staged_policies_stay_staged() -> None:
    """Each dry run is of its policy alone, and the set that is in force is not touched."""
    stage = manifest("projectcalico.org/v3", "StagedNetworkPolicy", "{types: [Ingress]}")
    more = stage.replace("web", "other")
    policies = read([("f", stage + more)]).policy_set
    first, second = staged(policies)

    assert [p.staged for p in enforced(policies, first).policies] == [True, False]
    assert {p.staged for p in policies.policies} == {True}
    assert effect(policies, second) == "adds CalicoNetworkPolicy shop/web"


def test_what_could_not_be_enforced_says_so() -> None:
    """A staged policy that the tables have no room for is reported with the reason, and the others are not
    in its way."""
    rules = ", ".join(
        f"{{action: Allow, protocol: TCP, destination: {{ports: {list(range(n, n + 60, 2))}}}}}"
        for n in range(1, 600, 60)
    )
    stage = manifest("projectcalico.org/v3", "StagedNetworkPolicy", f"{{ingress: [{rules}]}}")
    found = told(read([("f", PODS + stage)]))

    assert "intervals of ports" in found.refused
    assert found.changes.rows == ()


def test_which_are_chosen() -> None:
    """By title, or kind and title; all of them without names, up to the bound."""
    many = [
        manifest("projectcalico.org/v3", kind, "{}").replace("name: web", f"name: w{n}")
        for n in range(9)
        for kind in ("StagedNetworkPolicy", "StagedKubernetesNetworkPolicy")
    ]
    policies = read([("f", "".join(many))]).policy_set

    assert len(chosen(policies, ["shop/w1"])) == 2
    assert len(chosen(policies, ["shop/w1", "StagedNetworkPolicy shop/w2"])) == 3
    with pytest.raises(NotFound, match="w1"):
        chosen(policies, ["w1"])
    with pytest.raises(InvalidInput, match=f"18 staged policies; name at most {MOST_AT_ONCE}"):
        chosen(policies, ())
