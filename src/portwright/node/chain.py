"""Taps on devices that other CNI plugins made: made, checked, taken away; with the record alone.

The record's state is the intent: it is on disk as ``creating`` before the kernel is touched and as
``deleting`` before anything is taken away, and the journal has the plan for people to read. A crash in
between is finished by the next start (:meth:`Chain.recover`).
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence

import msgspec

from portwright.attach import tcfilter
from portwright.kernel import clsact, rtnl
from portwright.kernel.netlink import NetlinkSocket
from portwright.model.errors import Conflict, InvalidInput, NotFound, NotSupported, PortwrightError
from portwright.model.port import Chained, NetnsRef, Owner, Port, PortState, tap_name
from portwright.node import taps
from portwright.node.apply import Applier
from portwright.node.core import Core
from portwright.node.sandbox import Sandbox, find
from portwright.plan.operations import Operation, encode
from portwright.plan.tap_operations import AdoptLink, CreateTap, DeleteTap, PartLinks

#: Devices whose packets find them by something else than a MAC of their own: a guest's would not come back.
_UNFIT = frozenset({"ipvlan", "tun"})


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller wants: a tap on each of ``devices`` of a namespace that the caller names ``netns``.

    ``tap``: the tap's name, '' for one of ours. ``uid``, ``gid``: who may open it besides root.
    """

    owner: Owner
    netns: str
    devices: tuple[str, ...]
    queues: int = 1
    tap: str = ""
    uid: int | None = None
    gid: int | None = None
    labels: dict[str, str] = {}


class Chain:
    """The one writer of chained taps."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._store = core.store

    def add(self, wish: Wish, sandbox_fd: int, host_fd: int) -> tuple[Chained, ...]:
        """Make them; all or none. Raises Conflict, NotFound, NotSupported, InvalidInput: then nothing stays.

        A device that is a port's of ours, or has a tap already, is refused, and so is a pod that a policy in
        force selects: nothing holds the guest to it here.
        """
        if wish.tap and len(wish.devices) != 1:
            raise InvalidInput("TC_REDIRECT_TAP_NAME", wish.tap, f"is for one device of {len(wish.devices)}")
        if self._store.chained(wish.owner.key()):
            raise Conflict("port", wish.owner.key(), "it exists already; DEL it first")
        made: list[Chained] = []
        with Sandbox(sandbox_fd, wish.netns) as sandbox, Sandbox(host_fd, "host") as host:
            drafts = [self._draft(wish, device, sandbox, host) for device in wish.devices]
            try:
                for draft in drafts:
                    made.append(draft)
                    made[-1] = self._make(draft, wish, sandbox)
            except BaseException:
                for one in made:
                    self._take_away(one)
                raise
        return tuple(made)

    def of(self, owner: str) -> list[Chained]:
        """Those of a CNI attachment (``Owner.key()``)."""
        return self._store.chained(owner)

    def delete(self, one: Chained) -> None:
        """Take it away, whatever state it is in; the other plugin's device stays. May be repeated."""
        one = _in_state(one, PortState.DELETING)
        plan = _removal(one)
        with self._store.transaction(durable=True):
            self._store.put_chained(one)
            entry = self._store.begin(one.port.port_id, "unchain", encode(plan))
        self._core.faults.at("unchain:intent")
        with Applier(self._core.switch_for(), None, self._core.faults) as applier:
            applier.take_back(plan, "unchain")
        self._forget(one, entry)
        self._core.faults.at("unchain:commit")

    def lacks(self, one: Chained, sandbox_fd: int) -> list[str]:
        """What it lacks, as sentences; [] is well."""
        port = one.port
        if port.state is not PortState.ATTACHED:
            return [f"the tap {port.tap} is {port.state.value}, not attached"]
        with NetlinkSocket(netns_fd=sandbox_fd) as sock:
            device = rtnl.link_by_index(sock, one.index)
            if device is None:
                return [f"device {port.ifname}, of another plugin, is gone from the sandbox"]
            problems = (
                [] if device.mac == port.mac else [f"{device.name} has MAC {device.mac}, was {port.mac}"]
            )
            return problems + taps.lacks(sock, device, port.tap)

    def devices(self, sandbox_fd: int) -> tuple[str, ...]:
        """The names of the devices in a namespace."""
        with NetlinkSocket(netns_fd=sandbox_fd) as sock:
            return tuple(link.name for link in rtnl.links(sock, stats=False))

    def addresses(self, sandbox_fd: int) -> list[tuple[str, str]]:
        """(device, address without prefix length) of each address in a namespace."""
        with NetlinkSocket(netns_fd=sandbox_fd) as sock:
            names = {link.index: link.name for link in rtnl.links(sock, stats=False)}
            return [(names.get(a.index, ""), a.address) for a in rtnl.addresses(sock)]

    def recover(self) -> list[str]:
        """What a crash cut short is taken away, what its sandbox took along is detached; says what.

        Never raises for one of them.
        """
        done: list[str] = []
        for one in self._store.chained():
            if one.port.state in {PortState.ATTACHED, PortState.DETACHED}:
                if one.port.state is PortState.ATTACHED and not self._lives(one):
                    self._store.put_chained(_in_state(one, PortState.DETACHED))
                    done.append(f"chained tap {one.port.tap}: its sandbox is gone, detached")
                continue
            try:
                self._take_away(one)
                done.append(f"chained tap {one.port.tap} was {one.port.state.value}: taken away")
            except PortwrightError as error:
                done.append(f"failed: chained tap {one.port.tap}: {error}")
        return done

    # -- one of them -----------------------------------------------------------------------------

    def _draft(self, wish: Wish, device: str, sandbox: Sandbox, host: Sandbox) -> Chained:
        """It as a record, judged; nothing is written."""
        ref = sandbox.ref(self._core.boot_id)
        link = rtnl.link_by_name(sandbox.rtnl, device)
        if link is None:
            raise NotFound("device", f"{device} in {wish.netns}")
        if len(link.mac) != len("00:00:00:00:00:00") or link.name == "lo" or link.kind in _UNFIT:
            kind = link.kind or "such a device"
            way_out = (
                "chain behind a plugin that makes an Ethernet device of its own MAC: ptp, bridge, macvlan"
            )
            raise NotSupported("tcfilter", f"{kind} ({device}) of another plugin", way_out)
        self._refuse_taken(device, ref)
        slots = clsact.list_filters(sandbox.rtnl, link.index, "ingress")
        if any((f.pref, f.handle) == (clsact.OUR_PREF, clsact.OUR_HANDLE) for f in slots):
            raise Conflict(
                "device", device, f"has a filter in our slot, preference {clsact.OUR_PREF}, already"
            )
        port_id = secrets.token_hex(8)
        tap = wish.tap or tap_name(port_id)
        if rtnl.link_by_name(sandbox.rtnl, tap) is not None:
            raise Conflict("tap", tap, f"a device of this name is in {wish.netns}; delete it or take another")
        port = Port(
            port_id=port_id,
            network=wish.owner.network,
            net_id=0,
            owner=wish.owner,
            model=tcfilter.MODEL,
            state=PortState.CREATING,
            ifname=link.name,
            attach="",
            rep_name="",
            mac=link.mac,
            mtu=link.mtu,
            host=host.ref(self._core.boot_id),
            sandbox=ref,
            tap=tap,
            queues=wish.queues,
            labels=wish.labels,
            ipam="",
            created=time.time(),
        )
        if selecting := self._core.policies.selecting(port):
            why = f"{selecting[0]} selects it and can't hold there: the device is another plugin's"
            raise Conflict("policy", wish.owner.container_id, f"{why}; attach with model tcfilter alone")
        there = any(q.kind == "clsact" for q in clsact.qdiscs(sandbox.rtnl, link.index))
        return Chained(port=port, index=link.index, clsact=not there)

    def _refuse_taken(self, device: str, sandbox: NetnsRef) -> None:
        ports = [*self._store.ports(), *(one.port for one in self._store.chained())]
        for port in ports:
            same = (port.sandbox.cookie, port.sandbox.boot_id) == (sandbox.cookie, sandbox.boot_id)
            if same and port.ifname == device:
                way_out = (
                    "DEL that first"
                    if not port.rep_name
                    else "it needs no other: ask for model tcfilter there"
                )
                raise Conflict("device", device, f"is of port {port.port_id} ({port.owner.key()}); {way_out}")

    def _lives(self, one: Chained) -> bool:
        fd = find(one.port.sandbox, self._core.boot_id)
        if fd is not None:
            os.close(fd)
        return fd is not None

    def _make(self, one: Chained, wish: Wish, sandbox: Sandbox) -> Chained:
        port = one.port
        plan: Sequence[Operation] = (
            CreateTap(
                tap=port.tap,
                mac=port.mac,
                mtu=port.mtu,
                queues=port.queues,
                sandbox=port.sandbox,
                uid=wish.uid,
                gid=wish.gid,
            ),
            AdoptLink(
                device=port.ifname, index=one.index, tap=port.tap, clsact=one.clsact, sandbox=port.sandbox
            ),
        )
        with self._store.transaction(durable=True):
            self._store.put_chained(one)
            entry = self._store.begin(port.port_id, "chain", encode(tuple(plan)))
        self._core.faults.at("chain:intent")
        with Applier(self._core.switch_for(), sandbox, self._core.faults) as applier:
            try:
                applier.apply(plan, "chain")
            except BaseException:
                self._store.finish(entry, "failed")
                raise
        one = _in_state(one, PortState.ATTACHED)
        with self._store.transaction(durable=False):
            self._store.put_chained(one)
            self._store.finish(entry, "done")
        self._core.faults.at("chain:commit")
        return one

    def _take_away(self, one: Chained) -> None:
        """As ``delete``, of one that nobody was told of; also of one that was not recorded yet."""
        with Applier(self._core.switch_for(), None, self._core.faults) as applier:
            applier.take_back(_removal(one), "abandon-chain")
        self._forget(one, None)

    def _forget(self, one: Chained, entry: int | None) -> None:
        with self._store.transaction(durable=False):
            for known in self._store.chained(one.port.owner.key()):
                if known.port.port_id == one.port.port_id:
                    self._store.delete_chained(one.port.port_id)
            if entry is not None:
                self._store.finish(entry, "done")


def _in_state(one: Chained, state: PortState) -> Chained:
    return msgspec.structs.replace(one, port=msgspec.structs.replace(one.port, state=state))


def _removal(one: Chained) -> tuple[Operation, ...]:
    """The tap first: what still comes for the guest is dropped, and not answered by the namespace's stack."""
    port = one.port
    return (
        DeleteTap(tap=port.tap, sandbox=port.sandbox),
        PartLinks(device=port.ifname, index=one.index, clsact=one.clsact, sandbox=port.sandbox),
    )
