"""The programs of host endpoints' policies as chains of nftables.

A *program* is a jump into a chain for each tier, then what holds where none of them decided::

    <program>        jump <program>t0, jump <program>t1, ..., what holds else
    <program>t0      <match> accept; <match> goto <deny>; <match> return (pass); the tier's default

A rule that excludes something has a chain of its own, to which its tier's jumps: what is excluded returns.
From there a pass can't return past its tier, so it goes to a chain with the tiers that are left. No mark is
set, of a packet or a connection: they are the user's.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from portwright.policy.engine import Engine
from portwright.policy.host.bounds import refuse_size
from portwright.policy.host.matches import HEADER, AddressSets, Matcher, Words
from portwright.policy.host.stages import STATEFUL, Bound, Stage, taking_part
from portwright.policy.rules import (
    TCP,
    Action,
    Direction,
    OnChange,
    Policy,
    PolicySet,
    Rule,
    Snapshot,
    Tier,
)

#: Of the kernel's log, at most so many lines a second for a rule.
LOG_PREFIX, LOG_RATE = "calico-packet: ", 100
#: Of what a rule drops at most so many packets a second are told of, each by so many of its bytes.
TOLD_RATE, _TOLD_BYTES = 64, 128
_COMMENT_LENGTH = 100


class Site(msgspec.Struct, frozen=True, kw_only=True):
    """What a counter counts: drops of an endpoint, in a direction and a stage, by a rule or a default."""

    endpoint: str
    direction: Direction
    stage: Stage
    rule: str


class Program(NamedTuple):
    """What the chains of one program have in common.

    ``allow`` and ``none``: what is done with what is allowed, and with what nobody decides: it ends it, too.
    ``asking``: an earlier stage is only asked what it said: nothing is counted or logged, and a deny is none.
    """

    name: str
    bound: Bound
    direction: Direction
    stage: Stage
    allow: str
    none: str
    words: Words = HEADER
    asking: bool = False


class Programs:
    """The chains of a table, what its counters count, and the sets that its rules ask.

    ``told``: the group of NFLOG that hears of what is dropped, by the name of its counter.
    """

    def __init__(self, policies: PolicySet, snapshot: Snapshot, told: int | None) -> None:
        self.chains: dict[str, list[str]] = {}
        self.counters: dict[str, Site] = {}
        self.sets = AddressSets()
        #: by policy, '' for what is nobody's
        self.lines: Counter[str] = Counter()
        self._elements: Counter[str] = Counter()
        self._set_counts: Counter[str] = Counter()
        self._told = told
        self._matcher = Matcher(snapshot, self.sets)
        # The engines choose policies by endpoint, in order; they are asked about no address.
        self._engines = {s: Engine(taking_part(policies, s), Snapshot()) for s in Stage}

    def selecting(
        self, stage: Stage, bound: Bound, direction: Direction
    ) -> tuple[tuple[Tier, tuple[Policy, ...]], ...]:
        """The policies of a stage that select an endpoint, by tier, in order."""
        return self._engines[stage].selecting(bound.endpoint, direction)

    def add_program(self, program: Program) -> None:
        """Its chain's end, and its tiers' chains. Raises PolicyTooLarge."""
        selecting = self.selecting(program.stage, program.bound, program.direction)
        for place, (tier, policies) in enumerate(selecting):
            self.add(program.name, f"jump {program.name}t{place}")
            self._tier(program, place, tier, policies)
        self.add(program.name, program.none)

    def _tier(self, program: Program, place: int, tier: Tier, policies: tuple[Policy, ...]) -> None:
        chain = f"{program.name}t{place}"
        self.add(chain)
        for policy in policies:
            elements, sets = self.sets.elements, len(self.sets.sets)
            for index, rule in enumerate(policy.rules(program.direction) or ()):
                self._rule(program, place, policy, index, rule)
            self._elements[_owner(policy)] += self.sets.elements - elements
            self._set_counts[_owner(policy)] += len(self.sets.sets) - sets
            refuse_size(self.lines, self._elements, self._set_counts)
        if tier.default is Action.DENY:  # not so in the stages that have no defaults
            denied = self.deny(
                *program[1:4], f"tier-default {tier.name} {program.direction}", _of_default(policies)
            )
            self.add(chain, denied)

    def _rule(self, program: Program, place: int, policy: Policy, index: int, rule: Rule) -> None:
        if program.asking and rule.action is Action.LOG:
            return
        lines = self._matcher.lines(rule, program.direction, program.words)
        if not lines:
            return
        tier = chain = f"{program.name}t{place}"
        exclusions = self._matcher.exclusions(rule, program.words)
        title = f"{policy.kind} {policy.title} {program.direction}[{index}]"
        comment, owner = f' comment "{_plain(title)}"', _owner(policy)
        if exclusions:
            chain = f"{tier}r{len(self.chains)}"
            self.add(tier, f"jump {chain}{comment}", owner=owner)
            self.add(chain, *(f"{match} return".lstrip() for match in exclusions), owner=owner)
        match rule.action:
            case Action.ALLOW:
                verdict = program.allow
            case Action.LOG:
                first = "ct state new " if program.stage in STATEFUL else ""
                verdict = f'{first}limit rate {LOG_RATE}/second log prefix "{LOG_PREFIX}" level notice'
            case Action.PASS:
                verdict = self._rest(program, place) if exclusions else "return"
            case Action.DENY if program.asking:
                verdict = program.none
            case Action.DENY:
                verdict = self.deny(*program[1:4], title, policy.on_change)
        self.add(chain, *(f"{match} {verdict}{comment}".lstrip() for match in lines), owner=owner)

    def _rest(self, program: Program, place: int) -> str:
        """To the tiers after this one: a return would lead back into it."""
        name = f"{program.name}a{place}"
        if name not in self.chains:
            tiers = len(self.selecting(program.stage, program.bound, program.direction))
            self.add(name, *(f"jump {program.name}t{later}" for later in range(place + 1, tiers)))
            self.add(name, program.none)
        return f"goto {name}"

    def deny(
        self,
        bound: Bound,
        direction: Direction,
        stage: Stage,
        rule: str,
        on_change: OnChange = OnChange.RECHECK,
    ) -> str:
        """A counted drop, or the way to its chain: where it is told, or open connections are kept."""
        site = Site(endpoint=bound.endpoint.name, direction=direction, stage=stage, rule=rule)
        digest = hashlib.sha256(msgspec.json.encode(site)).hexdigest()[:16]
        self.counters[f"c{digest}"] = site
        count = f'counter name "c{digest}"'
        if stage not in STATEFUL:
            on_change = OnChange.RECHECK
        if on_change is OnChange.RECHECK and self._told is None:
            return f"{count} drop"
        name = f"d{digest}{on_change[:3]}"
        if name not in self.chains:
            tcp = f"meta l4proto {TCP} ct state established"
            if on_change is OnChange.KEEP:
                self.add(name, "ct state established accept")
            elif on_change is OnChange.RESET:
                # Whoever opened it is told, and what its host then says to the other end has to pass.
                self.add(name, f"{tcp} tcp flags & rst == rst accept")
            self.add(name, count)
            if self._told is not None:
                few = f"limit rate {TOLD_RATE}/second burst {TOLD_RATE} packets"
                self.add(name, f'{few} log prefix "c{digest}" group {self._told} snaplen {_TOLD_BYTES}')
            if on_change is OnChange.RESET:
                self.add(name, f"{tcp} reject with tcp reset")
            self.add(name, "drop")
        return f"goto {name}"

    def add(self, chain: str, *lines: str, owner: str = "") -> None:
        """Lines at the end of a chain, which is made if need be. ``owner``: the policy that they are of."""
        self.chains.setdefault(chain, []).extend(lines)
        self.lines[owner] += len(lines)


def _of_default(policies: Iterable[Policy]) -> OnChange:
    """What a tier's default means for what is open: a reset if one asks for it, keeping it if all do."""
    asked = {policy.on_change for policy in policies}
    if OnChange.RESET in asked:
        return OnChange.RESET
    return OnChange.KEEP if asked == {OnChange.KEEP} else OnChange.RECHECK


def _owner(policy: Policy) -> str:
    return f"{policy.kind} {policy.title}"


def _plain(text: str) -> str:
    """Text that may stand in quotes in a script, cut to what nft takes as a comment."""
    return re.sub(r"[^A-Za-z0-9 ._/\[\]-]", "_", text)[-_COMMENT_LENGTH:]
