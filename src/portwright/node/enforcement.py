"""What is compiled comes into force in every data path, and goes: which generation each of them has.

A change that touches little amends the generation in force in place, in data paths of which it is known
that they have the tables of before; all others get the tables whole. After a failure each packet is judged by
the old tables or by the new, and nothing is known, so that the next change installs whole.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Protocol

from portwright.kernel.bpf import Map
from portwright.node import generations
from portwright.node.faults import Faults
from portwright.policy.compile import compile_policies, recompile
from portwright.policy.difference import CellKey, Remains, diff
from portwright.policy.rules import PolicySet, Snapshot
from portwright.policy.tables import Compiled


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
        #: The generation, by data path, of which the tables are those of ``compiled``.
        self._installed: dict[int, int] = {}
        #: What changes of the present generation left behind in its tables.
        self._remains = Remains()

    def compile(self, policies: PolicySet, snapshot: Snapshot) -> Compiled:
        """Numbered as before where it means the same, so that events of the moment keep their rules.

        Changes nothing. Raises as compile_policies.
        """
        if self.compiled is None:
            return compile_policies(policies, snapshot)
        return recompile(self.compiled, policies, snapshot)

    def thaw(self) -> None:
        """Before all of it changes: the collector looks again through what the last changes made."""
        gc.unfreeze()

    def put(self, compiled: Compiled) -> None:
        """In force in every data path when it returns. Raises KernelFailed."""
        change = diff(self.compiled, compiled) if self.compiled is not None else None
        installed, self._installed = self._installed, {}  # of a failure half way nothing is known
        remains: tuple[CellKey, ...] | None = None
        if change is not None and self._remains.hinder(change):
            remains, self._remains = tuple(self._remains.cells), Remains()
        entries: generations.Entries | None = None
        done: dict[int, int] = {}
        for cookie, switch in list(self._switches.items()):
            number: int | None = None
            known = installed.get(cookie, 0)
            if change is not None and change.atomic and known and known == generations.in_force(switch.maps):
                number = generations.amend(
                    switch.maps, change, compiled.rules, remains=remains, faults=self._faults
                )
            if number is None:
                entries = entries or generations.entries_of(compiled)
                number = generations.install(switch.maps, entries, self._faults)
            done[cookie] = number
        if change is None or not change.atomic:
            self._remains = Remains()
        else:
            self._remains.add(change)
        self.compiled, self._installed = compiled, done
        # A hundred thousand objects of which the next change makes few others: else every few changes the
        # collector looks through all of them, for longer than a change takes.
        gc.freeze()

    def withdraw(self) -> None:
        """Nothing is in force any more, in any data path."""
        for switch in list(self._switches.values()):
            if generations.in_force(switch.maps):
                generations.withdraw(switch.maps, self._faults)
        self.compiled = None
        self._installed, self._remains = {}, Remains()
