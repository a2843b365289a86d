"""The data path in one host namespace: its maps, its two programs, their links.

The kernel owns all of it. Maps, programs and links are pinned below ``<run-dir>/bpf``, so a daemon
that stops, is killed or is upgraded drops no packet: the next one opens the pins. The directory

    <cookie of the namespace>/maps/<map>
                             /object-<hash of the object file>/<program>
                             /links/<port_id>_<direction>

says by its own names which object's programs are in force. An upgraded object is loaded onto the
pinned maps, and each link is switched to the new program in one atomic update
(``bpf_link_update``; on clsact a filter replaced under the same handle).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from portwright.dataplane import OBJECT, values
from portwright.dataplane.abi import SIZES, PwAbi, PwState, PwStateFlag
from portwright.kernel import clsact, netns, rtnl
from portwright.kernel.bpf import (
    Collection,
    CollectionSpec,
    Direction,
    Link,
    Map,
    Program,
    features,
    possible_cpus,
)
from portwright.kernel.netlink import NETLINK_NETFILTER, NetlinkSocket
from portwright.kernel.nft import Nft
from portwright.kernel.reaper import LinkReaper
from portwright.model.errors import Conflict, InternalError, InvalidInput, KernelFailed
from portwright.model.port import NetnsRef
from portwright.node import clones, older, taps
from portwright.node.faults import Faults

PROGRAMS = {"ingress": "pw_from_port", "egress": "pw_to_port"}
#: ABIs of which what stands in the maps means the same to these programs, or is carried over (node/older.py);
#: not so the other way round.
_OLDER_ABIS = (3, 4)
DIRECTIONS: tuple[Direction, Direction] = ("ingress", "egress")


class Switch:
    """Owns the descriptors of one namespace's data path. Close it to let go of them, not of the pins."""

    def __init__(self, ref: NetnsRef, fd: int, pins: Path, instance: str, faults: Faults) -> None:
        self._faults = faults
        self.ref = ref
        self.fd = fd
        self.pins = pins
        self.rtnl = NetlinkSocket(netns_fd=fd)
        self._reaper: LinkReaper | None = None
        self._joiner: taps.Joiner | None = None
        self._cloner: Program | None = None
        self.instance = instance
        self._nft: Nft | None = None
        self._conntrack: NetlinkSocket | None = None
        self._helper: ThreadPoolExecutor | None = None
        self.maps: dict[str, Map] = {}
        self.programs: dict[str, Program] = {}
        #: our nft table is there and current (see node.nat)
        self.nat_ready = False
        #: names of networks whose host side is ready (see node.core)
        self.prepared: set[str] = set()

    @classmethod
    def open(cls, ref: NetnsRef, fd: int, bpf_dir: Path, instance: str, faults: Faults) -> Switch:
        """Opens or makes the data path of the namespace behind ``fd`` (which it takes over)."""
        switch = cls(ref, fd, bpf_dir / f"{ref.cookie:x}", instance, faults)
        try:
            switch._load()
        except BaseException:
            switch.close()
            raise
        return switch

    @property
    def reaper(self) -> LinkReaper:
        """Deletes links of this namespace; made at first use."""
        if self._reaper is None:
            self._reaper = LinkReaper(self.fd)
        return self._reaper

    @property
    def joiner(self) -> taps.Joiner:
        """What joins a tap with its device (node.taps), one for all ports; loaded at first use."""
        if self._joiner is None:
            self._joiner = taps.Joiner()
        return self._joiner

    @property
    def cloner(self) -> Program:
        """What joins a clone's (node.clones); loaded at first use, and its map then is beside the others."""
        if self._cloner is None:
            self._cloner = clones.load(self.maps, self.pins / "maps")
        return self._cloner

    @property
    def nft(self) -> Nft:
        """The nftables of this namespace; the context is made at first use."""
        if self._nft is None:
            self._nft = Nft(self.fd)
        return self._nft

    def beside(self, work: Callable[[], None]) -> Future[None]:
        """Does ``work`` in a thread, one after the other; the caller waits for its end before it answers.

        For what the kernel is long at and nothing else waits for; it must touch nothing that the caller uses.
        """
        if self._helper is None:
            self._helper = ThreadPoolExecutor(max_workers=1, thread_name_prefix="beside")
        return self._helper.submit(work)

    @contextlib.contextmanager
    def conntrack(self) -> Iterator[NetlinkSocket]:
        """A netfilter socket of this namespace, kept from one use to the next.

        Kept because *closing* one waits until nf_tables has freed what the last transaction removed
        (nft_rcv_nl_event, net/netfilter/nf_tables_api.c): two RCU grace periods, 14 ms of a DEL.
        """
        if self._conntrack is None:
            self._conntrack = NetlinkSocket(NETLINK_NETFILTER, self.fd)
        try:
            yield self._conntrack
        except KernelFailed:  # answers may still be on their way
            self._conntrack.close()
            self._conntrack = None
            raise

    def _load(self) -> None:
        digest = hashlib.sha256(OBJECT.read_bytes()).hexdigest()[:16]
        current = self.pins / f"object-{digest}"
        if all((current / name).exists() for name in PROGRAMS.values()):
            self._open_pins(current)
            if self._others(current):  # an upgrade that a crash cut short
                self._take_over(current)
            return
        for part in ("maps", "links"):
            (self.pins / part).mkdir(parents=True, exist_ok=True)
        spec = CollectionSpec.load(OBJECT)
        reuse = {p.name: Map.from_pin(p) for p in (self.pins / "maps").iterdir() if p.name in spec.maps}
        if reuse:
            self._check_abi(reuse)
        with contextlib.ExitStack() as stack:
            for old in reuse.values():
                stack.enter_context(contextlib.closing(old))
            collection = stack.enter_context(contextlib.closing(Collection.load(spec, reuse=reuse)))
            # The state is pinned first and removed last: maps without it could be any version's.
            for name in sorted(collection.maps, key=lambda name: name != "pw_state"):
                if name not in reuse:
                    collection.maps[name].pin(self.pins / "maps" / name)
                    self._faults.at("load:maps")
            current.mkdir(exist_ok=True)
            for name in PROGRAMS.values():
                if not (current / name).exists():
                    collection.programs[name].pin(current / name)
        self._open_pins(current)
        self._faults.at("load:programs")
        self._take_over(current)

    def _others(self, current: Path) -> list[Path]:
        return [path for path in self.pins.glob("object-*") if path != current]

    def _take_over(self, current: Path) -> None:
        """Puts the current programs in force; the older ones' pins go last, so that a crash is noticed."""
        self._set_state()
        older.carry(self.maps)
        self._replace_programs()
        older.forget(self.pins)
        for old_object in self._others(current):
            _remove_pins(old_object)

    def _open_pins(self, current: Path) -> None:
        self.maps = {p.name: Map.from_pin(p) for p in (self.pins / "maps").iterdir()}
        self.programs = {name: Program.from_pin(current / name) for name in PROGRAMS.values()}

    def _check_abi(self, maps: dict[str, Map]) -> None:
        raw = maps["pw_state"].lookup(bytes(4)) if "pw_state" in maps else None
        if raw is None or PwState.unpack(raw).abi not in (0, *_OLDER_ABIS, PwAbi.ABI_VERSION):
            raise Conflict(
                "data path",
                str(self.pins),
                "its maps are of another version; detach the ports with the release that made them",
            )

    def _set_state(self, flags: int | None = None) -> None:
        raw = self.maps["pw_state"].lookup(bytes(4))
        if raw is None:
            raise InternalError("pw_state has no entry")
        state = PwState.unpack(raw)
        new = state._replace(abi=PwAbi.ABI_VERSION, flags=state.flags if flags is None else flags)
        self.maps["pw_state"].update(bytes(4), new.pack())

    def set_slow_only(self, on: bool) -> None:
        """Sends all local traffic through the host's stack: for comparison (R7) and for debugging."""
        self._set_state(PwStateFlag.SF_SLOW_ONLY if on else 0)

    # -- programs on a representor ---------------------------------------------------------------

    def link_pin(self, port_id: str, direction: str) -> Path:
        """Where a TCX link of the port is pinned, or would be."""
        return self.pins / "links" / f"{port_id}_{direction}"

    def attach(
        self, port_id: str, ifindex: int, direction: Direction, how: str, *, fresh: bool = False
    ) -> None:
        """Attaches; with ``how`` tcx also pins: an older pin of the port (its device is gone) is replaced.

        ``fresh``: the device was made a moment ago, so the careful way is only taken if that turns out wrong.
        """
        if how == "clsact":
            if fresh and self._put_fresh_filter(ifindex, direction):
                return
            clsact.ensure_clsact(self.rtnl, ifindex)
            self._put_filter(ifindex, direction)
            return
        program = self.programs[PROGRAMS[direction]]
        if self.attached(port_id, ifindex, direction):
            return  # a link goes with its device to another namespace and back
        pin = self.link_pin(port_id, direction)
        with netns.entered(self.fd), contextlib.closing(Link.attach_tcx(program, ifindex, direction)) as link:
            pin.unlink(missing_ok=True)
            link.pin(pin)

    def detach(self, port_id: str, direction: Direction) -> None:
        """Unpins; with the device gone nothing is left of the link. On clsact it went with the device."""
        self.link_pin(port_id, direction).unlink(missing_ok=True)

    def attached(self, port_id: str, ifindex: int, direction: Direction) -> bool:
        """Whether our current program is on this device."""
        program = self.programs[PROGRAMS[direction]]
        pin = self.link_pin(port_id, direction)
        if not pin.exists():
            return any(
                (f.pref, f.handle, f.prog_id) == (clsact.OUR_PREF, clsact.OUR_HANDLE, program.id)
                for f in clsact.list_filters(self.rtnl, ifindex, direction)
            )
        try:
            link = Link.from_pin(pin)
        except KernelFailed:
            return False
        with contextlib.closing(link):
            info = link.info()
        return info.ifindex == ifindex and info.prog_id == program.id

    def _put_filter(self, ifindex: int, direction: Direction) -> None:
        """Our filter in our slot; one that is there is replaced in one step."""
        name = PROGRAMS[direction]
        fd = self.programs[name].fd
        clsact.attach_bpf(
            self.rtnl, ifindex, direction, fd, name=name, pref=clsact.OUR_PREF, handle=clsact.OUR_HANDLE
        )

    def _put_fresh_filter(self, ifindex: int, direction: Direction) -> bool:
        name = PROGRAMS[direction]
        fd = self.programs[name].fd
        return clsact.attach_fresh(
            self.rtnl, ifindex, direction, fd, name=name, pref=clsact.OUR_PREF, handle=clsact.OUR_HANDLE
        )

    def _replace_programs(self) -> None:
        """Moves every live link and filter to the programs of the object just loaded."""
        for key, value in list(self.maps["pw_ports"].items()):
            ifindex, port_id = int.from_bytes(key, sys.byteorder), values.port_text(value)
            if rtnl.link_by_index(self.rtnl, ifindex) is None:
                continue
            for hook in DIRECTIONS:
                if not self.link_pin(port_id, hook).exists():
                    self._put_filter(ifindex, hook)
        for pin in sorted((self.pins / "links").iterdir()):
            direction = pin.name.rpartition("_")[2]
            with contextlib.closing(Link.from_pin(pin)) as link:
                if link.info().ifindex:
                    link.update(self.programs[PROGRAMS[direction]])

    # -- counters --------------------------------------------------------------------------------

    def make_counters(self, port_id: str) -> None:
        """Zeroed counters, unless the port has some already."""
        counters, key = self.maps["pw_counters"], values.port_key(port_id)
        if counters.lookup_percpu(key) is None:
            counters.update_percpu(key, [bytes(SIZES["PwCounters"])] * possible_cpus())

    def forget_counters(self, port_id: str) -> None:
        """Removes the counters and drop counts of a port; those of others stay."""
        self.maps["pw_counters"].delete(values.port_key(port_id))
        drops = self.maps["pw_drops"]
        for key in values.drop_keys(port_id):
            drops.delete(key)

    def port_links(self) -> Iterator[tuple[str, Path]]:
        """(port_id, pin) of every pinned link, for the reconciler."""
        for pin in (self.pins / "links").iterdir():
            yield pin.name.rpartition("_")[0], pin

    # -- end -------------------------------------------------------------------------------------

    def close(self) -> None:
        """Lets go of descriptors; the data path stays in force."""
        for thing in (*self.maps.values(), *self.programs.values()):
            thing.close()
        self.maps, self.programs = {}, {}
        self.rtnl.close()
        if self._joiner is not None:
            self._joiner.close()
            self._joiner = None
        if self._cloner is not None:
            self._cloner.close()
            self._cloner = None
        if self._reaper is not None:
            self._reaper.close()
            self._reaper = None
        if self._nft is not None:
            self._nft.close()
            self._nft = None
        if self._helper is not None:
            self._helper.shutdown(wait=True)
            self._helper = None
        if self._conntrack is not None:
            self._conntrack.close()
            self._conntrack = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def remove(self) -> None:
        """Takes the data path away. The caller made sure that no port is left."""
        pins = self.pins
        self.close()
        for old_object in pins.glob("object-*"):  # first, so that a crash leaves none without its maps
            _remove_pins(old_object)
        for path in (pins / "maps").glob("*"):
            if path.name != "pw_state":
                path.unlink(missing_ok=True)
                self._faults.at("close:pins")
        _remove_pins(pins)


def attach_mode(wanted: str = "") -> str:
    """``tcx`` or ``clsact``: as wanted, else ``PORTWRIGHT_ATTACH``, else clsact (docs/design.md, Attaching).

    Raises InvalidInput for another word, KernelTooOld if ``tcx`` is asked for and not there.
    """
    word = wanted or os.environ.get("PORTWRIGHT_ATTACH", "clsact")
    if word not in ("clsact", "tcx"):
        raise InvalidInput("attach", word, "must be tcx or clsact")
    if word == "tcx":
        features.probe("tcx").require()
    return word


def _remove_pins(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
