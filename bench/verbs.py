"""ADD and DEL, as a runtime times them: from the first plugin's exec to the last one's exit.

Every ADD is into a fresh namespace. Between two calls the kernel is given the time to end what the last one
left in the background (``Host.settle``), so nobody pays another's debt; what such debts come to when
calls follow each other at once is a figure of its own, ``churn``.
"""

from __future__ import annotations

import time

from bench.figures import Goal, Part, Series, at_most
from bench.lab import BRIDGE, MACVLAN, OURS, OURS_TCX, PTP, Host, Sandbox, able, conflist, hosts
from tests.conformance.kit.plugin import Json

_CHAIN = f"{BRIDGE} chain"
_CAPABILITIES: Json = {
    "portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}],
    "bandwidth": {
        "ingressRate": 100_000_000,
        "ingressBurst": 10_000_000,
        "egressRate": 100_000_000,
        "egressBurst": 10_000_000,
    },
}


def verbs(rounds: int, chain_rounds: int, churn: int) -> Part:
    """Plain ADD and DEL; the same with masquerading, a port mapping and limits; and churn."""
    series: list[Series] = []
    goals: list[Goal] = []
    contenders = able(BRIDGE, OURS, OURS_TCX, PTP, MACVLAN)
    with hosts(*contenders) as made:
        add, delete = _timed(made, contenders, rounds, chained=False)
        series += [
            Series(
                "ADD", "ms", add, "less", "one plugin, host-local or ours for the addresses, one IPv4 range"
            ),
            Series("DEL", "ms", delete, "less", "of the same"),
        ]
        goals += [
            at_most("ADD against bridge + host-local", series[0], OURS, BRIDGE, 0.5),
            at_most("DEL against bridge + host-local", series[1], OURS, BRIDGE, 0.25),
        ]
        pairs = _churned(made, contenders, churn)
        series.append(
            Series(
                "churn", "ms per ADD + DEL", pairs, "less", "one ADD + DEL after the other, without a pause"
            )
        )
    contenders = able(BRIDGE, OURS, OURS_TCX)
    with hosts(*contenders) as made:
        add, delete = _timed(made, contenders, chain_rounds, chained=True)
        what = "bridge with ipMasq, portmap, bandwidth; ours with masquerade and both capabilities"
        series += [
            Series("ADD, whole chain", "ms", add, "less", what),
            Series("DEL, whole chain", "ms", delete, "less", what),
        ]
        goals += [
            at_most(f"ADD against the {_CHAIN}", series[-2], OURS, BRIDGE, 0.2),
            at_most(f"DEL against the {_CHAIN}", series[-1], OURS, BRIDGE, 0.2),
        ]
    return Part("verbs", series, goals)


def _timed(
    made: dict[str, Host], contenders: tuple[str, ...], rounds: int, *, chained: bool
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Milliseconds of each ADD and of each DEL; a first round is thrown away (bridges, tables, caches)."""
    add: dict[str, list[float]] = {name: [] for name in contenders}
    delete: dict[str, list[float]] = {name: [] for name in contenders}
    confs = {name: conflist(name, made[name], chained=chained) for name in contenders}
    for turn in range(rounds + 1):
        at = turn % len(contenders)
        for name in contenders[at:] + contenders[:at]:
            host = made[name]
            sandbox = host.sandbox()
            host.settle()
            took_add, took_del = _once(host, confs[name], sandbox, chained)
            if turn:
                add[name].append(took_add)
                delete[name].append(took_del)
    return add, delete


def _once(host: Host, conf: Json, sandbox: Sandbox, chained: bool) -> tuple[float, float]:
    options = _CAPABILITIES if chained else {}
    begun = time.perf_counter()
    host.runtime.add(conf, sandbox.id, sandbox.path, runtime_config=options)
    added = time.perf_counter()
    host.settle()
    asked = time.perf_counter()
    host.runtime.delete(conf, sandbox.id, sandbox.path)
    ended = time.perf_counter()
    # The promise that DEL's answer makes: nobody finds the device any more.
    assert "eth0" not in sandbox.ns.run(["ip", "-br", "link"]), f"{host.name}: DEL left the device"
    return (added - begun) * 1e3, (ended - asked) * 1e3


def _churned(made: dict[str, Host], contenders: tuple[str, ...], pairs: int) -> dict[str, list[float]]:
    """Milliseconds per pair, of several bursts, each up to the moment at which the kernel is quiet again."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(3):
        for name in contenders:
            host = made[name]
            conf = conflist(name, host)
            sandboxes = [host.sandbox() for _ in range(pairs)]
            host.settle()
            begun = time.perf_counter()
            for sandbox in sandboxes:
                host.runtime.add(conf, sandbox.id, sandbox.path)
                host.runtime.delete(conf, sandbox.id, sandbox.path)
            host.settle()
            found[name].append((time.perf_counter() - begun) * 1e3 / pairs)
    return found
