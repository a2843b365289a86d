"""The socket's methods on the node's services: each translates parameters and results."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Literal, cast

import msgspec

from portwright.api import doctor as dm
from portwright.api import methods as m
from portwright.api import migrate as mm
from portwright.api import policy as pm
from portwright.api.request import Request
from portwright.daemon import given
from portwright.daemon.migrate import migrate
from portwright.daemon.policy import judged_state, policy_state, staged_policies
from portwright.daemon.why import Explainer
from portwright.dataplane.abi import PwCounter
from portwright.ipam import canonical_pools
from portwright.model.errors import NotSupported
from portwright.model.network import AddressRange, Network
from portwright.model.port import Owner, Port, PortState
from portwright.node import doctor, ends
from portwright.node.chain import Chain
from portwright.node.changes import Changes
from portwright.node.core import Core
from portwright.node.draft import PortSpec
from portwright.node.drops import DropFeed
from portwright.node.follow import Follower
from portwright.node.health import Health
from portwright.node.migrate import Migration
from portwright.node.networks import Networks
from portwright.node.ports import Ports
from portwright.node.switch import attach_mode
from portwright.observe import counters

VERSION = "0.1.0"


class Methods:
    """One coroutine a method of the contract."""

    def __init__(
        self,
        *,
        core: Core,
        ports: Ports,
        changes: Changes,
        networks: Networks,
        health: Health,
        chained: Chain,
        feed: DropFeed,
        follower: Follower | None,
        stop: Callable[[], None],
        changed: Callable[[], None],
    ) -> None:
        self._core = core
        self._store = core.store
        self._ports = ports
        self._changes = changes
        self._networks = networks
        self._health = health
        self._chain = chained
        self._feed = feed
        self._follower = follower
        self._stop = stop
        self._changed = changed
        self._explainer = Explainer(core)
        self.ready = False
        self.problems: list[str] = []

    # -- node ------------------------------------------------------------------------------------

    async def node_status(self, _params: m.NodeStatusParams, _request: Request) -> m.NodeStatus:
        """What runs, and what is wrong with it; ``ready`` is false while anything is."""
        states: dict[str, int] = {}
        for port in self._store.ports():
            states[port.state.value] = states.get(port.state.value, 0) + 1
        problems = [*self.problems, *self._health.host_endpoints(), *self._health.impaired()]
        return m.NodeStatus(
            version=VERSION,
            pid=os.getpid(),
            uptime_s=round(time.time() - self._core.started, 3),
            run_dir=str(self._core.paths.run_dir),
            state_dir=str(self._core.paths.state_dir),
            ready=self.ready and not problems,
            ports=states,
            networks=len(self._store.networks()),
            attach=attach_mode(),
            problems=tuple(problems),
            alarms=(*self._core.alarms, *self._health.policy_folder()),
            node_name=self._core.node_name,
        )

    async def node_stop(self, _params: m.NodeStopParams, _request: Request) -> m.NodeStopping:
        """Answers, then ends the process; the data path stays in force while there are ports."""
        self._stop()
        return m.NodeStopping(pid=os.getpid())

    # -- network ---------------------------------------------------------------------------------

    async def network_create(self, params: m.NetworkCreateParams, _request: Request) -> Network:
        """``subnets`` are range sets of one whole subnet each. Raises Conflict, InvalidInput."""
        pools = (*params.ranges, *((AddressRange(subnet=s),) for s in params.subnets))
        canonical_pools(pools, field="ranges")
        return self._networks.create(
            params.name,
            pools=pools,
            mtu=params.mtu,
            masquerade=params.masquerade,
            reach=params.reach,
            isolation=params.isolation,
            routes=params.routes,
            dns=params.dns,
            reserved=params.reserved,
        )

    async def network_list(self, _params: m.NetworkListParams, _request: Request) -> tuple[Network, ...]:
        """By name."""
        return tuple(sorted(self._store.networks(), key=lambda n: n.name))

    async def network_show(self, params: m.NetworkShowParams, _request: Request) -> m.NetworkView:
        """One network with the usage of each range set; raises NotFound."""
        network = self._store.get_network(params.name)
        usage = tuple(
            m.PoolUsage(
                ranges=", ".join(r.subnet for r in pool), size=u.total, used=u.used, resting=u.resting
            )
            for pool, u in zip(
                network.pools, self._store.usage_by_set(params.name, now=time.time()), strict=True
            )
        )
        return m.NetworkView(network=network, ports=self._store.port_count(params.name), usage=usage)

    async def network_delete(self, params: m.NetworkDeleteParams, _request: Request) -> m.NetworkDeleted:
        """Raises NotFound, and Conflict while it has ports."""
        self._networks.delete(params.name)
        return m.NetworkDeleted(name=params.name)

    # -- policy ----------------------------------------------------------------------------------

    async def policy_apply(self, params: pm.PolicyApplyParams, _request: Request) -> pm.PolicyState:
        """Raises InvalidInput, PolicyTooLarge; then nothing has changed."""
        files = [(f.name, f.text) for f in params.files]
        applied = self._core.policies.apply(files, dry_run=params.dry_run)
        self._nudge_follower(params.dry_run)
        return await judged_state(applied)

    async def policy_list(self, _params: pm.PolicyListParams, _request: Request) -> pm.PolicyState:
        """What is in force."""
        folder = self._core.policies.folder
        state = policy_state(self._core.policies.current())
        hosts = self._core.policies.host_endpoints()
        return msgspec.structs.replace(state, folder=folder.path, behind=folder.error, hosts=hosts)

    async def policy_delete(self, params: pm.PolicyDeleteParams, _request: Request) -> pm.PolicyState:
        """Raises NotFound."""
        left = self._core.policies.delete(params.files, dry_run=params.dry_run)
        self._nudge_follower(params.dry_run)
        return await judged_state(left)

    async def policy_staged(
        self, params: pm.PolicyStagedParams, _request: Request
    ) -> tuple[pm.StagedPolicy, ...]:
        """Raises NotFound, InvalidInput."""
        return await staged_policies(*self._core.policies.staged(params.names))

    def _nudge_follower(self, dry_run: bool = False) -> None:
        if self._follower is not None and not dry_run:
            self._follower.nudge()

    # -- port ------------------------------------------------------------------------------------

    async def port_create(self, params: m.PortCreateParams, request: Request) -> Port | m.Plan:
        """The port once it passes packets, or with ``dry_run`` the commands that would make it."""
        spec = PortSpec(
            network=self._store.get_network(params.network),
            owner=Owner(kind="name", name=params.name or f"{params.netns}/{params.ifname}"),
            ifname=params.ifname,
            netns=params.netns,
            mac=given.mac(params.mac),
            mtu=params.mtu,
            attach=params.attach or "",
            model=params.model,
            queues=params.queues,
            join=params.join or "",
            inner_addresses=params.inner_addresses,
            requested=tuple(given.address(ip) for ip in params.ips),
            routes=self._store.get_network(params.network).routes,
            dns=self._store.get_network(params.network).dns,
            port_mappings=params.port_mappings,
            limits=params.limits,
            labels=params.labels,
        )
        if params.dry_run:
            plan = self._ports.dry_run(spec, request.fds[0])
            return m.Plan(plan=tuple(m.Step(op=type(o).__name__, command=o.render()) for o in plan))
        port = self._ports.create(spec, request.fds[0])
        self._changed()
        return port

    async def port_list(self, params: m.PortListParams, _request: Request) -> tuple[Port, ...]:
        """Oldest first, chained taps among them; ``label`` is ``key`` or ``key=value``."""
        found: Iterable[Port] = (
            *self._store.ports(params.network, params.state),
            *(
                one.port
                for one in self._store.chained()
                if params.network in (None, one.port.network) and params.state in (None, one.port.state)
            ),
        )
        if params.label is not None:
            key, equals, value = params.label.partition("=")
            found = (
                p for p in found if key in p.labels and (not equals or p.labels[key] == value)
            )  # fmt: skip
        return tuple(sorted(found, key=lambda p: p.created))

    async def port_show(self, params: m.PortShowParams, _request: Request) -> Port:
        """The record, by id, name or representor; raises NotFound, or Conflict where several fit."""
        one = self._store.find_chained(params.port)
        return one.port if one is not None else self._store.find_port(params.port)

    def _held(self, text: str) -> Port:
        """The port that is meant. Raises NotFound, Conflict; NotSupported for a tap of another's device."""
        if (one := self._store.find_chained(text)) is not None:
            way_out = "nothing of ours holds it; attach with model tcfilter alone, and the port has it"
            raise NotSupported(f"{one.port.tap}, on another plugin's device,", "this", way_out)
        return self._store.find_port(text)

    async def port_link(self, params: m.PortLinkParams, _request: Request) -> m.PortLink:
        """The three states of R9, each of its own: what we want, what the kernel sees, what is recorded."""
        port = self._held(params.port)
        link = self._health.link(port)
        return m.PortLink(
            port_id=port.port_id,
            rep=port.rep_name,
            admin="down" if port.admin == "down" else "up",
            link="up" if link else "down",
            opstate="attached" if port.state is PortState.ATTACHED else "detached",
            ends=ends.of(self._core, port),
        )

    async def port_delete(self, params: m.PortDeleteParams, _request: Request) -> m.PortDeleted:
        """Once it answers nothing of the port is left but its resting addresses. Raises NotFound."""
        if (one := self._store.find_chained(params.port)) is not None:
            self._chain.delete(one)
            return m.PortDeleted(port_id=one.port.port_id)
        port = self._store.find_port(params.port)
        self._ports.delete(port)
        self._changed()
        return m.PortDeleted(port_id=port.port_id)

    async def port_set(self, params: m.PortSetParams, _request: Request) -> Port:
        """Changes what is given and leaves the rest; a label of None is removed."""
        port = self._held(params.port)
        limits = None
        if params.limits is not None:
            limits = given.limits(port.limits, params.limits)
        labels = None
        if params.labels is not None:
            merged = {**port.labels, **params.labels}
            labels = {k: v for k, v in merged.items() if v is not None}
        return self._changes.set(port, admin=params.admin, limits=limits, mtu=params.mtu, labels=labels)

    async def port_plug(self, params: m.PortPlugParams, request: Request) -> Port:
        """A new device for a detached port, in the namespace of the request's descriptor."""
        port = self._held(params.port)
        plugged = self._ports.plug(port, request.fds[0], params.netns, params.ifname)
        self._changed()
        return plugged

    async def port_unplug(self, params: m.PortUnplugParams, _request: Request) -> Port:
        """Takes the device away; addresses, limits and counters stay."""
        return self._ports.unplug(self._held(params.port))

    async def port_migrate(self, params: mm.PortMigrateParams, _request: Request) -> mm.Migrated:
        """Off their bridges, while they run; or how, with ``dry_run``."""
        done = migrate(Migration(self._core), params)
        self._changed()
        return done

    # -- what it carried -------------------------------------------------------------------------

    async def stats(self, params: m.StatsParams, _request: Request) -> tuple[m.PortStats, ...]:
        """Totals since a port was made, over all its devices; oldest port first, or the one named."""
        ports = self._chosen(params.port)
        dropped: dict[tuple[str, str], int] = {}
        for port, direction, _, count in self._drop_counters(ports):
            key = (port.port_id, direction)
            dropped[key] = dropped.get(key, 0) + count.packets
        return tuple(self._port_stats(p, dropped) for p in ports)

    def _port_stats(self, port: Port, dropped: dict[tuple[str, str], int]) -> m.PortStats:
        switch = self._core.switch_of(port) or self._core.switch_for()
        c = counters.totals(switch.maps, port)

        def side(packets: int, octets: int, slow_packets: int, slow_octets: int) -> m.DirectionStats:
            return m.DirectionStats(
                total=m.Count(packets=packets, bytes=octets),
                slow_path=m.Count(packets=slow_packets, bytes=slow_octets),
            )

        return m.PortStats(
            port_id=port.port_id,
            rep=port.rep_name,
            name=port.owner.name or port.owner.container_id,
            from_port=side(
                c.from_total_packets, c.from_total_octets, c.from_slow_packets, c.from_slow_octets
            ),
            to_port=side(c.to_total_packets, c.to_total_octets, c.to_slow_packets, c.to_slow_octets),
            drops=m.DropTotals(
                from_port=dropped.get((port.port_id, "from_port"), 0),
                to_port=dropped.get((port.port_id, "to_port"), 0),
            ),
        )

    def _chosen(self, name: str | None) -> list[Port]:
        if name is not None:
            return [self._held(name)]
        return sorted(self._store.ports(), key=lambda p: p.created)

    def _drop_counters(self, ports: list[Port]) -> Iterator[tuple[Port, str, str, PwCounter]]:
        for switch in list(self._core.switches.values()):
            yield from counters.drops(switch.maps, ports)

    async def drops(self, params: m.DropsParams, _request: Request) -> tuple[m.DropCount, ...]:
        """One count for each port, direction and reason that has any; and of host endpoints for each rule."""
        of_ports = (
            m.DropCount(
                port_id=port.port_id,
                rep=port.rep_name,
                direction=cast("m.Direction", direction),
                reason=reason,
                packets=count.packets,
                bytes=count.octets,
            )
            for port, direction, reason, count in self._drop_counters(self._chosen(params.port))
        )
        hosts = self._core.policies.hosts if params.port is None else None
        of_hosts = (
            m.DropCount(
                port_id=f"host:{','.join(drop.interfaces)}",
                rep=drop.site.endpoint,
                direction=drop.site.direction.value,
                reason=f"host-{drop.site.stage}",
                rule=drop.site.rule,
                packets=drop.packets,
                bytes=drop.octets,
            )
            for drop in (hosts.drops() if hosts is not None else ())
        )
        return (*of_ports, *of_hosts)

    async def drops_follow(
        self, params: m.DropsFollowParams, _request: Request
    ) -> AsyncIterator[m.DropEvent]:
        """Drops as they happen, until the caller goes; ``lost`` counts those left out before each."""
        port_id = self._store.find_port(params.port).port_id if params.port else None
        async for drop in self._feed.follow(port_id, logged=params.logged):
            yield m.DropEvent(
                time=drop.time,
                port_id=drop.port_id,
                rep=drop.endpoint or "pw" + drop.port_id[:8],
                direction=cast('m.Direction | Literal["ingress", "egress"]', drop.direction),
                reason=drop.reason,
                rule=drop.rule,
                summary=drop.summary,
                lost=drop.lost,
            )

    # -- why and doctor --------------------------------------------------------------------------

    async def why(self, params: m.WhyParams, _request: Request) -> m.Why:
        """What the data path would do to a packet, step by step; none is sent. Raises as Explainer.why."""
        return self._explainer.why(params)

    async def doctor(self, _params: dm.DoctorParams, _request: Request) -> dm.Diagnosis:
        """Every check of this host, the passed ones too, each failed one with a way out."""
        checks = tuple(
            dm.Check(name=f.name, ok=f.ok, level=f.level, detail=f.detail, way_out="" if f.ok else f.way_out)
            for f in doctor.examine(self._core, self._health)
        )
        found = tuple(
            dm.Feature(
                name=f.name, present=bool(f.supported), detail=f.detail or f"needs {f.need}, have {f.have}"
            )
            for f in doctor.probed()
        )
        return dm.Diagnosis(checks=checks, features=found)
