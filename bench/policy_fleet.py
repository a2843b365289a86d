"""A host of teams: many ports under many policies, and what a change of either costs there.

Twenty teams with five applications each, whose policies are what such teams write: who of the own team and
of another may call, an office by its nets, DNS, the world without the private nets, and nothing else. A
change is timed at the client, from the call to the answer, which comes when the change is in force; the
programs themselves are asked (`why`) whether it is.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from bench.figures import Goal, Part, Series, number, spread
from bench.lab import OurHost, Sandbox
from bench.policy_rules import File, requests
from portwright import Client
from portwright.model.port import Port
from portwright.node import generations
from portwright.node.endpoints import POD_NAME, POD_NAMESPACE, snapshot_of
from portwright.policy.compile import compile_policies
from portwright.policy.manifests.read import read
from portwright.policy.tables import Size

TEAMS, APPS = 20, 5
IN_FORCE_MS, COMPILE_S = 200.0, 3.0
#: TCP, of every pod, that the administrator's policy opens or closes.
_AGENT = 9999
_NETWORKS = "networking.k8s.io/v1"
#: What is changed: the figure's name, and what is done.
_CHANGES = {
    "wide": ("apply of one policy over every port", "a ClusterNetworkPolicy, "),
    "narrow": ("apply of one policy of one application", "a NetworkPolicy, "),
    "relabelled": ("change of a port's label", "`port set --label`, "),
    "created": ("port created", ""),
    "deleted": ("port deleted", ""),
}


class Fleet(NamedTuple):
    """How many ports and policies, and rounds: of changes, of whole applies and compiles."""

    ports: int
    policies: int
    changes: int
    wholes: int


def labels_of(number_: int) -> dict[str, str]:
    """Whose port the ``number_``-th is."""
    team, app = number_ % TEAMS, number_ // TEAMS % APPS
    return {"app": f"app-{app}", POD_NAMESPACE: f"team-{team}", POD_NAME: f"pod-{number_}"}


def manifests(count: int) -> list[File]:
    """Namespaces, and ``count`` NetworkPolicies, a file for each team."""
    by_team: list[list[object]] = [
        [
            {
                "apiVersion": "v1",
                "kind": "Namespace",
                "metadata": {"name": f"team-{t}", "labels": {"team": f"t{t}"}},
            }
        ]
        for t in range(TEAMS)
    ]
    for n in range(count):
        team, app, kind = n % TEAMS, n // TEAMS % APPS, n // (TEAMS * APPS)
        by_team[team].append(_policy(team, app, kind))
    return [
        (f"team-{team:02}.yaml", "---\n".join(f"{json.dumps(one)}\n" for one in objects))
        for team, objects in enumerate(by_team)
    ]


def _policy(team: int, app: int, kind: int) -> object:
    """The ``kind``-th policy of an application."""
    own, other = f"app-{(app + kind) % APPS}", f"app-{(app + 2) % APPS}"
    neighbour = {
        "namespaceSelector": {"matchLabels": {"team": f"t{(team + kind + 1) % TEAMS}"}},
        "podSelector": {"matchLabels": {"app": other}},
    }
    office = [{"ipBlock": {"cidr": f"198.18.{team}.{16 * (kind % 16)}/28"}}]
    office.append({"ipBlock": {"cidr": f"2001:db8:{team:x}:{kind:x}::/64"}})
    private = ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"]
    rules: list[tuple[str, object]] = [
        ("ingress", {"from": [{"podSelector": {"matchLabels": {"app": own}}}], "ports": _tcp(8080 + kind)}),
        ("ingress", {"from": [neighbour], "ports": _tcp(9090, 9100 + kind)}),
        ("ingress", {"from": office, "ports": _tcp(443)}),
        ("egress", {"ports": [{"protocol": protocol, "port": 53} for protocol in ("UDP", "TCP")]}),
        (
            "egress",
            {"to": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": private}}], "ports": _tcp(443)},
        ),
        ("egress", {"to": [neighbour], "ports": _tcp(9090, 9100 + kind)}),
    ]
    direction, rule = rules[kind % len(rules)]
    return {
        "apiVersion": _NETWORKS,
        "kind": "NetworkPolicy",
        "metadata": {"name": f"app-{app}-{kind}", "namespace": f"team-{team}"},
        "spec": {
            "podSelector": {"matchLabels": {"app": f"app-{app}"}},
            "policyTypes": [direction.capitalize()],
            direction: [rule],
        },
    }


def _tcp(*ports: int) -> list[object]:
    return [{"protocol": "TCP", "port": port} for port in ports]


def everybody(action: str) -> File:
    """The administrator's policy over every pod: ``action`` for one service, both ways."""
    match = {"action": action, "protocols": [{"tcp": {"destinationPort": {"number": _AGENT}}}]}
    whom: list[object] = [{"namespaces": {}}]
    manifest = {
        "apiVersion": "policy.networking.k8s.io/v1alpha2",
        "kind": "ClusterNetworkPolicy",
        "metadata": {"name": "agent"},
        "spec": {
            "tier": "Admin",
            "priority": 10,
            "subject": {"namespaces": {}},
            "ingress": [match | {"from": whom}],
            "egress": [match | {"to": whom}],
        },
    }
    return "agent.yaml", json.dumps(manifest)


def one_app(port: int) -> File:
    """A NetworkPolicy of one application, which lets its team call one more port."""
    manifest = {
        "apiVersion": _NETWORKS,
        "kind": "NetworkPolicy",
        "metadata": {"name": "more", "namespace": "team-0"},
        "spec": {
            "podSelector": {"matchLabels": {"app": "app-0"}},
            "ingress": [{"from": [{"podSelector": {}}], "ports": _tcp(port)}],
        },
    }
    return "more.yaml", json.dumps(manifest)


def fleet(size: Fleet) -> Part:
    """Changes among many ports, first without other policies and then under all of them; and compiling."""
    bare, few = f"{size.ports:,} ports, no policy", f"{size.ports:,} ports"
    many = f"{size.ports:,} ports, {size.policies:,} more policies"
    changes: dict[str, dict[str, list[float]]] = {name: {} for name in _CHANGES}
    whole: dict[str, list[float]] = {many: []}
    with _filled(size) as (api, sandboxes, ports):
        files = manifests(size.policies)
        _change_ports(changes, bare, api, sandboxes, size.changes)
        for where in (few, many):
            if where == many:
                for _ in range(size.wholes):
                    api.policy_delete(api.policy_list().files)
                    whole[many].append(_ms(lambda: [api.policy_apply(batch) for batch in requests(files)]))
                    assert len(api.policy_list().policies) == size.policies
            api.policy_apply([everybody("Accept")])
            changes["wide"][where] = _applied(api, ports, size.changes)
            changes["narrow"][where] = _narrow(api, size.changes)
            _change_ports(changes, where, api, sandboxes, size.changes)
        tables = ", ".join(f"{count:,} {name}" for name, count in api.policy_list().tables.items())
        stages, needed = _compiled([*files, everybody("Accept")], api.port_list(), size.wholes)
    at_client = "at the client, from the call to the answer"
    series = [
        Series(name, "ms", changes[key], "less", f"{what}{at_client}", next(iter(changes[key])))
        for key, (name, what) in _CHANGES.items()
    ]
    series += [
        Series("apply of all policies, from none", "ms", whole, "less", at_client),
        Series(
            "full compile", "s", stages, "less", f"{many}, pure: nothing is kept from before", "all of it"
        ),
    ]
    wide = changes["wide"]
    total = spread(stages["all of it"])
    goals = [
        Goal(
            f"a policy in force on {where}",
            spread(wide[where]).median < IN_FORCE_MS,
            f"{spread(wide[where])} ms, goal < {number(IN_FORCE_MS)} ms",
        )
        for where in (few, many)
    ]
    goals += [
        Goal(
            f"full compile of {size.ports:,} x {size.policies:,}",
            total.median < COMPILE_S,
            f"{total} s from manifests to map entries, goal < {number(COMPILE_S)} s",
        ),
    ]
    facts = {
        "tables of all policies": tables,
        "entries compiled": f"{needed.cells:,} cells, {needed.sets:,} sets, {needed.classes:,} classes",
    }
    return Part("policy", series, goals, facts)


@contextlib.contextmanager
def _filled(size: Fleet) -> Iterator[tuple[Client, list[Sandbox], list[Port]]]:
    """A host with its ports; everything is gone at the end."""
    host = OurHost()
    sandboxes: list[Sandbox] = []
    try:
        sandboxes += [Sandbox("fleet", loopback=False) for _ in range(size.ports)]
        with Client(host.daemon.run_dir / "portwright.sock", timeout=120) as api:
            api.network_create("fleet", subnets=["10.64.0.0/16", "fd00:64::/64"])
            ports = [
                api.port_create("fleet", sandbox.path, name=sandbox.id, labels=labels_of(n))
                for n, sandbox in enumerate(sandboxes)
            ]
            yield api, sandboxes, ports
            api.policy_delete(api.policy_list().files)
            for port in api.port_list():
                api.port_delete(port.port_id)
    finally:
        host.close()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(Sandbox.close, sandboxes))


def _applied(api: Client, ports: Sequence[Port], times: int) -> list[float]:
    """Milliseconds of each apply of the administrator's policy, of the opposite action each time."""
    taken = []
    for turn in range(times):
        action, verdict = (("Deny", "refused"), ("Accept", "allowed"))[turn % 2]
        taken.append(_ms(lambda: api.policy_apply([everybody(action)])))  # noqa: B023 - called at once
        told = api.why(ports[0].port_id, ports[1].port_id, dport=_AGENT)
        assert told.verdict == verdict, told
    return taken


def _narrow(api: Client, times: int) -> list[float]:
    return [_ms(lambda: api.policy_apply([one_app(7000 + turn)])) for turn in range(times)]  # noqa: B023


def _change_ports(
    changes: dict[str, dict[str, list[float]]],
    where: str,
    api: Client,
    sandboxes: Sequence[Sandbox],
    times: int,
) -> None:
    """Milliseconds of each change of the first port's application, and of the last port's end and making."""
    for key in ("relabelled", "created", "deleted"):
        changes[key][where] = []
    first, last = (sandbox.id for sandbox in (sandboxes[0], sandboxes[-1]))
    for turn in range(times):
        app = {"app": f"app-{(turn + 1) % 2}"}
        changes["relabelled"][where].append(_ms(lambda: api.port_set(first, labels=app)))  # noqa: B023
        labels = api.port_show(last).labels
        changes["deleted"][where].append(_ms(lambda: api.port_delete(last)))
        path = sandboxes[-1].path
        changes["created"][where].append(
            _ms(lambda: api.port_create("fleet", path, name=last, labels=labels))  # noqa: B023
        )
    api.port_set(first, labels={"app": labels_of(0)["app"]})


def _ms(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return (time.perf_counter() - begun) * 1e3


def _compiled(
    files: Sequence[File], ports: Sequence[Port], times: int
) -> tuple[dict[str, list[float]], Size]:
    """Seconds of each step from the manifests' text to the maps' entries."""
    stages: dict[str, list[float]] = {"all of it": [], "reading": [], "compiling": [], "map entries": []}
    for _ in range(times):
        marks = [time.perf_counter()]
        found = read(files)
        snapshot = snapshot_of(found, ports)
        marks.append(time.perf_counter())
        compiled = compile_policies(found.policy_set, snapshot)
        marks.append(time.perf_counter())
        generations.Entries(compiled).complete()
        marks.append(time.perf_counter())
        steps = [marks[-1] - marks[0], *(after - before for before, after in itertools.pairwise(marks))]
        for samples, step in zip(stages.values(), steps, strict=True):
            samples.append(step)
    return stages, compiled.size
