"""Whose packets an untracked policy denies whatever they are: what may be dropped before the stack."""

from __future__ import annotations

from typing import Final

from portwright.policy.engine import Engine
from portwright.policy.host.matches import AddressSets, Matcher, collapsed
from portwright.policy.host.stages import Bound, Stage, taking_part
from portwright.policy.rules import Action, Direction, Peer, PolicySet, Rule, Snapshot

_FAMILIES: Final = (4, 6)


def early_denies(policies: PolicySet, snapshot: Snapshot, bound: Bound) -> dict[str, str]:
    """Nets of sources whose packets to ``bound`` are dropped, but for failsafes and the link's; each's rule.

    Not every such source: of the untracked ingress rules those that come before any other than such a deny.
    """
    engine = Engine(taking_part(policies, Stage.UNTRACKED), Snapshot())
    matcher = Matcher(snapshot, AddressSets())
    found: dict[str, str] = {}
    for _, those in engine.selecting(bound.endpoint, Direction.INGRESS):
        for policy in those:
            for index, rule in enumerate(policy.ingress or ()):
                if not _is_plain_deny(rule):
                    return found
                title = f"{policy.kind} {policy.title} {Direction.INGRESS}[{index}]"
                for peer in rule.peers if rule.peers is not None else (Peer(nets=("0.0.0.0/0", "::/0")),):
                    nets = matcher.found(peer.selector) if peer.selector is not None else peer.nets or ()
                    for family in _FAMILIES:
                        for net in collapsed(family, nets):
                            found.setdefault(net, title)
    return found


def _is_plain_deny(rule: Rule) -> bool:
    """Whether it denies all that some addresses send, and says which by one field."""
    if rule.action is not Action.DENY or rule.traffic is not None or rule.not_traffic or rule.local:
        return False
    return all(peer in {Peer(nets=peer.nets), Peer(selector=peer.selector)} for peer in rule.peers or ())
