"""Reservations: host-local's cases 41 to 50 at the store, and memory that always agrees with the file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from portwright.ipam import Usage
from portwright.model.errors import Conflict, InternalError, InvalidInput, NotFound, PoolExhausted
from portwright.model.network import AddressRange, Network
from portwright.model.port import NetnsRef, Owner, Port, PortState, rep_name
from portwright.store import Store

NS = NetnsRef(path="/proc/1/ns/net", cookie=1, boot_id="b")
V4, V6 = AddressRange(subnet="10.1.2.0/24"), AddressRange(subnet="2001:db8:1::/64")


def port(port_id: str, network: str = "n") -> Port:
    """Make the record of a port."""
    return Port(
        port_id=port_id, network=network, net_id=1, owner=Owner(kind="name", name=port_id), model="veth",
        state=PortState.CREATING, ifname="eth0", rep_name=rep_name(port_id), mac="02:00:00:00:00:01",
        mtu=1500, host=NS, sandbox=NS,
    )  # fmt: skip


def add(store: Store, port_id: str, *requested: str, network: str = "n", now: float = 0.0) -> list[str]:
    """Make a port with addresses, in one transaction."""
    with store.transaction():
        given = store.reserve(network, None, port_id, requested, now=now)
        store.put_port(port(port_id, network))
    return [a.address for a in given]


def drop(store: Store, port_id: str, now: float = 0.0, *, rest: bool = True) -> tuple[str, ...]:
    """Delete a port and release its addresses."""
    with store.transaction():
        released = store.release(port_id, now=now, rest=rest)
        store.delete_port(port_id)
    return released


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """An open store with the networks ``n`` (both families) and ``tiny`` (one address)."""
    with Store.open(tmp_path) as opened:
        opened.add_network(Network(name="n", net_id=0, pools=((V4,), (V6,))))
        opened.add_network(Network(name="tiny", net_id=0, pools=((AddressRange(subnet="10.9.0.0/30"),),)))
        yield opened


def test_first_addresses_and_record(store: Store) -> None:
    """Cases 41 and 42: .2 and ::2, then .3; after a release of the first comes .4."""
    assert add(store, "a") == ["10.1.2.2", "2001:db8:1::2"]
    assert add(store, "b") == ["10.1.2.3", "2001:db8:1::3"]
    assert drop(store, "a") == ("10.1.2.2", "2001:db8:1::2")
    assert add(store, "c", now=1e9) == ["10.1.2.4", "2001:db8:1::4"]
    assert store.held_addresses() == {
        "10.1.2.3": "b", "2001:db8:1::3": "b", "10.1.2.4": "c", "2001:db8:1::4": "c",
    }  # fmt: skip
    assert store.addresses_of("c") == ("10.1.2.4", "2001:db8:1::4")
    assert store.address_owner("10.1.2.4") == "c"
    assert store.address_owner("10.1.2.9") is None


def test_release_of_nothing_is_no_error(store: Store) -> None:
    """Case 44: DEL of what never was."""
    assert store.release("unknown", now=0.0) == ()


def test_cursor_rests_and_owners_survive_a_restart(store: Store, tmp_path: Path) -> None:
    """What a new daemon loads is what the old one knew."""
    add(store, "a")
    add(store, "t", network="tiny", now=100.0)
    drop(store, "t", now=100.0)
    store.close()
    with Store.open(tmp_path) as again:
        assert add(again, "b", now=101.0) == ["10.1.2.3", "2001:db8:1::3"]
        with pytest.raises(PoolExhausted) as caught:
            add(again, "u", network="tiny", now=159.0)
        assert (caught.value.used, caught.value.resting) == (0, 1)
        assert again.port_count("tiny") == 0, "nothing half done"
        assert add(again, "u", network="tiny", now=160.0) == ["10.9.0.2"]


def test_an_undone_add_leaves_no_rest(store: Store) -> None:
    """Case 24: after a failed ADD the next one gets a working pool, at once."""
    add(store, "a", network="tiny")
    drop(store, "a", rest=False)
    assert add(store, "b", network="tiny") == ["10.9.0.2"]


def test_usage(store: Store) -> None:
    """Used, resting and total per set and in all; rests end with time."""
    add(store, "a", network="tiny", now=0.0)
    assert store.usage("tiny", now=0.0) == Usage(1, 0, 1)
    drop(store, "a", now=0.0)
    assert store.usage("tiny", now=59.0) == Usage(0, 1, 1)
    assert store.usage("tiny", now=60.0) == Usage(0, 0, 1)
    add(store, "b")
    assert store.usage_by_set("n", now=0.0) == (Usage(1, 0, 253), Usage(1, 0, 2**64 - 2))
    store.add_network(Network(name="none", net_id=0))
    assert store.usage("none", now=0.0) == Usage(0, 0, 0)


def test_requests(store: Store) -> None:
    """Case 45 at the store: given, taken, outside; a failed request leaves nothing."""
    assert add(store, "a", "10.1.2.88") == ["10.1.2.88", "2001:db8:1::2"]
    with pytest.raises(Conflict, match="is not available"):
        add(store, "b", "10.1.2.88")
    with pytest.raises(InvalidInput, match=r"failed to allocate all requested IPs: 10\.9\.9\.9"):
        add(store, "b", "10.9.9.9")
    assert store.port_count() == 1
    assert add(store, "b") == ["10.1.2.89", "2001:db8:1::3"]


def test_ranges_of_the_call(store: Store) -> None:
    """Case 47: given ranges are used instead of the network's; reserved addresses still hold."""
    store.update_network(Network(name="n", net_id=0, pools=((V4,),), reserved=("10.7.0.2",)))
    with store.transaction():
        given = store.reserve("n", [[AddressRange(subnet="10.7.0.0/24")], [V4]], "a", now=0.0)
        store.put_port(port("a"))
    assert given == ((0, "10.7.0.3"), (1, "10.1.2.2"))


def test_addresses_that_a_port_has_already_are_held(store: Store, tmp_path: Path) -> None:
    """Any number of them, of one family too, in file and memory; if one is outside or taken, none is."""
    add(store, "a", "10.1.2.9")

    def hold(*addresses: str) -> None:
        with store.transaction():
            store.put_port(port("moved"))
            store.hold("n", "moved", addresses)

    for addresses, refusal, match in (
        (("10.1.2.7", "10.1.3.1"), InvalidInput, "no range"),
        (("10.1.2.7", "10.1.2.9"), Conflict, "port a has it"),
    ):
        with pytest.raises(refusal, match=match):
            hold(*addresses)
        assert store.address_owner("10.1.2.7") is None
    hold("10.1.2.7", "10.1.2.8")
    assert store.addresses_of("moved") == ("10.1.2.7", "10.1.2.8")
    store.close()
    with Store.open(tmp_path) as again:
        assert again.addresses_of("moved") == ("10.1.2.7", "10.1.2.8")
        with pytest.raises(Conflict):
            add(again, "b", "10.1.2.8")
        assert drop(again, "moved") == ("10.1.2.7", "10.1.2.8")


def test_unknown_network_and_network_without_pools(store: Store) -> None:
    """Both are the caller's error, with a sentence."""
    with pytest.raises(NotFound):
        store.reserve("m", None, "a", now=0.0)
    store.add_network(Network(name="none", net_id=0))
    with pytest.raises(InvalidInput, match="no IP ranges specified"):
        store.reserve("none", None, "a", now=0.0)


def test_addresses_outside_changed_pools_stay_with_their_port(store: Store) -> None:
    """Changing the pools takes nothing away; releasing works as before."""
    add(store, "a")
    store.update_network(Network(name="n", net_id=0, pools=((AddressRange(subnet="10.5.0.0/24"),),)))
    assert add(store, "b") == ["10.5.0.2"]
    assert drop(store, "a") == ("10.1.2.2", "2001:db8:1::2")


def test_a_new_network_of_the_same_name_starts_over(store: Store) -> None:
    """The cursor goes with the network; the rest of its addresses does not."""
    add(store, "t", network="tiny", now=0.0)
    drop(store, "t", now=0.0)
    store.delete_network("tiny")
    store.add_network(Network(name="tiny", net_id=0, pools=((AddressRange(subnet="10.9.0.0/29"),),)))
    assert add(store, "u", network="tiny", now=1.0) == ["10.9.0.3"]


def test_an_address_without_a_port_cannot_be_committed(store: Store) -> None:
    """The schema refuses the leak; memory and file are as before."""
    with pytest.raises(InternalError, match="FOREIGN KEY"):
        store.reserve("n", None, "nobody", now=0.0)
    assert store.held_addresses() == {}
    assert add(store, "a") == ["10.1.2.2", "2001:db8:1::2"]


def test_rollback_takes_memory_back(store: Store) -> None:
    """After an exception the same addresses are given as if nothing had been tried."""
    add(store, "a", now=0.0)

    def attempt() -> None:
        """Change everything, then fail."""
        with store.transaction():
            change()
            raise KeyboardInterrupt

    def change() -> None:
        """Touch each table."""
        store.release("a", now=0.0)
        store.delete_port("a")
        store.reserve("n", None, "b", ("10.1.2.2",), now=0.0)
        store.put_port(port("b"))
        store.add_network(Network(name="m", net_id=0))
        store.update_network(Network(name="tiny", net_id=0))
        store.own("mount", "x")
        store.begin("b", "add", b"")

    with pytest.raises(KeyboardInterrupt):
        attempt()
    assert store.addresses_of("a") == ("10.1.2.2", "2001:db8:1::2")
    assert store.addresses_of("b") == ()
    assert [n.name for n in store.networks()] == ["n", "tiny"]
    assert store.get_network("tiny").pools
    assert (store.pending(), store.owned(), store.port_count()) == ([], [], 1)
    assert add(store, "c", now=0.0) == ["10.1.2.3", "2001:db8:1::3"]


def test_transactions_do_not_nest(store: Store) -> None:
    """A second transaction while one is open is a bug (an await inside), and ends neither wrongly."""
    with store.transaction():
        store.put_port(port("a"))
        with pytest.raises(InternalError, match="open already"), store.transaction():
            pass
    assert store.port_count() == 1
