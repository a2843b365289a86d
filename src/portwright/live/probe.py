"""Verdicts by real packets: what was sent arrived, or a port of ours counted its drop. Time decides nothing.

A round has no two flows of one sender, and no two for one receiver: so a drop that is counted at a port and
in a direction is of one flow alone, however many a round has. It ends when each has its verdict.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import select
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final, Protocol

from portwright.live import packets
from portwright.live.ears import HOST, OUTSIDE, Ears, Place, ProbeFailed, heard, open_socket, opener, reset
from portwright.policy.rules import TCP, UDP, Flow

#: Seconds within which a packet has arrived or is counted as dropped, on the busiest machine.
_WITHIN: Final = 20.0
_POLL_MS: Final = 10
#: Seconds after which a SYN is sent again, and a little less (RFC 6298, 2.1: one second).
_SYN_AGAIN: Final = 0.9
_FIRST_PORT: Final = 40_000  # of crafted packets' source ports

#: A drop that is policy's verdict; and such as policy makes and are none.
_VERDICT: Final = "policy"
_OF_NO_CONNECTION: Final = "ct-state-invalid"
_JUDGED: Final = frozenset({_VERDICT, "not_ready", "fragment_order", "flow_table"})

#: Of (port_id, direction, reason): packets dropped since the port was made.
Drops = Mapping[tuple[str, str, str], int]


class DropCount(Protocol):
    """What the daemon tells of drops."""

    @property
    def port_id(self) -> str:
        """Whose."""

    @property
    def direction(self) -> str:
        """``from_port`` or ``to_port``."""

    @property
    def reason(self) -> str:
        """Why."""

    @property
    def rule(self) -> str:
        """By which rule, of a host endpoint."""

    @property
    def packets(self) -> int:
        """How many."""


@dataclass(slots=True)
class _Shot:
    """One flow's packet under way. ``sender`` is closed when its verdict is there."""

    flow: Flow
    source: Place
    target: Place
    mark: bytes
    ear: socket.socket
    sender: socket.socket
    arrived: bool = False
    dropped: set[str] = field(default_factory=set)

    @property
    def title(self) -> str:
        """For people."""
        flow = self.flow
        what = f" port {flow.port}" if flow.port is not None else ""
        return f"{flow.source} -> {flow.destination} protocol {flow.protocol}{what}"

    @property
    def by_host(self) -> str:
        """The direction in which a host endpoint judges it, as it passes the host's own interface; or ''."""
        if self.source.port_id == OUTSIDE:
            return "ingress"
        return "egress" if self.target.port_id == OUTSIDE else ""

    @property
    def decided(self) -> bool:
        """Whether the packet is accounted for."""
        return self.arrived or bool(self.dropped)


class Prober:
    """Asks by packets. Not for two threads."""

    def __init__(
        self,
        places: Mapping[str, Place],
        drops: Callable[[], Iterable[DropCount]],
        *,
        within: float = _WITHIN,
    ) -> None:
        """``places`` by address in canonical form, looked at with each :meth:`send`.

        ``within`` how many seconds a packet has to be accounted for, else it failed.
        """
        self._places = places
        self._drops = drops
        self._within = within
        self._ears = Ears()
        self._sent = 0

    def close(self) -> None:
        """Close the listeners."""
        self._ears.close()

    def send(self, flows: Sequence[Flow], progress: Callable[[int], None] = lambda _done: None) -> list[bool]:
        """Send the first packet of each flow; whether it arrived, in the order of the flows.

        TCP by a real connection, UDP by a datagram, the rest by crafted packets; from the flow's source port,
        if it has one. ``progress`` is told how many have their verdict. Raises ProbeFailed where packets show
        no verdict, or two.
        """
        self._ears.keep(self._places.values())
        found: dict[int, bool] = {}
        before = self._counted()
        for members in rounds([self._ends(flow) for flow in flows]):
            verdicts, before = self._round([flows[at] for at in members], before)
            found.update(zip(members, verdicts, strict=True))
            progress(len(found))
        return [found[at] for at in range(len(flows))]

    def _ends(self, flow: Flow) -> tuple[str, str]:
        """What tells flows of a round apart: the sender's and the receiver's ports; '' where none is.

        Those that have to do with the host go one by one: its drops are counted for all alike.
        """
        ends = self._place(flow.source).port_id, self._place(flow.destination).port_id
        return (HOST, "") if {HOST, OUTSIDE} & {*ends} else ends

    def _place(self, address: str) -> Place:
        found = self._places.get(address)
        if found is None:
            raise ProbeFailed(address, "nobody has this address here")
        return found

    def _counted(self) -> Drops:
        found: dict[tuple[str, str, str], int] = {}
        for drop in self._drops():
            # The last packets of a connection that was reset belong to none any more: no verdict.
            if drop.rule != _OF_NO_CONNECTION:
                key = (drop.port_id, drop.direction, drop.reason)
                found[key] = found.get(key, 0) + drop.packets
        return found

    def _round(self, flows: Sequence[Flow], before: Drops) -> tuple[list[bool], Drops]:
        began = time.monotonic()
        with ExitStack() as stack:
            shots = []
            for flow in flows:
                shots.append(self._aim(flow))
                stack.callback(_cease, shots[-1])
            for shot in shots:
                self._fire(shot)
            after = self._await(shots, before)
        for shot in shots:
            heard(shot.ear, shot.flow.protocol)
        if time.monotonic() - began > _SYN_AGAIN:
            after = self._counted()  # a SYN may have come again since; it is of this round yet
        return [shot.arrived for shot in shots], after

    def _aim(self, flow: Flow) -> _Shot:
        source, target = self._place(flow.source), self._place(flow.destination)
        version = ipaddress.ip_address(flow.source).version
        ear = self._ears.at(target, version, flow.protocol, flow.port)
        sender = open_socket(source, version, flow.protocol)
        self._sent += 1
        mark = b"PW" + self._sent.to_bytes(packets.MARK - 2, "big")
        return _Shot(flow, source, target, mark, ear, sender)

    def _fire(self, shot: _Shot) -> None:
        flow, sender = shot.flow, shot.sender
        crafted = flow.protocol not in {TCP, UDP}
        try:
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sender.bind((flow.source, 0 if crafted else flow.source_port or 0))
            if flow.protocol == TCP:
                self._refuse(shot, sender.connect_ex((flow.destination, flow.port or 0)))
                shot.mark = opener(sender.getsockname())
                return
            port = flow.source_port or _FIRST_PORT + self._sent % 20_000
            kind = None if flow.icmp_type is None else (flow.icmp_type, flow.icmp_code or 0)
            data = (
                packets.payload(flow.protocol, port, flow.port or 0, kind, shot.mark)
                if crafted
                else shot.mark
            )
            sender.sendto(data, (flow.destination, 0 if crafted else flow.port or 0))
        except OSError as error:
            if error.errno == errno.EPERM and shot.by_host == "egress":
                return  # the host's own rules say so to who sends, and count it
            raise ProbeFailed(shot.title, f"can't be sent: {error.strerror}") from None

    @staticmethod
    def _refuse(shot: _Shot, code: int) -> None:
        if code not in {0, errno.EINPROGRESS}:
            raise ProbeFailed(shot.title, f"no connection can be tried: {os.strerror(code)}")

    def _await(self, shots: list[_Shot], before: Drops) -> Drops:
        deadline = time.monotonic() + self._within
        while True:
            _listen(shots)
            after = self._counted()
            _account(shots, before, after)
            waiting = [shot for shot in shots if not shot.decided]
            if not waiting:
                return after
            if time.monotonic() > deadline:
                why = f"neither arrived nor was counted as dropped within {self._within:g} s"
                raise ProbeFailed(waiting[0].title, why)
            _wait(waiting)


def _wait(shots: Iterable[_Shot]) -> None:
    """Return when something may have come, or it is time to look at the counters again."""
    poller = select.poll()
    for shot in shots:
        poller.register(shot.ear, select.POLLIN)
    poller.poll(_POLL_MS)


def _listen(shots: Iterable[_Shot]) -> None:
    marks: dict[int, set[bytes]] = {}
    for shot in shots:
        ear = shot.ear.fileno()
        if ear not in marks:
            marks[ear] = heard(shot.ear, shot.flow.protocol)
    for shot in shots:
        if shot.mark in marks[shot.ear.fileno()]:
            shot.arrived = True
        if shot.flow.protocol == TCP and not shot.arrived:
            code = shot.sender.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise ProbeFailed(shot.title, f"answered otherwise than by its listener: {os.strerror(code)}")


def _account(shots: Iterable[_Shot], before: Drops, after: Drops) -> None:
    """Lay each drop that was counted to its flow. Raises ProbeFailed for what makes no sense."""
    new = {key for key, count in after.items() if count > before.get(key, 0)}
    explained = set()
    for shot in shots:
        ends = {(shot.source.port_id, "from_port"), (shot.target.port_id, "to_port")}
        mine = {key for key in new if key[:2] in ends}
        by_host = {key for key in new if shot.by_host and key[0].startswith(HOST)}
        explained |= mine | by_host
        shot.dropped = {reason for _, _, reason in mine}
        if any(direction == shot.by_host for _, direction, _ in by_host):
            shot.dropped.add(_VERDICT)
        elif by_host:
            shot.arrived = True  # else there were no answer to drop
        if shot.dropped - {_VERDICT}:
            why = f"dropped, and not by policy: {', '.join(sorted(shot.dropped - {_VERDICT}))}"
            raise ProbeFailed(shot.title, why)
        if shot.arrived and shot.dropped:
            raise ProbeFailed(shot.title, "arrived, and a drop of it was counted")
    for port_id, direction, reason in sorted(new - explained):
        if reason in _JUDGED:
            where = f"port {port_id} {direction}"
            raise ProbeFailed(where, f"counted a drop ({reason}) that belongs to no flow of this round")


def _cease(shot: _Shot) -> None:
    if shot.flow.protocol == TCP:
        reset(shot.sender)
    else:
        shot.sender.close()


def rounds(ends: Sequence[tuple[str, str]]) -> Iterator[list[int]]:
    """Put flows, known by (sender's port, receiver's port), into rounds: none has a port twice as either.

    '' is no port, and may come any number of times. At most twice as many rounds as any port has flows.
    """
    used: dict[tuple[int, str], int] = {}
    found: list[list[int]] = []
    for index, (source, target) in enumerate(ends):
        keys = [(role, port) for role, port in enumerate((source, target)) if port]
        taken = 0
        for key in keys:
            taken |= used.get(key, 0)
        free = ~taken & (taken + 1)
        at = free.bit_length() - 1
        for key in keys:
            used[key] = used.get(key, 0) | free
        while len(found) <= at:
            found.append([])
        found[at].append(index)
    yield from found


__all__ = ["Place", "ProbeFailed", "Prober", "rounds"]
