"""Places to die, for the crash tests.

``PORTWRIGHT_DIE_AT=add:3:before`` makes the daemon kill itself with SIGKILL right before the
fourth operation of its next ADD: no handler runs, as with ``kill -9`` from outside. With a fault
set operations are applied one at a time, so that every state in between is reached. Unset, which
is always but in tests, it costs one attribute check an operation.
"""

from __future__ import annotations

import os
import signal


class Faults:
    def __init__(self, spec: str = "") -> None:
        self.spec = spec
        self.armed = bool(spec)

    @classmethod
    def from_environment(cls) -> Faults:
        return cls(os.environ.get("PORTWRIGHT_DIE_AT", ""))

    def reach(self, kind: str, step: int, when: str) -> None:
        """Dies if this is the place; returns at once otherwise."""
        if self.armed and self.spec == f"{kind}:{step}:{when}":
            os.kill(os.getpid(), signal.SIGKILL)
