"""What every operation is: a value with an inverse, and a rendering as a command."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from portwright.plan.operations import Operation


class Base(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """What all operations share."""

    def inverse(self) -> Operation | None:
        """The operation that takes this one back, or None when another one's inverse does."""
        return None

    def render(self) -> str:
        """The command that a person would have typed."""
        raise NotImplementedError


def inside(where: str) -> str:
    """What stands before a command that is given in that namespace."""
    return "ip netns exec SANDBOX " if where == "sandbox" else ""
