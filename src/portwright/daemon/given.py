"""What callers give, in the model's form."""

from __future__ import annotations

import ipaddress

import msgspec

from portwright.api.methods import LimitsChange
from portwright.model.errors import InvalidInput
from portwright.model.port import Limits


def address(text: str) -> str:
    """An address, without a prefix length. Raises InvalidInput."""
    try:
        return str(ipaddress.ip_interface(text).ip)
    except ValueError as error:
        raise InvalidInput("ips", text, "is not an IP address") from error


def mac(text: str | None) -> str:
    """A unicast MAC address in lower case; '' for none. Raises InvalidInput."""
    if not text:
        return ""
    parts = text.lower().replace("-", ":").split(":")
    if len(parts) != 6 or any(len(p) != 2 for p in parts):
        raise InvalidInput("mac", text, "must be a MAC address like 02:00:00:00:00:01")
    try:
        first = int(parts[0], 16)
        bytes(int(p, 16) for p in parts)
    except ValueError as error:
        raise InvalidInput("mac", text, "must be a MAC address like 02:00:00:00:00:01") from error
    if first & 1:
        raise InvalidInput("mac", text, "must be a unicast MAC address")
    return ":".join(parts)


def limits(before: Limits, change: LimitsChange) -> Limits:
    """Limits with what of them is to change."""
    given = {k: v for k, v in msgspec.structs.asdict(change).items() if v is not None}
    for direction in ("egress", "ingress"):
        # A new rate without a burst gets the default burst again, not the old one's.
        if f"{direction}_rate" in given and f"{direction}_burst" not in given:
            given[f"{direction}_burst"] = 0
    return msgspec.structs.replace(before, **given)
