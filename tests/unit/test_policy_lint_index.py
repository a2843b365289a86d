"""Lints that look policies up, against the same lints that compare each with each."""

from __future__ import annotations

import ipaddress
import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import policy_fleet
from portwright.policy.labels import EVERYTHING, And, Contains, Expr, Has, In, Not, Or
from portwright.policy.lint import Entry, Lint
from portwright.policy.lints import index, together
from portwright.policy.manifests import read as reader
from portwright.policy.manifests.read import read
from portwright.policy.population import Population, covers, may_overlap
from portwright.policy.rules import Action, Endpoint, Peer, PortRange, Rule, Snapshot, Traffic
from tests.fix_policy import CORPORA, corpus, texts
from tests.policy_random.world import make_world

LINTS = (together.dns, together.whose_names, together.excepts, together.equal_priorities)
File = tuple[str, str]


# --- the slow form: an index that finds everybody -------------------------------------------------


class Everybody:
    """In the place of any index: all that were given."""

    def __init__(self, given_: Sequence[Any] | set[Any], *_world: object) -> None:
        self.given = list(given_)

    def meeting(self, _one: object) -> int:
        return (1 << len(self.given)) - 1

    overlapping = meeting

    def candidates(self, _narrow: Expr) -> Iterator[Any]:
        yield from self.given


def entries_of(files: Sequence[File]) -> tuple[list[Entry], Snapshot]:
    """What the lints are asked about these manifests."""
    asked: list[tuple[Sequence[Entry], Snapshot]] = []

    def listen(entries: Sequence[Entry], snapshot: Snapshot) -> tuple[Lint, ...]:
        asked.append((entries, snapshot))
        return ()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "lint", listen)
        read(files)
    [(entries, snapshot)] = asked
    return list(entries), snapshot


def findings(entries: Sequence[Entry], endpoints: Sequence[Endpoint]) -> list[Lint]:
    """Those of all these lints, in their order."""
    return [found for lint in LINTS for found in lint(entries, Population(endpoints))]


def agree(files: Sequence[File]) -> int:
    """Assert that both forms find the same, with the pods that there are and with none; how much that is."""
    entries, snapshot = entries_of(files)
    total = 0
    for endpoints in (snapshot.endpoints, ()):
        quick = findings(entries, endpoints)
        with pytest.MonkeyPatch.context() as patch:
            for name in ("Subjects", "Covering", "Services", "Blocks"):
                patch.setattr(together, name, Everybody)
            slow = findings(entries, endpoints)
        assert quick == slow
        total += len(quick)
    return total


@pytest.mark.parametrize("name", CORPORA)
def test_the_corpora(name: str) -> None:
    """Every state of every corpus."""
    for case in corpus(name).cases:
        agree(texts(name, case))


def test_generated_worlds() -> None:
    """Worlds of every kind of policy; some have findings."""
    total = 0
    for number in range(150):
        items = {"apiVersion": "v1", "kind": "List", "items": list(make_world(f"index {number}").documents)}
        total += agree([("world.json", json.dumps(items))])
    assert total > 50


NETS = ["10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24", "10.1.2.3/32", "0.0.0.0/0", "::/0", "2001:db8::/32"]
HOLES = {
    "10.0.0.0/8": ["10.1.0.0/16", "10.1.2.3/32"],
    "10.1.0.0/16": ["10.1.2.0/24", "10.1.2.3/32"],
    "0.0.0.0/0": ["10.0.0.0/8", "10.1.2.0/24"],
    "::/0": ["2001:db8::/32", "2001:db8:1::/48"],
    "2001:db8::/32": ["2001:db8:1::/48"],
}


def many(seed: str) -> list[File]:
    """NetworkPolicies and admin policies that often are about the same, and pods of some of their labels."""
    dice = random.Random(seed)

    def labels() -> dict[str, Any]:
        keys = dice.sample(["app", "tier"], dice.randint(0, 2))
        if dice.random() < 0.2:
            operator = dice.choice(["In", "NotIn", "Exists", "DoesNotExist"])
            asked = {"key": "app", "operator": operator}
            return {
                "matchExpressions": [
                    asked | ({"values": dice.sample("abc", 2)} if operator.endswith("In") else {})
                ]
            }
        return {"matchLabels": {key: dice.choice("abc") for key in keys}}

    def rule(side: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if dice.random() < 0.9:
            blocks = []
            for net in dice.sample(NETS, dice.randint(1, 2)):
                without = dice.sample(HOLES.get(net, []), dice.randint(0, len(HOLES.get(net, []))))
                blocks.append({"ipBlock": {"cidr": net, "except": without}})
            found[side] = blocks
        if dice.random() < 0.7:
            port: dict[str, Any] = {"protocol": dice.choice(["TCP", "UDP"])}
            if dice.random() < 0.8:
                port["port"] = dice.choice([53, 80, 81, 443, "http"])
                if port["port"] == 80 and dice.random() < 0.5:
                    port["endPort"] = dice.choice([81, 20_000])
            found["ports"] = [port]
        return found

    items: list[dict[str, Any]] = []
    for number in range(12):
        sides = {"ingress": "from", "egress": "to"}
        spec = {way: [rule(side)] for way, side in sides.items() if dice.random() < 0.7}
        items.append(
            {
                "apiVersion": "networking.k8s.io/v1",
                "kind": "NetworkPolicy",
                "metadata": {"name": f"p{number}", "namespace": dice.choice("xy")},
                "spec": {"podSelector": labels(), "policyTypes": ["Ingress", "Egress"], **spec},
            }
        )
    for number in range(5):
        whom = {"namespaceSelector": {}, "podSelector": labels()}
        items.append(
            {
                "apiVersion": "policy.networking.k8s.io/v1alpha2",
                "kind": "ClusterNetworkPolicy",
                "metadata": {"name": f"a{number}"},
                "spec": {
                    "tier": "Admin",
                    "priority": dice.choice([1, 2]),
                    "subject": {"pods": whom},
                    "egress": [{"action": "Accept", "to": [{"domainNames": ["example.com"]}]}],
                },
            }
        )
    for number in range(3):
        name = {"name": f"pod{number}", "namespace": dice.choice("xy")}
        labelled = {key: dice.choice("abc") for key in ("app", "tier")}
        items.append({"apiVersion": "v1", "kind": "Pod", "metadata": {**name, "labels": labelled}})
    return [("many.json", json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))]


def test_policies_about_the_same() -> None:
    """Policies made to collide: the same findings, of each kind many, with the same words."""
    total = sum(agree(many(f"same {number}")) for number in range(60))
    assert total > 1_000


def test_a_thousand_policies_are_not_compared_each_with_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a fleet with nothing to find, few pairs are looked at, where each with each is 60,000."""
    entries, _ = entries_of(policy_fleet.manifests(1_000))
    looked = 0
    real = together._same_packet

    def counted(*args: Any) -> bool:
        nonlocal looked
        looked += 1
        return real(*args)

    monkeypatch.setattr(together, "_same_packet", counted)
    assert findings(entries, ()) == []
    assert looked < 1_000


# --- the indexes themselves -----------------------------------------------------------------------

keys = st.sampled_from(["a", "b"])
values = st.frozensets(st.sampled_from("uvw"), max_size=2)
terms: st.SearchStrategy[Expr] = st.one_of(
    st.builds(In, keys, values),
    st.builds(Has, keys),
    st.builds(Contains, keys, st.just("u")),
    st.builds(lambda key: Not(Has(key)), keys),
    st.builds(lambda key, some: Not(In(key, some)), keys, values),
    st.just(EVERYTHING),
)
exprs = st.one_of(
    terms,
    st.lists(terms, max_size=3).map(lambda some: And(tuple(some))),
    st.builds(lambda t: Or((t,)), terms),
)


@given(st.lists(exprs, max_size=8), exprs)
def test_none_that_may_overlap_or_covers_is_missed(many_: list[Expr], one: Expr) -> None:
    """An index finds more than is true at times, never less."""
    meeting = index.Subjects(many_, Population(())).meeting(one)
    near = set(index.Covering(many_).candidates(one))
    for place, other in enumerate(many_):
        assert meeting >> place & 1 or not may_overlap(one, other)
        assert other in near or not covers(other, one)


@given(
    st.lists(st.dictionaries(keys, st.sampled_from("uvw")), min_size=1, max_size=4),
    st.lists(exprs, max_size=8),
    exprs,
)
def test_of_known_pods_the_answer_is_exact(pods: list[dict[str, str]], many_: list[Expr], one: Expr) -> None:
    """Just those that select a pod that this one selects."""
    world = Population([Endpoint(name=f"p{n}", labels=labels) for n, labels in enumerate(pods)])
    found = list(index.places(index.Subjects(many_, world).meeting(one)))
    assert found == [place for place, other in enumerate(many_) if world.of(one) & world.of(other)]


ranges = st.tuples(st.integers(0, 90), st.integers(0, 90)).map(lambda p: PortRange(min(p), max(p)))
parts = st.builds(
    Traffic,
    protocol=st.sampled_from([None, 6, 17]),
    ports=st.lists(ranges, max_size=2).map(tuple),
)
rules = st.builds(
    lambda traffic: Rule(action=Action.ALLOW, traffic=traffic),
    st.one_of(st.none(), st.lists(parts, max_size=2).map(tuple)),
)


@given(st.lists(rules, max_size=8), rules)
def test_no_rule_that_shares_a_packet_is_missed(many_: list[Rule], one: Rule) -> None:
    """Ranges of ports too, narrow or wide."""
    meeting = index.Services(many_).meeting(one)
    for place, other in enumerate(many_):
        assert meeting >> place & 1 or not together._share_traffic(one, other)


def net(version: int, second: int, length: int) -> str:
    """A net of a few in each family."""
    text = f"10.{second}.0.0/{length}" if version == 4 else f"20{second:02x}::/{length}"
    return str(ipaddress.ip_network(text, strict=False))


nets = st.builds(net, st.sampled_from([4, 6]), st.integers(0, 15), st.integers(0, 32))
peers = st.builds(lambda some: Peer(nets=some), st.one_of(st.none(), st.lists(nets, max_size=3).map(tuple)))


@given(st.lists(peers, max_size=8), nets)
def test_no_block_that_has_an_address_of_a_net_is_missed(many_: list[Peer], one: str) -> None:
    """Around the net, within it, or the same."""
    overlapping = index.Blocks(many_).overlapping(one)
    for place, other in enumerate(many_):
        assert bool(overlapping >> place & 1) == together._lets_in(other, one)
