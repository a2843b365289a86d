"""Host endpoints' policies as one nftables table: its sets, counters, chains and their rules.

A base chain for each hook sends a packet to the chain of its interface's endpoint: what the hook's stage lets
pass by itself, then the :mod:`program <portwright.policy.host.programs>` of the endpoint's policies.

What an earlier stage allowed, a later one learns by asking the same rules again: of packets that are not
tracked by the header, of those allowed before DNAT by the addresses and ports that conntrack remembers.
Nothing in a packet says it, and an untracked one may be somebody else's (a ``notrack`` of the user's).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import msgspec

from portwright.policy.host.bounds import refuse_depth
from portwright.policy.host.matches import ORIGINAL
from portwright.policy.host.programs import Program, Programs, Site
from portwright.policy.host.stages import (
    FAILSAFE_IN,
    FAILSAFE_OUT,
    LOOPBACK,
    ON_LINK,
    PORTS_PREFIX,
    Bound,
    Stage,
)
from portwright.policy.rules import ICMP6, Direction, PolicySet, Snapshot

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


class _Rendering:
    def __init__(
        self, policies: PolicySet, snapshot: Snapshot, bound: Sequence[Bound], told: int | None
    ) -> None:
        self._bound = bound
        self._programs = Programs(policies, snapshot, told)
        self._bases: dict[str, str] = {}

    def table(self) -> Rendered:
        if self._bound:
            self._shared()
            self._untracked()
            self._pre_dnat()
            self._local()
            self._forward()
            refuse_depth(self._programs.chains, self._bases, self._programs.lines)
        return Rendered(
            bases=self._bases,
            chains={name: tuple(lines) for name, lines in self._programs.chains.items()},
            sets=self._programs.sets.sets,
            counters=self._programs.counters,
        )

    # -- stages ----------------------------------------------------------------------------------

    def _shared(self) -> None:
        for hops, kinds in ON_LINK.items():
            numbers = ", ".join(map(str, kinds))
            self._programs.add(
                "on_link", f"meta l4proto {ICMP6} icmpv6 type {{ {numbers} }} ip6 hoplimit {hops} accept"
            )
        for direction, there, back in ((_IN, FAILSAFE_IN, FAILSAFE_OUT), (_OUT, FAILSAFE_OUT, FAILSAFE_IN)):
            self._programs.add(_failsafe(direction), *_accept_ports("dport", there))
            # Replies of a failsafe port belong to a connection that is tracked.
            replies = _accept_ports("sport", back)
            self._programs.add(f"{_failsafe(direction)}_raw", *_accept_ports("dport", there), *replies)

    def _untracked(self) -> None:
        for direction, base in ((_IN, "untracked_in"), (_OUT, "untracked_out")):
            targets: dict[str, str] = {}
            for number, bound in self._governed(Stage.UNTRACKED, direction):
                name = targets[bound.endpoint.name] = f"u{direction[0]}{number}"
                self._programs.add(name, "jump on_link", f"jump {_failsafe(direction)}_raw")
                self._programs.add_program(
                    Program(name, bound, direction, Stage.UNTRACKED, "notrack accept", "accept")
                )
            self._base(base, direction, targets)

    def _pre_dnat(self) -> None:
        targets: dict[str, str] = {}
        for number, bound in self._governed(Stage.PRE_DNAT, _IN):
            name = targets[bound.endpoint.name] = f"p{number}"
            self._programs.add(name, "jump on_link", f"jump {_failsafe(_IN)}")
            self._tracked(name, bound, _IN, Stage.PRE_DNAT)
            self._ask_untracked(name, bound, _IN)
            self._programs.add(name, f"goto {name}m")
            self._programs.add_program(Program(f"{name}m", bound, _IN, Stage.PRE_DNAT, "accept", "accept"))
        self._base("pre_dnat", _IN, targets)

    def _local(self) -> None:
        for direction, base in ((_IN, "input"), (_OUT, "output")):
            targets: dict[str, str] = {}
            for number, bound in enumerate(self._bound):
                name = targets[bound.endpoint.name] = f"l{direction[0]}{number}"
                self._programs.add(name, "jump on_link", f"jump {_failsafe(direction)}")
                self._tracked(name, bound, direction, Stage.LOCAL)
                self._ask_untracked(name, bound, direction)
                self._ask_pre_dnat(name, bound, direction)
                self._programs.add(name, f"goto {name}m")
                denied = self._programs.deny(bound, direction, Stage.LOCAL, "host-default")
                self._programs.add_program(
                    Program(f"{name}m", bound, direction, Stage.LOCAL, "accept", denied)
                )
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
                self._programs.add(name, f"goto {name}m")
                self._programs.add_program(
                    Program(f"{name}m", bound, direction, Stage.FORWARD, "accept", "accept")
                )
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
            self._programs.add_program(
                Program(name, bound, _IN, Stage.UNTRACKED, "accept", "goto forward_to", asking=True)
            )
        self._programs.add("forward_to", *self._dispatch(_OUT, targets))
        if asked:
            self._programs.add("forward_from", *self._dispatch(_IN, asked, other="goto forward_to"))
            self._programs.add(base, "ct state untracked goto forward_from")
        self._programs.add(base, "goto forward_to")

    # -- parts of them ---------------------------------------------------------------------------

    def _governed(self, stage: Stage, direction: Direction) -> list[tuple[int, Bound]]:
        """The endpoints that policies of a stage select, with their numbers."""
        return [(n, b) for n, b in enumerate(self._bound) if self._programs.selecting(stage, b, direction)]

    def _base(self, base: str, direction: Direction, targets: dict[str, str]) -> None:
        if targets:
            self._bases[base] = _BASES[base]
            self._programs.add(base, *self._dispatch(direction, targets))

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
        self._programs.add(
            name,
            "ct direction reply ct state established accept",
            "ct state related accept",
            # Later packets of what was related at first: an FTP server's data connection.
            "ct status expected accept",
            f"ct state invalid {self._programs.deny(bound, direction, stage, 'ct-state-invalid')}",
        )

    def _ask_untracked(self, name: str, bound: Bound, direction: Direction) -> None:
        if self._programs.selecting(Stage.UNTRACKED, bound, direction):
            self._programs.add(name, f"ct state untracked goto {name}u")
            asked = (f"{name}u", bound, direction, Stage.UNTRACKED, "accept", f"goto {name}m")
            self._programs.add_program(Program(*asked, asking=True))

    def _ask_pre_dnat(self, name: str, bound: Bound, direction: Direction) -> None:
        if direction is _IN and self._programs.selecting(Stage.PRE_DNAT, bound, direction):
            self._programs.add(name, f"ct direction original goto {name}p")
            asked = (f"{name}p", bound, direction, Stage.PRE_DNAT, "accept", f"goto {name}m")
            self._programs.add_program(Program(*asked, words=ORIGINAL, asking=True))


def _failsafe(direction: Direction) -> str:
    return "failsafe_in" if direction is _IN else "failsafe_out"


def _accept_ports(word: str, ports: Mapping[int, tuple[int, ...]]) -> Iterator[str]:
    for protocol, numbers in ports.items():
        yield f"meta l4proto {protocol} th {word} {{ {', '.join(map(str, numbers))} }} accept"
