"""What the policies say of a flow: the specification, as a function.

Everything else that decides (the compiler's tables, the BPF programs, the nft rendering) is tested against
this module, and `why`, the matrix and the dry run ask it. Semantics: reference/policy.md, 1.5 and the
positions of 1.2. In short:

- A connection has two sides, the source's egress and the destination's ingress; both must allow. An address
  that belongs to no workload has no side: nothing selects it.
- Two built-in rules come before all policies: an endpoint's traffic to its own address, and the local node's
  traffic to its workloads, are allowed.
- Ports are the destination's, by number or by the name that the *destination* gives them under the packet's
  protocol. A packet without ports (ICMP, a later fragment) matches no rule that asks for one.
- Host-network pods live on their node's address: no policy selects them and no selector finds them. Network
  sets are peers only.

Not here, since it needs more than one packet or none at all: replies and related ICMP errors (they pass with
the connection that they belong to), failsafe ports and untracked or pre-DNAT policies of host endpoints.
"""

from __future__ import annotations

import enum

import msgspec

from portwright.model.errors import InvalidInput
from portwright.policy.labels import matches
from portwright.policy.matching import World, rule_peers_match, rule_traffic_matches
from portwright.policy.rules import (
    Action,
    Direction,
    Endpoint,
    EndpointKind,
    Flow,
    Policy,
    PolicySet,
    Rule,
    Snapshot,
    Tier,
)

#: How many endpoints, and pairs of addresses, an engine remembers; at the limit it forgets all and goes on.
_REMEMBERED = 1 << 18


class Implicit(enum.StrEnum):
    """What decided where no rule did."""

    NONE = ""
    OWN_ADDRESS = "own-address"
    """Built-in: from one of the endpoint's addresses to one of its addresses."""
    LOCAL_NODE = "local-node"
    """Built-in: from the node that the workload runs on."""
    TIER_DEFAULT = "tier-default"
    """Policies of the tier select the endpoint, no rule decided, and the tier denies by default."""
    ALL_PASSED = "all-passed"
    """Policies select the endpoint, and each tier passed the flow on."""
    NO_POLICY = "no-policy"
    """No policy selects the endpoint in this direction."""
    HOST_DEFAULT = "host-default"
    """A host endpoint, once it exists, denies what no policy allows (Calico)."""


class Logged(msgspec.Struct, frozen=True, kw_only=True):
    """A rule of action LOG that the flow matched on its way."""

    policy: Policy
    index: int
    rule: Rule


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """One side's verdict and what gave it.

    Either ``policy``, ``index`` (from 0, of the policy's rules of this direction) and ``rule`` are there and
    ``implicit`` is '', or ``implicit`` says why none is. ``tier`` is the rule's, or the one whose default it
    was. ``selected_by``: every enforced policy that selects the endpoint in this direction, in order.
    """

    verdict: Action
    direction: Direction
    endpoint: Endpoint
    tier: Tier | None = None
    policy: Policy | None = None
    index: int | None = None
    rule: Rule | None = None
    implicit: Implicit = Implicit.NONE
    selected_by: tuple[Policy, ...] = ()
    logs: tuple[Logged, ...] = ()

    @property
    def allowed(self) -> bool:
        """Whether this side lets the flow pass."""
        return self.verdict is Action.ALLOW


class Connection(msgspec.Struct, frozen=True, kw_only=True):
    """Both sides; None where the address is no workload's."""

    egress: Decision | None
    ingress: Decision | None
    allowed: bool


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A rule whose addresses match a pair; whether its traffic does is left."""

    policy: Policy
    index: int
    rule: Rule


def selects(policy: Policy, endpoint: Endpoint, direction: Direction) -> bool:
    """Whether ``policy`` governs ``endpoint`` in ``direction``.

    Staged policies govern nothing. Untracked and pre-DNAT policies are the host interface's own stage, before
    workloads. Network sets, nodes and pods on the host's network are nobody's subject.
    """
    if policy.staged or policy.do_not_track or policy.pre_dnat or policy.rules(direction) is None:
        return False
    if endpoint.host_network or endpoint.kind not in {EndpointKind.WORKLOAD, EndpointKind.HOST}:
        return False
    return matches(policy.subject, endpoint.labels)


class Engine:
    """Policies and a snapshot, ready to be asked often. Both are taken as they are and never change.

    Raises InvalidInput for a policy of a tier that the set does not have, and for malformed addresses.
    """

    def __init__(self, policies: PolicySet, snapshot: Snapshot) -> None:
        self.world = World(snapshot)
        self.tiers: tuple[tuple[Tier, tuple[Policy, ...]], ...] = tiers_in_order(policies)
        # Keyed by identity, since hashing a policy costs more than asking it; the value keeps its key alive.
        self._selecting: dict[
            tuple[int, Direction], tuple[Endpoint, tuple[tuple[Tier, tuple[Policy, ...]], ...]]
        ] = {}
        self._near: dict[tuple[int, Direction, str, str], tuple[tuple[Tier, tuple[Candidate, ...]], ...]] = {}

    def selecting(
        self, endpoint: Endpoint, direction: Direction
    ) -> tuple[tuple[Tier, tuple[Policy, ...]], ...]:
        """The tiers that have policies for ``endpoint`` in ``direction``, with these policies, in order."""
        key = (id(endpoint), direction)
        kept = self._selecting.get(key)
        if kept is None:
            if len(self._selecting) >= _REMEMBERED:
                self._selecting.clear()
                self._near.clear()  # its keys live as long as these values
            chosen = tuple(
                (tier, those)
                for tier, policies in self.tiers
                if (those := tuple(p for p in policies if selects(p, endpoint, direction)))
            )
            kept = self._selecting[key] = (endpoint, chosen)
        return kept[1]

    def candidates(
        self, endpoint: Endpoint, direction: Direction, own: str, other: str
    ) -> tuple[tuple[Tier, tuple[Candidate, ...]], ...]:
        """Per selecting tier the rules whose addresses match this pair, in order."""
        key = (id(endpoint), direction, own, other)
        kept = self._near.get(key)
        if kept is None:
            if len(self._near) >= _REMEMBERED:
                self._near.clear()
            kept = self._near[key] = tuple(
                (
                    tier,
                    tuple(
                        Candidate(policy=policy, index=index, rule=rule)
                        for policy in policies
                        for index, rule in enumerate(policy.rules(direction) or ())
                        if rule_peers_match(rule, own, other, self.world)
                    ),
                )
                for tier, policies in self.selecting(endpoint, direction)
            )
        return kept

    def judge(self, endpoint: Endpoint, direction: Direction, flow: Flow) -> Decision:
        """What the policies alone say of this side, without the built-in rules."""
        own, other = sides(flow, direction)
        selecting = self.selecting(endpoint, direction)
        selected_by = tuple(policy for _, policies in selecting for policy in policies)
        logs: tuple[Logged, ...] = ()

        def decision(verdict: Action, implicit: Implicit, tier: Tier | None = None) -> Decision:
            return Decision(
                verdict=verdict,
                direction=direction,
                endpoint=endpoint,
                tier=tier,
                implicit=implicit,
                selected_by=selected_by,
                logs=logs,
            )

        for tier, candidates in self.candidates(endpoint, direction, own, other):
            decided = Action.LOG
            for near in candidates:
                if not rule_traffic_matches(near.rule, flow, self.world):
                    continue
                decided = near.rule.action
                if decided is Action.PASS:
                    break
                if decided is Action.LOG:
                    logs = (*logs, Logged(policy=near.policy, index=near.index, rule=near.rule))
                    continue
                return Decision(
                    verdict=decided,
                    direction=direction,
                    endpoint=endpoint,
                    tier=tier,
                    policy=near.policy,
                    index=near.index,
                    rule=near.rule,
                    selected_by=selected_by,
                    logs=logs,
                )
            if decided is not Action.PASS and tier.default is Action.DENY:
                return decision(Action.DENY, Implicit.TIER_DEFAULT, tier)
        if endpoint.kind is EndpointKind.HOST:
            return decision(Action.DENY, Implicit.HOST_DEFAULT)
        return decision(Action.ALLOW, Implicit.ALL_PASSED if selecting else Implicit.NO_POLICY)

    def built_in(self, endpoint: Endpoint, direction: Direction, flow: Flow) -> Implicit:
        """The built-in rule that allows this side whatever the policies say; '' if none does."""
        if flow.source in endpoint.addresses and flow.destination in endpoint.addresses:
            return Implicit.OWN_ADDRESS
        if (
            direction is Direction.INGRESS
            and endpoint.kind is EndpointKind.WORKLOAD
            and self.world.is_local_node(flow.source)
        ):
            return Implicit.LOCAL_NODE
        return Implicit.NONE

    def decide(self, endpoint: Endpoint, direction: Direction, flow: Flow) -> Decision:
        """This side's verdict: the built-in rules, then the tiers."""
        built_in = self.built_in(endpoint, direction, flow)
        if not built_in:
            return self.judge(endpoint, direction, flow)
        return Decision(
            verdict=Action.ALLOW,
            direction=direction,
            endpoint=endpoint,
            implicit=built_in,
            selected_by=tuple(p for _, those in self.selecting(endpoint, direction) for p in those),
        )

    def connect(self, flow: Flow) -> Connection:
        """Both sides of a new connection, as the addresses tell them."""
        source, destination = self.world.workload(flow.source), self.world.workload(flow.destination)
        egress = None if source is None else self.decide(source, Direction.EGRESS, flow)
        ingress = None if destination is None else self.decide(destination, Direction.INGRESS, flow)
        return Connection(
            egress=egress,
            ingress=ingress,
            allowed=all(side.allowed for side in (egress, ingress) if side is not None),
        )


def sides(flow: Flow, direction: Direction) -> tuple[str, str]:
    """(the selected side's own address, the other's)."""
    if direction is Direction.INGRESS:
        return flow.destination, flow.source
    return flow.source, flow.destination


def tiers_in_order(policies: PolicySet) -> tuple[tuple[Tier, tuple[Policy, ...]], ...]:
    """Tiers by (order, name), each with its policies by (order, name, namespace, kind).

    Raises InvalidInput for a policy whose tier the set does not have: skipped, it would be one not enforced.
    """
    tiers = sorted(policies.tiers, key=lambda tier: (tier.order, tier.name))
    names = {tier.name for tier in tiers}
    for policy in policies.policies:
        if policy.tier not in names:
            raise InvalidInput(
                f"{policy.kind} {policy.title}: tier", policy.tier, "there is no such tier; apply it first"
            )
    ordered = sorted(policies.policies, key=lambda p: (p.order, p.name, p.namespace, p.kind))
    return tuple((tier, tuple(p for p in ordered if p.tier == tier.name)) for tier in tiers)


def decide(
    policies: PolicySet, snapshot: Snapshot, endpoint: Endpoint, direction: Direction, flow: Flow
) -> Decision:
    """One side of one flow; who asks often keeps an Engine."""
    return Engine(policies, snapshot).decide(endpoint, direction, flow)


def connect(policies: PolicySet, snapshot: Snapshot, flow: Flow) -> Connection:
    """Both sides of one flow; who asks often keeps an Engine."""
    return Engine(policies, snapshot).connect(flow)
