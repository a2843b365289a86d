"""Why a flow is allowed or denied: both sides, the rules that nearly matched, and what would mend it.

What nobody answers is the implicit deny: which policies select the endpoint, and what each of their rules
lacked. Here every rule of the deciding tier says so, nearest first, with its file and line; the tiers before
it, which passed the flow on, come after.
"""

from __future__ import annotations

import itertools

import msgspec

from portwright.policy.engine import Decision, Engine, Implicit, sides
from portwright.policy.isolation import KIND as OF_NETWORK
from portwright.policy.lacks import flow_text, rule_peer_lacks, rule_traffic_lacks
from portwright.policy.mend import AddPolicy, AddRule, Change, applied, options, place_text
from portwright.policy.rules import Action, Direction, Flow, Policy, PolicySet, Rule, Snapshot
from portwright.policy.snippets import flow_style

#: How many mends are proposed at most, and how many combinations are tried for them.
_MOST_MENDS, _MOST_TRIES = 3, 64
#: How many near rules the text shows; the value has them all.
_MOST_SHOWN = 10

_BUILT_IN = {
    Implicit.OWN_ADDRESS: "built-in rule own-address: traffic of an endpoint to itself is always allowed",
    Implicit.LOCAL_NODE: "built-in rule local-node: the node reaches the workloads that run on it",
    Implicit.NO_POLICY: "no policy selects it in this direction",
    Implicit.ALL_PASSED: "policies select it, and each tier passed the flow on",
}


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One rule that did not match. ``peer`` and ``traffic``: what lacked, in words; empty is all right."""

    policy: Policy
    index: int
    rule: Rule
    peer: tuple[str, ...]
    traffic: tuple[str, ...]

    @property
    def distance(self) -> tuple[int, int]:
        """The nearer, the smaller: how many of the two lack, then how many conditions do."""
        return (bool(self.peer) + bool(self.traffic), len(self.peer) + len(self.traffic))


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """One side's decision with what nearly matched.

    ``near``: the deciding tier's rules that did not match, nearest first, then the other tiers'; empty where
    a rule decided. ``bare``: policies that select the endpoint with no rule at all. ``without``: what the
    policies alone would have said, where a built-in rule decided.
    """

    decision: Decision
    near: tuple[Finding, ...] = ()
    bare: tuple[Policy, ...] = ()
    without: Decision | None = None


class Mend(msgspec.Struct, frozen=True, kw_only=True):
    """Changes with which, all made, the engine allows the flow (that was tried)."""

    changes: tuple[Change, ...]

    def __str__(self) -> str:
        return "; and ".join(str(change) for change in self.changes)


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Both sides joined. ``source`` and ``destination``: whom the addresses belong to, for people.

    ``mends``: for a denied flow, at least one, the smallest first; for an allowed one none.
    """

    flow: Flow
    source: str
    destination: str
    egress: Side | None
    ingress: Side | None
    allowed: bool
    mends: tuple[Mend, ...] = ()

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def explain(policies: PolicySet, snapshot: Snapshot, flow: Flow) -> Explanation:
    """Why ``flow`` is allowed or denied; who asks often keeps an engine and calls :func:`explained`."""
    return explained(Engine(policies, snapshot), policies, flow)


def explained(engine: Engine, policies: PolicySet, flow: Flow) -> Explanation:
    """The same by an engine that was made of ``policies``."""
    found = engine.connect(flow)
    egress = _side(engine, found.egress, flow)
    ingress = _side(engine, found.ingress, flow)
    return Explanation(
        flow=flow,
        source=_who(engine, flow.source),
        destination=_who(engine, flow.destination),
        egress=egress,
        ingress=ingress,
        allowed=found.allowed,
        mends=() if found.allowed else _mends(engine, policies, (egress, ingress), flow),
    )


def _who(engine: Engine, address: str) -> str:
    """``web/a``, ``node n1``, or the address."""
    endpoint = engine.world.workload(address)
    if endpoint is not None:
        return endpoint.title
    nodes = engine.world.nodes(address)
    return f"node {nodes[0].name}" if nodes else address


def _side(engine: Engine, decision: Decision | None, flow: Flow) -> Side | None:
    if decision is None:
        return None
    if decision.implicit in {Implicit.OWN_ADDRESS, Implicit.LOCAL_NODE}:
        without = engine.judge(decision.endpoint, decision.direction, flow)
        return Side(decision=decision, without=without)
    if decision.rule is not None:
        return Side(decision=decision)
    own, other = sides(flow, decision.direction)
    deciding = decision.tier.name if decision.tier is not None else ""
    findings = []
    written = [policy for policy in decision.selected_by if policy.kind != OF_NETWORK]
    for policy in written:
        for index, rule in enumerate(policy.rules(decision.direction) or ()):
            finding = Finding(
                policy=policy,
                index=index,
                rule=rule,
                peer=rule_peer_lacks(rule, own, other, engine.world),
                traffic=rule_traffic_lacks(rule, flow, engine.world),
            )
            # A rule that matched without deciding (pass, log) lacks nothing and is no near miss.
            if finding.peer or finding.traffic:
                findings.append(finding)
    findings.sort(key=lambda finding: (finding.policy.tier != deciding, finding.distance))
    bare = tuple(policy for policy in written if not policy.rules(decision.direction))
    return Side(decision=decision, near=tuple(findings), bare=bare)


def _mends(
    engine: Engine, policies: PolicySet, both: tuple[Side | None, ...], flow: Flow
) -> tuple[Mend, ...]:
    """Combinations of one change for each side that denies, those that do let the flow pass."""
    choices: list[list[Change]] = []
    for side in both:
        if side is None or side.decision.allowed:
            continue
        tier = side.decision.tier
        near = tuple(
            (near.policy, near.index, near.rule)
            for near in side.near
            if tier is not None and near.policy.tier == tier.name
        )
        choices.append(list(options(side.decision, near, flow, engine.world)))
    mends: list[Mend] = []
    # The last of each side's always helps, so it is tried even if the others are many.
    last = tuple(choice[-1] for choice in choices)
    tries = itertools.islice(itertools.product(*choices), _MOST_TRIES)
    for changes in itertools.chain(tries, [last]):
        mend = Mend(changes=changes)
        if mend not in mends and _helps(mend, engine, policies, flow):
            mends.append(mend)
        if len(mends) == _MOST_MENDS:
            break
    return tuple(mends)


def _helps(mend: Mend, engine: Engine, policies: PolicySet, flow: Flow) -> bool:
    return Engine(*applied(mend.changes, policies, engine.world.snapshot)).connect(flow).allowed


# --- text, as reference/policy.md 6.4 has it ---


def _lines(told: Explanation) -> list[str]:
    verdict = "ALLOW" if told.allowed else "DENY"
    lines = [f"{verdict}  {told.source} -> {told.destination} {flow_text(told.flow)}"]
    for direction, side, who in (
        (Direction.EGRESS, told.egress, told.source),
        (Direction.INGRESS, told.ingress, told.destination),
    ):
        if side is None:
            lines.append(f"  {direction} of {who}: no policy holds there (it is no pod of this host)")
        else:
            lines += _side_lines(side, f"  {direction} of {who}: ")
    for mend, word in zip(told.mends, itertools.chain(["to mend it"], itertools.repeat("or")), strict=False):
        lines.append(f"  {word:>10}: {mend}")
        for change in mend.changes:
            if isinstance(change, AddRule | AddPolicy) and change.snippet.body is not None:
                lines.append(f"{'':14}- {flow_style(change.snippet.body)}")
    return lines


def _side_lines(side: Side, start: str) -> list[str]:
    decision = side.decision
    lines = [f"  logged by {_rule_text(log.policy, log.index, log.rule)}" for log in decision.logs]
    if decision.policy is not None and decision.rule is not None and decision.index is not None:
        rule = _rule_text(decision.policy, decision.index, decision.rule)
        tier = "" if decision.policy.kind == OF_NETWORK else f", tier {decision.policy.tier}"
        return [f"{start}{decision.verdict.upper()} by {rule}{tier}", *lines]
    if decision.implicit is not Implicit.TIER_DEFAULT:
        text = _BUILT_IN.get(decision.implicit, decision.implicit)
        return [f"{start}{decision.verdict.upper()}, {text}{_without_text(side.without)}", *lines]
    count = sum(policy.kind != OF_NETWORK for policy in decision.selected_by)
    selecting = f"{count} {'policies select' if count > 1 else 'policy selects'} it"
    tier = decision.tier.name if decision.tier is not None else ""
    lines.insert(0, f"{start}DENY, tier {tier}, no rule matched (implicit deny because {selecting})")
    shown = side.near[:_MOST_SHOWN]
    names = [_rule_text(near.policy, near.index, near.rule) for near in shown]
    width = max((len(name) for name in names), default=0)
    for near, name in zip(shown, names, strict=True):
        lines.append(f"    {name:{width}}  peer {_lack_text(near.peer)}  port {_lack_text(near.traffic)}")
    if len(side.near) > len(shown):
        lines.append(f"    and {len(side.near) - len(shown)} rules further off")
    lines += [f"    {place_text(policy)} has no {decision.direction} rule" for policy in side.bare]
    return lines


def _without_text(without: Decision | None) -> str:
    return "" if without is None or without.allowed else "; policies alone would deny it"


def _lack_text(lacks: tuple[str, ...]) -> str:
    return f"NO ({'; '.join(lacks)})" if lacks else "OK"


def _rule_text(policy: Policy, index: int, rule: Rule) -> str:
    if policy.kind == OF_NETWORK:  # its rules are nobody's to number
        return f"{policy.kind} {policy.title}"
    where = f" {rule.where}" if str(rule.where) else ""
    action = "" if rule.action is Action.ALLOW else f" ({rule.action})"
    return f"{policy.title} rule {index + 1}{where}{action}"
