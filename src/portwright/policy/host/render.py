"""Host endpoints' policies as one nftables table: its sets, counters, chains and their rules.

A base chain for each hook sends a packet to the chain of its interface's endpoint, which is a *program*: a
jump into a chain for each tier, then what holds where none of them decided::

    <program>        jump <program>t0, jump <program>t1, ..., what holds else
    <program>t0      <match> accept; <match> goto <deny>; <match> return (pass); the tier's default

A rule that excludes something has a chain of its own, to which its tier's jumps: what is excluded returns.
From there a pass can't return past its tier, so it goes to a chain with the tiers that are left. No mark is
set, of a packet or a connection: they are the user's.

What an earlier stage allowed, a later one learns by asking the same rules again: of packets that are not
tracked by the header, of those allowed before DNAT by the addresses and ports that conntrack remembers.
Nothing in a packet says it, and an untracked one may be somebody else's (a ``notrack`` of the user's).
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from portwright.policy.engine import Engine
from portwright.policy.host.bounds import refuse_depth, refuse_size
from portwright.policy.host.matches import HEADER, ORIGINAL, AddressSets, Matcher, Words
from portwright.policy.host.stages import (
    FAILSAFE_IN,
    FAILSAFE_OUT,
    LOOPBACK,
    ON_LINK,
    PORTS_PREFIX,
    STATEFUL,
    Bound,
    Stage,
    taking_part,
)
from portwright.policy.rules import (
    ICMP6,
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

#: Hook and priority. Before conntrack (-200) as raw is; between it and DNAT (-100, ours -105); after it.
_BASES: Final = {
    "untracked_in": "prerouting priority -302",
    "untracked_out": "output priority -302",
    "pre_dnat": "prerouting priority -150",
    "input": "input priority 0",
    "output": "output priority 0",
    "forward_in": "forward priority 0",
    "forward_out": "forward priority 1",
}
_IN, _OUT = Direction.INGRESS, Direction.EGRESS


class Site(msgspec.Struct, frozen=True, kw_only=True):
    """What a counter counts: drops of an endpoint, in a direction and a stage, by a rule or a default."""

    endpoint: str
    direction: Direction
    stage: Stage
    rule: str


class Rendered(msgspec.Struct, frozen=True, kw_only=True):
    """A table. ``bases``: hook and priority by chain; ``chains``: every chain's lines, of bases too.

    ``sets``: (IP version, addresses) by name; ``counters``: what each counts.
    """

    bases: dict[str, str]
    chains: dict[str, tuple[str, ...]]
    sets: dict[str, tuple[int, tuple[str, ...]]]
    counters: dict[str, Site]


def render(
    policies: PolicySet, snapshot: Snapshot, bound: Sequence[Bound], told: int | None = None
) -> Rendered:
    """The table of these endpoints. Raises PolicyTooLarge, and InvalidInput as Engine.

    ``told``: the group of NFLOG that hears of what is dropped, by the name of its counter.
    """
    return _Rendering(policies, snapshot, bound, told).table()


class _Program(NamedTuple):
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


class _Rendering:
    def __init__(
        self, policies: PolicySet, snapshot: Snapshot, bound: Sequence[Bound], told: int | None
    ) -> None:
        self._bound = bound
        self._told = told
        self._sets = AddressSets()
        self._matcher = Matcher(snapshot, self._sets)
        # The engines choose policies by endpoint, in order; they are asked about no address.
        self._engines = {s: Engine(taking_part(policies, s), Snapshot()) for s in Stage}
        self._chains: dict[str, list[str]] = {}
        self._bases: dict[str, str] = {}
        self._counters: dict[str, Site] = {}
        self._lines: Counter[str] = Counter()
        self._elements: Counter[str] = Counter()
        self._set_counts: Counter[str] = Counter()

    def table(self) -> Rendered:
        if self._bound:
            self._shared()
            self._untracked()
            self._pre_dnat()
            self._local()
            self._forward()
            refuse_depth(self._chains, self._bases, self._lines)
        return Rendered(
            bases=self._bases,
            chains={name: tuple(lines) for name, lines in self._chains.items()},
            sets=self._sets.sets,
            counters=self._counters,
        )

    # -- stages ----------------------------------------------------------------------------------

    def _shared(self) -> None:
        for hops, kinds in ON_LINK.items():
            numbers = ", ".join(map(str, kinds))
            self._add(
                "on_link", f"meta l4proto {ICMP6} icmpv6 type {{ {numbers} }} ip6 hoplimit {hops} accept"
            )
        for direction, there, back in ((_IN, FAILSAFE_IN, FAILSAFE_OUT), (_OUT, FAILSAFE_OUT, FAILSAFE_IN)):
            self._add(_failsafe(direction), *_accept_ports("dport", there))
            # Replies of a failsafe port belong to a connection that is tracked.
            replies = _accept_ports("sport", back)
            self._add(f"{_failsafe(direction)}_raw", *_accept_ports("dport", there), *replies)

    def _untracked(self) -> None:
        for direction, base in ((_IN, "untracked_in"), (_OUT, "untracked_out")):
            targets: dict[str, str] = {}
            for number, bound in self._governed(Stage.UNTRACKED, direction):
                name = targets[bound.endpoint.name] = f"u{direction[0]}{number}"
                self._add(name, "jump on_link", f"jump {_failsafe(direction)}_raw")
                self._program(_Program(name, bound, direction, Stage.UNTRACKED, "notrack accept", "accept"))
            self._base(base, direction, targets)

    def _pre_dnat(self) -> None:
        targets: dict[str, str] = {}
        for number, bound in self._governed(Stage.PRE_DNAT, _IN):
            name = targets[bound.endpoint.name] = f"p{number}"
            self._add(name, "jump on_link", f"jump {_failsafe(_IN)}")
            self._tracked(name, bound, _IN, Stage.PRE_DNAT)
            self._ask_untracked(name, bound, _IN)
            self._add(name, f"goto {name}m")
            self._program(_Program(f"{name}m", bound, _IN, Stage.PRE_DNAT, "accept", "accept"))
        self._base("pre_dnat", _IN, targets)

    def _local(self) -> None:
        for direction, base in ((_IN, "input"), (_OUT, "output")):
            targets: dict[str, str] = {}
            for number, bound in enumerate(self._bound):
                name = targets[bound.endpoint.name] = f"l{direction[0]}{number}"
                self._add(name, "jump on_link", f"jump {_failsafe(direction)}")
                self._tracked(name, bound, direction, Stage.LOCAL)
                self._ask_untracked(name, bound, direction)
                self._ask_pre_dnat(name, bound, direction)
                self._add(name, f"goto {name}m")
                denied = self._deny(bound, direction, Stage.LOCAL, "host-default")
                self._program(_Program(f"{name}m", bound, direction, Stage.LOCAL, "accept", denied))
            self._base(base, direction, targets)

    def _forward(self) -> None:
        for direction, base in ((_IN, "forward_in"), (_OUT, "forward_out")):
            targets: dict[str, str] = {}
            for number, bound in self._governed(Stage.FORWARD, direction):
                name = targets[bound.endpoint.name] = f"f{direction[0]}{number}"
                self._tracked(name, bound, direction, Stage.FORWARD)
                if direction is _IN:
                    self._ask_untracked(name, bound, direction)
                    self._ask_pre_dnat(name, bound, direction)
                self._add(name, f"goto {name}m")
                self._program(_Program(f"{name}m", bound, direction, Stage.FORWARD, "accept", "accept"))
            if targets and direction is _OUT:
                self._on_the_way_out(base, targets)
            else:
                self._base(base, direction, targets)

    def _on_the_way_out(self, base: str, targets: dict[str, str]) -> None:
        """What came in untracked, by an allow, has no further stage, not of the interface it leaves by."""
        self._bases[base] = _BASES[base]
        asked: dict[str, str] = {}
        for number, bound in self._governed(Stage.UNTRACKED, _IN):
            name = asked[bound.endpoint.name] = f"fw{number}"
            self._program(
                _Program(name, bound, _IN, Stage.UNTRACKED, "accept", "goto forward_to", asking=True)
            )
        self._add("forward_to", *self._dispatch(_OUT, targets))
        if asked:
            self._add("forward_from", *self._dispatch(_IN, asked, other="goto forward_to"))
            self._add(base, "ct state untracked goto forward_from")
        self._add(base, "goto forward_to")

    # -- parts of them ---------------------------------------------------------------------------

    def _governed(self, stage: Stage, direction: Direction) -> list[tuple[int, Bound]]:
        """The endpoints that policies of a stage select, with their numbers."""
        return [(n, b) for n, b in enumerate(self._bound) if self._selecting(stage, b, direction)]

    def _selecting(
        self, stage: Stage, bound: Bound, direction: Direction
    ) -> tuple[tuple[Tier, tuple[Policy, ...]], ...]:
        return self._engines[stage].selecting(bound.endpoint, direction)

    def _base(self, base: str, direction: Direction, targets: dict[str, str]) -> None:
        if targets:
            self._bases[base] = _BASES[base]
            self._add(base, *self._dispatch(direction, targets))

    def _dispatch(self, direction: Direction, targets: dict[str, str], other: str = "accept") -> list[str]:
        """To the chain of the interface's endpoint (``targets`` by its name); of what has none, ``other``."""
        word = "iifname" if direction is _IN else "oifname"
        lines: list[str] = []
        last = other
        for bound in self._bound:
            name = targets.get(bound.endpoint.name)
            target = f"goto {name}" if name else other
            lines += [f'{word} "{interface}" {target}' for interface in bound.interfaces]
            last = target if bound.every else last
        if last != other:
            lines += [f'{word} "{LOOPBACK}" {other}', f'{word} "{PORTS_PREFIX}*" {other}']
        return [*lines, last]

    def _tracked(self, name: str, bound: Bound, direction: Direction, stage: Stage) -> None:
        """What goes with a connection that was let through, and what belongs to none."""
        self._add(
            name,
            "ct direction reply ct state established accept",
            "ct state related accept",
            # Later packets of what was related at first: an FTP server's data connection.
            "ct status expected accept",
            f"ct state invalid {self._deny(bound, direction, stage, 'ct-state-invalid')}",
        )

    def _ask_untracked(self, name: str, bound: Bound, direction: Direction) -> None:
        if self._selecting(Stage.UNTRACKED, bound, direction):
            self._add(name, f"ct state untracked goto {name}u")
            asked = (f"{name}u", bound, direction, Stage.UNTRACKED, "accept", f"goto {name}m")
            self._program(_Program(*asked, asking=True))

    def _ask_pre_dnat(self, name: str, bound: Bound, direction: Direction) -> None:
        if direction is _IN and self._selecting(Stage.PRE_DNAT, bound, direction):
            self._add(name, f"ct direction original goto {name}p")
            asked = (f"{name}p", bound, direction, Stage.PRE_DNAT, "accept", f"goto {name}m")
            self._program(_Program(*asked, words=ORIGINAL, asking=True))

    # -- programs --------------------------------------------------------------------------------

    def _program(self, program: _Program) -> None:
        selecting = self._selecting(program.stage, program.bound, program.direction)
        for place, (tier, policies) in enumerate(selecting):
            self._add(program.name, f"jump {program.name}t{place}")
            self._tier(program, place, tier, policies)
        self._add(program.name, program.none)

    def _tier(self, program: _Program, place: int, tier: Tier, policies: tuple[Policy, ...]) -> None:
        chain = f"{program.name}t{place}"
        self._add(chain)
        for policy in policies:
            elements, sets = self._sets.elements, len(self._sets.sets)
            for index, rule in enumerate(policy.rules(program.direction) or ()):
                self._rule(program, place, policy, index, rule)
            self._elements[_owner(policy)] += self._sets.elements - elements
            self._set_counts[_owner(policy)] += len(self._sets.sets) - sets
            refuse_size(self._lines, self._elements, self._set_counts)
        if tier.default is Action.DENY:  # not so in the stages that have no defaults
            denied = self._deny(
                *program[1:4], f"tier-default {tier.name} {program.direction}", _of_default(policies)
            )
            self._add(chain, denied)

    def _rule(self, program: _Program, place: int, policy: Policy, index: int, rule: Rule) -> None:
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
            chain = f"{tier}r{len(self._chains)}"
            self._add(tier, f"jump {chain}{comment}", owner=owner)
            self._add(chain, *(f"{match} return".lstrip() for match in exclusions), owner=owner)
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
                verdict = self._deny(*program[1:4], title, policy.on_change)
        self._add(chain, *(f"{match} {verdict}{comment}".lstrip() for match in lines), owner=owner)

    def _rest(self, program: _Program, place: int) -> str:
        """To the tiers after this one: a return would lead back into it."""
        name = f"{program.name}a{place}"
        if name not in self._chains:
            tiers = len(self._selecting(program.stage, program.bound, program.direction))
            self._add(name, *(f"jump {program.name}t{later}" for later in range(place + 1, tiers)))
            self._add(name, program.none)
        return f"goto {name}"

    def _deny(
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
        self._counters[f"c{digest}"] = site
        count = f'counter name "c{digest}"'
        if stage not in STATEFUL:
            on_change = OnChange.RECHECK
        if on_change is OnChange.RECHECK and self._told is None:
            return f"{count} drop"
        name = f"d{digest}{on_change[:3]}"
        if name not in self._chains:
            tcp = f"meta l4proto {TCP} ct state established"
            if on_change is OnChange.KEEP:
                self._add(name, "ct state established accept")
            elif on_change is OnChange.RESET:
                # Whoever opened it is told, and what its host then says to the other end has to pass.
                self._add(name, f"{tcp} tcp flags & rst == rst accept")
            self._add(name, count)
            if self._told is not None:
                few = f"limit rate {TOLD_RATE}/second burst {TOLD_RATE} packets"
                self._add(name, f'{few} log prefix "c{digest}" group {self._told} snaplen {_TOLD_BYTES}')
            if on_change is OnChange.RESET:
                self._add(name, f"{tcp} reject with tcp reset")
            self._add(name, "drop")
        return f"goto {name}"

    def _add(self, chain: str, *lines: str, owner: str = "") -> None:
        self._chains.setdefault(chain, []).extend(lines)
        self._lines[owner] += len(lines)


def _failsafe(direction: Direction) -> str:
    return "failsafe_in" if direction is _IN else "failsafe_out"


def _accept_ports(word: str, ports: Mapping[int, tuple[int, ...]]) -> Iterator[str]:
    for protocol, numbers in ports.items():
        yield f"meta l4proto {protocol} th {word} {{ {', '.join(map(str, numbers))} }} accept"


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
