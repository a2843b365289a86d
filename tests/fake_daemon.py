"""A stand-in for the daemon behind a real server: a loop in a thread, and handlers with canned answers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from portwright.api import doctor as dm
from portwright.api import methods as m
from portwright.api import migrate as mm
from portwright.api import policy as pm
from portwright.api.registry import Registry
from portwright.api.request import Request
from portwright.api.server import Server
from portwright.model.errors import Conflict, NotFound
from portwright.model.network import AddressRange, Network
from portwright.model.port import Adopted, NetnsRef, Owner, Port, PortAddress, PortState

T = TypeVar("T")
PORT_ID = "0123456789abcdef"


class Loop:
    """An event loop that runs in a thread, so that blocking clients can be tested against it."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` in the loop and return its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def close(self) -> None:
        """Stop the loop and its thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


class Running:
    """A server that runs: ``server`` belongs to ``loop``."""

    def __init__(self, loop: Loop, server: Server, path: Path) -> None:
        self.loop, self.server, self.path = loop, server, path


@contextlib.contextmanager
def serving(path: Path, dispatch: Any, **options: Any) -> Iterator[Running]:
    """Serve ``dispatch`` at ``path`` while the block runs."""
    loop = Loop()
    try:

        async def start() -> Server:
            server = Server(path, dispatch, **options)
            await server.start()
            return server

        server = loop.run(start())
        try:
            yield Running(loop, server, path)
        finally:
            loop.run(server.close(0.5))
    finally:
        loop.close()


def make_port(port_id: str = PORT_ID, name: str = "web", **changes: Any) -> Port:
    """Return a port with plausible values."""
    port = Port(
        port_id=port_id,
        network="blue",
        net_id=1,
        owner=Owner(kind="name", name=name),
        model="veth",
        state=PortState.ATTACHED,
        ifname="eth0",
        rep_name="pw" + port_id[:8],
        mac="02:00:00:00:00:01",
        mtu=1500,
        host=NetnsRef(path="/proc/1/ns/net", cookie=1, boot_id="b"),
        sandbox=NetnsRef(path="/run/netns/s1", cookie=2, boot_id="b"),
        addresses=(
            PortAddress(address="10.1.0.2", gateway="169.254.1.1"),
            PortAddress(address="fd00:1::2", gateway="fe80::1"),
        ),
    )
    return msgspec.structs.replace(port, **changes)


BLUE = Network(
    name="blue",
    net_id=1,
    pools=((AddressRange(subnet="10.1.0.0/24"),), (AddressRange(subnet="fd00:1::/64"),)),
    masquerade=True,
)


_POLICIES = pm.PolicyState(
    files=("/etc/p/web.yaml",),
    policies=("NetworkPolicy shop/web",),
    tables={"sets": 1, "cells": 1200},
)
_CHANGES = pm.PolicyChanges(
    rows=(
        pm.PolicyChange(
            sources=("shop/a", "shop/b", "shop/c", "shop/d", "any other address"),
            targets=("shop/web",),
            services=("all but tcp 80",),
            families=(4, 6),
            allowed=False,
            before="no policy",
            after="ingress tier-default of default, by shop/web /etc/p/web.yaml:1",
            pairs=1005,
            more_from=1000,
        ),
    ),
    more_rows=2,
    more_pairs=4212,
    counted=False,
)


class FakeDaemon:
    """Handlers for the whole contract. ``calls`` records the parameters; answers are canned."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.namespaces: list[tuple[int, int]] = []  # (st_dev, st_ino) of descriptors that came
        self.stopping = asyncio.Event()

    def dispatch(self, request: Request) -> Any:
        """Serve a request."""
        return Registry(self, version="0.1.0").dispatch(request)

    def _note(self, params: Any, request: Request | None = None) -> None:
        self.calls.append(params)
        for fd in request.fds if request else ():
            found = os.fstat(fd)
            self.namespaces.append((found.st_dev, found.st_ino))

    async def node_status(self, params: m.NodeStatusParams, request: Request) -> m.NodeStatus:
        self._note(params)
        return m.NodeStatus(
            version="0.1.0",
            pid=os.getpid(),
            uptime_s=12.3,
            run_dir="/run/portwright",
            state_dir="/var/lib/portwright",
            ready=True,
            ports={"attached": 2, "detached": 1},
            networks=1,
            attach="tcx",
        )

    async def node_stop(self, params: m.NodeStopParams, request: Request) -> m.NodeStopping:
        self.stopping.set()
        return m.NodeStopping(pid=os.getpid())

    async def network_create(self, params: m.NetworkCreateParams, request: Request) -> Network:
        self._note(params)
        if params.name == "blue":
            raise Conflict("network", "blue", "it exists")
        pools = params.ranges or tuple((AddressRange(subnet=s),) for s in params.subnets)
        return Network(name=params.name, net_id=7, pools=pools, mtu=params.mtu, reach=params.reach)

    async def network_list(self, params: m.NetworkListParams, request: Request) -> list[Network]:
        return [BLUE, Network(name="red", net_id=2, mtu=9000, reach=("*",), isolation="strict")]

    async def network_show(self, params: m.NetworkShowParams, request: Request) -> m.NetworkView:
        if params.name != "blue":
            raise NotFound("network", params.name)
        usage = (m.PoolUsage(ranges="10.1.0.0/24", size=254, used=2, resting=1),)
        return m.NetworkView(network=BLUE, ports=2, usage=usage)

    async def network_delete(self, params: m.NetworkDeleteParams, request: Request) -> m.NetworkDeleted:
        self._note(params)
        return m.NetworkDeleted(name=params.name)

    async def port_create(self, params: m.PortCreateParams, request: Request) -> Port | m.Plan:
        self._note(params, request)
        if params.dry_run:
            return m.Plan(
                plan=(
                    m.Step(op="CreateVeth", command="ip link add pw01234567 type veth"),
                    m.Step(op="SetUp", command="ip link set pw01234567 up"),
                )
            )
        return make_port(
            name=params.name or "",
            labels=params.labels,
            port_mappings=params.port_mappings,
            limits=params.limits,
        )

    async def port_list(self, params: m.PortListParams, request: Request) -> list[Port]:
        self._note(params)
        pod = {"io.kubernetes.pod.namespace": "default", "io.kubernetes.pod.name": "api-0"}
        owner = Owner(kind="cni", network="blue", container_id="c" * 64, ifname="eth0")
        second = make_port(
            "fedcba9876543210", owner=owner, labels=pod, addresses=(), state=PortState.DETACHED
        )
        return [make_port(), second]

    async def port_show(self, params: m.PortShowParams, request: Request) -> Port:
        if params.port not in ("web", PORT_ID):
            raise NotFound("port", params.port)
        return make_port(labels={"tier": "front"})

    async def port_link(self, params: m.PortLinkParams, request: Request) -> m.PortLink:
        return m.PortLink(port_id=PORT_ID, rep="pw01234567", admin="up", link="down", opstate="attached")

    async def port_delete(self, params: m.PortDeleteParams, request: Request) -> m.PortDeleted:
        self._note(params)
        return m.PortDeleted(port_id=PORT_ID)

    async def port_set(self, params: m.PortSetParams, request: Request) -> Port:
        self._note(params)
        return make_port()

    async def port_plug(self, params: m.PortPlugParams, request: Request) -> Port:
        self._note(params, request)
        return make_port()

    async def port_migrate(self, params: mm.PortMigrateParams, request: Request) -> mm.Migrated:
        self._note(params)
        adopted = Adopted(link="veth12", bridge="docker0", bridge_mac="02:42:00:00:00:01")
        plan = (m.Step(op="LeaveBridge", command="ip link set pw01234567 nomaster"),)
        moved = mm.Moved(
            bridge="docker0",
            ports=(make_port(model="adopt", adopted=adopted),),
            removed=params.remove_bridge,
            plan=plan if params.dry_run else (),
        )
        return mm.Migrated(bridges=(moved,))

    async def port_unplug(self, params: m.PortUnplugParams, request: Request) -> Port:
        self._note(params)
        return make_port(state=PortState.DETACHED)

    async def stats(self, params: m.StatsParams, request: Request) -> list[m.PortStats]:
        def direction(packets: int) -> m.DirectionStats:
            return m.DirectionStats(
                total=m.Count(packets=packets, bytes=packets * 100), slow_path=m.Count(packets=1, bytes=100)
            )

        drops = m.DropTotals(from_port=3, to_port=0)
        return [
            m.PortStats(
                port_id=PORT_ID,
                rep="pw01234567",
                name="web",
                from_port=direction(10),
                to_port=direction(2000),
                drops=drops,
            )
        ]

    async def drops(self, params: m.DropsParams, request: Request) -> list[m.DropCount]:
        return [
            m.DropCount(
                port_id=PORT_ID,
                rep="pw01234567",
                direction="from_port",
                reason="spoof-ip",
                packets=3,
                bytes=294,
            )
        ]

    async def drops_follow(self, params: m.DropsFollowParams, request: Request) -> AsyncIterator[m.DropEvent]:
        for number in range(3):
            yield m.DropEvent(
                time=1700000000.5 + number,
                port_id=PORT_ID,
                rep="pw01234567",
                direction="from_port",
                reason="spoof-ip",
                rule="anti-spoof" if number else "",
                summary=f"10.9.9.{number} > 10.1.0.3 tcp 80",
                lost=number,
            )

    async def why(self, params: m.WhyParams, request: Request) -> m.Why:
        self._note(params)
        steps = (
            m.WhyStep(step="source", text="port web owns the address", detail="10.1.0.2"),
            m.WhyStep(step="deliver", text="redirected to its peer"),
        )
        return m.Why(verdict="allow", steps=steps, delivered_to="pwfedcba98", path="fast")

    async def policy_apply(self, params: pm.PolicyApplyParams, request: Request) -> pm.PolicyState:
        self._note(params)
        return msgspec.structs.replace(_POLICIES, changes=_CHANGES) if params.dry_run else _POLICIES

    async def policy_list(self, params: pm.PolicyListParams, request: Request) -> pm.PolicyState:
        return _POLICIES

    async def policy_delete(self, params: pm.PolicyDeleteParams, request: Request) -> pm.PolicyState:
        self._note(params)
        none = pm.PolicyChanges()
        return msgspec.structs.replace(_POLICIES, changes=none) if params.dry_run else _POLICIES

    async def policy_staged(
        self, params: pm.PolicyStagedParams, request: Request
    ) -> tuple[pm.StagedPolicy, ...]:
        self._note(params)
        return (
            pm.StagedPolicy(
                policy="StagedNetworkPolicy shop/web",
                where="/etc/p/web.yaml:1",
                action="Set",
                effect="adds CalicoNetworkPolicy shop/web",
                changes=_CHANGES,
            ),
            pm.StagedPolicy(
                policy="StagedGlobalNetworkPolicy big",
                where="/etc/p/web.yaml:9",
                action="Delete",
                effect="deletes GlobalNetworkPolicy big",
                changes=pm.PolicyChanges(),
                refused="too large",
            ),
        )

    async def doctor(self, params: dm.DoctorParams, request: Request) -> dm.Diagnosis:
        return dm.Diagnosis(
            checks=(
                dm.Check(name="kernel", ok=True, detail="6.18"),
                dm.Check(name="forwarding", ok=False, level="warning", detail="off", way_out="sysctl -w x=1"),
            ),
            features=(
                dm.Feature(name="tcx", present=True),
                dm.Feature(name="netkit", present=False, detail="6.7"),
            ),
        )
