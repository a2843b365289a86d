"""Generated clusters: manifests of every kind that is enforced, as one value that a seed gives.

A world is a function of its seed, so a mismatch is found again by its number. It stays a list of documents,
which shrinks (tests/dataplane/shrink.py) and prints as what a user would write. Its labels, nets, names and
ports are few, so that rules meet.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import msgspec

from portwright.policy.manifests.read import read
from portwright.policy.rules import EndpointKind, PolicySet, Snapshot
from tests.policy_random.admin import Admin
from tests.policy_random.calico import Calico
from tests.policy_random.dice import DOMAINS, Document


class World(msgspec.Struct, frozen=True):
    """One generated cluster: documents, and what the reader makes of them."""

    seed: str
    documents: tuple[Document, ...]
    policies: PolicySet
    snapshot: Snapshot


def read_world(seed: str, documents: Sequence[Document]) -> World:
    """The documents, read. Node ``here`` is the one that the pods run on. Raises as ``read``."""
    items = {"apiVersion": "v1", "kind": "List", "items": list(documents)}
    manifests = read([("world.json", json.dumps(items))])
    endpoints = tuple(
        msgspec.structs.replace(end, local_node=True)
        if end.kind is EndpointKind.NODE and end.name == "here"
        else end
        for end in manifests.snapshot.endpoints
    )
    return World(seed, tuple(documents), manifests.policy_set, Snapshot(endpoints=endpoints, domains=DOMAINS))


def make_world(seed: str) -> World:
    """The world of this seed."""
    return read_world(seed, _Cluster(random.Random(seed)).documents())


class _Cluster(Admin, Calico):
    def documents(self) -> list[Document]:
        """Who there is, and from three to nine policies."""
        makers = (self.kubernetes, self.kubernetes, self.cluster, self.admin, self.calico, self.calico)
        policies = [self.one(makers)(number) for number in range(self.dice.randint(3, 8))]
        if self.chance(0.3):
            policies.append(self.baseline())
        return [*self.cluster_objects(), *self.calico_objects(), *policies]
