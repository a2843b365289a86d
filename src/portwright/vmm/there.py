"""``portwright vm run --netns``: a guest on the ports of a namespace that a container runtime made.

Namespace and ports are the runtime's and stay. What the guest's NICs are set to is read from the devices in
the namespace, so that whatever was done there after us is true in the guest too.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import msgspec

from portwright.api.client import Client
from portwright.api.paths import NetnsSpec, netns_path, open_netns
from portwright.kernel import netns, rtnl
from portwright.kernel.netlink import NetlinkSocket
from portwright.model.errors import InvalidInput, NotFound
from portwright.model.port import Port, PortState
from portwright.vmm.cards import home_of, nic_of
from portwright.vmm.cmdline import network_words
from portwright.vmm.contract import NicFacts, Started, facts_of
from portwright.vmm.driver import Console, End
from portwright.vmm.inspect import read
from portwright.vmm.layer3 import Layer3
from portwright.vmm.qemu import Guest, prepare
from portwright.vmm.run import boot, chosen
from portwright.vmm.spec import GuestSpec
from portwright.vmm.vhost import Vhost
from portwright.vmm.vhost import choose as choose_vhost


def run_there(
    client: Client,
    spec: GuestSpec,
    where: NetnsSpec,
    console: Console,
    *,
    vhost: Vhost = "auto",
    patience: float,
    started: Callable[[Started], None],
) -> End:
    """Run the guest on every port with a tap in the namespace ``where``, until it ends; how.

    As :func:`portwright.vmm.run.run`, but that nothing is made, and so nothing is left to be taken away, and
    that it has no control socket. Raises InvalidInput where there is no such port, and as :func:`read` does.
    """
    prepare(spec)
    spec, fall_back = chosen(spec)
    carried = choose_vhost(vhost)
    with contextlib.ExitStack() as stack:
        namespace = open_netns(where)
        stack.callback(os.close, namespace)
        ports = _ports(client, namespace, netns_path(where))
        inside = [port.ifname for port in ports if port.model != "tap"]
        found = read(namespace, inside)
        direct = network_words([port for port in ports if port.model == "tap"])
        words = [
            *(f"portwright.nic={port.ifname},{port.mac},{port.mtu}" for port in ports if port.model != "tap"),
            *found.words(),
            *direct,
            f"portwright.host={spec.name}",
            spec.append,
        ]
        nics = tuple(nic_of(port, vhost=carried) for port in ports)
        whole = replace(spec, append=" ".join(words).strip(), nics=nics)
        devices = home_of(nics[0], namespace)
        stack.callback(os.close, devices)

        @contextlib.asynccontextmanager
        async def served(guest: Guest) -> AsyncIterator[None]:
            facts = Started(
                name=spec.name,
                pid=guest.pid,
                accel=guest.spec.accel,
                nics=tuple(_facts(port, found) for port in ports),
                model=" ".join(dict.fromkeys(port.model for port in ports)),
                vhost=carried,
            )
            started(facts)
            yield

        return boot(whole, namespace, devices, console, served, patience=patience, fall_back=fall_back)


def _ports(client: Client, namespace: int, path: str) -> list[Port]:
    """The attached ports with a tap in the namespace, the oldest first, which is eth0 as a rule."""
    if not netns.is_netns(namespace):
        raise InvalidInput("netns", path, "is not a network namespace")
    cookie, boot_id = netns.cookie(namespace), netns.boot_id()
    there = [
        port
        for port in client.port_list()
        if (port.sandbox.cookie, port.sandbox.boot_id) == (cookie, boot_id)
        and port.state is PortState.ATTACHED
        and port.tap
    ]
    if not there:
        why = "has no port with a tap; attach with model tcfilter first (docs/cni.md), or leave --netns out"
        raise InvalidInput("netns", path, why)
    for port in there:
        if port.inner_addresses:  # its addresses are not the guest's, which was frozen with others
            raise InvalidInput("netns", path, f"port {port.port_id} is for a restored guest")
    with NetlinkSocket(netns_fd=namespace) as sock:
        return [_as_it_is(sock, port) for port in there]


def _as_it_is(sock: NetlinkSocket, port: Port) -> Port:
    """A port with the MAC and the MTU that another plugin's device has now; the guard knows those of ours."""
    if port.rep_name:
        return port
    device, tap = (rtnl.link_by_name(sock, name) for name in (port.ifname, port.tap))
    if device is None or tap is None:
        raise NotFound("device", f"{port.ifname if device is None else port.tap} in {port.sandbox.path}")
    return msgspec.structs.replace(port, mac=device.mac, mtu=min(device.mtu, tap.mtu))


def _facts(port: Port, found: Layer3) -> NicFacts:
    """As of any port; the addresses of another plugin's device are those that it has."""
    facts = facts_of(port)
    if facts.addresses:
        return facts
    mine = tuple(a.text.partition("/")[0] for a in found.addresses if a.device == port.ifname)
    return msgspec.structs.replace(facts, addresses=mine)
