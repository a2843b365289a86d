"""Tables amended in place are the ones that a whole install would have made, after any row of changes."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from contextlib import closing

import msgspec
import pytest

from portwright.dataplane import OBJECT, policy_values
from portwright.kernel.bpf import Collection, CollectionSpec, Map
from portwright.node import generations
from portwright.policy.compile import compile_policies, recompile
from portwright.policy.difference import Remains, diff
from portwright.policy.manifests.read import read
from portwright.policy.rules import Endpoint, PolicySet, Snapshot
from portwright.policy.tables import Compiled

pytestmark = pytest.mark.netns

SLOTS = 8
APPS, TEAMS = 6, 3
_POLICY = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: p{number}}}
spec:
  podSelector: {{matchLabels: {{app: a{app}}}}}
  policyTypes: [Ingress, Egress]
  ingress:
  - from: [{{podSelector: {{matchLabels: {{team: t{team}}}}}}}, {{ipBlock: {{cidr: 10.{number}.0.0/16}}}}]
    ports: [{{protocol: TCP, port: {port}, endPort: {end}}}]
  egress:
  - to: [{{podSelector: {{matchExpressions: [{{key: app, operator: NotIn, values: [a{team}]}}]}}}}]
"""


@pytest.fixture
def maps() -> Iterator[dict[str, Map]]:
    """The data path's maps; nothing is in force."""
    with Collection.load(CollectionSpec.load(OBJECT)) as collection:
        yield dict(collection.maps)


def policies() -> PolicySet:
    """A policy for each app, of several peers and ports."""
    texts = [
        _POLICY.format(number=n, app=n % APPS, team=n % TEAMS, port=1000 + n, end=1010 + 3 * n)
        for n in range(2 * APPS)
    ]
    return read([("policies.yaml", "---\n".join(texts))]).policy_set


def world(pods: dict[int, tuple[int, int]]) -> Snapshot:
    """Pods by number, of an app and a team, with an address of each family."""
    template = read([("pod.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: x}\n")]).snapshot.endpoints[0]
    return Snapshot(
        endpoints=tuple(
            Endpoint(
                name=f"pod{n}",
                namespace="default",
                labels=template.labels | {"app": f"a{app}", "team": f"t{team}"},
                addresses=(f"172.16.{n >> 8}.{n & 255}", f"fd00::{n:x}"),
            )
            for n, (app, team) in pods.items()
        )
    )


def tables(maps: dict[str, Map], number: int) -> dict[str, dict[bytes, bytes]]:
    """What stands in the tables of a generation."""
    found = {}
    for name in ("pw_peers", "pw_bounds", "pw_sets", "pw_cells"):
        raw = maps[name].lookup(struct.pack("=I", number % SLOTS))
        assert raw is not None, name
        with closing(Map.from_id(struct.unpack("=I", raw)[0])) as inner:
            found[name] = dict(inner.items())
    return found


def assert_in_force(maps: dict[str, Map], compiled: Compiled, left: Remains) -> None:
    """Every entry is there, and no other but what the changes are known to have left."""
    wanted = {name: dict(packed.pairs()) for name, packed in generations.Entries(compiled).complete().items()}
    there = tables(maps, generations.in_force(maps))
    assert there["pw_peers"] == wanted["pw_peers"]
    assert there["pw_bounds"] == wanted["pw_bounds"]
    assert {k: there["pw_sets"][k] for k in wanted["pw_sets"]} == wanted["pw_sets"]
    assert wanted["pw_cells"].items() <= there["pw_cells"].items()
    classes = {e.class_id for e in compiled.addresses.values()} | set(compiled.prefixes.values())
    assert not [k for k in left.cells if k[0] in compiled.sets and k[1] in classes], "of another meaning now"
    remains = {policy_values.cell_key(*key) for key in left.cells}
    assert there["pw_cells"].keys() - wanted["pw_cells"].keys() <= remains


def test_a_row_of_changes_is_as_good_as_an_install(maps: dict[str, Map]) -> None:
    """Pods come, go and change their labels: made in place, but where a net comes or goes with them.

    What is left behind goes before its numbers mean something else: no entry ever stands under a number
    of another meaning.
    """
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    rules = policies()
    pods = {n: (n % APPS, n % TEAMS) for n in range(1, 9)}
    compiled = compile_policies(rules, world(pods))
    number = generations.install(maps, generations.Entries(compiled))
    left, flushed, in_place = Remains(), 0, 0
    for step in range(200):
        one = dice.randrange(1, 30)
        if one in pods and dice.random() < 0.5:
            del pods[one]
        else:
            pods[one] = (dice.randrange(APPS + 2), dice.randrange(TEAMS + 1))
        new = recompile(compiled, rules, world(pods))
        change = diff(compiled, new)
        if change.atomic:
            remains = None
            if left.hinder(change):
                remains, left, flushed = tuple(left.cells), Remains(), flushed + 1
            amended = generations.amend(maps, change, new.rules, remains=remains)
            assert amended is not None, "no room for a set"
            assert amended > number
            assert amended % SLOTS == number % SLOTS
            left.add(change)
            number, in_place = amended, in_place + 1
        else:
            assert change.put_prefixes or change.delete_prefixes, step
            number, left = generations.install(maps, generations.Entries(new)), Remains()
        compiled = new
        assert generations.in_force(maps) == number
        assert_in_force(maps, compiled, left)
    assert in_place > 100
    assert 0 < flushed < in_place


def test_a_set_without_room_changes_nothing(maps: dict[str, Map]) -> None:
    """The array of sets is as large as it was made: the caller installs all anew."""
    rules = policies()
    one = compile_policies(rules, world({1: (0, 0)}))
    number = generations.install(maps, generations.Entries(one))
    before = tables(maps, number)
    change = diff(one, recompile(one, rules, world({1: (0, 0), 2: (1, 1)})))
    far = {10_000: next(iter(change.put_sets.values()))}
    assert generations.amend(maps, msgspec.structs.replace(change, put_sets=far), one.rules) is None
    assert tables(maps, number) == before
    assert generations.in_force(maps) == number


def test_cells_without_room_change_no_verdict(maps: dict[str, Map]) -> None:
    """The table of cells has room for a few times what it was made with, not for all that could come."""
    rules = policies()
    one = compile_policies(rules, world({1: (0, 0)}))
    generations.install(maps, generations.Entries(one))
    before = tables(maps, generations.in_force(maps))
    change = diff(one, recompile(one, rules, world({1: (0, 0), 2: (1, 1)})))
    verdict = next(iter(change.put_cells.values()))
    many = {(1, 1_000 + n, 0): verdict for n in range(20_000)}
    assert generations.amend(maps, msgspec.structs.replace(change, put_cells=many), one.rules) is None
    after = tables(maps, generations.in_force(maps))
    assert after["pw_peers"] == before["pw_peers"]
    assert before["pw_cells"].items() <= after["pw_cells"].items()
    assert after["pw_cells"].keys() - before["pw_cells"].keys() < {policy_values.cell_key(*k) for k in many}
