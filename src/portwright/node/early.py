"""Packets that an untracked policy denies whatever they are, dropped by XDP on the host's interface.

It saves the stack the work of a flood and decides nothing: the host's nftables table denies the same. So
where there can be no XDP program, as there is another's or no such interface, that is only told.

Of each interface a folder ``early/<hash of its name>`` beside the data path's pins has the link and the map,
which stay as long as those. A change is a new map with a new program, put into the link in one step.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final, Protocol, TypeAlias

from portwright.dataplane import policy_values
from portwright.dataplane.abi import PwCounter, PwPolicyConst
from portwright.kernel import netns, rtnl
from portwright.kernel.bpf import Collection, CollectionSpec, Link, Map, Program
from portwright.kernel.netlink import NetlinkSocket
from portwright.model.errors import KernelFailed
from portwright.policy.host.stages import FAILSAFE_IN, FAILSAFE_OUT

OBJECT: Final = Path(__file__).parent.parent / "dataplane" / "early.bpf.o"
PROGRAM: Final = "pw_early_drop"
_TO, _FROM = 1, 2

Nets: TypeAlias = tuple[str, ...]


class Namespace(Protocol):
    """What is needed of the switch of our own namespace."""

    fd: int
    rtnl: NetlinkSocket
    pins: Path


class Early:
    """One for the node. ``lacking``: by interface, why its drops are left to the host's stack."""

    def __init__(self) -> None:
        """Nothing is put anywhere yet."""
        self._pins = Path()
        self._there: dict[str, tuple[int, Nets]] = {}  # by interface: its number, and what is dropped there
        self.lacking: dict[str, str] = {}

    def put(self, own: Namespace, wanted: Mapping[str, Nets]) -> None:
        """On these interfaces drop what comes from these nets, and nothing on others.

        What can't be is in ``lacking``, and no error.
        """
        self._pins = own.pins / "early"
        self.lacking = {}
        kept = {_folder(name) for name in wanted}
        for stale in self._pins.glob("*"):
            if stale.name not in kept:
                shutil.rmtree(stale, ignore_errors=True)
        self._there = {name: there for name, there in self._there.items() if name in wanted}
        for name, nets in wanted.items():
            link = rtnl.link_by_name(own.rtnl, name)
            if link is None or link.name != name:
                self._there.pop(name, None)
                self.lacking[name] = f"{name} is not there"
            elif self._there.get(name) != (link.index, nets):
                try:
                    self._attach(own, name, link.index, nets)
                except KernelFailed as error:
                    self._there.pop(name, None)
                    another = error.errno == errno.EBUSY
                    self.lacking[name] = f"{name} has another's XDP program" if another else str(error)
                else:
                    self._there[name] = link.index, nets

    def dropped(self) -> Iterator[tuple[str, str, int, int]]:
        """(interface, net, packets, bytes), since the interface's nets were last changed; none of none."""
        for name, (_, nets) in self._there.items():
            with (
                contextlib.suppress(KernelFailed),
                contextlib.closing(Map.from_pin(self._pin(name, "map"))) as kept,
            ):
                counted = {key: PwCounter.unpack(value) for key, value in kept.items()}
                for net in nets:
                    count = counted.get(policy_values.net_key(net))
                    if count is not None and count.packets:
                        yield name, net, count.packets, count.octets

    def _attach(self, own: Namespace, name: str, ifindex: int, nets: Nets) -> None:
        spec = CollectionSpec.load(OBJECT)
        most = min(max(len(nets), 1), PwPolicyConst.MAX_PEERS)
        with contextlib.closing(Collection.load(spec, max_entries={"pw_early": most})) as made:
            counted = PwCounter(0, 0).pack()
            made.maps["pw_early"].update_batch((policy_values.net_key(net), counted) for net in nets[:most])
            made.maps["pw_failsafes"].update_batch(_failsafes())
            self._pin(name, "map").parent.mkdir(parents=True, exist_ok=True)
            self._link(own, name, ifindex, made.programs[PROGRAM])
            self._pin(name, "map").unlink(missing_ok=True)
            made.maps["pw_early"].pin(self._pin(name, "map"))

    def _link(self, own: Namespace, name: str, ifindex: int, program: Program) -> None:
        """Puts the program into the interface's link; a link of a device that is gone is made anew."""
        pin = self._pin(name, "link")
        if pin.exists():
            with contextlib.closing(Link.from_pin(pin)) as link:
                if link.info().ifindex == ifindex:
                    link.update(program)
                    return
            pin.unlink()
        with netns.entered(own.fd):
            try:
                link = Link.attach_xdp(program, ifindex)
            except KernelFailed as error:
                if error.errno == errno.EBUSY:
                    raise
                link = Link.attach_xdp(program, ifindex, "generic")  # a driver that can't, with this MTU say
        with contextlib.closing(link):
            link.pin(pin)

    def _pin(self, name: str, what: str) -> Path:
        return self._pins / _folder(name) / what


def _folder(interface: str) -> str:
    """A name without a dot, which a bpffs does not take and VLAN interfaces have."""
    return hashlib.sha256(interface.encode()).hexdigest()[:16]


def _failsafes() -> Iterable[tuple[bytes, bytes]]:
    flags: dict[int, int] = {}
    for flag, ports in ((_TO, FAILSAFE_IN), (_FROM, FAILSAFE_OUT)):
        for protocol, numbers in ports.items():
            for number in numbers:
                key = protocol << 16 | number
                flags[key] = flags.get(key, 0) | flag
    return (
        (policy_values.number_value(key), policy_values.number_value(value)) for key, value in flags.items()
    )
