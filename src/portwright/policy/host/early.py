"""Whose packets an untracked policy denies whatever they are: what may be dropped before the stack."""

from __future__ import annotations

from typing import Final

from portwright.policy.engine import Engine
from portwright.policy.host.matches import AddressSets, Matcher, collapsed
from portwright.policy.host.stages import Bound, Stage, taking_part
from portwright.policy.rules import Action, Direction, Peer, PolicySet, Rule, Snapshot

_FAMILIES: Final = (4, 6)


def early_denies(policies: PolicySet, snapshot: Snapshot, bound: Bound) -> tuple[tuple[int, str], ...]:
    """(IP version, net) of sources whose packets to ``bound`` are dropped, but for failsafes and the link's.

    Not every such source: of the untracked ingress rules those that come before any other than such a deny.
    """
    engine = Engine(taking_part(policies, Stage.UNTRACKED), Snapshot())
    matcher = Matcher(snapshot, AddressSets())
    found: dict[tuple[int, str], None] = {}
    for _, those in engine.selecting(bound.endpoint, Direction.INGRESS):
        for policy in those:
            for rule in policy.ingress or ():
                if not _is_plain_deny(rule):
                    return tuple(found)
                for peer in rule.peers if rule.peers is not None else (Peer(nets=("0.0.0.0/0", "::/0")),):
                    nets = matcher.found(peer.selector) if peer.selector is not None else peer.nets or ()
                    for family in _FAMILIES:
                        found |= dict.fromkeys((family, net) for net in collapsed(family, nets))
    return tuple(found)


def _is_plain_deny(rule: Rule) -> bool:
    """Whether it denies all that some addresses send, and says which by one field."""
    if rule.action is not Action.DENY or rule.traffic is not None or rule.not_traffic or rule.local:
        return False
    return all(peer in {Peer(nets=peer.nets), Peer(selector=peer.selector)} for peer in rule.peers or ())
