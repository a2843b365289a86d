"""An attachment: a request as the port that it asks for, and the port that it got as CNI's result."""

from __future__ import annotations

from portwright.attach import tap, veth
from portwright.cni import config
from portwright.cni.request import CniRequest
from portwright.cni.result import Result, ResultInterface, ResultIp, merge_with_prev
from portwright.model.network import GATEWAY_MAC, Dns, Network
from portwright.model.port import Port, PortAddress
from portwright.node.draft import PortSpec, gateway_of


def spec_of(request: CniRequest, network: Network, foreign: Result | None) -> PortSpec:
    """The port that an ADD asks for. ``foreign``: the answer of another IPAM plugin, if one was asked."""
    conf = request.config
    wish = conf.requested
    given: tuple[PortAddress, ...] | None = None
    routes = network.routes if conf.ipam is None and not conf.routes else conf.all_routes
    ipam_dns = Dns()
    if foreign is not None:
        given = tuple(
            PortAddress(
                address=ip.address.partition("/")[0],
                gateway=ip.gateway or gateway_of(ip.address.partition("/")[0], ()),
            )
            for ip in foreign.ips
        )
        routes = conf.routes + foreign.routes
        ipam_dns = foreign.dns
    pools = wish.ip_ranges + network.pools if wish.ip_ranges else None
    return PortSpec(
        network=network,
        owner=request.owner(),
        ifname=request.ifname,
        netns=request.netns,
        model=conf.model,
        attach=conf.attach,
        queues=conf.queues,
        join=conf.join,
        inner_addresses=conf.inner_addresses,
        mac=wish.mac,
        mtu=conf.mtu,
        pools=pools,
        requested=wish.ips if given is None else (),
        given=given,
        routes=routes,
        dns=conf.resolve_dns(ipam_dns if foreign is not None else network.dns),
        port_mappings=wish.port_mappings,
        limits=wish.limits,
        labels=wish.labels,
        ipam=conf.ipam.type if conf.ipam is not None else config.BUILTIN_IPAM,
        cni=request.to_record() if foreign is not None else {},
    )


def result_of(request: CniRequest, port: Port) -> Result:
    """Interfaces: the representor, the device, a tap's two; behind a previous plugin's, never between."""
    interfaces = [ResultInterface(name=port.rep_name, mac=GATEWAY_MAC, mtu=port.mtu, sandbox="")]
    if port.model != tap.MODEL:
        interfaces.append(
            ResultInterface(name=port.ifname, mac=port.mac, mtu=port.mtu, sandbox=request.netns)
        )
        if port.tap:
            interfaces.append(ResultInterface(name=port.tap, mtu=port.mtu, sandbox=request.netns))
    if port.tap:
        # As tc-redirect-tap answers: the guest's card, of the tap's name and "in" the container.
        card = ResultInterface(name=port.tap, mac=port.mac, mtu=port.mtu, sandbox=request.container_id)
        interfaces.append(card)
    holder = len(interfaces) - 1
    own = Result(
        interfaces=tuple(interfaces),
        ips=tuple(
            ResultIp(address=veth.host_prefix(a.address), gateway=a.gateway, interface=holder)
            for a in port.addresses
        ),
        routes=port.routes,
        dns=port.dns,
    )
    return merge_with_prev(request.config.prev_result, own)
