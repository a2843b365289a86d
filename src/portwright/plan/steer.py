"""Steering look-ups: what ports that name domains send to anybody's port 53 goes to the daemon's proxy.

Two chains and a set in our own table (plan/nat.py), there only while there are such ports::

    set    steered           representors of the ports
    steer          raw - 1   in prerouting: UDP and TCP to port 53 from them, to the proxy, or nowhere
    steer_replies  raw - 1   in output: what the proxy answers them

``tproxy`` changes nothing in a packet: the proxy sees the sandbox's address and the resolver's. The mark has
it routed to this host (node/steer.py). Before conntrack and untracked, so that nobody's NAT has a say: the
resolver is the one that the sandbox named, and the proxy's own query goes the host's way to it.

Where no proxy listens (the daemon is away) the next rule drops: an answer that policy does not hear of
would be kept by the sandbox, and lead nowhere. A port that asks too often is held to a rate here, at no
cost to the daemon.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

from portwright.plan.nat import table_name

#: Queries a second of one port, and how many at once.
RATE, BURST = 500, 500
#: Of our rules among the host's routing rules: before those of others, which match what they mark.
PRIORITY = 77
_MARK = 0x70770000
_HOOKS = {
    "steer": "type filter hook prerouting priority -301; policy accept",
    "steer_replies": "type filter hook output priority -301; policy accept",
}
_SETS = {
    "steered": "type ifname",
    "steered_rates": "type ifname; size 65535; flags dynamic,timeout; timeout 10s",
}
_TO_53 = "iifname @steered meta l4proto { tcp, udp } th dport 53"


def mark_of(instance: str) -> int:
    """The packet mark, and the number of the routing table, of one daemon."""
    return _MARK | zlib.crc32(instance.encode()) & 0xFFFF


def steer(instance: str, reps: Iterable[str], port: int) -> str:
    """A script that steers what these representors receive for port 53 to the proxy on ``port``.

    What others receive is steered no more.
    """
    table, mark = table_name(instance), f"{mark_of(instance):#x}"
    to_proxy = f"add rule inet {table} steer {_TO_53} notrack meta mark set {mark} tproxy"
    names = ", ".join(f'"{rep}"' for rep in sorted(reps))
    lines = [
        *_made(table),
        f"flush set inet {table} steered",
        f"add element inet {table} steered {{ {names} }}",
        *(f"flush chain inet {table} {name}" for name in _HOOKS),
        f"add rule inet {table} steer {_TO_53} update @steered_rates "
        f'{{ iifname limit rate over {RATE}/second burst {BURST} packets }} counter drop comment "too many"',
        f'{to_proxy} ip to 127.0.0.1:{port} accept comment "to the proxy4"',
        f'{to_proxy} ip6 to [::1]:{port} accept comment "to the proxy6"',
        f'add rule inet {table} steer {_TO_53} counter drop comment "no proxy"',
        f"add rule inet {table} steer_replies oifname @steered meta l4proto {{ tcp, udp }} th sport 53 "
        'notrack comment "replies"',
    ]
    return "".join(f"{line}\n" for line in lines)


def change(instance: str, added: Iterable[str], removed: Iterable[str]) -> str:
    """A script that steers some more and some no more; whichever of these are steered already.

    ENOENT: the table, or the set, is gone.
    """
    table = table_name(instance)
    # Added first, so that what is to be deleted is there (``destroy`` needs Linux 6.3).
    lines = [f'add element inet {table} steered {{ "{rep}" }}' for rep in sorted({*added, *removed})]
    lines += [f'delete element inet {table} steered {{ "{rep}" }}' for rep in sorted(removed)]
    return "".join(f"{line}\n" for line in lines)


def unsteer(instance: str) -> str:
    """A script that takes all of it away; what is not there is no error."""
    table = table_name(instance)
    lines = [
        *_made(table),
        *(f"flush chain inet {table} {name}" for name in _HOOKS),
        *(f"delete chain inet {table} {name}" for name in _HOOKS),
        *(f"delete set inet {table} {name}" for name in _SETS),
    ]
    return "".join(f"{line}\n" for line in lines)


def _made(table: str) -> list[str]:
    """Adding what is there does nothing; so what follows finds it, whatever was there before."""
    return [
        f"add table inet {table}",
        *(f"add set inet {table} {name} {{ {spec}; }}" for name, spec in _SETS.items()),
        *(f"add chain inet {table} {name} {{ {spec}; }}" for name, spec in _HOOKS.items()),
    ]
