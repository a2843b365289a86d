"""What is compiled and when: a change that is judged first is not compiled again to be put in force."""

from __future__ import annotations

from portwright.node.enforcement import Enforcement
from portwright.node.faults import Faults
from portwright.policy.manifests.cluster import workload_labels
from portwright.policy.manifests.read import read
from portwright.policy.rules import Endpoint, Snapshot

POLICIES = read([("p.yaml", "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p}\n"
                            "spec: {podSelector: {matchLabels: {app: a}}}\n")]).policy_set  # fmt: skip


def world(app: str) -> Snapshot:
    """One pod with a label."""
    labels = workload_labels({"app": app}, "default", {})
    return Snapshot(
        endpoints=(Endpoint(name="x", namespace="default", labels=labels, addresses=("10.0.0.1",)),)
    )


def test_what_was_judged_is_put() -> None:
    """The same policies in the same world, whoever asks again, until something is in force."""
    enforcement = Enforcement({}, Faults())
    judged = enforcement.compile(POLICIES, world("a"))
    assert judged.addresses["10.0.0.1"].set_in
    assert enforcement.compile(POLICIES, world("a")) is judged
    assert enforcement.compile(POLICIES, world("b")).addresses["10.0.0.1"].set_in == 0
    assert enforcement.compile(POLICIES, world("a")) is not judged


def test_what_is_in_force_is_what_the_next_is_numbered_by() -> None:
    """After a change what was judged before it may be of other numbers: it is compiled anew."""
    enforcement = Enforcement({}, Faults())
    first = enforcement.compile(POLICIES, world("a"))
    enforcement.put(first)
    second = enforcement.compile(POLICIES, world("a"))
    assert (enforcement.compiled, second.sets) == (first, first.sets)
    assert second is not first
    enforcement.withdraw()
    assert enforcement.compile(POLICIES, world("a")) is not second
