"""The addresses of bridges that we removed: on the loopback of the host, until no port is left there.

Sandboxes that came off the bridge have them for their gateway's, and services of the host may listen on them.
"""

from __future__ import annotations

import errno
import ipaddress
from collections.abc import Iterable

from portwright.kernel import rtnl
from portwright.node.switch import Switch
from portwright.store import Store

#: Kind of what is on record as ours; its name is COOKIE:ADDRESS.
KIND = "bridge-address"
_LOOPBACK = 1  # in every namespace (net/core/dev.c: dev_index_reserve, drivers/net/loopback.c)


def keep_addresses(store: Store, switch: Switch, addresses: Iterable[str]) -> None:
    """Puts them on the loopback before the bridge goes; what is there already stays its owner's."""
    held = {a.address for a in rtnl.addresses(switch.rtnl, _LOOPBACK)}
    for address in addresses:
        if address not in held:
            store.own(KIND, f"{switch.ref.cookie:x}:{address}")
            add = rtnl.addr_add(_LOOPBACK, _prefix(address), noprefixroute=True)
            switch.rtnl.execute([add.tolerating(errno.EEXIST)])


def drop_addresses(store: Store, switch: Switch) -> None:
    """Takes them off again."""
    prefix = f"{switch.ref.cookie:x}:"
    for thing in store.owned(KIND):
        if thing.name.startswith(prefix):
            gone = rtnl.addr_del(_LOOPBACK, _prefix(thing.name.removeprefix(prefix)))
            switch.rtnl.execute([gone.tolerating(errno.EADDRNOTAVAIL)])
            store.disown(KIND, thing.name)


def _prefix(address: str) -> str:
    return f"{address}/{ipaddress.ip_address(address).max_prefixlen}"
