"""The policy corpora: where they are, what a case is, and how one is asked.

A corpus is a folder of tests/data/policy with manifests as users write them and an ``expect.json``: cases,
each the manifests of one state and rows of (from, to, protocol, port, allowed[, egress, ingress]). ``from``
and ``to`` are ``namespace/pod`` (its first address, or ``namespace/pod#1`` for the next) or an address. A
port is a number, or "type/code" for ICMP, or null where a packet has none. The last two columns are the two
sides' own verdicts, where a case tells them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path

import msgspec

from portwright.policy.engine import Engine
from portwright.policy.labels import NAMESPACE_PREFIX
from portwright.policy.manifests.cluster import workload_labels
from portwright.policy.manifests.read import read
from portwright.policy.rules import (
    ICMP,
    ICMP6,
    SCTP,
    TCP,
    UDP,
    Endpoint,
    EndpointKind,
    Flow,
    NamedPort,
    PolicySet,
    Snapshot,
)

DATA = Path(__file__).parent / "data" / "policy"
PROTOCOLS = {"tcp": TCP, "udp": UDP, "sctp": SCTP, "icmp": ICMP, "icmp6": ICMP6}

#: Some of cyclonus' policies leave out what they all are.
_KIND = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy"}

#: Every corpus of manifests, and how many verdicts it has at least (a lost file is no smaller corpus).
CORPORA = {
    "own": 784,
    "e2e": 527,
    "conformance": 301,
    "assistant": 1090,
    "evaluators": 178,
    "recipes": 75,
}
#: Verdicts of cyclonus_cases.json, and those of them from a pod to itself.
CYCLONUS_VERDICTS, CYCLONUS_SELF = 124_884, 13_848


class Row(msgspec.Struct, frozen=True, array_like=True):
    """One verdict that is expected."""

    source: str
    destination: str
    protocol: str | int
    port: int | str | None
    allowed: bool
    egress: bool | None = None
    ingress: bool | None = None


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One state and what is expected of it. ``local_nodes``: on which of its nodes the workloads run."""

    name: str
    manifests: tuple[str, ...]
    expect: tuple[Row, ...]
    domains: dict[str, tuple[str, ...]] = {}
    local_nodes: tuple[str, ...] = ()


class Corpus(msgspec.Struct, frozen=True):
    """``expect.json``. ``source``: where the facts are from."""

    source: str
    cases: tuple[Case, ...]


class State(msgspec.Struct, frozen=True, kw_only=True):
    """A case, read: what an engine is asked, and the answers."""

    title: str
    policies: PolicySet
    snapshot: Snapshot
    asked: tuple[tuple[Flow, Row], ...]


def corpus(name: str) -> Corpus:
    """One corpus as it stands on disk."""
    return msgspec.json.decode((DATA / name / "expect.json").read_bytes(), type=Corpus)


def texts(name: str, case: Case) -> list[tuple[str, str]]:
    """The manifests of a case: (file, text)."""
    return [(f"{name}/{file}", (DATA / name / file).read_text()) for file in case.manifests]


def state(name: str, case: Case, files: list[tuple[str, str]] | None = None) -> State:
    """A case through the reader; ``files`` instead of its own manifests, for whom these are changed."""
    manifests = read(texts(name, case) if files is None else files)
    endpoints = tuple(
        msgspec.structs.replace(endpoint, local_node=True)
        if endpoint.kind is EndpointKind.NODE and endpoint.name in case.local_nodes
        else endpoint
        for endpoint in manifests.snapshot.endpoints
    )
    return State(
        title=f"{name}: {case.name}",
        policies=manifests.policy_set,
        snapshot=Snapshot(endpoints=endpoints, domains=case.domains),
        asked=tuple((flow_of(row, endpoints), row) for row in case.expect),
    )


def address_of(where: str, endpoints: tuple[Endpoint, ...]) -> str:
    """The address that a row's ``from`` or ``to`` stands for."""
    if "/" not in where:
        return where
    title, _, index = where.partition("#")
    for endpoint in endpoints:
        if endpoint.kind is EndpointKind.WORKLOAD and endpoint.title == title:
            return endpoint.addresses[int(index or 0)]
    raise LookupError(f"{title} is no pod of this state")


def flow_of(row: Row, endpoints: tuple[Endpoint, ...]) -> Flow:
    """The packet that a row asks about. Its source port is one that nothing names."""
    protocol = row.protocol if isinstance(row.protocol, int) else PROTOCOLS[row.protocol]
    source, destination = address_of(row.source, endpoints), address_of(row.destination, endpoints)
    if isinstance(row.port, str):
        icmp_type, icmp_code = (int(part) for part in row.port.split("/"))
        return Flow(
            source=source,
            destination=destination,
            protocol=protocol,
            icmp_type=icmp_type,
            icmp_code=icmp_code,
        )
    return Flow(
        source=source,
        destination=destination,
        protocol=protocol,
        source_port=None if row.port is None else 49_152,
        port=row.port,
    )


@functools.cache
def states(name: str) -> tuple[State, ...]:
    """All of a corpus, read once for a session."""
    return tuple(state(name, case) for case in corpus(name).cases)


def mismatches(asked: State) -> Iterator[str]:
    """A sentence for each verdict of a state that the engine gives otherwise."""
    engine = Engine(asked.policies, asked.snapshot)
    for flow, row in asked.asked:
        found = engine.connect(flow)
        sides = [None if side is None else side.allowed for side in (found.egress, found.ingress)]
        wrong = found.allowed != row.allowed
        wrong |= row.egress is not None and row.egress != sides[0]
        wrong |= row.ingress is not None and row.ingress != sides[1]
        if wrong:
            want = "allowed" if row.allowed else "denied"
            yield (
                f"{asked.title}: {row.source} -> {row.destination} {row.protocol} {row.port}: {want} expected"
            )


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One step of a cyclonus case. ``expected``: bit (from * pods + to) * ports + port."""

    title: str
    policies: str
    snapshot: Snapshot
    addresses: tuple[str, ...]
    ports: tuple[tuple[int, int], ...]
    expected: str


@functools.cache
def cyclonus() -> tuple[Step, ...]:
    """The 256 steps of cyclonus' 230 cases; ``policies`` is JSON text, as the reader takes it."""
    whole = json.loads((DATA / "cyclonus_cases.json").read_text())
    ports = tuple((PROTOCOLS[p["Proto"].lower()], p["Port"]) for p in whole["ports"])
    named = tuple(
        NamedPort(p["Name"], number, port) for p, (number, port) in zip(whole["ports"], ports, strict=True)
    )
    found = []
    for case in whole["cases"]:
        for index, step in enumerate(case["steps"]):
            endpoints = tuple(
                Endpoint(
                    name=pod["Name"],
                    namespace=pod["Ns"],
                    labels=workload_labels(pod["Labels"] or {}, pod["Ns"], step["namespaces"][pod["Ns"]]),
                    addresses=(pod["IP"],),
                    named_ports=named,
                )
                for pod in step["pods"]
            )
            found.append(
                Step(
                    title=f"cyclonus: {case['description']} ({index + 1})",
                    policies=json.dumps(
                        {"apiVersion": "v1", "kind": "List", "items": [_KIND | p for p in step["policies"]]}
                    ),
                    snapshot=Snapshot(endpoints=endpoints),
                    addresses=tuple(pod["IP"] for pod in step["pods"]),
                    ports=ports,
                    expected=step["expected"],
                )
            )
    return tuple(found)


@functools.cache
def cyclonus_policies(text: str) -> PolicySet:
    """The policies of a step; equal ones are read once."""
    return read([("step.json", text)]).policy_set


def namespace_label(key: str) -> str:
    """The effective label of a namespace's own."""
    return NAMESPACE_PREFIX + key
