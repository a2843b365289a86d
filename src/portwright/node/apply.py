"""Applies operations to the kernel, and takes them back.

Netlink operations that follow each other in one namespace go in one ``sendmsg``: the kernel works
through the batch in our own system call, in order, so a plan keeps its order and costs a
round trip for each namespace instead of each operation.
"""

from __future__ import annotations

import contextlib
import errno
import select
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from functools import partial

from portwright.attach import tcfilter
from portwright.dataplane import values
from portwright.dataplane.abi import PwDir, PwLimitKey
from portwright.kernel import rtnl, sysctl
from portwright.kernel.bpf import Direction
from portwright.kernel.netlink import NetlinkSocket, Request
from portwright.model.errors import Conflict, InternalError, KernelFailed, NetlinkFailed, NotFound
from portwright.model.network import GATEWAY_MAC
from portwright.node import clones, entries, inner, lent, nat, taps
from portwright.node.faults import Faults
from portwright.node.sandbox import Sandbox
from portwright.node.switch import DIRECTIONS, Switch
from portwright.plan import adopt_operations as adopt_op
from portwright.plan import clone_operations as clone_op
from portwright.plan import inner_operations as inner_op
from portwright.plan import operations as op
from portwright.plan import path_operations as path_op
from portwright.plan import tap_operations as tap_op

#: Seconds within which a link with a carrier must transmit, and between two looks.
_LINK_WITHIN, _LOOK_AGAIN = 2.0, 0.0002


class Applier:
    """Applies plans for one port. ``sandbox`` may be None for plans that only take away."""

    def __init__(self, switch: Switch, sandbox: Sandbox | None, faults: Faults) -> None:
        self._switch = switch
        self._sandbox = sandbox
        self._faults = faults
        self._index: dict[str, int] = {}
        self._device_index = 0
        self._batch: list[Request] = []
        self._batch_socket: NetlinkSocket | None = None
        self._beside: list[Future[None]] = []

    def __enter__(self) -> Applier:
        return self

    def __exit__(self, *_: object) -> None:
        wait(self._beside)

    @property
    def rep_ifindex(self) -> int:
        """Of the representor that the plan made; 0 before."""
        return next(iter(self._index.values()), 0)

    def apply(self, plan: Sequence[op.Operation], kind: str, *, undo: bool = True) -> None:
        """Applies all of ``plan``, or none: on failure what was done is taken back, then it raises.

        If taking back fails too, the journal still holds the intent and the next start finishes it.
        Without ``undo`` (a change to a port that is there already) what was done stays.
        """
        done = 0
        try:
            for done, operation in enumerate(plan):
                self._faults.reach(kind, done, "before")
                self._do(operation)
                if self._faults.armed:
                    self._flush()
                self._faults.reach(kind, done, "after")
            self._flush()
            self._join()
        except BaseException:
            self._batch.clear()
            if not undo:
                raise
            with contextlib.suppress(Exception):
                self.take_back(op.undo(tuple(plan[: done + 1])), f"undo-{kind}")
            raise

    def take_back(self, plan: Sequence[op.Operation], kind: str) -> None:
        """Applies a plan of removals. Goes on after a failure and raises the first at the end."""
        first: Exception | None = None
        for step, operation in enumerate(plan):
            self._faults.reach(kind, step, "before")
            try:
                self._do(operation)
                self._flush()
            except Exception as error:  # noqa: BLE001 - best effort over all operations, then raised
                self._batch.clear()
                first = first or error
            self._faults.reach(kind, step, "after")
        try:
            self._join()
        except Exception as error:  # noqa: BLE001 - the same
            first = first or error
        if first is not None:
            raise first

    def _join(self) -> None:
        """Waits for what goes on beside; raises what failed there."""
        while self._beside:
            self._beside.pop().result()

    # -- netlink batches -------------------------------------------------------------------------

    def _send(self, where: str, request: Request) -> None:
        socket = self._switch.rtnl if where == "host" else self._inside().rtnl
        if self._batch_socket is not socket:
            self._flush()
            self._batch_socket = socket
        self._batch.append(request)

    def _flush(self) -> None:
        batch, self._batch = self._batch, []
        if batch and self._batch_socket is not None:
            self._batch_socket.execute(batch)

    def _inside(self) -> Sandbox:
        if self._sandbox is None:
            raise InternalError("a plan that needs the sandbox was applied without its namespace")
        return self._sandbox

    def _ifindex(self, rep: str) -> int:
        index = self._index.get(rep, 0)
        if not index:
            link = rtnl.link_by_name(self._switch.rtnl, rep)
            if link is None:
                raise NotFound("representor", rep)
            index = self._index[rep] = link.index
        return index

    # -- one operation ---------------------------------------------------------------------------

    def _do(self, operation: op.Operation) -> None:
        match operation:
            case op.CreateVeth():
                self._create_veth(operation)
            case op.NameLink(rep=rep, altnames=altnames):
                index = self._ifindex(rep)
                self._send("host", rtnl.altname_add(index, list(altnames)))
                # Below 1,280 bytes of MTU a device has no IPv6 at all (net/ipv6/addrconf.c).
                quiet = rtnl.link_set(index, addrgenmode="none").tolerating(errno.EAFNOSUPPORT)
                self._send("host", quiet)
            case op.SetSysctl(where=where, path=path, value=value):
                self._flush()
                fd = self._switch.fd if where == "host" else self._inside().fd
                sysctl.write(path, value, netns_fd=fd)
            case op.SetLink(where=where, name=name, up=up, mtu=mtu):
                self._send(where, rtnl.link_set(self._at(where, name), up=up, mtu=mtu))
            case op.AddAddress(address=address):
                self._send("sandbox", rtnl.addr_add(self._device_index, address, nodad=True))
            case op.AddRoute(where=where, dev=dev, route=r, onlink=onlink, kind=kind, shared=shared):
                request = rtnl.route_add(
                    r.dst,
                    oif=self._at(where, dev),
                    gw=r.gw,
                    onlink=onlink,
                    scope=r.scope,
                    table=r.table,
                    priority=r.priority,
                    mtu=r.mtu,
                    advmss=r.advmss,
                    type=kind,
                )
                self._send(where, request.tolerating(errno.EEXIST) if shared else request)
            case op.AddNeighbour(where=where, dev=dev, address=address, mac=mac):
                self._send(where, rtnl.neigh_replace(self._at(where, dev), address, mac, permanent=True))
            case _:
                self._flush()
                self._do_data_path(operation)

    def _at(self, where: str, name: str) -> int:
        return self._ifindex(name) if where == "host" else self._device_index

    def _create_veth(self, operation: op.CreateVeth) -> None:
        request = rtnl.veth_create(
            operation.rep,
            mac=operation.gateway_mac,
            mtu=operation.mtu,
            peer_name=operation.ifname,
            peer_mac=operation.mac,
            peer_netns_fd=self._inside().fd,
            peer_mtu=operation.mtu,
        )
        try:
            self._switch.rtnl.execute([request])
        except NetlinkFailed as error:
            if error.errno == errno.EEXIST:
                raise Conflict(
                    "interface",
                    operation.ifname,
                    f"already exists in {operation.sandbox}; choose another CNI_IFNAME or delete it",
                ) from error
            raise
        link = rtnl.link_by_name(self._switch.rtnl, operation.rep)
        if link is None:
            raise NotFound("representor", operation.rep)
        self._index[operation.rep] = link.index
        self._device_index = link.link_index
        self._send("host", rtnl.link_set(link.index, alias=operation.alias))

    def _create_host_tap(self, operation: tap_op.CreateHostTap) -> None:
        taps.create_host(self._switch.fd, operation)
        index = self._ifindex(operation.rep)
        self._send("host", rtnl.link_set(index, mtu=operation.mtu, alias=operation.alias))

    def _await_link(self, rep: str) -> None:
        """The link watch runs at once for a veth (linkwatch_urgent_event), so this is a look or two.

        Without a carrier there is nothing to wait for: somebody in the sandbox took its end down.
        """
        index = self._ifindex(rep)
        deadline = time.monotonic() + _LINK_WITHIN
        while (link := rtnl.link_by_index(self._switch.rtnl, index)) is not None and link.carrier:
            if link.operstate == "up":
                return
            if time.monotonic() > deadline:
                raise KernelFailed(errno.ETIMEDOUT, f"ip link show {rep}", f"operstate is {link.operstate}")
            select.select([], [], [], _LOOK_AGAIN)

    def _delete_link(self, rep: str) -> None:
        """Only a veth or a tap that carries the gateway's MAC under the recorded name is ours."""
        link = rtnl.link_by_name(self._switch.rtnl, rep)
        if link is None or (link.name, link.mac) != (rep, GATEWAY_MAC) or link.kind not in {"veth", "tun"}:
            return
        self._switch.reaper.delete(link.index)

    def _do_data_path(self, operation: op.Operation) -> None:
        switch = self._switch
        match operation:
            case op.DeleteLink(rep=rep):
                self._delete_link(rep)
            case op.AwaitLink(rep=rep):
                self._await_link(rep)
            case tap_op.CreateHostTap():
                self._create_host_tap(operation)
            case tap_op.CreateMacvtap():
                taps.create_macvtap(self._inside(), operation)
            case tap_op.CreateTap():
                taps.create(self._inside(), operation)
            case tap_op.JoinLinks(join=tcfilter.MIRRED):
                taps.redirect(self._inside(), operation)
            case tap_op.JoinLinks():
                taps.join(self._inside(), operation, self._switch.joiner)
            case tap_op.DeleteTap():
                taps.delete(operation)
            case clone_op.JoinClone():
                clones.join(self._inside(), operation, switch)
            case clone_op.RemoveClone():
                clones.remove(operation, switch)
            case tap_op.AdoptLink():
                taps.adopt(self._inside(), operation, self._switch.joiner)
            case tap_op.PartLinks():
                taps.part(operation)
            case path_op.AttachProgram(rep=rep, port_id=port_id, direction=direction, how=how):
                fresh = bool(self._device_index)  # made by this very plan
                switch.attach(port_id, self._ifindex(rep), direction_of(direction), how, fresh=fresh)
            case path_op.DetachProgram(port_id=port_id, direction=direction, rep=rep):
                switch.detach(port_id, direction_of(direction))
                if rep:
                    lent.detach(switch, rep, direction_of(direction))
            case path_op.PutPort():
                self._put_port(operation)
            case path_op.RemovePort(rep=rep, port_id=port_id, ifindex=ifindex):
                self._remove_port(port_id, self._index.get(rep, ifindex))
            case path_op.ForgetPort(port_id=port_id):
                switch.forget_counters(port_id)
            case path_op.PutTargets():
                index = self._ifindex(operation.rep)
                value = entries.target_value(operation, index)
                for address in operation.addresses:
                    switch.maps["pw_addrs"].update(values.address(address), value)
            case path_op.RemoveTargets(port_id=port_id, addresses=addresses):
                self._remove_targets(port_id, addresses)
            case op.PublishPorts(port_id=port_id, mappings=mappings, addresses=addresses):
                self._join()  # a purge of withdrawn ports uses the same socket
                nat.publish_ports(switch, port_id, mappings, addresses)
            case op.UnpublishPorts(mappings=mappings, addresses=addresses):
                try:
                    nat.withdraw_ports(switch, mappings, addresses)
                finally:
                    # Some 10 ms, the longest part of a DEL, and nothing else of it depends on it.
                    purge = partial(nat.purge, switch, mappings, addresses, added=False)
                    self._beside.append(switch.beside(purge))
                if self._faults.armed:
                    self._join()
            case _:
                self._do_lent(operation)

    def _do_lent(self, operation: op.Operation) -> None:
        """Operations on a device that is somebody else's."""
        switch = self._switch
        match operation:
            case adopt_op.BorrowLink(rep=rep):
                self._index[rep] = lent.borrow(switch, operation)
            case adopt_op.ReturnLink():
                lent.give_back(switch, operation)
            case adopt_op.AddWay():
                lent.add_way(switch, operation)
            case adopt_op.DropWay():
                lent.drop_way(switch, operation)
            case adopt_op.LeaveBridge():
                lent.leave(switch, operation)
            case adopt_op.EnterBridge():
                lent.enter(switch, operation)
            case adopt_op.CloseLink():
                lent.close(switch, operation)
            case adopt_op.AnswerFor():
                lent.answer_for(switch, operation)
            case adopt_op.AnswerNoMore():
                lent.answer_no_more(switch, operation)
            case inner_op.BypassBridge():
                inner.bypass(operation, switch.joiner)
            case inner_op.UseBridge():
                inner.use(operation)
            case inner_op.DropBridge():
                inner.drop(operation)
            case inner_op.MakeBridge():
                inner.make(operation)
            case _:
                raise InternalError(f"no way to apply {type(operation).__name__}")

    def _put_port(self, operation: path_op.PutPort) -> None:
        maps = self._switch.maps
        self._switch.make_counters(operation.port_id)
        for key, limit in entries.limit_values(operation, time.monotonic_ns()).items():
            if limit is not None:
                maps["pw_limits"].update(key, limit)
            else:
                maps["pw_limits"].delete(key)
        index = self._ifindex(operation.rep)
        key = entries.port_key(index)
        maps["pw_ports"].update(key, entries.port_value(operation, maps["pw_ports"].lookup(key)))

    def _remove_port(self, port_id: str, ifindex: int) -> None:
        """The entry may belong to another port by now: numbers of gone devices come again."""
        maps, mine = self._switch.maps, values.port_key(port_id)
        ports = maps["pw_ports"]
        if ifindex:
            key = entries.port_key(ifindex)
            held = [(key, ports.lookup(key) or b"")]
        else:
            held = list(ports.items())  # a crash came before the number was recorded
        for key, value in held:
            if value.startswith(mine):
                ports.delete(key)
        for direction in PwDir:
            maps["pw_limits"].delete(PwLimitKey(port_id=int(port_id, 16), dir=direction).pack())

    def _remove_targets(self, port_id: str, addresses: tuple[str, ...]) -> None:
        targets, mine = self._switch.maps["pw_addrs"], values.port_key(port_id)
        for address in addresses:
            raw = values.address(address)
            value = targets.lookup(raw)
            if value is not None and value.startswith(mine):
                targets.delete(raw)


def direction_of(text: str) -> Direction:
    """The direction of that name; InternalError for another word."""
    for direction in DIRECTIONS:
        if text == direction:
            return direction
    raise InternalError(f"direction {text!r}")
