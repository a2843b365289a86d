"""What host endpoints' policies say of a connection's first packet: the specification of :mod:`.render`.

Of an untracked one it says so of every packet. Replies, and what is related to a connection, pass with it
and are not asked about here.
"""

from __future__ import annotations

import msgspec

from portwright.policy.engine import Decision, Engine, Implicit
from portwright.policy.host.stages import (
    STATEFUL,
    Stage,
    is_failsafe,
    is_on_link,
    taking_part,
)
from portwright.policy.matching import World
from portwright.policy.rules import (
    Action,
    Direction,
    Endpoint,
    Flow,
    Policy,
    PolicySet,
    Snapshot,
    Tier,
)


class Ruling(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a packet: allowed or not, in which stage, and by what.

    ``reason``: ``failsafe``, ``on-link``, ``no-policy`` (forwarded, and nobody's), or ``policy``, for which
    ``decision`` stands.
    """

    allowed: bool
    stage: Stage
    reason: str = "policy"
    decision: Decision | None = None

    @property
    def text(self) -> str:
        """``denied in forward by GlobalNetworkPolicy web egress[0] web.yaml:3``, for people."""
        by = self.reason
        if (decision := self.decision) is not None:
            if decision.policy is not None and decision.rule is not None:
                owner = f"{decision.policy.kind} {decision.policy.title}"
                by = f"{owner} {decision.direction}[{decision.index}] {decision.policy.where}".rstrip()
            else:
                by = f"{decision.implicit} {decision.tier.name}" if decision.tier else str(decision.implicit)
        return f"{'allowed' if self.allowed else 'denied'} in {self.stage} by {by}"


class Judge:
    """Policies and a snapshot, ready to be asked often."""

    def __init__(self, policies: PolicySet, snapshot: Snapshot) -> None:
        """Raises as Engine."""
        self._engines = {stage: Engine(taking_part(policies, stage), snapshot) for stage in Stage}

    @property
    def world(self) -> World:
        """Whom there is, by address."""
        return self._engines[Stage.LOCAL].world

    def selecting(
        self, stage: Stage, endpoint: Endpoint, direction: Direction
    ) -> tuple[tuple[Tier, tuple[Policy, ...]], ...]:
        """The tiers whose policies of a stage select an endpoint, with these policies, in order."""
        return self._engines[stage].selecting(endpoint, direction)

    def decide(self, stage: Stage, endpoint: Endpoint, direction: Direction, flow: Flow) -> Decision | None:
        """What the policies of one stage say; None: nothing, which the next stage is for."""
        engine = self._engines[stage]
        if stage is Stage.FORWARD and not engine.selecting(endpoint, direction):
            return None
        found = engine.judge(endpoint, direction, flow)
        if stage is not Stage.LOCAL and found.implicit is Implicit.HOST_DEFAULT:
            return None
        return found

    def local(
        self, endpoint: Endpoint, direction: Direction, flow: Flow, before: Flow | None = None
    ) -> Ruling:
        """What a local process receives or sends; ``before``: the packet as it was before DNAT."""
        first = self._early(endpoint, direction, before or flow)
        if first is not None and (not first.allowed or first.stage is Stage.UNTRACKED):
            return first
        if is_on_link(flow) or is_failsafe(flow, direction):
            reason = "on-link" if is_on_link(flow) else "failsafe"
            return Ruling(allowed=True, stage=Stage.LOCAL, reason=reason)
        if skip := self._skips(endpoint, direction, before or flow):
            return skip
        decision = self._engines[Stage.LOCAL].judge(endpoint, direction, flow)
        return Ruling(allowed=decision.allowed, stage=Stage.LOCAL, decision=decision)

    def forwarded(
        self, incoming: Endpoint | None, outgoing: Endpoint | None, flow: Flow, before: Flow | None = None
    ) -> Ruling:
        """What is routed on, from one interface to another, each an endpoint or none."""
        before = before or flow
        if incoming is not None:
            first = self._early(incoming, Direction.INGRESS, before)
            if first is not None and (not first.allowed or first.stage is Stage.UNTRACKED):
                return first
            # Not early, as the link's, but nobody tracks it: so that stage is asked, and its allow counts.
            if is_on_link(flow):
                found = self.decide(Stage.UNTRACKED, incoming, Direction.INGRESS, flow)
                if found is not None and found.allowed:
                    return Ruling(allowed=True, stage=Stage.UNTRACKED, decision=found)
        ends = ((incoming, Direction.INGRESS), (outgoing, Direction.EGRESS))
        last: Decision | None = None
        for endpoint, direction in ends:
            if endpoint is None or self._skips(endpoint, direction, before):
                continue
            decision = self.decide(Stage.FORWARD, endpoint, direction, flow)
            if decision is not None and not decision.allowed:
                return Ruling(allowed=False, stage=Stage.FORWARD, decision=decision)
            last = decision or last
        reason = "no-policy" if last is None else "policy"
        return Ruling(allowed=True, stage=Stage.FORWARD, reason=reason, decision=last)

    def _early(self, endpoint: Endpoint, direction: Direction, flow: Flow) -> Ruling | None:
        """The stages before routing: a denial, an allow that counts, or None."""
        if is_on_link(flow):
            return None
        for stage in (Stage.UNTRACKED, Stage.PRE_DNAT):
            if stage is Stage.PRE_DNAT and direction is Direction.EGRESS:
                continue
            if is_failsafe(flow, direction, replies=stage not in STATEFUL):
                continue
            decision = self.decide(stage, endpoint, direction, flow)
            if decision is not None:
                return Ruling(allowed=decision.verdict is Action.ALLOW, stage=stage, decision=decision)
        return None

    def _skips(self, endpoint: Endpoint, direction: Direction, before: Flow) -> Ruling | None:
        """An allow before DNAT, by which the endpoint's ingress side is decided."""
        if direction is Direction.EGRESS or is_on_link(before):
            return None
        decision = self.decide(Stage.PRE_DNAT, endpoint, direction, before)
        if decision is None or not decision.allowed:
            return None
        return Ruling(allowed=True, stage=Stage.PRE_DNAT, decision=decision)
