"""What a table of host endpoints may have, refused before it is sent with the name of who asks for most."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

from portwright.policy.tables import PolicyTooLarge

#: What one table may have. A program of more is nothing that a person wrote.
MAX_LINES: Final = 65_536
MAX_ELEMENTS: Final = 1_000_000
#: The kernel finds one by walking through all of them: so many take it two seconds to load.
MAX_SETS: Final = 4_096
#: Chains one behind the other, a base with them: the kernel's NFT_JUMP_STACK_SIZE.
MAX_DEPTH: Final = 16


_TARGET = re.compile(r"\b(?:jump|goto) ([a-z0-9_]+)")
#: What stands in quotes is a name or a comment, and leads nowhere.
_QUOTED = re.compile(r'"[^"]*"')


def refuse_size(lines: Counter[str], elements: Counter[str], sets: Counter[str]) -> None:
    """Raises PolicyTooLarge for more lines, sets, or addresses in these than a table may have; by policy."""
    for what, counted, limit in (
        ("lines of nftables rules for host endpoints", lines, MAX_LINES),
        ("addresses in sets for host endpoints", elements, MAX_ELEMENTS),
        ("sets of addresses for host endpoints", sets, MAX_SETS),
    ):
        if (need := counted.total()) > limit:
            policy, most = _first(counted)
            raise PolicyTooLarge(what, need, limit, policy, f"alone adds {most:,}")


def refuse_depth(chains: Mapping[str, Iterable[str]], bases: Iterable[str], lines: Counter[str]) -> None:
    """Raises PolicyTooLarge for chains that lead on deeper than the kernel follows."""
    known: dict[str, int] = {}

    def depth(chain: str) -> int:
        if chain not in known:
            targets = {t for line in chains[chain] for t in _TARGET.findall(_QUOTED.sub("", line))}
            known[chain] = 1 + max(map(depth, targets), default=0)
        return known[chain]

    need = max(map(depth, bases), default=0)
    if need > MAX_DEPTH:
        why = "has rules that pass and exclude (notPorts, notProtocol), as other tiers have too"
        raise PolicyTooLarge(
            "levels of nftables chains for a host endpoint", need, MAX_DEPTH, _first(lines)[0], why
        )


def _first(counted: Counter[str]) -> tuple[str, int]:
    """Who has most of it, of those that have a name."""
    return max(((who, n) for who, n in counted.items() if who), key=lambda one: one[1], default=("", 0))
