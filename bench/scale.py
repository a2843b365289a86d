"""A host with many ports: what the next ADD costs, what the daemon holds, how long its restart takes."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.figures import Goal, Part, Series, at_most, number, spread
from bench.lab import OURS, OurHost, Sandbox, conflist
from portwright.model.errors import DaemonUnavailable

MEMORY_LIMIT_MB = 120
READY_WITHIN = 3.0


def scale(few: int, many: int, rounds: int, restarts: int) -> Part:
    """Two hosts of ours, one with ``few`` ports and one with ``many``, asked in turn."""
    small, large = OurHost(), OurHost()
    sandboxes: list[Sandbox] = []
    try:
        sizes = {few: small, many: large}
        filled: dict[int, float] = {}
        for count, host in sizes.items():
            host.daemon.cli("network", "create", "many", "--subnet", "10.64.0.0/16")
            made = [Sandbox("many", loopback=False) for _ in range(count)]
            sandboxes += made
            with host.daemon.client() as client:
                begun = time.perf_counter()
                for sandbox in made:
                    client.port_create("many", sandbox.path, name=sandbox.id)
                filled[count] = time.perf_counter() - begun
        add, delete = _timed({f"{n:,} ports": host for n, host in sizes.items()}, rounds)
        rss, pss = memory(large)
        ready = [_restart(large, many) for _ in range(restarts)]
        begun = time.perf_counter()
        with large.daemon.client() as client:
            for port in client.port_list():
                client.port_delete(port.port_id)
        emptied = time.perf_counter() - begun
    finally:
        _close(small, large, sandboxes)
    adds = Series(
        "ADD among ports", "ms", add, "less", "the CNI shim's, in turn, by how many ports there are"
    )
    dels = Series("DEL among ports", "ms", delete, "less", "of the same")
    restarted = Series(
        "restart",
        "s",
        {f"{many:,} ports": ready},
        "less",
        "from exec of the killed daemon's successor to ready",
    )
    median = spread(ready).median
    goals = [
        at_most(f"ADD with {many:,} ports against {few}", adds, f"{many:,} ports", f"{few:,} ports", 1.3),
        Goal(
            f"daemon memory at {many:,} ports",
            rss <= MEMORY_LIMIT_MB,
            f"{number(rss)} MB resident, {number(pss)} MB PSS, goal <= {MEMORY_LIMIT_MB} MB",
        ),
        Goal(
            f"restart with {many:,} ports",
            median <= READY_WITHIN,
            f"ready in {spread(ready)} s, goal <= {number(READY_WITHIN)} s",
        ),
    ]
    facts = {
        "ports made, one after the other through one socket": f"{many / filled[many]:.0f} a second",
        "ports deleted, likewise": f"{many / emptied:.0f} a second",
    }
    return Part("scale", [adds, dels, restarted], goals, facts)


def memory(host: OurHost) -> tuple[float, float]:
    """(resident, proportional) MB of the daemon's process, the larger of the two judged."""
    assert host.daemon.process is not None
    # nsenter execs the daemon: its pid is the process's.
    text = Path(f"/proc/{host.daemon.process.pid}/smaps_rollup").read_text()
    found = {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines()[1:]}
    return found["Rss"] / 1024, found["Pss"] / 1024


def _timed(sizes: dict[str, OurHost], rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    add: dict[str, list[float]] = {name: [] for name in sizes}
    delete: dict[str, list[float]] = {name: [] for name in sizes}
    confs = {name: conflist(OURS, host) for name, host in sizes.items()}
    for turn in range(rounds + 1):
        for name in sorted(sizes, reverse=bool(turn % 2)):
            host = sizes[name]
            sandbox = host.sandbox()
            host.settle()
            begun = time.perf_counter()
            host.runtime.add(confs[name], sandbox.id, sandbox.path)
            added = time.perf_counter()
            host.settle()
            asked = time.perf_counter()
            host.runtime.delete(confs[name], sandbox.id, sandbox.path)
            ended = time.perf_counter()
            if turn:
                add[name].append((added - begun) * 1e3)
                delete[name].append((ended - asked) * 1e3)
    return add, delete


def _restart(host: OurHost, ports: int) -> float:
    """Seconds from exec to the first answer that says ready, after a SIGKILL; every port is there."""
    host.daemon.kill()
    begun = time.perf_counter()
    host.daemon.launch()
    while True:
        try:
            with host.daemon.client() as client:
                if client.node_status().ready:
                    took = time.perf_counter() - begun
                    assert len(client.port_list()) == ports
                    return took
        except DaemonUnavailable:
            assert host.daemon.process is not None
            assert host.daemon.process.poll() is None, host.daemon.tail()
            assert time.perf_counter() - begun < 120, host.daemon.tail()
            time.sleep(0.002)  # what is measured is how long this takes: nothing announces it sooner


def _close(small: OurHost, large: OurHost, sandboxes: list[Sandbox]) -> None:
    for host in (small, large):
        host.close()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(Sandbox.close, sandboxes))
