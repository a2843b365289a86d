"""Each table of the store by itself: networks, ports, journal, owned, meta."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from portwright.model.errors import Conflict, InternalError, InvalidInput, NotFound
from portwright.model.network import AddressRange, Network
from portwright.model.port import NetnsRef, Owner, Port, PortState, rep_name
from portwright.store import OwnedThing, Store
from portwright.store.journal import KEEP

NS = NetnsRef(path="/proc/1/ns/net", cookie=1, boot_id="b")
NET = Network(name="n", net_id=0, pools=((AddressRange(subnet="10.1.2.0/24"),),))


def port(number: int, name: str = "", *, network: str = "n", state: PortState = PortState.CREATING) -> Port:
    """Make a port owned by a name, or by a CNI container if there is none."""
    port_id = f"{number:08x}00000000"
    cni = Owner(kind="cni", network=network, container_id=f"container{number}", ifname="eth0")
    return Port(
        port_id=port_id,
        network=network,
        net_id=1,
        owner=Owner(kind="name", name=name) if name else cni,
        model="veth",
        state=state,
        ifname="eth0",
        rep_name=rep_name(port_id),
        mac="02:00:00:00:00:01",
        mtu=1500,
        host=NS,
        sandbox=NS,
        labels={"a": "b"},
        cni={"config": {"ipam": {"type": "x"}}},
    )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """An open store with the network ``n``."""
    with Store.open(tmp_path / "state") as opened:
        opened.add_network(NET)
        yield opened


def test_networks_get_ids_that_are_never_reused(store: Store, tmp_path: Path) -> None:
    """A deleted network's id is not given again, not even after a restart."""
    assert store.add_network(Network(name="m", net_id=0)).net_id == 2
    store.delete_network("m")
    store.close()
    with Store.open(tmp_path / "state") as again:
        assert again.add_network(Network(name="m", net_id=0)).net_id == 3
        assert [n.name for n in again.networks()] == ["n", "m"]
        assert again.get_network("n").pools == NET.pools


def test_network_errors(store: Store) -> None:
    """Duplicates, unknown names, given ids, bad pools and networks in use are refused."""
    with pytest.raises(Conflict, match="exists already"):
        store.add_network(NET)
    with pytest.raises(InvalidInput, match="net_id"):
        store.add_network(Network(name="m", net_id=5))
    with pytest.raises(InvalidInput, match="too small") as caught:
        store.add_network(Network(name="m", net_id=0, pools=((AddressRange(subnet="10.0.0.0/31"),),)))
    assert caught.value.field == "pools[0][0].subnet"
    for call in (store.get_network, store.delete_network):
        with pytest.raises(NotFound, match="network 'm'"):
            call("m")
    store.put_port(port(1))
    with pytest.raises(Conflict, match="has 1 port; delete them first"):
        store.delete_network("n")
    store.delete_port(port(1).port_id)
    store.delete_network("n")
    assert store.networks() == []


def test_update_network_keeps_its_id(store: Store) -> None:
    """An update replaces all but the id; another id is refused."""
    changed = Network(name="n", net_id=0, mtu=1400, pools=((AddressRange(subnet="FD00::/64"),),))
    assert store.update_network(changed).net_id == 1
    assert store.get_network("n").pools == ((AddressRange(subnet="fd00::/64"),),)
    with pytest.raises(InvalidInput):
        store.update_network(Network(name="n", net_id=7))
    with pytest.raises(NotFound):
        store.update_network(Network(name="m", net_id=0))


def test_ports_come_back_as_they_were(store: Store, tmp_path: Path) -> None:
    """Every field survives the file and a restart; a second put replaces."""
    first, second = port(1), port(2, "web", state=PortState.ATTACHED)
    store.put_port(first)
    store.put_port(second)
    store.put_port(port(1, state=PortState.DETACHED))
    store.close()
    with Store.open(tmp_path / "state") as again:
        assert list(again.ports()) == [port(1, state=PortState.DETACHED), second]
        assert list(again.ports("n", PortState.ATTACHED)) == [second]
        assert list(again.ports("m")) == []
        assert (again.port_count(), again.port_count("m")) == (2, 0)
        assert again.get_port(second.port_id) == second
        assert again.port_by_owner("cni/n/container1/eth0") is not None
        assert again.port_by_owner("cni/n/container1/eth1") is None


def test_duplicate_ports_are_refused(store: Store) -> None:
    """One port per owner (host-local's words), one per representor name, only on networks that exist."""
    store.put_port(port(1, "web"))
    with pytest.raises(Conflict, match="duplicate allocation is not allowed: port 0000000100000000"):
        store.put_port(port(2, "web"))
    twin = Port(**{f: getattr(port(1), f) for f in Port.__struct_fields__} | {"port_id": "0000000199999999"})
    with pytest.raises(Conflict, match="another port_id"):
        store.put_port(twin)
    with pytest.raises(NotFound, match="network 'nowhere'"):
        store.put_port(port(3, network="nowhere"))
    assert [p.port_id for p in store.ports()] == ["0000000100000000"]


def test_a_refusal_inside_a_transaction_leaves_it_usable(store: Store) -> None:
    """A duplicate is the caller's to handle: the rest of the transaction is committed."""
    with store.transaction():
        store.put_port(port(1, "web"))
        with pytest.raises(Conflict):
            store.put_port(port(2, "web"))
        store.put_port(port(3))
    assert store.port_count() == 2


def test_find_port(store: Store) -> None:
    """Exact ids and names beat beginnings; what could be several names them."""
    for number, name in ((0xAB000001, "web"), (0xAB000002, "web-2"), (0xCD000003, "ab"), (4, "50%_*")):
        store.put_port(port(number, name))
    assert store.find_port("ab00000100000000").owner.name == "web"
    assert store.find_port("pwab000002").owner.name == "web-2"
    assert store.find_port("web").owner.name == "web"
    assert store.find_port("web-").owner.name == "web-2"
    assert store.find_port("ab").owner.name == "ab"
    assert store.find_port("c").owner.name == "ab"
    assert store.find_port("50%_").owner.name == "50%_*"
    with pytest.raises(Conflict, match=r"could be 2 ports: ab00000100000000 \(name/web\), ab000002"):
        store.find_port("ab0")
    for nothing in ("x", "", "%", "5_", "*"):
        with pytest.raises(NotFound):
            store.find_port(nothing)


def test_delete_port(store: Store) -> None:
    """Deleting an unknown port is NotFound; one that holds addresses is refused until they are released."""
    with store.transaction():
        store.put_port(port(1))
        store.reserve("n", None, port(1).port_id, now=0.0)
    with pytest.raises(Conflict, match=r"still holds 10\.1\.2\.2"):
        store.delete_port(port(1).port_id)
    with store.transaction():
        store.release(port(1).port_id, now=0.0)
        store.delete_port(port(1).port_id)
    with pytest.raises(NotFound):
        store.delete_port(port(1).port_id)
    with pytest.raises(NotFound):
        store.get_port(port(1).port_id)


def test_ports_may_change_while_iterating(store: Store) -> None:
    """GC deletes what it walks over."""
    for number in range(5):
        store.put_port(port(number))
    for each in store.ports():
        store.delete_port(each.port_id)
    assert store.port_count() == 0


def test_journal(store: Store, tmp_path: Path) -> None:
    """Intents stay pending over a restart until they are closed, exactly once."""
    first = store.begin("p1", "add", b'{"ops":[]}')
    second = store.begin("p2", "del", b"\x00\xff")
    assert second > first
    store.finish(first, "done")
    store.close()
    with Store.open(tmp_path / "state") as again:
        (entry,) = again.pending()
        assert (entry.id, entry.port_id, entry.kind, entry.plan, entry.state) == (
            second, "p2", "del", b"\x00\xff", "intent",
        )  # fmt: skip
        assert entry.created > 0
        again.finish(second, "failed")
        assert [(e.id, e.state) for e in again.history()] == [(second, "failed"), (first, "done")]
        for closed in (first, second, 999):
            with pytest.raises(InternalError):
                again.finish(closed, "done")


def test_the_journal_is_bounded(store: Store) -> None:
    """Closed entries are pruned to about 1,000; an old open intent stays."""
    with store.transaction(durable=False):
        oldest = store.begin("p", "add", b"")
        for _ in range(KEEP + 200):
            last = store.begin("p", "add", b"")
            store.finish(last, "done")
    assert KEEP <= len(store.history(limit=10_000)) - 1 < KEEP + 64
    store.prune()
    kept = store.history(limit=10_000)
    assert len(kept) == KEEP + 1
    assert (kept[0].id, kept[-1].id) == (last, oldest)
    assert [e.id for e in store.pending()] == [oldest]


def test_owned_keeps_the_first_detail(store: Store) -> None:
    """The previous value of a sysctl is the one from before the first change."""
    assert store.own("sysctl", "net.ipv4.ip_forward", {"previous": "0"}) is True
    assert store.own("sysctl", "net.ipv4.ip_forward", {"previous": "1"}) is False
    assert store.own("mount", "/run/x") is True
    assert store.owned() == [
        OwnedThing("mount", "/run/x", None),
        OwnedThing("sysctl", "net.ipv4.ip_forward", {"previous": "0"}),
    ]
    assert store.owned("mount") == [OwnedThing("mount", "/run/x", None)]
    assert store.disown("mount", "/run/x") is True
    assert store.disown("mount", "/run/x") is False


def test_resolved_names_outlive_a_restart(store: Store, tmp_path: Path) -> None:
    """Each entry once, with its latest end; what is gone is gone, and forgetting it again is no error."""
    one, other = ("a" * 16, "*.example", "192.0.2.1"), ("a" * 16, "*.example", "2001:db8::1")
    store.note_resolved([(*one, 10.5), (*other, 20.0)])
    store.note_resolved([(*one, 30.25)], gone=[other])
    store.note_resolved([], gone=[other])
    store.close()

    with Store.open(tmp_path / "state") as again:
        assert again.resolved() == [(*one, 30.25)]


def test_meta(store: Store, tmp_path: Path) -> None:
    """The instance id is the directory's, for good; the last boot is told once per boot."""
    instance = store.instance_id
    assert len(instance) == 32
    assert [store.note_boot("one"), store.note_boot("one")] == [None, "one"]
    store.close()
    with Store.open(tmp_path / "state") as again, Store.open(tmp_path / "other") as other:
        assert again.note_boot("two") == "one"
        assert again.instance_id == instance != other.instance_id
