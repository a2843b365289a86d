"""Places to die, for the crash tests.

``PORTWRIGHT_DIE_AT`` names one place; there the daemon kills itself with SIGKILL: no handler runs, as
with ``kill -9`` from outside. The places (tests/faults/ goes through all of them):

    add:3:before, add:3:after          around the fourth operation of the next ADD; likewise
                                       del, plug, unplug, clear, restore, undo-add, undo-plug, abandon,
                                       set (settings that were asked for), heard (settings that the
                                       representor has already), undo-set, undo-heard, refresh,
                                       chain, unchain, abandon-chain (taps on other plugins' devices),
                                       migrate, leave, undo-migrate (sandboxes on a bridge; and off it)
    add:intent, add:commit             the intent is on disk, the kernel untouched; the outcome is on disk,
                                       the caller not told; likewise del, plug, unplug, set, heard, chain,
                                       unchain
    undo-set:intent                    a set was refused, the former settings are on record again; likewise
                                       undo-heard
    set:told                           the sandbox's end has its MTU, the outcome is not on disk; likewise
                                       heard
    migrate:intent, migrate:commit     all sandboxes of a bridge are about to leave it; are on record as ports
    migrate:kept, migrate:removed      the bridge's addresses are the loopback's too; the bridge is gone
    replay:done                        a spooled DEL is carried out, its file still there
    load:maps, load:programs           of a new data path its maps are pinned; its programs too, but no link
                                       runs them
    close:steer, close:table, close:sysctl, close:pins
                                       the last port is gone: what steers look-ups, the table, the sysctls,
                                       some pins are removed
    policy:compiled, policy:recorded, policy:installed
                                       a change of policy is judged; on record; in force
    hosts:recorded, hosts:installed, hosts:removed, policy:hosts
                                       the table of host endpoints is about to be made; is in force; is gone,
                                       but on record; is as the change wants it, which is not on record yet
    policy:<table>, policy:swept, policy:withdrawn
                                       in a data path the next generation has this table; all of them; there
                                       is none any more
    policy:amend-cells, policy:amend-peers
                                       the generation in force has its new cells; and its new addresses
    steer:recorded, steer:routed       look-ups are about to be steered; routes are there, but no chain yet
    unsteer:chains, unsteer:routed, unsteer:done
                                       of what steers them the chains are gone; the routes too; and the record
    dns:steered, dns:open              a port's look-ups come to the proxy; an answer's addresses are open
                                       and not on record yet
    recover-...                        any of these while a start finishes what an earlier run left

With a fault set operations are applied one at a time, so that every state in between is reached. Unset,
which is always but in tests, a place costs one attribute check.
"""

from __future__ import annotations

import os
import signal


class Faults:
    """At most one place to die; ``stage`` is put before the names of places (``recover-``)."""

    def __init__(self, spec: str = "") -> None:
        self.spec = spec
        self.armed = bool(spec)
        self.stage = ""

    @classmethod
    def from_environment(cls) -> Faults:
        """What ``PORTWRIGHT_DIE_AT`` names, if it is set."""
        return cls(os.environ.get("PORTWRIGHT_DIE_AT", ""))

    def reach(self, kind: str, step: int, when: str) -> None:
        """Dies if this is the place; returns at once otherwise."""
        if self.armed:
            self.at(f"{kind}:{step}:{when}")

    def at(self, place: str) -> None:
        """Dies if this is the place; returns at once otherwise."""
        if self.armed and self.spec == self.stage + place:
            os.kill(os.getpid(), signal.SIGKILL)
