"""Carries out ``plan.nat`` and ``plan.publish`` in a switch's namespace."""

from __future__ import annotations

import errno
from collections.abc import Iterable

from portwright.kernel import conntrack
from portwright.model.errors import KernelFailed
from portwright.model.network import Network
from portwright.model.port import PortAddress, PortMapping
from portwright.node.switch import Switch
from portwright.plan import nat, publish


def publish_ports(
    switch: Switch, port_id: str, mappings: Iterable[PortMapping], addresses: Iterable[PortAddress]
) -> None:
    """Adds the elements, then purges conntrack that led elsewhere. The table must be there."""
    mappings, addresses = tuple(mappings), tuple(addresses)
    switch.nft.run(nat.port_elements_add(switch.instance, mappings, addresses, holder=port_id))
    _purge(switch, mappings, addresses, added=True)


def unpublish_ports(
    switch: Switch, mappings: Iterable[PortMapping], addresses: Iterable[PortAddress]
) -> None:
    """Removes the elements, whatever of them is there, then purges conntrack that led here."""
    mappings, addresses = tuple(mappings), tuple(addresses)
    script = nat.port_elements_delete(switch.instance, mappings, addresses)
    # ENOENT: the table is gone, and the elements with it. EEXIST: another holder's by now.
    failed = switch.nft.run_each(nat.each(script), ignore=(errno.ENOENT, errno.EEXIST))
    _purge(switch, mappings, addresses, added=False)
    if failed:
        raise failed[0]


def declare_subnets(switch: Switch, networks: Iterable[Network]) -> None:
    """Makes the table if need be, and says which subnets are ours and which are masqueraded."""
    networks = tuple(networks)
    local = {r.subnet for n in networks for pool in n.pools for r in pool}
    masquerade = {r.subnet for n in networks if n.masquerade for pool in n.pools for r in pool}
    script = nat.subnets(switch.instance, sorted(local), sorted(masquerade))
    if not switch.nat_ready:
        script = nat.base_table(switch.instance) + script
    switch.nft.run(script)
    switch.nat_ready = True


def remove_table(switch: Switch) -> None:
    """Takes the table away; none is no error."""
    switch.nft.run(nat.remove_table(switch.instance))
    switch.nat_ready = False


def _purge(
    switch: Switch, mappings: tuple[PortMapping, ...], addresses: tuple[PortAddress, ...], *, added: bool
) -> None:
    for purge in publish.purges(mappings, addresses, added=added):
        try:
            conntrack.purge(
                switch.fd,
                proto=purge.proto,
                family=purge.family,
                orig_dst_port=purge.orig_dst_port,
                orig_dst=purge.orig_dst,
                reply_src=purge.reply_src,
                reply_src_port=purge.reply_src_port,
            )
        except KernelFailed as error:
            # No ctnetlink in this kernel: nothing can be stale that we could see.
            if error.errno not in (errno.EPROTONOSUPPORT, errno.EINVAL, errno.ENOENT):
                raise
