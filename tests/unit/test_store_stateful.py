"""The store against a plain model: commits, rollbacks and restarts in any order (hypothesis)."""

from __future__ import annotations

import shutil
import tempfile

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from portwright.model.errors import PoolExhausted
from portwright.model.network import AddressRange, Network
from portwright.model.port import NetnsRef, Owner, Port, PortState, rep_name
from portwright.store import Store

NS = NetnsRef(path="/proc/1/ns/net", cookie=1, boot_id="b")
REST = 60.0
#: The two networks overlap on purpose: n has .2 to .6, m has .2 to .13 (.1 is the gateway of both).
NETWORKS = {"n": "10.0.0.0/29", "m": "10.0.0.0/28"}
NEVER = {f"10.0.0.{i}" for i in (0, 1, 14, 15)}


class StoreMachine(RuleBasedStateMachine):
    """``owner`` maps committed addresses to ports, ``released`` to the time of release."""

    def __init__(self) -> None:
        """Open a store of its own."""
        super().__init__()
        self.dir = tempfile.mkdtemp(prefix="portwright-store-")
        self.store = Store.open(self.dir, rest_seconds=REST)
        for name, subnet in NETWORKS.items():
            pools = ((AddressRange(subnet=subnet),),)
            self.store.add_network(Network(name=name, net_id=0, pools=pools, reserved=("10.0.0.14",)))
        self.owner: dict[str, str] = {}
        self.released: dict[str, float] = {}
        self.now = 1000.0
        self.count = 0

    def teardown(self) -> None:
        """Leave nothing behind."""
        self.store.close()
        shutil.rmtree(self.dir)

    def free(self, network: str) -> set[str]:
        """Return what may be chosen in the network by the rules."""
        top = 6 if network == "n" else 13
        return {
            a
            for a in (f"10.0.0.{i}" for i in range(2, top + 1))
            if a not in self.owner and self.now - self.released.get(a, -REST) >= REST
        }

    @rule(network=st.sampled_from(sorted(NETWORKS)), commit=st.booleans(), durable=st.booleans())
    def add(self, network: str, commit: bool, durable: bool) -> None:
        """Reserve, then commit or roll back: only a commit changes anything."""
        self.count += 1
        port_id = f"{self.count:08x}00000000"
        port = Port(
            port_id=port_id, network=network, net_id=1, owner=Owner(kind="name", name=port_id), model="veth",
            state=PortState.CREATING, ifname="eth0", rep_name=rep_name(port_id), mac="02:00:00:00:00:01",
            mtu=1500, host=NS, sandbox=NS,
        )  # fmt: skip
        free = self.free(network)
        if not free:
            with pytest.raises(PoolExhausted):
                self.store.reserve(network, None, port_id, now=self.now)
            return
        try:
            with self.store.transaction(durable=durable):
                ((_, address),) = self.store.reserve(network, None, port_id, now=self.now)
                self.store.put_port(port)
                if not commit:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            return
        assert address in free
        assert address not in NEVER
        self.owner[address] = port_id
        self.released.pop(address, None)

    @precondition(lambda self: self.owner)
    @rule(data=st.data(), commit=st.booleans())
    def delete(self, data: st.DataObject, commit: bool) -> None:
        """Release, then commit or roll back."""
        address = data.draw(st.sampled_from(sorted(self.owner)))
        port_id = self.owner[address]
        try:
            with self.store.transaction():
                assert self.store.release(port_id, now=self.now) == (address,)
                self.store.delete_port(port_id)
                if not commit:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            return
        del self.owner[address]
        self.released[address] = self.now

    @rule(seconds=st.sampled_from([1.0, 30.0, 60.0]))
    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds

    @rule()
    def restart(self) -> None:
        """Close and open again."""
        self.store.close()
        self.store = Store.open(self.dir, rest_seconds=REST)

    @invariant()
    def agrees(self) -> None:
        """The file, the memory and the model name the same owners; usage adds up."""
        assert self.store.held_addresses() == self.owner
        assert {p.port_id for p in self.store.ports()} == set(self.owner.values())
        for address, port_id in self.owner.items():
            assert self.store.address_owner(address) == port_id
            assert self.store.addresses_of(port_id) == (address,)
        for network in NETWORKS:
            used, resting, total = self.store.usage(network, now=self.now)
            assert total - used - resting == len(self.free(network))


StoreMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestStore = StoreMachine.TestCase
