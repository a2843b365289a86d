"""What the store costs. The figures are printed (pytest -s); the bounds are for any machine."""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

from portwright.model.network import AddressRange, Network
from portwright.model.port import NetnsRef, Owner, Port, PortAddress, PortState, rep_name
from portwright.store import Store

NS = NetnsRef(path="/run/netns/cni-0b1c2d3e-4f50-6172-8394-a5b6c7d8e9f0", cookie=1, boot_id="b")
PLAN = b"x" * 800  # about what a veth plan is as JSON


def port(number: int, addresses: tuple[str, ...], state: PortState) -> Port:
    """Make a port as CNI makes one."""
    port_id = f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}"
    return Port(
        port_id=port_id, network="n", net_id=1,
        owner=Owner(kind="cni", network="n", container_id=f"{number:064x}", ifname="eth0"), model="veth",
        state=state, ifname="eth0", rep_name=rep_name(port_id), mac="02:00:00:00:00:01", mtu=1500, host=NS,
        sandbox=NS, addresses=tuple(PortAddress(address=a, gateway="169.254.1.1") for a in addresses),
        labels={"namespace": "default", "pod": f"pod-{number}"},
    )  # fmt: skip


def add(store: Store, number: int) -> tuple[float, float]:
    """Do what an ADD does to the store; return the seconds of the intent and of the completion."""
    draft = port(number, (), PortState.CREATING)
    start = time.perf_counter()
    with store.transaction():
        given = tuple(a.address for a in store.reserve("n", None, draft.port_id, now=0.0))
        store.put_port(port(number, given, PortState.CREATING))
        entry = store.begin(draft.port_id, "add", PLAN)
    middle = time.perf_counter()
    with store.transaction(durable=False):
        store.put_port(port(number, given, PortState.ATTACHED))
        store.finish(entry, "done")
    return middle - start, time.perf_counter() - middle


def steps(store: Store, number: int) -> int:
    """Count the instructions of SQLite's virtual machine that an ADD takes."""
    count = 0

    def tick() -> int:
        nonlocal count
        count += 1
        return 0

    store._connection.set_progress_handler(tick, 1)
    add(store, number)
    store._connection.set_progress_handler(None, 1)
    return count


def test_cost(tmp_path: Path) -> None:
    """An ADD takes as many steps with 1,000 ports as with 10; opening them is quick."""
    with Store.open(tmp_path) as store:
        pools = ((AddressRange(subnet="10.1.0.0/16"),), (AddressRange(subnet="2001:db8::/64"),))
        store.add_network(Network(name="n", net_id=0, pools=pools))
        times = [add(store, n) for n in range(10)]
        few = steps(store, 10)
        times += [add(store, n) for n in range(11, 1000)]
        many = steps(store, 1000)
    start = time.perf_counter()
    with Store.open(tmp_path) as store:
        opened = time.perf_counter() - start
        assert store.port_count() == 1001
    intent, completion = (statistics.median(t) * 1e6 for t in zip(*times, strict=True))
    p99 = statistics.quantiles([sum(t) for t in times], n=100)[98] * 1e6
    sys.stdout.write(
        f"ADD in the store: intent {intent:.0f} us, completion {completion:.0f} us (medians), "
        f"both {p99:.0f} us at the 99th percentile; {few} VM steps with 10 ports, {many} with 1,000; "
        f"open with 1,000 ports {opened * 1e3:.1f} ms\n"
    )
    assert many <= few * 1.2
    assert intent + completion < 50_000
    assert opened < 2.0
