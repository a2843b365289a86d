"""SIGKILL at any moment: no committed result is lost, no address has two owners."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path
from typing import NoReturn

from portwright.model.errors import PoolExhausted
from portwright.model.network import AddressRange, Network
from portwright.model.port import NetnsRef, Owner, Port, PortAddress, PortState, rep_name
from portwright.store import Store

ROUNDS = 100
NS = NetnsRef(path="/proc/1/ns/net", cookie=1, boot_id="b")


def port(port_id: str, addresses: tuple[str, ...], state: PortState) -> Port:
    """Make a port that lists its addresses."""
    return Port(
        port_id=port_id, network="n", net_id=1, owner=Owner(kind="name", name=port_id), model="veth",
        state=state, ifname="eth0", rep_name=rep_name(port_id), mac="02:00:00:00:00:01", mtu=1500, host=NS,
        sandbox=NS, addresses=tuple(PortAddress(address=a, gateway="169.254.1.1") for a in addresses),
    )  # fmt: skip


def daemon(state_dir: Path, out: int, seed: int) -> NoReturn:
    """Add and delete until killed; each line is written after the commit that it tells of ('?': before)."""

    def say(*words: object) -> None:
        """Write one line in one write(2)."""
        os.write(out, (" ".join(map(str, words)) + "\n").encode())

    try:
        choose = random.Random(seed)
        store = Store.open(state_dir, rest_seconds=0.0)
        mine = [p.port_id for p in store.ports()]
        say("open")
        while True:
            if mine and choose.random() < len(mine) / 80:
                victim = mine.pop(choose.randrange(len(mine)))
                say("?del", victim)
                with store.transaction():
                    entry = store.begin(victim, "del", b"plan")
                with store.transaction(durable=False):
                    store.release(victim, now=0.0)
                    store.delete_port(victim)
                    store.finish(entry, "done")
                say("del", victim)
                continue
            port_id = f"{choose.getrandbits(64):016x}"
            try:
                with store.transaction():
                    given = tuple(a.address for a in store.reserve("n", None, port_id, now=0.0))
                    store.put_port(port(port_id, given, PortState.CREATING))
                    entry = store.begin(port_id, "add", b"plan")
            except PoolExhausted:
                say("full")
                continue
            say("add", port_id, *given)
            with store.transaction(durable=False):
                store.put_port(port(port_id, given, PortState.ATTACHED))
                store.finish(entry, "done")
            say("attached", port_id)
            mine.append(port_id)
    except BaseException as error:  # noqa: BLE001 - the child must never return into pytest
        say("error", repr(error))
    finally:
        os._exit(1)


def run_and_kill(state_dir: Path, seed: int, lines_to_read: int) -> list[list[str]]:
    """Run a daemon, kill it after that many lines, and return all that it said."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        daemon(state_dir, write, seed)
    os.close(write)
    said = []
    with os.fdopen(read, "rb") as pipe:
        for line in pipe:
            said.append(line.decode().split())
            if len(said) == lines_to_read:
                os.kill(pid, signal.SIGKILL)  # it is somewhere in the work after that line
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), said[-1]
    return said


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """Over 100 lives of one state directory: what was told is there, and each address has one port.

    A life ends in the middle of an intent, a completion or a delete; the next one opens
    the same directory at once, as systemd would start it.
    """
    choose = random.Random(os.getpid())
    with Store.open(tmp_path) as store:
        pools = ((AddressRange(subnet="10.1.0.0/25"),), (AddressRange(subnet="2001:db8::/64"),))
        store.add_network(Network(name="n", net_id=0, pools=pools))
    there: dict[str, tuple[str, ...]] = {}
    told, open_ends = 0, 0
    for round_number in range(ROUNDS):
        said = run_and_kill(tmp_path, choose.getrandbits(32), choose.randrange(2, 60))
        told += len(said)
        attached, maybe = set(), set()
        for kind, *words in said:
            assert kind != "error", words
            if kind == "add":
                given = tuple(words[1:])
                assert not any(set(given) & set(other) for p, other in there.items() if p not in maybe)
                there[words[0]] = given
            elif kind == "attached":
                attached.add(words[0])
            elif kind == "?del":
                maybe.add(words[0])
            elif kind == "del":
                del there[words[0]]
                maybe.discard(words[0])
        with Store.open(tmp_path, rest_seconds=0.0) as store:
            recorded = {p.port_id: p for p in store.ports()}
            held = store.held_addresses()
            pending = {e.port_id for e in store.pending()}
            # The record agrees with itself: each port lists what is held for it, and nothing else is held.
            assert held == {a.address: p.port_id for p in recorded.values() for a in p.addresses}
            for port_id, given in there.items():
                if port_id in recorded:
                    assert tuple(a.address for a in recorded[port_id].addresses) == given
                else:
                    assert port_id in maybe, f"round {round_number}: {port_id} was told and is lost"
            for port_id in attached & set(there) - maybe:
                assert recorded[port_id].state is PortState.ATTACHED
            # Committed, but not told: at most the last undertaking, and its intent (if open) says so.
            assert len(set(recorded) - set(there)) <= 1
            unfinished = {p.port_id for p in recorded.values() if p.state is PortState.CREATING}
            assert unfinished <= pending
            open_ends += len(pending)
            # Recovery, as the node would do it: what was not finished is undone.
            for entry in store.pending():
                with store.transaction():
                    store.release(entry.port_id, now=0.0, rest=False)
                    if entry.port_id in recorded:
                        store.delete_port(entry.port_id)
                    store.finish(entry.id, "failed")
            there = {p.port_id: tuple(a.address for a in p.addresses) for p in store.ports()}
    assert told > ROUNDS * 10
    sys.stdout.write(f"{told} results told, {open_ends} of {ROUNDS} lives ended inside an undertaking\n")
