"""A network's default for its ports: what holds where no policy decides (docs/policy.md has the table).

``open`` is Kubernetes': it passes. ``tenant`` and ``strict`` are rules like all others, of policies that
nobody wrote, in a tier after all tiers; so the engine, the tables and the explanations need to know nothing
of them. Whom they hold for is told by labels with a colon in their key, which no manifest can name; a port's
own labels with one are lost (manifests/cluster.py).

An endpoint has one set of labels, and its addresses may be of several networks. Then the label's value names
the addresses, and the rules ask for them as the own side's: each address obeys its own network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from msgspec.structs import replace

from portwright.model.network import Isolation
from portwright.policy.labels import EVERYTHING, NAMESPACE_NAME, NAMESPACE_PREFIX, Has, In, both
from portwright.policy.rules import (
    Action,
    Endpoint,
    Peer,
    Policy,
    PolicySet,
    Rule,
    Snapshot,
    Tier,
)

#: Of the policies made here.
KIND: Final = "network"
#: After every tier that a manifest can make: of no order (infinite), and no name of theirs has a tilde.
ISOLATION: Final = Tier(name="~isolation", order=float("inf"), default=Action.PASS)

#: Labels that only this module gives.
_PREFIX: Final = "pw:"
#: Every endpoint that has a port on this host: what is none is the world.
_PORT: Final = _PREFIX + "port"
_TENANT: Final = _PREFIX + "tenant:"
_NAMESPACE: Final = NAMESPACE_PREFIX + NAMESPACE_NAME


class Home(NamedTuple):
    """The network that an address is of, and that network's isolation."""

    network: str
    isolation: Isolation


class _Asked(NamedTuple):
    """One policy's worth: the label that its subjects have, and the tenant that they are of."""

    key: str
    own: str
    tenant: str


def labelled(endpoint: Endpoint, homes: Mapping[str, Home]) -> Endpoint:
    """The endpoint of a port with the labels that say which network each of its addresses is of.

    ``homes``: by address, of all its addresses.
    """
    labels = {key: value for key, value in endpoint.labels.items() if not key.startswith(_PREFIX)}
    labels[_PORT] = ""
    mine = {address: homes[address] for address in endpoint.addresses}
    for home in set(mine.values()):
        if home.isolation != "open":
            own = sorted(address for address, its in mine.items() if its == home)
            labels[_key(home)] = "" if len(own) == len(mine) else " ".join(own)
    return replace(endpoint, labels=labels)


def with_isolation(policies: PolicySet, snapshot: Snapshot) -> PolicySet:
    """The policies, and those that stand for the isolation of the networks of labelled endpoints."""
    asked = {each for endpoint in snapshot.endpoints for each in _asked(endpoint)}
    if not asked:
        return policies
    return PolicySet(
        tiers=(*policies.tiers, ISOLATION),
        policies=(*policies.policies, *(_policy(each) for each in sorted(asked))),
    )


def _key(home: Home) -> str:
    return f"{_PREFIX}{home.isolation}:{home.network}"


def _asked(endpoint: Endpoint) -> Iterator[_Asked]:
    if _PORT not in endpoint.labels:
        return
    for key, own in endpoint.labels.items():
        if key.startswith(_PREFIX) and key != _PORT:
            yield _Asked(key, own, endpoint.namespace if key.startswith(_TENANT) else "")


def _policy(asked: _Asked) -> Policy:
    isolation, _, network = asked.key.removeprefix(_PREFIX).partition(":")
    subject = In(asked.key, frozenset({asked.own}))
    tenant = In(_NAMESPACE, frozenset({asked.tenant})) if asked.tenant else EVERYTHING
    name = f"{network}: isolation {isolation}"
    name += f" of {asked.tenant}" if asked.tenant else ""
    name += f" for {asked.own.replace(' ', ', ')}" if asked.own else ""
    local = Peer(nets=tuple(_net(address) for address in asked.own.split())) if asked.own else None
    deny = Rule(action=Action.DENY, local=local)
    allow = Rule(action=Action.ALLOW, local=local)
    ingress: tuple[Rule, ...] = (deny,)
    egress: tuple[Rule, ...] = (deny,)
    if asked.tenant:
        same = replace(allow, peers=(Peer(selector=both(Has(_PORT), tenant)),))
        ingress = (same, deny)
        egress = (same, replace(deny, peers=(Peer(selector=Has(_PORT)),)), allow)
    return Policy(
        kind=KIND,
        name=name,
        tier=ISOLATION.name,
        order=0,
        subject=both(subject, tenant),
        ingress=ingress,
        egress=egress,
    )


def _net(address: str) -> str:
    return f"{address}/{128 if ':' in address else 32}"
