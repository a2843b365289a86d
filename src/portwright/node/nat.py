"""Carries out ``plan.nat`` and ``plan.publish`` in a switch's namespace."""

from __future__ import annotations

import errno
import ipaddress
from collections.abc import Iterable

import msgspec

from portwright.kernel import conntrack
from portwright.model.errors import KernelFailed, NetlinkFailed
from portwright.model.network import Network
from portwright.model.port import Port, PortAddress, PortMapping
from portwright.node.switch import Switch
from portwright.plan import nat, publish


def publish_ports(
    switch: Switch, port_id: str, mappings: Iterable[PortMapping], addresses: Iterable[PortAddress]
) -> None:
    """Adds the elements, then purges conntrack that led elsewhere. The table must be there."""
    mappings, addresses = tuple(mappings), tuple(addresses)
    switch.nft.run(nat.port_elements_add(switch.instance, mappings, addresses, holder=port_id))
    purge(switch, mappings, addresses, added=True)


def withdraw_ports(switch: Switch, mappings: Iterable[PortMapping], addresses: Iterable[PortAddress]) -> None:
    """Removes the elements, whatever of them is there. ``purge`` what led here is due after it."""
    script = nat.port_elements_delete(switch.instance, tuple(mappings), tuple(addresses))
    try:
        switch.nft.run(script)  # nearly always all of it is there: one transaction, one RCU grace period
    except KernelFailed:
        # ENOENT: the table is gone, and the elements with it. EEXIST: another holder's by now.
        failed = switch.nft.run_each(nat.each(script), ignore=(errno.ENOENT, errno.EEXIST))
        if failed:
            raise failed[0] from None


def declare_subnets(switch: Switch, networks: Iterable[Network], strays: Iterable[Port] = ()) -> None:
    """Makes the table if need be, and says which subnets are ours and which are masqueraded."""
    script = nat.subnets(switch.instance, *subnets(networks, strays))
    if not switch.nat_ready:
        script = nat.base_table(switch.instance) + script
    switch.nft.run(script)
    switch.nat_ready = True


def subnets(networks: Iterable[Network], strays: Iterable[Port]) -> tuple[list[str], list[str]]:
    """(what is ours, what of it is masqueraded): the networks' pools, and the strays of these networks."""
    known = {network.name: network for network in networks}
    local = {r.subnet for n in known.values() for pool in n.pools for r in pool}
    hidden = {r.subnet for n in known.values() if n.masquerade for pool in n.pools for r in pool}
    for port in strays:
        network = known.get(port.network)
        if network is not None:
            own = {str(ipaddress.ip_network(address)) for address in stray_addresses(port, network)}
            local |= own
            hidden |= own if network.masquerade else set()
    return sorted(local), sorted(hidden)


def stray_addresses(port: Port, network: Network) -> list[str]:
    """The port's addresses outside of its network's pools.

    They are a foreign IPAM plugin's, of a runtime's ipRanges, or of ranges that the network had before.
    """
    blocks = [ipaddress.ip_network(r.subnet) for pool in network.pools for r in pool]
    return [
        a.address
        for a in port.addresses
        if not any(ipaddress.ip_address(a.address) in block for block in blocks)
    ]


def remove_table(switch: Switch) -> None:
    """Takes the table away; none is no error."""
    switch.nft.run(nat.remove_table(switch.instance))
    switch.nat_ready = False


def others(switch: Switch) -> list[str]:
    """The tables of daemons beside us in this namespace."""
    found = (entry.get("table") for entry in switch.nft.run_json("list tables inet"))
    names = (str(table.get("name", "")) for table in found if isinstance(table, dict))
    own = nat.table_name(switch.instance)
    return [n for n in names if n != own and (n == "portwright" or n.startswith("portwright_"))]


def repair(switch: Switch, publications: Iterable[publish.Publication]) -> bool:
    """Makes the mappings in the kernel those of the record, atomically; tells whether they differed."""
    observed = switch.nft.list_table("inet", nat.table_name(switch.instance)) or []
    publications = tuple(publications)
    script = nat.stale_elements(switch.instance, publications, observed)
    there = {e.identity() for e in nat.observed_elements(observed)}
    for one in publications:
        if any(e.identity() not in there for e in publish.elements(one.mappings, one.addresses)):
            script += nat.port_elements_delete(switch.instance, one.mappings, one.addresses)
            script += nat.port_elements_add(switch.instance, one.mappings, one.addresses, holder=one.holder)
    switch.nft.run(script)
    return bool(script)


def purge(
    switch: Switch, mappings: Iterable[PortMapping], addresses: Iterable[PortAddress], *, added: bool
) -> None:
    """Deletes the conntrack entries that lead elsewhere (``added``) or that led through the mappings."""
    wanted = [
        conntrack.Entries(**msgspec.structs.asdict(purge))
        for purge in publish.purges(mappings, addresses, added=added)
    ]
    if not wanted:
        return
    try:
        with switch.conntrack() as socket:
            conntrack.purge(socket, *wanted)
    except (KernelFailed, NetlinkFailed) as error:
        # No ctnetlink in this kernel: nothing can be stale that we could see.
        if error.errno not in (errno.EPROTONOSUPPORT, errno.EINVAL, errno.ENOENT):
            raise
