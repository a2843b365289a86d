"""What a port's operations mean in the maps, and whether the maps hold it.

The maps are ours alone: where they differ from the record, the record is right. (Not so the representor's
MTU and administrative state, which an operator may have changed: see ``node.changes``.)
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from portwright.attach import veth
from portwright.dataplane import values
from portwright.dataplane.abi import PwDir, PwLimitKey, PwPort, PwPortFlag
from portwright.model.port import Port
from portwright.node.switch import Switch
from portwright.plan import path_operations as op


def port_key(ifindex: int) -> bytes:
    """The key of pw_ports."""
    return ifindex.to_bytes(4, sys.byteorder)


def port_value(operation: op.PutPort, held: bytes | None = None) -> bytes:
    """The value of pw_ports. ``held``: what stands there, and lends what the record does not have.

    That is the count that the data path keeps, and what ``proxy_look_ups`` has set.
    """
    flows, names = 0, False
    if held is not None and held.startswith(values.port_key(operation.port_id)):
        stands = PwPort.unpack(held)
        flows, names = stands.flows, bool(stands.flags & PwPortFlag.PF_NAMES)
    return values.port_value(
        port_id=operation.port_id,
        net_id=operation.net_id,
        mac_address=operation.mac,
        gateway_mac=operation.gateway_mac,
        mtu=operation.mtu,
        sandbox=operation.sandbox,
        addresses=operation.addresses,
        gateways=operation.gateways,
        limits=operation.limits,
        flows=flows,
        names=names,
        tap=operation.tap,
        onlink=operation.onlink,
    )


def proxy_look_ups(switch: Switch, ports: Iterable[Port]) -> None:
    """Has look-ups of these ports, and of no others, pass the host's stack to resolvers that are ports, too.

    There they are steered (node/steer.py). Whose, policy says and not the record: recovery leaves it alone.
    """
    table = switch.maps["pw_ports"]
    proxied = {port_key(port.rep_ifindex): values.port_key(port.port_id) for port in ports}
    for key, value in list(table.items()):
        mine = proxied.get(key)
        names = mine is not None and value.startswith(mine)
        if names == bool(PwPort.unpack(value).flags & PwPortFlag.PF_NAMES):
            continue
        held = table.lookup(key)  # anew, for the count that is in it
        if held is not None:
            entry = PwPort.unpack(held)
            table.update(key, entry._replace(flags=entry.flags ^ PwPortFlag.PF_NAMES).pack())


def target_value(operation: op.PutTargets, ifindex: int) -> bytes:
    """The value of pw_addrs, of each of the port's addresses; ``ifindex`` is the representor's."""
    return values.target_value(
        port_id=operation.port_id,
        net_id=operation.net_id,
        ifindex=ifindex,
        mtu=operation.mtu,
        sandbox=operation.sandbox,
        mac_address=operation.mac,
        gateway_mac=operation.gateway_mac,
        limited=operation.limited,
        down=operation.down,
        tap=operation.tap,
    )


def limit_values(operation: op.PutPort, now_ns: int) -> dict[bytes, bytes | None]:
    """Key and value of pw_limits, each bucket full at ``now_ns`` (CLOCK_MONOTONIC); None for no limit."""
    limits, number = operation.limits, int(operation.port_id, 16)
    found: dict[bytes, bytes | None] = {}
    for direction, rate, burst in (
        (PwDir.FROM_PORT, limits.egress_rate, limits.egress_burst),
        (PwDir.TO_PORT, limits.ingress_rate, limits.ingress_burst),
    ):
        key = PwLimitKey(port_id=number, dir=direction).pack()
        found[key] = values.limit_value(rate, burst, now_ns) if rate else None
    return found


class Entries:
    """The maps of a switch that say what its ports are held to, read at once."""

    def __init__(self, switch: Switch) -> None:
        """Reads them. What is written later is not seen."""
        self._ports = dict(switch.maps["pw_ports"].items())
        self._targets = dict(switch.maps["pw_addrs"].items())
        self._limits = dict(switch.maps["pw_limits"].items())

    def know(self, port: Port) -> bool:
        """Whether its representor and all its addresses are entered as this port's, whatever settings."""
        mine = values.port_key(port.port_id)
        held = self._ports.get(port_key(port.rep_ifindex), b"")
        targets = [self._targets.get(values.address(a.address), b"") for a in port.addresses]
        return all(value.startswith(mine) for value in (held, *targets))

    def agree(self, port: Port) -> bool:
        """Whether every value is what the record says; of a limit its rate and burst.

        Whether look-ups are proxied is not on record, and not compared.
        """
        entry = veth.entry(port)
        held = self._ports.get(port_key(port.rep_ifindex))
        if held != port_value(entry, held):
            return False
        target = target_value(veth.targets(port), port.rep_ifindex)
        if any(self._targets.get(values.address(a.address)) != target for a in port.addresses):
            return False
        wanted = limit_values(entry, 0)
        return all(_limit(self._limits.get(key)) == _limit(value) for key, value in wanted.items())


def _limit(value: bytes | None) -> tuple[int, int] | None:
    if value is None:
        return None
    spec = values.limit_spec(value)
    return spec.rate, spec.burst
