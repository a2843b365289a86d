"""The world of policies is found anew when something of it is another, and only then."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from portwright.model.network import Network
from portwright.model.port import Port, PortState
from portwright.node.world import World
from portwright.policy.manifests.read import Manifests, read
from portwright.policy.rules import Endpoint
from portwright.store import Store
from tests import fix_ports

NAMESPACE = "io.kubernetes.pod.namespace"


def manifests(team: str = "a") -> Manifests:
    """A namespace with a label."""
    text = f"apiVersion: v1\nkind: Namespace\nmetadata: {{name: x, labels: {{team: {team}}}}}\n"
    return read([("x.yaml", text)])


def port(number: int, **labels: str) -> Port:
    """A port of namespace x."""
    return fix_ports.port(number, {NAMESPACE: "x", **labels})


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A network and two ports."""
    with Store.open(tmp_path) as opened:
        opened.add_network(Network(name="n1", net_id=0))
        opened.put_port(port(1, app="a"))
        opened.put_port(port(2, app="b"))
        yield opened


def found(world: World, **changed: Port) -> tuple[Endpoint, ...]:
    """The endpoints of the namespace's manifest and the ports."""
    return world.snapshot(manifests(), {}, **changed).endpoints


def apps(endpoints: tuple[Endpoint, ...]) -> list[str]:
    """Their label, in order."""
    return [endpoint.labels["app"] for endpoint in endpoints]


def test_what_does_not_change_is_not_found_anew(store: Store) -> None:
    """Other policies are no other world; nor is a read of the same manifests."""
    world = World(store)
    first = found(world)
    store.set_manifests([("a", "text")])
    assert found(world) is first
    assert apps(first) == ["a", "b"]


def test_what_changes_is_seen(store: Store) -> None:
    """A port's labels, one more, one less; a namespace's labels; a network's isolation."""
    world = World(store)
    assert apps(found(world)) == ["a", "b"]
    store.put_port(port(1, app="c"))
    assert apps(found(world)) == ["c", "b"]
    store.put_port(port(3, app="d"))
    assert apps(found(world)) == ["c", "b", "d"]
    store.delete_port(port(2).port_id)
    assert apps(found(world)) == ["c", "d"]
    other = world.snapshot(manifests("z"), {}).endpoints
    assert other != found(world)
    store.update_network(msgspec.structs.replace(store.get_network("n1"), isolation="strict"))
    assert any(key.startswith("pw:") for key in found(world)[0].labels)
    store.put_port(msgspec.structs.replace(port(3), state=PortState.DELETING))
    assert apps(found(world)) == ["c"]


def test_what_is_taken_back_is_not_kept(store: Store) -> None:
    """A change that was looked at and rolled back (a label that policy refuses) leaves nothing behind."""
    world = World(store)
    before = found(world)

    def look() -> None:
        with store.transaction():
            store.put_port(port(1, app="refused"))
            assert apps(found(world)) == ["refused", "b"]
            raise RuntimeError

    with pytest.raises(RuntimeError):
        look()
    assert found(world) == before
    assert apps(found(world)) == ["a", "b"]


def test_a_port_that_comes_or_goes_is_not_kept(store: Store) -> None:
    """What is asked for one that is not on record yet, or still is, holds for that question."""
    world = World(store)
    assert apps(found(world, port=port(3, app="new"))) == ["a", "b", "new"]
    assert apps(found(world, without=port(1))) == ["b"]
    assert apps(found(world)) == ["a", "b"]


def test_domains_are_those_of_the_moment(store: Store) -> None:
    """What names stand for is asked each time, without the addresses that ports have."""
    world = World(store)
    for address in ("192.0.2.1", "192.0.2.2"):
        domains: dict[str, tuple[str, ...]] = {"example.com": (address, "10.0.0.1")}
        assert world.snapshot(manifests(), domains).domains == {"example.com": (address,)}
