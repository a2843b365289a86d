"""Policies that select taps on other plugins' devices, where nothing of ours holds the guest to them."""

from __future__ import annotations

from collections.abc import Sequence

from portwright.policy.lints.entry import Lint
from portwright.policy.rules import Where

_SHOWN = 3


def chained_ports(title: str, pods: Sequence[str]) -> Lint:
    """The finding that the policy (``KIND NAME``) selects these pods and does not hold there."""
    more = f" and {len(pods) - _SHOWN} more" if len(pods) > _SHOWN else ""
    return Lint(
        Where(path=title),
        title,
        "chained-port",
        f"It selects {', '.join(sorted(pods)[:_SHOWN])}{more}, chained behind another CNI plugin, "
        "and does not hold there",
        "Attach them with model tcfilter alone.",
    )
