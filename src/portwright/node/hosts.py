"""Host endpoints in force: policies of the host's own interfaces, as one nftables table in our namespace.

The table is on record before it is made (``owned``, kind ``hosts``), so that a later start knows whether
there is one of ours to take away. It stays when the daemon ends.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Protocol

import msgspec

from portwright.kernel import rtnl
from portwright.kernel.bpf import features
from portwright.kernel.netlink import NetlinkSocket
from portwright.kernel.nft import Nft
from portwright.model.errors import KernelFailed, PortwrightError
from portwright.node.early import Early
from portwright.node.faults import Faults
from portwright.plan import hosts as scripts
from portwright.policy.host.early import early_denies
from portwright.policy.host.judge import Judge, Ruling
from portwright.policy.host.programs import Site
from portwright.policy.host.render import Rendered, render
from portwright.policy.host.stages import Bound, Stage, bind, bound_to, local_endpoints, refuse
from portwright.policy.manifests.calico_hosts import HOST_INTERFACE
from portwright.policy.rules import Direction, Flow, PolicySet, Snapshot
from portwright.store.owned import OwnedThing

KIND: Final = "hosts"

log = logging.getLogger(__name__)


class Record(Protocol):
    """What is needed of the store."""

    def own(self, kind: str, name: str, detail: object = None) -> bool:
        """Records a thing of ours."""

    def disown(self, kind: str, name: str) -> bool:
        """Drops the record."""

    def owned(self, kind: str | None = None) -> list[OwnedThing]:
        """The things of a kind."""


class Namespace(Protocol):
    """What is needed of the switch of our own namespace."""

    fd: int
    instance: str
    rtnl: NetlinkSocket
    pins: Path

    @property
    def nft(self) -> Nft:
        """Its nftables."""


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What host endpoints ask for: which interfaces each is now, and the table, None for no table."""

    bound: tuple[Bound, ...] = ()
    table: Rendered | None = None
    #: endpoints of this node that are found by an address
    by_address: bool = False
    #: by interface: the nets of which untracked policies deny all, for XDP, and the rule of each
    early: dict[str, dict[str, str]] = {}


class HostDrops(msgspec.Struct, frozen=True, kw_only=True):
    """What a rule, or a default, dropped."""

    site: Site
    interfaces: tuple[str, ...]
    packets: int
    octets: int


class Hosts:
    """One for the node. ``error``: why what is on record is not in force, or ''."""

    def __init__(self, store: Record, own: Callable[[], Namespace], node: str, faults: Faults) -> None:
        """``own``: the namespace that we are in; ``node``: the name that this node's endpoints name."""
        self._store = store
        self._own = own
        self._faults = faults
        self.node = node
        self.error = ""
        self.wanted = Wanted()
        self._early = Early()
        #: what the table has, as far as we know
        self._there: scripts.Present | None = None

    def plan(self, policies: PolicySet, snapshot: Snapshot) -> Wanted:
        """What these policies ask for. Raises InvalidInput and PolicyTooLarge; changes nothing."""
        ends = local_endpoints(snapshot, self.node)
        if not ends:
            return Wanted()
        refuse(policies, ends)
        by_address = any(HOST_INTERFACE not in end.labels for end in ends)
        bound = bind(ends, self._addresses() if by_address else {})
        table = render(policies, snapshot, bound, self._told()) if bound else None
        early: dict[str, dict[str, str]] = {}
        for each in bound:
            if each.interfaces and (nets := early_denies(policies, snapshot, each)):
                early |= dict.fromkeys(each.interfaces, nets)
        return Wanted(bound=bound, table=table, by_address=by_address, early=early)

    def check(self, wanted: Wanted) -> None:
        """Raises KernelFailed or InvalidInput for a table that nft or the kernel would refuse."""
        if wanted.table is not None and wanted.table != self.wanted.table:
            own = self._own()
            with Nft(own.fd) as nft:
                nft.check(scripts.put_hosts(own.instance, wanted.table, self._present(own)))

    def put(self, wanted: Wanted, *, anyway: bool = False) -> None:
        """In force when it returns. Raises KernelFailed; then the table of before still is.

        ``anyway``: even if it is what is known to be in force.
        """
        if anyway or wanted.table != self.wanted.table:
            own = self._own()
            if wanted.table is not None:
                self._put(own, wanted.table)
            elif self._is_ours(own):
                own.nft.run(scripts.remove_hosts(own.instance))
                self._there = scripts.Present()
                self._faults.at("hosts:removed")
                self._store.disown(KIND, scripts.hosts_table(own.instance))
        if anyway or wanted.early or self.wanted.early:
            self._early.put(self._own(), {name: tuple(nets) for name, nets in wanted.early.items()})
            self._faults.at("hosts:early")
        self.wanted = wanted
        self.error = ""

    def restore(self, policies: PolicySet, snapshot: Snapshot) -> None:
        """Puts in force what is on record, whatever an earlier run left. What can't be is told."""
        self._there = None
        self._follow(policies, snapshot, anyway=True)

    def mend(self) -> bool:
        """Puts the table back if somebody removed it; whether that was so. Raises KernelFailed."""
        if self.wanted.table is None:
            return False
        if self._counted() is not None:
            return False
        self._there = scripts.Present()
        self.put(self.wanted, anyway=True)
        return True

    @property
    def follows(self) -> bool:
        """Whether it matters to it what interfaces the host has, and their addresses."""
        return self.wanted.by_address or bool(self.wanted.early) or bool(self.error)

    @property
    def not_early(self) -> dict[str, str]:
        """By interface: why what could be dropped by XDP there is left to the stack."""
        return self._early.lacking

    def follow(self, policies: PolicySet, snapshot: Snapshot) -> None:
        """Addresses may have moved: so do the endpoints that are found by one. Told, not raised."""
        self._follow(policies, snapshot, anyway=bool(self.error))

    def drops(self) -> list[HostDrops]:
        """What was dropped, by rule, since the rule came. Raises KernelFailed."""
        if self.wanted.table is None:
            return []
        counted = self._counted() or {}
        where = {b.endpoint.name: ("*",) if b.every else b.interfaces for b in self.wanted.bound}
        early: dict[tuple[Site, str], tuple[int, int]] = {}
        for site, interface, _, packets, octets in self.dropped_early():
            before = early.get((site, interface), (0, 0))
            early[site, interface] = before[0] + packets, before[1] + octets
        found = [
            HostDrops(site=site, interfaces=(interface,), packets=packets, octets=octets)
            for (site, interface), (packets, octets) in early.items()
        ]
        return found + [
            HostDrops(site=site, interfaces=where[site.endpoint], packets=packets, octets=octets)
            for name, site in self.wanted.table.counters.items()
            for packets, octets in (counted.get(name, (0, 0)),)
            if packets
        ]

    def told_group(self) -> int:
        """The group of NFLOG in which the table tells of drops."""
        return scripts.told_group(self._own().instance)

    def dropped_by(self, counter: str) -> Site | None:
        """What a counter of the table in force counts."""
        return self.wanted.table.counters.get(counter) if self.wanted.table is not None else None

    def counted(self) -> dict[str, int]:
        """Packets by counter of the table in force. Raises KernelFailed."""
        return {name: packets for name, (packets, _) in (self._counted() or {}).items()}

    def dropped_early(self) -> Iterator[tuple[Site, str, str, int, int]]:
        """(site, interface, source net, packets, bytes) of what XDP dropped since its nets last changed."""
        owner = {interface: b.endpoint.name for b in self.wanted.bound for interface in b.interfaces}
        for interface, net, packets, octets in self._early.dropped():
            rule = self.wanted.early.get(interface, {}).get(net)
            if rule is not None and interface in owner:
                site = Site(
                    endpoint=owner[interface],
                    direction=Direction.INGRESS,
                    stage=Stage.UNTRACKED,
                    rule=f"{rule}, by XDP",
                )
                yield site, interface, net, packets, octets

    def _told(self) -> int | None:
        return self.told_group() if features.probe("nflog").supported else None

    def forwarded(
        self, policies: PolicySet, snapshot: Snapshot, flow: Flow, interface: str, direction: Direction
    ) -> tuple[str, Ruling] | None:
        """(its endpoint's name, what that says) of a flow routed by an interface; None: it has none."""
        end = bound_to(self.wanted.bound, interface)
        if end is None:
            return None
        comes = direction is Direction.INGRESS
        judge = Judge(policies, snapshot)
        return end.name, judge.forwarded(end if comes else None, None if comes else end, flow)

    def _counted(self) -> dict[str, tuple[int, int]] | None:
        """(packets, bytes) by counter; None if there is no table."""
        own = self._own()
        table = scripts.hosts_table(own.instance)
        try:
            return scripts.counted(own.nft.run_json(f"list counters table inet {table}"))
        except KernelFailed as error:
            if error.errno != errno.ENOENT:
                raise
            return None

    def _follow(self, policies: PolicySet, snapshot: Snapshot, *, anyway: bool) -> None:
        before = self.wanted
        try:
            wanted = self.plan(policies, snapshot)
            self.put(wanted, anyway=anyway)
        except PortwrightError as error:
            self.error = f"host endpoints: {error}"
            log.error("%s", self.error)
            return
        for each in wanted.bound:
            if each not in before.bound:
                names = "all interfaces" if each.every else ", ".join(each.interfaces)
                log.info("host endpoint %s is %s", each.endpoint.name, names)

    def _put(self, own: Namespace, table: Rendered) -> None:
        self._store.own(KIND, scripts.hosts_table(own.instance))
        self._faults.at("hosts:recorded")
        try:
            try:
                self._run(own, table)
            except KernelFailed:
                # Somebody else's hand was in it (``flush ruleset``): by what is there now.
                self._there = None
                self._run(own, table)
        except BaseException:
            self._there = None
            raise
        self._there = scripts.present(table)
        self._faults.at("hosts:installed")

    def _run(self, own: Namespace, table: Rendered) -> None:
        # A context of its own: after a failure libnftables 1.0.6 takes what it tried for what is there, and
        # ends the process (an assertion) where it would name the place of the conflict.
        with Nft(own.fd) as nft:
            nft.run(scripts.put_hosts(own.instance, table, self._present(own)))

    def _present(self, own: Namespace) -> scripts.Present:
        if self._there is None:
            self._there = scripts.observed(own.nft.list_table("inet", scripts.hosts_table(own.instance)))
        return self._there

    def _is_ours(self, own: Namespace) -> bool:
        name = scripts.hosts_table(own.instance)
        return any(thing.name == name for thing in self._store.owned(KIND))

    def _addresses(self) -> dict[str, list[str]]:
        """Of each interface of our namespace, those that it has now."""
        sock = self._own().rtnl
        names = {link.index: link.name for link in rtnl.links(sock, stats=False)}
        found: dict[str, list[str]] = {}
        for each in rtnl.addresses(sock):
            if each.index in names:
                found.setdefault(names[each.index], []).append(each.address)
        return found
