"""The stages that a packet of a host endpoint goes through, who takes part in each, and what always passes.

::

    untracked   before connection tracking, doNotTrack policies; no implied replies, nobody's default
    pre-dnat    before addresses are translated, preDNAT policies; ingress only, nobody's default
    forward     what is routed on, policies with applyOnForward; allowed where none selects the endpoint
    local       what local processes send and receive, all other policies too; denied where none allows

An allow of the untracked stage ends them all, an allow before DNAT the ingress side of the later ones, as in
Calico (felix/rules, projectcalico/calico). Which interface an endpoint is, :func:`bind` says.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

import msgspec

from portwright.model.errors import InvalidInput
from portwright.policy.engine import selects
from portwright.policy.manifests.calico_hosts import HOST_INTERFACE, HOST_NODE
from portwright.policy.rules import (
    ICMP6,
    TCP,
    UDP,
    Action,
    Direction,
    Endpoint,
    EndpointKind,
    Flow,
    Policy,
    PolicySet,
    Snapshot,
)

#: An endpoint of this interface is of all that have none of their own.
EVERY: Final = "*"
#: What such a one never is: the loopback, and what begins as ports' representors do.
LOOPBACK, PORTS_PREFIX = "lo", "pw"
#: Names that nft reads as they are written, in quotes: no quote, no wildcard, no blank.
_PLAIN = re.compile(r"[A-Za-z0-9_.@+-]{1,15}", re.ASCII)
_REPRESENTOR = re.compile(r"pw[0-9a-f]{8}", re.ASCII)

#: Ports that no host policy closes, so that it can't lock its author out: Calico's
#: FailsafeInboundHostPorts and FailsafeOutboundHostPorts (felix/config/config_params.go).
FAILSAFE_IN: Final = {TCP: (22, 179, 2379, 2380, 5473, 6443, 6666, 6667), UDP: (68,)}
FAILSAFE_OUT: Final = {TCP: (179, 2379, 2380, 5473, 6443, 6666, 6667), UDP: (53, 67)}
#: ICMPv6 types without which a link is none, by the hop limit that no router lets through: routers,
#: neighbours, redirects (RFC 4861), multicast listeners (RFC 2710, 3810). Conntrack tracks none of them.
ON_LINK: Final = {255: (133, 134, 135, 136, 137), 1: (130, 131, 132, 143)}


class Stage(enum.StrEnum):
    """In the order in which a packet meets them; it meets one of the last two."""

    UNTRACKED = "untracked"
    PRE_DNAT = "pre-dnat"
    FORWARD = "forward"
    LOCAL = "local"


#: In these a connection's replies pass with it.
STATEFUL: Final = frozenset({Stage.PRE_DNAT, Stage.FORWARD, Stage.LOCAL})
#: In these a tier denies what its policies select and don't decide.
WITH_DEFAULTS: Final = frozenset({Stage.FORWARD, Stage.LOCAL})


class Bound(NamedTuple):
    """An endpoint of this node and the interfaces that it is; ``every``: all that are nobody else's."""

    endpoint: Endpoint
    interfaces: tuple[str, ...]
    every: bool = False


def stage_of(policy: Policy) -> Stage | None:
    """The stage that a policy is of alone; None: of ``local``, and perhaps of ``forward``."""
    if policy.do_not_track:
        return Stage.UNTRACKED
    return Stage.PRE_DNAT if policy.pre_dnat else None


def taking_part(policies: PolicySet, stage: Stage) -> PolicySet:
    """The policies of a stage, as an engine takes them: without the flags that keep them from workloads.

    Where a stage has no default its tiers pass on.
    """
    those = tuple(
        msgspec.structs.replace(p, do_not_track=False, pre_dnat=False)
        for p in policies.policies
        if (stage_of(p) or Stage.LOCAL) is (Stage.LOCAL if stage is Stage.FORWARD else stage)
        and (stage is not Stage.FORWARD or p.apply_on_forward)
    )
    tiers = policies.tiers
    if stage not in WITH_DEFAULTS:
        tiers = tuple(msgspec.structs.replace(tier, default=Action.PASS) for tier in tiers)
    return PolicySet(tiers=tiers, policies=those)


def local_endpoints(snapshot: Snapshot, node: str) -> tuple[Endpoint, ...]:
    """The host endpoints of this node, by name."""
    those = (e for e in snapshot.endpoints if e.kind is EndpointKind.HOST and e.labels.get(HOST_NODE) == node)
    return tuple(sorted(those, key=lambda e: e.name))


def refuse(policies: PolicySet, endpoints: Iterable[Endpoint]) -> None:
    """Raises InvalidInput for what these endpoints of this node, or policies that select them, can't have."""
    endpoints = tuple(endpoints)
    taken: dict[str, Endpoint] = {}
    for end in endpoints:
        name = end.labels.get(HOST_INTERFACE, "")
        field = f"HostEndpoint {end.name}: spec.interfaceName"
        if not name:
            continue
        if name == LOOPBACK:
            raise InvalidInput(field, name, "what a host sends to itself always passes: leave it out")
        if _REPRESENTOR.fullmatch(name):
            why = "this is a port's; select the port by its labels instead"
            raise InvalidInput(field, name, why)
        if name != EVERY and not _PLAIN.fullmatch(name):
            why = f'one interface\'s own name is needed here, or "{EVERY}" for all; a pattern is none'
            raise InvalidInput(field, name, why)
        if name in taken:
            why = f"HostEndpoint {taken[name].name} is this interface already: leave one of the two out"
            raise InvalidInput(field, name, why)
        taken[name] = end
    for policy in policies.policies:
        _refuse_domains(policy, endpoints)


def _refuse_domains(policy: Policy, endpoints: tuple[Endpoint, ...]) -> None:
    plain = msgspec.structs.replace(policy, do_not_track=False, pre_dnat=False)
    for direction in Direction:
        for index, rule in enumerate(policy.rules(direction) or ()):
            names = [n for peer in (*(rule.peers or ()), rule.local) if peer for n in peer.domains or ()]
            if names and any(selects(plain, end, direction) for end in endpoints):
                path = rule.where.path or f"spec.{direction}[{index}]"
                raise InvalidInput(
                    f"{policy.where}: {policy.kind} {policy.title}: {path}.destination.domains",
                    ", ".join(names),
                    "the host's own look-ups are not followed, so no host endpoint's policy can ask for "
                    "names: give nets, or keep the selector from host endpoints",
                )


def bind(endpoints: Iterable[Endpoint], addresses: Mapping[str, Iterable[str]]) -> tuple[Bound, ...]:
    """Which interfaces each of these endpoints is, of the interfaces' ``addresses`` now; by name.

    Where several fit an interface the first by name is it, as in Calico. One that is named is bound whether
    it exists or not. Endpoints that are no interface at present are left out. Raises InvalidInput for an
    interface that has to be bound and has a name that nft can't be told.
    """
    endpoints = sorted(endpoints, key=lambda e: e.name)
    where = {a: name for name, found in addresses.items() for a in found if _may_be(name)}
    owner: dict[str, Endpoint] = {}
    for end in endpoints:
        name = end.labels.get(HOST_INTERFACE)
        names = [name] if name else sorted({where[a] for a in end.addresses if a in where})
        for each in names:
            if each != EVERY and not _PLAIN.fullmatch(each):
                raise InvalidInput(
                    f"HostEndpoint {end.name}: spec.expectedIPs",
                    each,
                    "the interface that has the address has a name that can't be told to nftables: rename it",
                )
            owner.setdefault(each, end)
    found = []
    for end in endpoints:
        mine = tuple(sorted(name for name, by in owner.items() if by is end and name != EVERY))
        if mine:
            found.append(Bound(end, mine))
    if EVERY in owner:
        found.append(Bound(owner[EVERY], (), every=True))
    return tuple(found)


def _may_be(interface: str) -> bool:
    return interface != LOOPBACK and not interface.startswith(PORTS_PREFIX)


def bound_to(bound: Iterable[Bound], interface: str) -> Endpoint | None:
    """The endpoint that an interface is."""
    every = None
    for each in bound:
        if interface in each.interfaces:
            return each.endpoint
        every = each.endpoint if each.every else every
    return every if _may_be(interface) else None


def is_on_link(flow: Flow) -> bool:
    """Whether it is what a link needs, which always passes, but to where it would be routed."""
    return flow.protocol == ICMP6 and any(flow.icmp_type in types for types in ON_LINK.values())


def is_failsafe(flow: Flow, direction: Direction, *, replies: bool = False) -> bool:
    """Whether it is to a failsafe port; with ``replies``: or from one of the other direction's."""
    there, back = FAILSAFE_IN, FAILSAFE_OUT
    if direction is Direction.EGRESS:
        there, back = back, there
    return flow.port in there.get(flow.protocol, ()) or (
        replies and flow.source_port in back.get(flow.protocol, ())
    )
