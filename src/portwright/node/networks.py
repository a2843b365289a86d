"""Networks: made by name on the command line, or by the first CNI configuration that names them."""

from __future__ import annotations

import contextlib
import time
from typing import Protocol

import msgspec

from portwright.ipam import compile_pools
from portwright.model.errors import Conflict, InvalidInput, NotFound
from portwright.model.network import AddressRange, Dns, Isolation, Network, Route
from portwright.node.core import Core
from portwright.plan.routes import canonical_routes, check_dns


class NetworkConf(Protocol):
    """What a CNI configuration says of its network (``cni.config.NetConf``)."""

    @property
    def name(self) -> str:
        """Of the configuration: part of an attachment's key."""

    @property
    def network(self) -> str:
        """Of the network that it joins; the configuration's own name unless it says otherwise."""

    @property
    def isolation(self) -> Isolation | None:
        """None where the configuration leaves it to the network."""

    @property
    def ipam(self) -> object | None:
        """None where the configuration leaves the addresses to the network."""

    def as_network(self, net_id: int) -> Network:
        """The network that the configuration describes, under that number."""


class Networks:
    """The networks of the record, and what each switch knows of them."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._store = core.store

    def create(
        self,
        name: str,
        *,
        pools: tuple[tuple[AddressRange, ...], ...] = (),
        mtu: int | None = None,
        masquerade: bool = False,
        reach: tuple[str, ...] = (),
        isolation: Isolation = "open",
        routes: tuple[Route, ...] = (),
        dns: Dns = Dns(),  # noqa: B008 - frozen
        reserved: tuple[str, ...] = (),
    ) -> Network:
        """Records a new network; raises Conflict if the name is taken, InvalidInput for bad ranges."""
        network = self._store.add_network(
            Network(
                name=name,
                net_id=0,
                pools=pools,
                mtu=mtu,
                masquerade=masquerade,
                reach=reach,
                isolation=isolation,
                routes=canonical_routes(routes),
                dns=check_dns(dns),
                reserved=reserved,
                source="cli",
            )
        )
        self._core.refresh_networks()
        return network

    def delete(self, name: str) -> None:
        """Deletes a network without ports; raises NotFound, Conflict."""
        self._store.delete_network(name)
        for switch in self._core.switches.values():
            switch.prepared.discard(name)
        self._core.refresh_networks()

    def for_cni(self, conf: NetworkConf) -> Network:
        """The network that a CNI configuration joins; made, or brought up to date, from it.

        A configuration that only names its network (``network``, no ipam) takes it as it is. One that
        describes a network made on the command line must not change it behind its owner's back.
        """
        try:
            known: Network | None = self._store.get_network(conf.network)
        except NotFound:
            known = None
        if known is not None and (conf.ipam is None or known.source == "cli"):
            _refuse_another_isolation(known, conf.isolation)
        if conf.ipam is None and known is not None:
            return known
        if conf.ipam is None and conf.network != conf.name:
            raise NotFound("network", conf.network)
        wanted = conf.as_network(known.net_id if known else 0)
        if wanted != known and wanted.pools:
            # Judged here first: the store would name the field by its own word for it.
            compile_pools(wanted.name, wanted.pools, wanted.reserved)
        if known is None:
            network = self._store.add_network(wanted)
            self._core.refresh_networks()
            return network
        if known.source == "cli":
            if wanted.pools and wanted.pools != known.pools:
                raise InvalidInput(
                    "ipam.ranges",
                    conf.network,
                    "differs from the network's own ranges; drop ipam from the configuration",
                )
            return known
        wanted = msgspec.structs.replace(wanted, source=known.source)
        if wanted == known:
            return known
        with self._store.transaction():
            network = self._store.update_network(wanted)
            self._core.policies.judge()
        if network != known:
            self._core.refresh_networks()
        return network

    def known(self, name: str) -> bool:
        """Tell whether there is a network of this name."""
        return any(network.name == name for network in self._store.networks())

    def take_back(self, name: str) -> None:
        """Deletes a network that a failed ADD has made, unless a port is on it by now."""
        with contextlib.suppress(Conflict, NotFound):
            self.delete(name)

    def exhausted(self, name: str) -> str:
        """A sentence if no further port fits into the network's pools, else ''."""
        for number, usage in enumerate(self._store.usage_by_set(name, now=time.time())):
            if usage.used + usage.resting >= usage.total:
                return (
                    f"network {name!r}: range set {number} is exhausted "
                    f"({usage.used} in use, {usage.resting} resting, {usage.total} in all)"
                )
        return ""


def _refuse_another_isolation(known: Network, asked: Isolation | None) -> None:
    """Raises InvalidInput where a configuration asks a network that it does not describe for another one."""
    if asked not in {None, known.isolation}:
        why = f"network {known.name} is {known.isolation}; drop isolation, or join a network that is {asked}"
        raise InvalidInput("isolation", asked, why)
