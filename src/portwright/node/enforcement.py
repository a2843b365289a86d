"""What is compiled comes into force in every data path, and goes: which generation each of them has.

A change that touches little amends the generation in force in place, in data paths of which it is known
that they have the tables of before; all others get the tables whole. After a failure each packet is judged by
the old tables or by the new, and nothing is known, so that the next change installs whole.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping
from typing import Protocol

from portwright.kernel.bpf import Map
from portwright.node import generations
from portwright.node.faults import Faults
from portwright.policy.compile import compile_policies, recompile
from portwright.policy.difference import CellKey, Remains, diff, is_atomic
from portwright.policy.rules import PolicySet, Snapshot
from portwright.policy.tables import Compiled

#: Changes of the whole between two collections: the last of them takes longer, by a tenth of a second.
_COLLECTED = 16


class DataPath(Protocol):
    """What is needed of a switch."""

    @property
    def maps(self) -> Mapping[str, Map]:
        """By name in the source."""


class Enforcement:
    """One for the node. ``compiled``: what is in force, None while nothing is."""

    def __init__(self, switches: Mapping[int, DataPath], faults: Faults) -> None:
        """``switches`` by cookie, looked at with each change; nothing is put in force yet."""
        self._switches = switches
        self._faults = faults
        self.compiled: Compiled | None = None
        #: What was compiled last and is not in force: a change is judged before it is recorded, and then put.
        self._judged: tuple[PolicySet, Snapshot, Compiled] | None = None
        #: The generation, by data path, of which the tables are those of ``compiled``.
        self._installed: dict[int, int] = {}
        #: What changes of the present generation left behind in its tables.
        self._remains = Remains()
        self._wholes = 0  # how often all of it has changed

    def compile(self, policies: PolicySet, snapshot: Snapshot) -> Compiled:
        """Numbered as before where it means the same, so that events of the moment keep their rules.

        Changes nothing. Raises as compile_policies.
        """
        if self._judged is not None and self._judged[:2] == (policies, snapshot):
            return self._judged[2]
        before, self._judged = self.compiled, None
        if before is None:
            compiled = compile_policies(policies, snapshot)
        else:
            compiled = recompile(before, policies, snapshot)
        self._judged = policies, snapshot, compiled
        return compiled

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """While all of it changes: the collector would look through a hundred thousand objects that stay.

        It does after every so many times, as little of what goes is a cycle.
        """
        gc.disable()
        try:
            yield
            self._wholes += 1
            if not self._wholes % _COLLECTED:
                gc.unfreeze()
                gc.collect()
                gc.freeze()
        finally:
            gc.enable()

    def put(self, compiled: Compiled) -> None:
        """In force in every data path when it returns. Raises KernelFailed."""
        before = self.compiled
        change = diff(before, compiled) if before is not None and is_atomic(before, compiled) else None
        installed, self._installed = self._installed, {}  # of a failure half way nothing is known
        remains: tuple[CellKey, ...] | None = None
        if change is not None and self._remains.hinder(change):
            remains, self._remains = tuple(self._remains.cells), Remains()
        entries: generations.Entries | None = None
        done: dict[int, int] = {}
        for cookie, switch in list(self._switches.items()):
            number: int | None = None
            known = installed.get(cookie, 0)
            if change is not None and known and known == generations.in_force(switch.maps):
                number = generations.amend(
                    switch.maps, change, compiled.rules, remains=remains, faults=self._faults
                )
            if number is None:
                entries = entries or generations.Entries(compiled)
                number = generations.install(switch.maps, entries, self._faults)
            done[cookie] = number
        if change is None:
            self._remains = Remains()
        else:
            self._remains.add(change)
        self.compiled, self._installed, self._judged = compiled, done, None
        # A hundred thousand objects of which the next change makes few others: else every few changes the
        # collector looks through all of them, for longer than a change takes.
        gc.freeze()

    def withdraw(self) -> None:
        """Nothing is in force any more, in any data path."""
        for switch in list(self._switches.values()):
            if generations.in_force(switch.maps):
                generations.withdraw(switch.maps, self._faults)
        self.compiled = self._judged = None
        self._installed, self._remains = {}, Remains()
