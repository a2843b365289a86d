"""Compares the record with the kernel: one port for CHECK, the whole host for STATUS and doctor.

What is there beyond the record - more routes, another MAC from ``tuning``, added addresses - is the
business of whoever put it there. What the record says and the kernel lacks is a problem.
"""

from __future__ import annotations

import os
import sys

from portwright.attach import macvtap, tap
from portwright.dataplane import values
from portwright.dataplane.abi import PwPort, PwTarget
from portwright.ipam import Leak, ObservedLink, find_leaks
from portwright.kernel import rtnl
from portwright.kernel.netlink import NetlinkSocket
from portwright.model.port import Port, PortState
from portwright.node import clones, taps
from portwright.node.core import Core
from portwright.node.nat import subnets
from portwright.node.switch import DIRECTIONS, Switch
from portwright.plan import nat


class Health:
    """Compares the record with the kernel and changes neither."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._store = core.store

    def link(self, port: Port) -> bool:
        """Has the representor a carrier? Says nothing of health: the sandbox may set its end down (R9)."""
        switch = self._core.switch_of(port)
        found = rtnl.link_by_name(switch.rtnl, port.rep_name) if switch is not None else None
        return found is not None and found.carrier

    # -- one port --------------------------------------------------------------------------------

    def check_port(self, port: Port, sandbox_fd: int | None = None) -> list[str]:
        """What an attached port lacks, as sentences, the gravest first; [] is well."""
        if port.state is not PortState.ATTACHED:
            return [f"the port is {port.state.value}, not attached"]
        switch = self._core.switch_of(port)
        if switch is None:
            return ["the namespace of its representor is gone"]
        problems = self._representor(switch, port)
        problems += self._data_path(switch, port)
        on_host = port.adopted is not None and port.adopted.tap
        fd = sandbox_fd if sandbox_fd is not None or on_host else self._core.sandbox_fd(port)
        if on_host:
            pass
        elif fd is None:
            problems.append(f"the sandbox {port.sandbox.path} is gone")
        else:
            try:
                problems += _sandbox(fd, port)
            finally:
                if sandbox_fd is None:
                    os.close(fd)
        if port.port_mappings:
            table = switch.nft.list_table("inet", nat.table_name(switch.instance))
            problems += nat.verify(switch.instance, port.port_mappings, port.addresses, table)
        problems += self._subnets(switch, port)
        held = set(self._store.addresses_of(port.port_id))
        if port.ipam == "portwright":
            problems += [
                f"address {a.address} is not reserved" for a in port.addresses if a.address not in held
            ]
        return problems

    def _representor(self, switch: Switch, port: Port) -> list[str]:
        link = rtnl.link_by_name(switch.rtnl, port.rep_name)
        if link is None:
            return [f"representor {port.rep_name} is gone"]
        problems = []
        if not link.up:
            problems.append(f"representor {port.rep_name} is down")
        routes = {r.dst for r in rtnl.routes(switch.rtnl, oif=link.index)}
        problems += [
            f"the host has no route to {a.address} by {port.rep_name}"
            for a in port.addresses
            if _prefix(a.address) not in routes
        ]
        return problems

    def _data_path(self, switch: Switch, port: Port) -> list[str]:
        problems = [
            f"program {direction} is not attached to {port.rep_name}"
            for direction in DIRECTIONS
            if not switch.attached(port.port_id, port.rep_ifindex, direction)
        ]
        number = int(port.port_id, 16)
        raw = switch.maps["pw_ports"].lookup(port.rep_ifindex.to_bytes(4, sys.byteorder))
        if raw is None or PwPort.unpack(raw).port_id != number:
            problems.append(f"map pw_ports has no entry of port {port.port_id}")
        for a in port.addresses:
            raw = switch.maps["pw_addrs"].lookup(values.address(a.address))
            if raw is None or PwTarget.unpack(raw).port_id != number:
                problems.append(f"map pw_addrs does not lead {a.address} to port {port.port_id}")
        if switch.maps["pw_counters"].lookup_percpu(values.port_key(port.port_id)) is None:
            problems.append(f"map pw_counters has no entry of port {port.port_id}")
        return problems + clones.lacks(switch, port)

    def _subnets(self, switch: Switch, port: Port) -> list[str]:
        network = self._store.get_network(port.network)
        if not network.masquerade or port.network not in switch.prepared:
            return []
        known = [n for n in self._store.networks() if n.name in switch.prepared]
        local, hidden = subnets(known, self._core.strays_in(switch))
        table = switch.nft.list_table("inet", nat.table_name(switch.instance))
        problems = nat.verify_subnets(switch.instance, local, hidden, table)
        return problems + nat.verify(switch.instance, (), (), table)

    # -- the host --------------------------------------------------------------------------------

    def policy_folder(self) -> list[str]:
        """Why what the watched folder says is not what is in force; [] if it is, or if there is none."""
        folder = self._core.policies.folder
        return [f"policy folder {folder.path}: {folder.error}"] if folder.error else []

    def host_endpoints(self) -> list[str]:
        """Why what policy says of the host's own interfaces is not what is in force; [] if it is."""
        hosts = self._core.policies.hosts
        return [hosts.error] if hosts is not None and hosts.error else []

    def impaired(self) -> list[str]:
        """Attached ports whose data path is broken: CNI's error 51. Bounded: the first ten."""
        problems: list[str] = []
        for port in self._store.ports(state=PortState.ATTACHED):
            switch = self._core.switch_of(port)
            if switch is None:
                continue
            problems += [f"port {port.port_id}: {p}" for p in self._data_path(switch, port)]
            if len(problems) >= 10:
                break
        return problems

    def leaks(self) -> list[Leak]:
        """Record, namespaces and kernel compared: what one has and another lacks."""
        core = self._core
        ports = list(self._store.ports())
        reps = {p.rep_name for p in ports}
        living = {switch.ref.cookie for switch in core.switches.values()}
        links: list[ObservedLink] = []
        routed: dict[str, str] = {}
        for switch in core.switches.values():
            names = {}
            for link in rtnl.links(switch.rtnl, stats=False):
                # Another daemon's representors have such names too; only ours are in our record.
                ours = next((n for n in (link.name, *link.altnames) if n in reps), "")
                names[link.index] = ours or link.name
                if ours:
                    links.append(ObservedLink(netns=switch.ref.cookie, name=ours, ifindex=link.index))
            known = {_prefix(a.address): a.address for p in ports for a in p.addresses}
            for route in rtnl.routes(switch.rtnl, table=254):
                if route.dst in known:
                    routed[known[route.dst]] = names.get(route.oif, "")
        for port in ports:
            if port.adopted and port.adopted.tap:  # a guest on the host itself
                living.add(port.sandbox.cookie)
                continue
            fd = core.sandbox_fd(port)
            if fd is not None:
                living.add(port.sandbox.cookie)
                os.close(fd)
        return find_leaks(
            ports,
            boot_id=core.boot_id,
            living=living,
            links=links,
            held=self._store.held_addresses(),
            routed=routed,
            pending={entry.port_id for entry in self._store.pending()},
        )


def _sandbox(fd: int, port: Port) -> list[str]:
    if port.model == tap.MODEL:  # which puts nothing there
        return []
    with NetlinkSocket(netns_fd=fd) as sock:
        link = rtnl.link_by_name(sock, port.ifname)
        if link is None:
            return [f"interface {port.ifname} is gone from the sandbox"]
        problems = [] if link.up else [f"interface {port.ifname} is down in the sandbox"]
        held = {a.address for a in rtnl.addresses(sock, link.index)}
        inner = port.adopted is not None and port.adopted.inner is not None  # the guest has them
        problems += [
            f"address {a.address} is gone from {port.ifname}"
            for a in port.addresses
            if a.address not in held and not inner
        ]
        routes = {r.dst for r in rtnl.routes(sock, oif=link.index)}
        problems += [f"route to {r.dst} is gone from the sandbox" for r in port.routes if r.dst not in routes]
        if port.tap:
            lacks = taps.lacks_macvtap if port.model == macvtap.MODEL else taps.lacks
            problems += lacks(sock, link, port.tap)
    return problems


def _prefix(address: str) -> str:
    return f"{address}/{128 if ':' in address else 32}"
