"""What the doctor is asked, and what it finds."""

from __future__ import annotations

from typing import Literal

import msgspec

from portwright.api.registry import Params, method


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One check. ``level`` is how bad it is that it is not ok; ``way_out`` what to do then."""

    name: str
    ok: bool
    level: Literal["error", "warning", "info"] = "error"
    detail: str = ""
    way_out: str = ""


class Feature(msgspec.Struct, frozen=True, kw_only=True):
    """A kernel feature that was probed."""

    name: str
    present: bool
    detail: str = ""


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """What the doctor found."""

    checks: tuple[Check, ...]
    features: tuple[Feature, ...] = ()


@method("doctor", Diagnosis)
class DoctorParams(Params[Diagnosis], frozen=True, kw_only=True):
    """Check the host, the kernel and the daemon's own state."""
