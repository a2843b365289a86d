"""The calls of the client: one function per method, giving a value that says what to send.

Pure. :class:`portwright.Client` and :class:`portwright.AsyncClient` have the same methods, made
from these: the sync ones return the result, the async ones have to be awaited, and streams are
iterated. Their docstrings and types are those here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, ParamSpec, TypeVar

import msgspec

from portwright.api import doctor as dm
from portwright.api import methods as m
from portwright.api import migrate as mm
from portwright.api import policy as pm
from portwright.api.paths import NetnsSpec, netns_path
from portwright.api.registry import IntrospectParams, Params
from portwright.model.network import AddressRange, Dns, Isolation, Network, Route
from portwright.model.port import Limits, Port, PortMapping, PortState

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Call(Generic[R]):
    """A method, its parameters, the type of its result (or of its events), the namespaces to pass."""

    method: str
    params: Params[Any]
    result: type[R]
    netns: tuple[NetnsSpec, ...] = ()


class Built(Generic[P, R]):
    """Base of the descriptors that make a client's method from a function of this module."""

    def __init__(self, build: Callable[P, Call[R]]) -> None:
        self._build = build
        self.__doc__ = build.__doc__
        self.__wrapped__ = build


def introspect() -> Call[dict[str, object]]:
    """Describe the protocol: every method with its parameters and results as JSON schemas."""
    return Call("introspect", IntrospectParams(), dict[str, object])


def node_status() -> Call[m.NodeStatus]:
    """Say how the daemon is."""
    return Call("node.status", m.NodeStatusParams(), m.NodeStatus)


def node_stop() -> Call[m.NodeStopping]:
    """Ask the daemon to stop. Traffic and policy of the ports stay. Returns before it has ended."""
    return Call("node.stop", m.NodeStopParams(), m.NodeStopping)


def network_create(
    name: str,
    *,
    subnets: Sequence[str] = (),
    ranges: Sequence[Sequence[AddressRange]] = (),
    mtu: int | None = None,
    masquerade: bool = False,
    reach: Sequence[str] = (),
    isolation: Isolation = "open",
    routes: Sequence[Route] = (),
    dns: Dns | None = None,
    reserved: Sequence[str] = (),
) -> Call[Network]:
    """Create a network. ``subnets``: CIDRs, each a range set of its own; ``ranges``: whole range sets.

    Raises InvalidInput, Conflict.
    """
    params = m.NetworkCreateParams(
        name=name,
        subnets=tuple(subnets),
        ranges=tuple(tuple(each) for each in ranges),
        mtu=mtu,
        masquerade=masquerade,
        reach=tuple(reach),
        isolation=isolation,
        routes=tuple(routes),
        dns=dns or Dns(),
        reserved=tuple(reserved),
    )
    return Call("network.create", params, Network)


def network_list() -> Call[tuple[Network, ...]]:
    """Return the networks, by name."""
    return Call("network.list", m.NetworkListParams(), tuple[Network, ...])


def network_show(name: str) -> Call[m.NetworkView]:
    """Return one network and how much of it is in use. Raises NotFound."""
    return Call("network.show", m.NetworkShowParams(name=name), m.NetworkView)


def network_delete(name: str) -> Call[m.NetworkDeleted]:
    """Delete a network. Raises NotFound; Conflict while a port is on it."""
    return Call("network.delete", m.NetworkDeleteParams(name=name), m.NetworkDeleted)


def port_create(
    network: str,
    netns: NetnsSpec,
    *,
    ifname: str = "eth0",
    name: str | None = None,
    mac: str | None = None,
    ips: Sequence[str] = (),
    labels: Mapping[str, str] | None = None,
    port_mappings: Sequence[PortMapping] = (),
    limits: Limits | None = None,
    mtu: int | None = None,
    attach: Literal["clsact", "tcx"] | None = None,
    model: str = "veth",
    queues: int = 1,
    join: Literal["bpf", "peer", "mirred"] | None = None,
    inner_addresses: Sequence[str] = (),
) -> Call[Port]:
    """Create a port with its device in a sandbox.

    ``netns``: a path, a name in /run/netns, ``pid:N`` or an open descriptor (which stays yours). ``model``:
    ``tcfilter`` and ``macvtap`` make a tap too (``Port.tap``, with ``queues``), joined with the device or on
    it, for a hypervisor; of ``tap`` it is the port's host end, and nothing is put into the sandbox.
    ``join``: what joins a tcfilter's, ``bpf`` unless said, ``peer`` past the device's egress, or ``mirred``.
    ``inner_addresses``: its guest is one of many with the same ``mac`` and these, of each family one.
    Raises InvalidInput, NotFound (the network), Conflict, PoolExhausted, NotSupported.
    """
    params = m.PortCreateParams(
        network=network,
        netns=netns_path(netns),
        ifname=ifname,
        name=name,
        mac=mac,
        ips=tuple(ips),
        labels=dict(labels or {}),
        port_mappings=tuple(port_mappings),
        limits=limits or Limits(),
        mtu=mtu,
        attach=attach,
        model=model,
        queues=queues,
        join=join,
        inner_addresses=tuple(inner_addresses),
    )
    return Call("port.create", params, Port, (netns,))


def _planned(create: Callable[P, Call[Port]]) -> Callable[P, Call[m.Plan]]:
    """The same call with the same parameters, as a dry run."""

    @functools.wraps(create)
    def port_plan(*args: P.args, **kwargs: P.kwargs) -> Call[m.Plan]:
        call = create(*args, **kwargs)
        return Call(call.method, msgspec.structs.replace(call.params, dry_run=True), m.Plan, call.netns)

    port_plan.__name__ = port_plan.__qualname__ = "port_plan"
    port_plan.__doc__ = (
        "Return what :func:`port_create` would do, as commands. Nothing is changed. Raises the same."
    )
    return port_plan


port_plan = _planned(port_create)


def port_list(
    *, network: str | None = None, state: PortState | str | None = None, label: str | None = None
) -> Call[tuple[Port, ...]]:
    """Return ports, oldest first, that meet every condition. ``label``: ``key`` or ``key=value``.

    Raises InvalidInput for a state that is none.
    """
    params = m.PortListParams(network=network, state=state, label=label)  # type: ignore[arg-type]  # the daemon checks
    return Call("port.list", params, tuple[Port, ...])


def port_show(port: str) -> Call[Port]:
    """Return one port, by port_id, unique prefix of one, name or representor. Raises NotFound, Conflict."""
    return Call("port.show", m.PortShowParams(port=port), Port)


def port_link(port: str) -> Call[m.PortLink]:
    """Return how a port's link stands, and its ends if it has a tap. Raises NotFound, Conflict."""
    return Call("port.link", m.PortLinkParams(port=port), m.PortLink)


def port_delete(port: str) -> Call[m.PortDeleted]:
    """Delete a port, whether its device is there or not. Raises NotFound, Conflict."""
    return Call("port.delete", m.PortDeleteParams(port=port), m.PortDeleted)


def port_set(
    port: str,
    *,
    admin: Literal["up", "down"] | None = None,
    limits: m.LimitsChange | None = None,
    mtu: int | None = None,
    labels: Mapping[str, str | None] | None = None,
) -> Call[Port]:
    """Change what is not None. ``labels`` are merged; a value of None removes the key.

    Raises NotFound, InvalidInput, NotSupported.
    """
    changed = dict(labels) if labels is not None else None
    params = m.PortSetParams(port=port, admin=admin, limits=limits, mtu=mtu, labels=changed)
    return Call("port.set", params, Port)


def port_plug(port: str, netns: NetnsSpec, *, ifname: str | None = None) -> Call[Port]:
    """Give a detached port a device in a sandbox; ``netns`` as for :func:`port_create`.

    Raises NotFound, PortStateError, Conflict.
    """
    params = m.PortPlugParams(port=port, netns=netns_path(netns), ifname=ifname)
    return Call("port.plug", params, Port, (netns,))


def port_unplug(port: str) -> Call[Port]:
    """Take a port's device out of its sandbox. The port stays, detached. Raises NotFound, PortStateError."""
    return Call("port.unplug", m.PortUnplugParams(port=port), Port)


def port_migrate(
    bridge: str | None = None,
    *,
    network: str | None = None,
    addresses: Mapping[str, Sequence[str]] | None = None,
    remove_bridge: bool = False,
    forwarding_accepted: bool = False,
    dry_run: bool = False,
) -> Call[mm.Migrated]:
    """Move the sandboxes of a bridge, or of all, off it while they run; ``dry_run``: say how.

    ``addresses``: more of a sandbox's, by its MAC. Raises NotFound, InvalidInput, Conflict, NotSupported; a
    bridge that can't be left altogether stays as it is.
    """
    params = mm.PortMigrateParams(
        bridge=bridge,
        network=network,
        addresses={mac: tuple(each) for mac, each in (addresses or {}).items()},
        remove_bridge=remove_bridge,
        forwarding_accepted=forwarding_accepted,
        dry_run=dry_run,
    )
    return Call("port.migrate", params, mm.Migrated)


def stats(port: str | None = None) -> Call[tuple[m.PortStats, ...]]:
    """Return the counters of every port, or of one. Raises NotFound."""
    return Call("stats", m.StatsParams(port=port), tuple[m.PortStats, ...])


def drops(port: str | None = None) -> Call[tuple[m.DropCount, ...]]:
    """Return the drop counters that are not zero, of every port or of one. Raises NotFound."""
    return Call("drops", m.DropsParams(port=port), tuple[m.DropCount, ...])


def drops_follow(port: str | None = None, *, logged: bool = False) -> Call[m.DropEvent]:
    """Iterate over dropped packets as they happen, on a connection of its own. Raises NotFound, Busy."""
    return Call("drops.follow", m.DropsFollowParams(port=port, logged=logged), m.DropEvent)


def why(
    src: str,
    dst: str,
    *,
    proto: Literal["tcp", "udp", "sctp", "icmp"] = "tcp",
    sport: int | None = None,
    dport: int | None = None,
    family: Literal[4, 6] | None = None,
) -> Call[m.Why]:
    """Explain what happens to a packet from ``src`` to ``dst``: ports, addresses or ``host``.

    Raises NotFound, InvalidInput.
    """
    params = m.WhyParams(src=src, dst=dst, proto=proto, sport=sport, dport=dport, family=family)
    return Call("why", params, m.Why)


def doctor() -> Call[dm.Diagnosis]:
    """Check the host, the kernel and the daemon's own state."""
    return Call("doctor", dm.DoctorParams(), dm.Diagnosis)


def policy_apply(files: Sequence[tuple[str, str]], *, dry_run: bool = False) -> Call[pm.PolicyState]:
    """Put manifest files (name, text) in force with those that are. Raises InvalidInput, PolicyTooLarge."""
    sent = tuple(pm.PolicyFile(name=name, text=text) for name, text in files)
    return Call("policy.apply", pm.PolicyApplyParams(files=sent, dry_run=dry_run), pm.PolicyState)


def policy_list() -> Call[pm.PolicyState]:
    """Say which policies are in force."""
    return Call("policy.list", pm.PolicyListParams(), pm.PolicyState)


def policy_delete(files: Sequence[str], *, dry_run: bool = False) -> Call[pm.PolicyState]:
    """Take manifest files away, by the names they were applied under. Raises NotFound."""
    params = pm.PolicyDeleteParams(files=tuple(files), dry_run=dry_run)
    return Call("policy.delete", params, pm.PolicyState)


def policy_staged(names: Sequence[str] = ()) -> Call[tuple[pm.StagedPolicy, ...]]:
    """Say what staged policies would change, those of these names or all. Raises NotFound, InvalidInput."""
    params = pm.PolicyStagedParams(names=tuple(names))
    return Call("policy.staged", params, tuple[pm.StagedPolicy, ...])
