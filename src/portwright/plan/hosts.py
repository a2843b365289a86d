"""Host endpoints' table (policy/host/render.py) as scripts for nft: what puts it in force, and takes it away.

The table stays and its contents are exchanged in one transaction. Were the table itself exchanged, a packet
between two hooks could meet the new base chain before it counts and the old one after it does, and so
neither's rules. Counters of rules that stay keep their figures.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from portwright.plan.nat import table_name
from portwright.policy.host.render import Rendered

_PREFIX = "portwright-hosts"
#: Of a host's one daemon, and how many more for those of others beside it.
_GROUP, _OTHERS = 0x7077, 4096


class Present(NamedTuple):
    """The names of what a table has, and which of its sets are known to have the addresses of their names."""

    chains: frozenset[str] = frozenset()
    sets: frozenset[str] = frozenset()
    counters: frozenset[str] = frozenset()
    known_sets: frozenset[str] = frozenset()


def hosts_table(instance: str = "") -> str:
    """The table's name; of no form that :func:`portwright.plan.nat.table_name` gives any daemon.

    Raises InvalidInput as that does.
    """
    return _PREFIX + table_name(instance).removeprefix("portwright")


def told_group(instance: str = "") -> int:
    """The group of NFLOG in which this daemon hears of what its table drops: "pw", or one behind it."""
    return _GROUP + 1 + zlib.crc32(instance.encode()) % _OTHERS if instance else _GROUP


def remove_hosts(instance: str) -> str:
    """A script that removes the table and all in it. No error if there is none."""
    table = hosts_table(instance)
    return f"add table inet {table}\ndelete table inet {table}\n"


def put_hosts(instance: str, wanted: Rendered, there: Present) -> str:
    """A script that makes the table's contents these, of a table that has what ``there`` says, or is not."""
    table = hosts_table(instance)
    lines = [f"add table inet {table}", f"flush table inet {table}"]
    stale_sets = {name for name in there.sets if name not in wanted.sets or name not in there.known_sets}
    for kind, stale in (
        ("chain", there.chains - wanted.chains.keys()),
        ("set", stale_sets),
        ("counter", there.counters - wanted.counters.keys()),
    ):
        lines += [f"delete {kind} inet {table} {name}" for name in sorted(stale)]
    for name, (version, addresses) in wanted.sets.items():
        if name not in there.sets or name in stale_sets:
            kind = "ipv4_addr" if version == 4 else "ipv6_addr"
            elements = ", ".join(addresses)
            lines.append(
                f"add set inet {table} {name} {{ type {kind}; flags interval; elements = {{ {elements} }}; }}"
            )
    lines += [f"add counter inet {table} {name}" for name in wanted.counters if name not in there.counters]
    for name in wanted.chains:
        base = wanted.bases.get(name)
        hook = f" {{ type filter hook {base}; policy accept; }}" if base else ""
        lines.append(f"add chain inet {table} {name}{hook}")
    lines += [
        f"add rule inet {table} {name} {line}" for name, rules in wanted.chains.items() for line in rules
    ]
    return "".join(f"{line}\n" for line in lines)


def present(wanted: Rendered) -> Present:
    """What a table has after :func:`put_hosts`."""
    return Present(
        chains=frozenset(wanted.chains),
        sets=frozenset(wanted.sets),
        counters=frozenset(wanted.counters),
        known_sets=frozenset(wanted.sets),
    )


def observed(objects: Sequence[Mapping[str, object]] | None) -> Present:
    """What ``Nft.list_table`` says that a table has."""
    names: dict[str, set[str]] = {"chain": set(), "set": set(), "counter": set()}
    for entry in objects or ():
        for kind, found in names.items():
            body = entry.get(kind)
            if isinstance(body, dict):
                found.add(str(body.get("name")))
    return Present(
        chains=frozenset(names["chain"]), sets=frozenset(names["set"]), counters=frozenset(names["counter"])
    )


def counted(objects: Iterable[Mapping[str, object]]) -> dict[str, tuple[int, int]]:
    """(packets, bytes) by counter of ``list counters table``."""
    found = (entry.get("counter") for entry in objects)
    return {str(c["name"]): (int(c["packets"]), int(c["bytes"])) for c in found if isinstance(c, dict)}
