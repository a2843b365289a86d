"""What the services share: the record, the switches, the networks' state in each of them."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path

from portwright.dataplane.abi import PwReachKey
from portwright.kernel import ifreq, netns, rtnl, sysctl
from portwright.kernel.bpf import is_bpffs, mount_bpffs, umount_bpffs
from portwright.model.errors import InvalidInput, KernelFailed
from portwright.model.network import Network
from portwright.model.port import NetnsRef, Port
from portwright.node import moved, nat, sandbox, steer
from portwright.node.faults import Faults
from portwright.node.hosts import Hosts
from portwright.node.paths import Paths
from portwright.node.policies import Policies
from portwright.node.switch import Switch
from portwright.store import Store

#: Host-wide switches that routing needs. Their former values are recorded and put back.
_FORWARDING = ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding")
DEFAULT_MTU = 1500

log = logging.getLogger(__name__)


class Core:
    """Opened by the daemon, used by one thread."""

    def __init__(self, paths: Paths, store: Store, faults: Faults, node_name: str = "") -> None:
        self.paths = paths
        self.store = store
        self.faults = faults
        self.boot_id = netns.boot_id()
        self.started = time.time()
        #: what happened to our side of the host by someone else's hand; the newest last
        self.alarms: deque[str] = deque(maxlen=32)
        #: what happened to look-ups of domain names so far, by word (node.domains)
        self.look_ups: Counter[str] = Counter()
        self.switches: dict[int, Switch] = {}
        self.node_name = node_name or socket.gethostname()
        hosts = Hosts(store, self.switch_for, self.node_name, faults)
        self.policies = Policies(store, self.switches, faults, hosts)
        self.policies.chained = lambda: [one.port for one in store.chained()]
        self.strays = self._find_strays()
        self._own_fd = netns.self_fd()
        self.own_cookie = netns.cookie(self._own_fd)

    @classmethod
    def open(cls, paths: Paths, faults: Faults, node_name: str = "") -> Core:
        """Opens the record and our bpffs. Raises Conflict if another daemon holds the state.

        ``node_name``: what HostEndpoints call this host, '' for its own name.
        """
        paths.run_dir.mkdir(parents=True, exist_ok=True, mode=0o755)
        store = Store.open(paths.state_dir)
        try:
            boot_id = netns.boot_id()
            if store.note_boot(boot_id) != boot_id:
                # of an earlier boot: what is there today is not ours
                for kind in ("sysctl", steer.KIND, moved.KIND):
                    for thing in store.owned(kind):
                        store.disown(kind, thing.name)
            paths.bpf.mkdir(exist_ok=True, mode=0o700)
            there = is_bpffs(paths.bpf)
            if not there or (paths.bpf.is_mount() and not store.owned("mount")):  # or the record was lost
                store.own("mount", str(paths.bpf))
            if not there:
                mount_bpffs(paths.bpf)
            return cls(paths, store, faults, node_name)
        except BaseException:
            store.close()
            raise

    def close(self) -> None:
        """Lets go of everything; the data path stays in force. With no port left, it goes too."""
        try:
            if self.store.port_count() == 0:
                self._remove_everything()
        finally:
            for switch in self.switches.values():
                switch.close()
            self.switches.clear()
            os.close(self._own_fd)
            self.store.close()

    def alarm(self, sentence: str, why: str = "") -> None:
        """Said once as long as it is among the latest: who does it in a loop drives out no other's.

        ``why`` is for the log alone, and may differ.
        """
        if sentence not in self.alarms:
            log.error("%s", f"{sentence}: {why}" if why else sentence)
            self.alarms.append(sentence)

    # -- switches --------------------------------------------------------------------------------

    def entered(self, fd: int) -> contextlib.AbstractContextManager[None]:
        """This thread in the namespace behind ``fd``, and back at the end; for layers above the kernel's."""
        return netns.entered(fd)

    def switch_for(self, fd: int | None = None) -> Switch:
        """The switch of the namespace behind ``fd`` (stays the caller's), or of our own."""
        source = self._own_fd if fd is None else fd
        for known in self.switches.values():
            # While a switch holds its namespace open, no other one has its inode.
            if netns.same(source, known.fd):
                return known
        if fd is not None and not netns.is_netns(fd):
            raise InvalidInput(
                "netns", str(Path(f"/proc/self/fd/{fd}").readlink()), "is no network namespace"
            )
        cookie = self.own_cookie if fd is None else netns.cookie(fd)
        path = "" if cookie == self.own_cookie else str(Path(f"/proc/self/fd/{source}").readlink())
        ref = NetnsRef(path=path, cookie=cookie, boot_id=self.boot_id)
        switch = Switch.open(ref, os.dup(source), self.paths.bpf, self.paths.instance, self.faults)
        self.switches[cookie] = switch
        self._write_reach(switch)
        return switch

    def switch_of(self, port: Port) -> Switch | None:
        """The switch that holds the port's representor; None if its namespace is gone."""
        if port.host.boot_id != self.boot_id:
            return None
        switch = self.switches.get(port.host.cookie)
        if switch is not None:
            return switch
        if port.host.cookie == self.own_cookie:
            return self.switch_for()
        fd = netns.find_by_cookie(port.host.cookie)
        if fd is None:
            return None
        with contextlib.closing(_Fd(fd)):
            return self.switch_for(fd)

    def sandbox_fd(self, port: Port) -> int | None:
        """A descriptor (the caller closes it) of the port's sandbox if it still lives."""
        return sandbox.find(port.sandbox, self.boot_id)

    def drop_idle_switch(self, switch: Switch) -> None:
        """Removes the data path of a foreign namespace once its last port is gone."""
        if switch.ref.cookie == self.own_cookie:
            return
        if any(p.host.cookie == switch.ref.cookie for p in self.store.ports()):
            return
        del self.switches[switch.ref.cookie]
        self._remove(switch)

    def drop_remains(self, cookie: int) -> str:
        """Removes what a crash left of a foreign namespace's data path. Says what that was; '' if in use."""
        if cookie in self.switches or any(p.host.cookie == cookie for p in self.store.ports()):
            return ""
        fd = netns.find_by_cookie(cookie)
        if fd is not None:
            with contextlib.closing(_Fd(fd)):
                switch = self.switch_for(fd)
            self.drop_idle_switch(switch)
            return f"namespace {cookie:x}: no port is left, its data path is removed"
        shutil.rmtree(self.paths.bpf / f"{cookie:x}", ignore_errors=True)
        for thing in self.store.owned("sysctl"):
            if thing.name.startswith(f"{cookie:x}:"):
                self.store.disown("sysctl", thing.name)
        self.store.disown(steer.KIND, f"{cookie:x}")
        return f"namespace {cookie:x}: gone, and its data path with it"

    def remembered(self) -> set[int]:
        """The cookies of namespaces of which something of ours is pinned or recorded."""
        # A bpffs also has files of the kernel's own: maps.debug, progs.debug (kernel/bpf/inode.c).
        names = [path.name for path in self.paths.bpf.iterdir() if path.is_dir()]
        names += [thing.name.partition(":")[0] for thing in self.store.owned("sysctl")]
        names += [thing.name for thing in self.store.owned(steer.KIND)]
        return {int(name, 16) for name in names}

    def _remove(self, switch: Switch) -> None:
        """All that we keep in a namespace for its ports, of which none is left."""
        try:
            steer.unsteer(self.store, switch, self.faults)
            self.faults.at("close:steer")
            nat.remove_table(switch)
            self.faults.at("close:table")
        except KernelFailed as error:
            log.error("nftables table: %s", error)
        moved.drop_addresses(self.store, switch)
        self._restore_forwarding(switch)
        self.faults.at("close:sysctl")
        switch.remove()

    # -- networks in a switch --------------------------------------------------------------------

    def prepare(self, switch: Switch, network: Network) -> None:
        """Makes the host side of a network ready: forwarding, subnets, reach. Idempotent and cheap."""
        if network.name in switch.prepared:
            return
        self._set_forwarding(switch)
        self.declare(switch, (*self._live_networks(switch), network))
        switch.prepared.add(network.name)

    def declare(self, switch: Switch, networks: tuple[Network, ...]) -> None:
        """Writes the subnets of the networks in use, and who may reach whom."""
        nat.declare_subnets(switch, {n.name: n for n in networks}.values(), self.strays_in(switch))
        self._write_reach(switch)

    def strays_in(self, switch: Switch) -> list[Port]:
        """The ports of a switch with an address outside of their network's pools."""
        return [p for p in self.strays.values() if p.host.cookie == switch.ref.cookie]

    def admit(self, switch: Switch, port: Port) -> None:
        """A port is about to work: its policy comes into force, and its stray addresses are declared."""
        self.policies.admit(switch, port)
        known = self.store.get_network(port.network)
        if nat.stray_addresses(port, known):
            self.strays[port.port_id] = port
            self.declare(switch, self._live_networks(switch))

    def dismiss(self, switch: Switch | None, port: Port) -> None:
        """A port is gone: so are its stray addresses, and its part in policy."""
        self.policies.dismiss(port)
        if self.strays.pop(port.port_id, None) is not None and switch is not None and switch.nat_ready:
            self.declare(switch, self._live_networks(switch))

    def _find_strays(self) -> dict[str, Port]:
        known = {n.name: n for n in self.store.networks()}
        return {
            p.port_id: p
            for p in self.store.ports()
            if p.network in known and nat.stray_addresses(p, known[p.network])
        }

    def refresh_networks(self) -> None:
        """After a network changed: all switches learn it, and so does policy."""
        self.policies.networks_changed()
        self.strays = self._find_strays()
        for switch in self.switches.values():
            if switch.nat_ready:
                self.declare(switch, self._live_networks(switch))

    def _live_networks(self, switch: Switch) -> tuple[Network, ...]:
        known = {n.name: n for n in self.store.networks()}
        return tuple(known[name] for name in sorted(switch.prepared) if name in known)

    def _write_reach(self, switch: Switch) -> None:
        wanted = {
            PwReachKey(from_net=a.net_id, to_net=b.net_id).pack()
            for a, b in reach_pairs(self.store.networks())
        }
        reach = switch.maps["pw_reach"]
        present = set(reach.keys())
        for key in present - wanted:
            reach.delete(key)
        for key in wanted - present:
            reach.update(key, (1).to_bytes(4, sys.byteorder))

    def uplink_mtu(self, switch: Switch) -> int:
        """The MTU of the device of the default route (IPv4's first), or 1500 without one."""
        for family in (socket.AF_INET, socket.AF_INET6):
            index = rtnl.default_oif(switch.rtnl, family)
            name = ifreq.name(switch.rtnl, index) if index else None
            mtu = ifreq.mtu(switch.rtnl, name) if name else None
            if mtu:
                return min(mtu, 65535)
        return DEFAULT_MTU

    def interface_to(self, address: str) -> str:
        """The interface by which our own namespace reaches an address; '' for none, and for its own."""
        link = rtnl.device_to(self.switch_for().rtnl, address)
        return "" if link is None else link.name

    # -- host-wide sysctls -----------------------------------------------------------------------

    def _set_forwarding(self, switch: Switch) -> None:
        for path in _FORWARDING:
            with contextlib.suppress(KernelFailed):
                before = sysctl.read(path, netns_fd=switch.fd)
                if before == "1":
                    continue
                self.store.own("sysctl", f"{switch.ref.cookie:x}:{path}", {"before": before})
                if path.startswith("net/ipv6"):
                    self._keep_router_advertisements(switch)
                sysctl.write(path, "1", netns_fd=switch.fd)

    def set_sysctl(self, switch: Switch, path: str, value: str) -> None:
        """Sets one, if it is there, until no port is left in the namespace."""
        with contextlib.suppress(KernelFailed):
            before = sysctl.read(path, netns_fd=switch.fd)
            if before != value:
                detail = {"before": before, "ours": value}
                self.store.own("sysctl", f"{switch.ref.cookie:x}:{path}", detail)
                sysctl.write(path, value, netns_fd=switch.fd)

    def _keep_router_advertisements(self, switch: Switch) -> None:
        """A forwarding host ignores router advertisements unless accept_ra is 2 (ip-sysctl.rst).

        Without this an uplink that has its default route from one would lose it.
        """
        uplink = rtnl.default_uplink(switch.rtnl, socket.AF_INET6)
        if uplink is None:
            return
        path = f"net/ipv6/conf/{uplink.name}/accept_ra"
        if sysctl.read(path, netns_fd=switch.fd) == "1":
            self.store.own("sysctl", f"{switch.ref.cookie:x}:{path}", {"before": "1", "ours": "2"})
            sysctl.write(path, "2", netns_fd=switch.fd)

    def _restore_forwarding(self, switch: Switch) -> None:
        """Puts back what we set, if nobody else changed it since, and no daemon beside us needs it.

        Then it stays on record: with the other one gone, our next start and end puts it back.
        """
        if nat.others(switch):
            return
        prefix = f"{switch.ref.cookie:x}:"
        for thing in self.store.owned("sysctl"):
            if not thing.name.startswith(prefix):
                continue
            path = thing.name.removeprefix(prefix)
            detail = thing.detail if isinstance(thing.detail, dict) else {}
            with contextlib.suppress(KernelFailed):
                if sysctl.read(path, netns_fd=switch.fd) == detail.get("ours", "1"):
                    sysctl.write(path, str(detail.get("before", "0")), netns_fd=switch.fd)
            self.store.disown("sysctl", thing.name)

    def _remove_everything(self) -> None:
        """No port is left: the table, the sysctls, the pins and the mount go as well."""
        for cookie in list(self.switches):
            self._remove(self.switches.pop(cookie))
        for thing in self.store.owned("mount"):
            with contextlib.suppress(KernelFailed):  # busy: it stays on record, for the next time
                umount_bpffs(thing.name)
                self.store.disown("mount", thing.name)
        with contextlib.suppress(OSError):
            self.paths.bpf.rmdir()


def reach_pairs(networks: list[Network]) -> Iterator[tuple[Network, Network]]:
    """Ordered pairs of different networks that may talk.

    Both must name each other, or one names ``*`` and the other is named or names ``*`` too: a
    network opens itself, never another one.
    """
    for a in networks:
        for b in networks:
            if a.name != b.name and _names(a, b) and _names(b, a):
                yield a, b


def _names(network: Network, other: Network) -> bool:
    return "*" in network.reach or other.name in network.reach


class _Fd:
    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        os.close(self.fd)
