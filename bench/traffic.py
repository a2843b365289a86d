"""Packets between two sandboxes: one TCP stream, and request/response, each contender in turn.

Ours runs with everything that is always on: the guard on both ports and every counter.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.figures import Goal, Part, Series, at_least
from bench.lab import (
    BRIDGE,
    BRIDGE_BY_HAND,
    MACVLAN,
    OURS,
    OURS_TCX,
    PTP,
    VETH,
    Sandbox,
    able,
    hosts,
    pair,
)
from tests.conformance.kit.netns import NSENTER

_CONTENDERS = (VETH, OURS, OURS_TCX, BRIDGE, PTP, MACVLAN, BRIDGE_BY_HAND)
_STREAM_PORT = 5299
CPUS = ("0", "1")  # client and server: fixed, so that the scheduler's choice is not what differs


def stream(rounds: int, megabytes: int) -> Part:
    """One TCP stream (iperf3) of ``megabytes`` a round, and the CPU it takes on both sides."""
    with _pairs() as pairs, contextlib.ExitStack() as stack:
        speed: dict[str, list[float]] = {name: [] for name in pairs}
        cost: dict[str, list[float]] = {name: [] for name in pairs}
        for _, server, _ in pairs.values():
            stack.enter_context(iperf_server(server))
        for turn in range(rounds):
            for name in turned(tuple(pairs), turn):
                a, _, address = pairs[name]
                gbits, cpu = iperf(a, address, megabytes)
                speed[name].append(gbits)
                cost[name].append(cpu / gbits)
    series = Series(
        "TCP stream",
        "Gb/s",
        speed,
        "more",
        f"iperf3, one stream of {megabytes} MB a round, client and server on a CPU each",
    )
    burned = Series(
        "CPU of the stream", "% of a CPU per Gb/s", cost, "less", "both sides, as iperf3 accounts for it"
    )
    goals = [at_least("TCP stream against a bare veth pair", series, OURS, VETH, 0.97)]
    goals += [
        at_least(f"TCP stream ahead of {theirs}", series, OURS, theirs, 1.0)
        for theirs in (BRIDGE, PTP, MACVLAN)
    ]
    return Part("stream", [series, burned], goals)


def latency(rounds: int, milliseconds: int) -> Part:
    """Round trips of one byte, TCP and UDP: how many a second, and the 99th percentile."""
    series: list[Series] = []
    goals: list[Goal] = []
    with _pairs() as pairs, compiled("rr") as program:
        for proto in ("TCP", "UDP"):
            rate: dict[str, list[float]] = {name: [] for name in pairs}
            p99: dict[str, list[float]] = {name: [] for name in pairs}
            for turn in range(rounds):
                for name in turned(tuple(pairs), turn):
                    a, b, address = pairs[name]
                    found = answer(
                        [program, a.path, b.path, address, proto.lower(), str(milliseconds), *CPUS]
                    )
                    rate[name].append(float(found["rate"]))
                    p99[name].append(float(found["p99"]))
            how = f"bench/rr.c, one byte each way, {milliseconds} ms a round, client and server on a CPU each"
            rates = Series(f"{proto} request/response", "round trips/s", rate, "more", how)
            tails = Series(f"{proto} p99 latency", "µs", p99, "less", how)
            series += [rates, tails]
            goals.append(
                at_least(f"{proto} request/response rate against a bare veth pair", rates, OURS, VETH, 0.95)
            )
            goals.append(at_least(f"{proto} p99 latency against a bare veth pair", tails, OURS, VETH, 0.95))
    return Part("latency", series, goals)


def turned(contenders: tuple[str, ...], turn: int) -> tuple[str, ...]:
    """The contenders, each round beginning with another: nobody always runs after the same one."""
    at = turn % len(contenders)
    return contenders[at:] + contenders[:at]


@contextlib.contextmanager
def _pairs() -> Iterator[dict[str, tuple[Sandbox, Sandbox, str]]]:
    with hosts(*able(*_CONTENDERS)) as made:
        yield {name: pair(name, host) for name, host in made.items()}


@contextlib.contextmanager
def iperf_server(sandbox: Sandbox, port: int = _STREAM_PORT) -> Iterator[None]:
    """A server in a sandbox, listening."""
    command = [NSENTER, f"--net={sandbox.path}", "iperf3", "-s", "-p", str(port), "-A", CPUS[1]]
    command.append("--forceflush")
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert server.stdout is not None
    try:
        for line in server.stdout:  # its own words, instead of waiting some time
            if b"listening" in line:
                break
        yield
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def iperf(a: Sandbox, address: str, megabytes: int, port: int = _STREAM_PORT) -> tuple[float, float]:
    """(Gb/s that arrived, % of a CPU that client and server took together)."""
    command = [NSENTER, f"--net={a.path}", "iperf3", "-c", address, "-p", str(port)]
    end = answer([*command, "-A", CPUS[0], "-n", f"{megabytes}M", "-J"])["end"]
    cpu = end["cpu_utilization_percent"]
    return end["sum_received"]["bits_per_second"] / 1e9, cpu["host_total"] + cpu["remote_total"]


@contextlib.contextmanager
def compiled(name: str, *flags: str) -> Iterator[str]:
    """A helper of this folder (rr, flows, taps), compiled here and now, so that it is this machine's."""
    with tempfile.TemporaryDirectory(prefix=f"pwt-{name}-") as folder:
        program = Path(folder, name)
        source = Path(__file__).with_name(f"{name}.c")
        subprocess.run(["gcc", "-O2", "-Wall", "-Werror", *flags, "-o", program, source], check=True)
        yield str(program)


def answer(command: list[str]) -> dict[str, Any]:
    """The JSON object that a command prints; AssertionError with all it said if it fails."""
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise AssertionError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    body: dict[str, Any] = json.loads(done.stdout)
    return body
