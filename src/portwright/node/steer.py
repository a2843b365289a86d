"""Carries out ``plan.steer`` in a switch's namespace: the nft chains, and routes for what they mark.

On record before it is made, and by namespace: so that a start after a crash finds what there is to take away.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Iterable

from portwright.kernel import rtnl
from portwright.kernel.netlink import Request
from portwright.kernel.rtnl_rule import rule_add, rule_del
from portwright.model.errors import KernelFailed, NetlinkFailed
from portwright.node.faults import Faults
from portwright.node.switch import Switch
from portwright.plan import steer as plan
from portwright.store import Store

KIND = "steer"
#: Of the loopback device, in every namespace.
_LO = 1
_FAMILIES = ((int(socket.AF_INET), "0.0.0.0/0"), (int(socket.AF_INET6), "::/0"))

log = logging.getLogger(__name__)


def steer(store: Store, switch: Switch, reps: Iterable[str], port: int, faults: Faults) -> None:
    """Has the look-ups of these representors come to the proxy on ``port``, and nobody else's."""
    store.own(KIND, _name(switch), {"mark": plan.mark_of(switch.instance)})
    faults.at("steer:recorded")
    switch.rtnl.execute(_routing(switch, add=True))
    faults.at("steer:routed")
    switch.nft.run(plan.steer(switch.instance, reps, port))


def change(switch: Switch, *, added: Iterable[str], removed: Iterable[str]) -> None:
    """Has the look-ups of these representors come too, and of those no more. After ``steer``."""
    switch.nft.run(plan.change(switch.instance, added, removed))


def unsteer(store: Store, switch: Switch, faults: Faults) -> None:
    """Takes all of it away, if there is any on record. What can't be taken stays there, for the next time."""
    if not is_steered(store, switch):
        return
    try:
        switch.nft.run(plan.unsteer(switch.instance))
        faults.at("unsteer:chains")
        switch.rtnl.execute(_routing(switch, add=False))
    except (KernelFailed, NetlinkFailed) as error:
        log.error("look-ups in namespace %s are still steered: %s", _name(switch), error)
        return
    faults.at("unsteer:routed")
    store.disown(KIND, _name(switch))
    faults.at("unsteer:done")


def is_steered(store: Store, switch: Switch) -> bool:
    """Whether something of ours is there, or was about to be."""
    return any(thing.name == _name(switch) for thing in store.owned(KIND))


def _routing(switch: Switch, *, add: bool) -> list[Request]:
    """The mark's table says that everything is here; by what else it would be routed, does not matter.

    But the way back of a marked packet is not by that table. Where the host looks at it with the mark
    (``src_valid_mark``, which VPNs set, and firewalls' ``fib saddr . mark``), it would find a source of its
    own, and drop the packet. That look is as if by ``lo``: so a rule before sends it to the main table.
    """
    mark = plan.mark_of(switch.instance)
    rule, found = rule_add if add else rule_del, list[Request]()
    for family, everywhere in _FAMILIES:
        route = (rtnl.route_add if add else rtnl.route_del)(everywhere, oif=_LO, table=mark, type="local")
        found += [
            # EACCES: a host with IPv6 disabled, which forwards none of it. ENOENT: the table is not there.
            route.tolerating(*((errno.EEXIST, errno.EACCES) if add else (errno.ESRCH, errno.ENOENT))),
            rule(family, mark=mark, table=rtnl.RT_TABLE_MAIN, priority=plan.PRIORITY - 1, iif="lo"),
            rule(family, mark=mark, table=mark, priority=plan.PRIORITY),
        ]
    return found


def _name(switch: Switch) -> str:
    return f"{switch.ref.cookie:x}"
