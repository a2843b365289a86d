"""Changes to a port that is there: its settings, and what others do to its representor with ``ip link``.

The operator owns the representor's administrative state and MTU, by whatever tool: the record follows
(R8, R10, R11 of docs/semantics.md). Its namespace and its programs are ours: they are put back (R13).

A change is a journal entry with the new record: ``set`` if we were asked for it, ``heard`` if the
representor was changed already. After a crash the next start carries it to its end (``finish``).
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence

import msgspec

from portwright.attach import veth
from portwright.kernel import news, nsid, rtnl
from portwright.kernel.netlink import NetlinkSocket
from portwright.model.errors import InvalidInput, PortwrightError
from portwright.model.network import GATEWAY_MAC
from portwright.model.port import Limits, Port, PortState
from portwright.node.apply import Applier
from portwright.node.core import Core
from portwright.node.switch import Switch
from portwright.plan.operations import Operation, SetLink, encode

#: Kinds of journal entries: a change that was asked for; one that the representor has already.
SET, HEARD = "set", "heard"

log = logging.getLogger(__name__)


class Changes:
    """Used by the one writer's thread, like ``Ports``."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._store = core.store

    # -- by request ------------------------------------------------------------------------------

    def set(
        self,
        port: Port,
        *,
        admin: str | None = None,
        limits: Limits | None = None,
        mtu: int | None = None,
        labels: dict[str, str] | None = None,
        heard: bool = False,
    ) -> Port:
        """Changes a port, attached or not; None leaves a value. The new record is durable first.

        ``admin`` is the representor's: down means no carrier inside and no traffic either way (R8, R10),
        for this device and the next. A new MTU is told to the sandbox's end, and enforced whether that
        listens or not. Raises InvalidInput with nothing changed; where the kernel refuses, all of it is put
        back and then it raises. After a crash at any point the new settings are in force, all of them.

        ``heard``: the representor itself has been changed, and may be changed again by now. Then it is
        left alone: to write what was heard would undo what came after it.
        """
        new = msgspec.structs.replace(
            port,
            admin=admin if admin is not None else port.admin,
            limits=complete(limits) if limits is not None else port.limits,
            mtu=mtu if mtu is not None else port.mtu,
            labels=labels if labels is not None else port.labels,
        )
        least = veth.MIN_MTU6 if any(":" in a.address for a in new.addresses) else veth.MIN_MTU
        if mtu is not None and not least <= new.mtu <= veth.MAX_MTU:
            raise InvalidInput("mtu", new.mtu, f"must be {least} to {veth.MAX_MTU} for this port's addresses")
        kind = HEARD if heard else SET
        plan = _plan(new, kind, mtu=mtu is not None, limits=limits is not None, admin=admin is not None)
        switch = self._core.switch_of(new) if new.state is PortState.ATTACHED else None
        if switch is None or not plan:
            with self._store.transaction(durable=True):
                self._store.put_port(new)
                self._judge_labels(port, new)
            self._heed_labels(port, new)
            self._tell_limits(port, new)
            return new
        with self._store.transaction(durable=True):
            self._store.put_port(new)
            self._judge_labels(port, new)
            entry = self._store.begin(new.port_id, kind, encode(plan))
        self._core.faults.at(f"{kind}:intent")
        try:
            self._apply(switch, plan, kind)
        except BaseException:
            self._put_back(switch, port, kind, entry)
            raise
        if mtu is not None:
            self._tell(switch, new, mtu=new.mtu)
            self._core.faults.at(f"{kind}:told")
        # Not durable: a power cut would bring the intent back, but not the device that it is for.
        with self._store.transaction(durable=False):
            self._store.finish(entry, "done")
        self._core.faults.at(f"{kind}:commit")
        self._heed_labels(port, new)
        self._tell_limits(port, new)
        return new

    def _judge_labels(self, old: Port, new: Port) -> None:
        """Raises where policy could not be put in force with them: then no later change could be either."""
        if new.labels != old.labels:
            self._core.policies.judge()

    def _heed_labels(self, old: Port, new: Port) -> None:
        if new.labels != old.labels:
            self._core.policies.relabelled()

    def _tell_limits(self, old: Port, new: Port) -> None:
        """To the hypervisor's side, which may have limits of its own to keep the same."""
        if new.limits != old.limits:
            news.tell(self._core.paths.run_dir, new.sandbox.cookie)

    def tell_all(self) -> None:
        """Whoever follows ports looks at them anew: a word may have been lost with an earlier daemon."""
        news.tell_all(self._core.paths.run_dir)

    def _put_back(self, switch: Switch, port: Port, kind: str, entry: int) -> None:
        """After a refusal: the former settings. If these are refused too, the next start tries again.

        Unless the device is gone, which is what was refused then, and what the events are about to tell.
        """
        with self._store.transaction(durable=True):
            self._store.put_port(port)
        self._core.faults.at(f"undo-{kind}:intent")
        try:
            self._apply(switch, _plan(port, kind), f"undo-{kind}")
        except PortwrightError as error:
            if self._where(port) is not None:
                log.error("port %s: its settings of before could not be put back: %s", port.port_id, error)
                return
        self._store.finish(entry, "failed")

    # -- by recovery -----------------------------------------------------------------------------

    def finish(self, kind: str, port: Port, entry: int) -> None:
        """Carries an interrupted change to its end: all that can be set is what the record says.

        Without a device the record alone counts: it is in force with the next one.
        """
        switch = self._where(port)
        if switch is None:
            self._store.finish(entry, "failed")
            return
        self._apply(switch, _plan(port, kind), kind)
        self._tell(switch, port, mtu=port.mtu)
        self._core.faults.at(f"{kind}:told")
        self._store.finish(entry, "done")
        self._core.faults.at(f"{kind}:commit")

    # -- by event --------------------------------------------------------------------------------

    def mtu_changed(self, port: Port, mtu: int) -> Port:
        """The representor's MTU was changed with ``ip link``: record, data path and sandbox follow (R11)."""
        changed = self.set(port, mtu=mtu, heard=True)
        if changed.admin == "up":  # below 1,280 bytes the kernel took IPv6 away, and its routes with it
            self.refresh(changed)
        return changed

    def admin_changed(self, port: Port, admin: str) -> Port:
        """The representor was set up or down with ``ip link``: as if by ``port set --admin``."""
        return self.set(port, admin=admin, heard=True)

    def keep_mtu(self, port: Port) -> None:
        """Puts back the MTU on record, and the routes that the other one may have cost."""
        self.set(port, mtu=port.mtu)
        if port.admin == "up":
            self.refresh(port)

    def keep_mac(self, port: Port) -> None:
        """Puts back the MAC on record inside: the guest is held to it, and can't be told another."""
        switch = self._core.switch_of(port)
        if switch is not None:
            self._tell(switch, port, mac=port.mac)

    def keep_gateway(self, switch: Switch, port: Port) -> None:
        """Puts back the representor's MAC, which the sandbox sends to, and the neighbours that it cost."""
        switch.rtnl.execute([rtnl.link_set(port.rep_ifindex, mac=GATEWAY_MAC)])
        if port.admin == "up":
            self.refresh(port)

    def refresh(self, port: Port) -> None:
        """Puts back the host's routes and neighbours, which the kernel flushes when a link goes down."""
        switch = self._core.switch_of(port)
        if switch is not None:
            self._apply(switch, list(veth.reach(port, again=True)), "refresh")

    def bring_back(self, switch: Switch, port: Port, moved_to: int, index: int) -> Port | None:
        """The representor went to another namespace: moves it back and guards it again (R13).

        ``moved_to`` is that namespace's id in the switch's own, ``index`` the ifindex there: as the
        kernel announced, so that nobody can pass off another device. None if it is not there any more;
        what raises leaves it down, in the switch's namespace or there.
        """
        if rtnl.link_by_name(switch.rtnl, port.rep_name) is None and not _fetch(
            switch, port, moved_to, index
        ):
            return None
        plan = veth.restore(port)
        with self._store.transaction(durable=True):
            entry = self._store.begin(port.port_id, "restore", encode(plan))
        link = rtnl.link_by_name(switch.rtnl, port.rep_name)
        if link is not None:  # its IPv6 state began anew with the move
            with contextlib.suppress(PortwrightError):
                switch.rtnl.execute([rtnl.link_set(link.index, addrgenmode="none")])
        try:
            with Applier(switch, None, self._core.faults) as applier:
                applier.apply(plan, "restore", undo=False)
                back = msgspec.structs.replace(port, rep_ifindex=applier.rep_ifindex)
        except BaseException:
            self._store.finish(entry, "failed")
            raise
        with self._store.transaction(durable=True):
            self._store.put_port(back)
            self._store.finish(entry, "done")
        return back

    # -- steps -----------------------------------------------------------------------------------

    def _where(self, port: Port) -> Switch | None:
        """The switch in which the port's own representor is; None if it is in none."""
        switch = self._core.switch_of(port) if port.state is PortState.ATTACHED else None
        link = rtnl.link_by_name(switch.rtnl, port.rep_name) if switch is not None else None
        return switch if link is not None and link.index == port.rep_ifindex else None

    def _apply(self, switch: Switch, plan: Sequence[Operation], kind: str) -> None:
        with Applier(switch, None, self._core.faults) as applier:
            applier.apply(plan, kind, undo=False)

    def _tell(self, switch: Switch, port: Port, *, mtu: int | None = None, mac: str | None = None) -> None:
        """Sets it on the sandbox's end and its tap. It is theirs to refuse: then it is only enforced."""
        word = "MTU" if mac is None else "MAC"
        fd = self._core.sandbox_fd(port) if port.model != veth.DIRECT else None
        if fd is None:
            return
        try:
            with NetlinkSocket(netns_fd=fd) as sock:
                device = _device(switch, port, sock)
                if device is None:
                    log.warning(
                        "port %s: its device is not in its sandbox, the %s is not told", port.port_id, word
                    )
                else:
                    sock.execute([rtnl.link_set(device.index, mtu=mtu, mac=mac)])
                if port.tap and rtnl.link_by_name(sock, port.tap) is not None:
                    sock.execute([rtnl.link_set(port.tap, mtu=mtu, mac=mac)])
        except PortwrightError as error:
            log.warning("port %s: the sandbox's end keeps its %s: %s", port.port_id, word, error)
        finally:
            os.close(fd)


def _plan(
    port: Port, kind: str, *, mtu: bool = True, limits: bool = True, admin: bool = True
) -> tuple[Operation, ...]:
    """What puts these settings of a port in force. ``heard`` leaves the representor itself alone."""
    plan: list[Operation] = []
    if mtu:
        plan.append(SetLink(where="host", name=port.rep_name, mtu=port.mtu))
    if mtu or limits:
        plan += [veth.entry(port), veth.targets(port)]
    if admin:
        plan += veth.enable(port) if port.admin == "up" else veth.disable(port)
    return tuple(o for o in plan if not (kind == HEARD and isinstance(o, SetLink)))


def complete(limits: Limits) -> Limits:
    """A rate without a burst gets 100 ms of it, at least 64 KiB: one GSO packet.

    Raises InvalidInput for a number that no map can hold.
    """
    for field, number in msgspec.structs.asdict(limits).items():
        if not 0 <= number < 2**63:
            raise InvalidInput(f"limits.{field}", number, "must be 0 to 2^63 - 1, in bits")
    least = 65536 * 8

    def burst(rate: int, given: int) -> int:
        return given or (max(rate // 10, least) if rate else 0)

    return msgspec.structs.replace(
        limits,
        egress_burst=burst(limits.egress_rate, limits.egress_burst),
        ingress_burst=burst(limits.ingress_rate, limits.ingress_burst),
    )


def _device(switch: Switch, port: Port, sandbox: NetlinkSocket) -> rtnl.LinkInfo | None:
    """The representor's peer as found in the sandbox: by number, for the sandbox may have renamed it."""
    rep = rtnl.link_by_name(switch.rtnl, port.rep_name)
    if rep is None:
        return None
    device = rtnl.link_by_index(sandbox, rep.link_index)
    # It may have gone on to a third namespace, and its number here be another device's.
    return device if device is not None and (device.kind, device.link_index) == ("veth", rep.index) else None


def _fetch(switch: Switch, port: Port, moved_to: int, index: int) -> bool:
    fd = nsid.find(switch.rtnl, moved_to)
    if fd is None:
        return False
    try:
        with NetlinkSocket(netns_fd=fd) as there:
            link = rtnl.link_by_index(there, index)
            if link is None or f"port-{port.port_id}" not in link.altnames:
                return False
            name = port.rep_name if port.rep_name not in (link.name, *link.altnames) else None
            there.execute([rtnl.link_set(index, netns_fd=switch.fd, name=name)])
    finally:
        os.close(fd)
    return True
