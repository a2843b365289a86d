"""What joins a guest's tap with a device: frames a second, gigabits, CPU for each gigabit, and attaching.

A user-space reader and writer on the tap's descriptor, with virtio-net headers and offloads, stands in for
the hypervisor (bench/taps.c). All contenders have the same namespaces, the same veth pair to the host, and no
program on its host end: what differs is what joins tap and device alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from bench.figures import Goal, Part, Series, at_least, at_most
from bench.traffic import CPUS, answer, compiled, turned
from portwright.kernel import netns
from portwright.model.port import NetnsRef
from portwright.node import taps
from portwright.node.sandbox import Sandbox
from portwright.plan.tap_operations import CreateTap, DeleteTap, JoinLinks
from tests.fix_netns import TestNetns

TCFILTER, MIRRED, MACVTAP, BRIDGE = "portwright tcfilter", "u32 + mirred", "macvtap", "bridge"
PEER = "portwright tcfilter, peer"
_DEVICE, _TAP, _HOST = "eth0", "tap0", "h0"
_GUEST_MAC, _HOST_MAC = "02:00:00:00:00:02", "02:00:00:00:00:03"
#: In namespaces that have so many taps already an attach is timed again.
_MANY = 1000


class Place:
    """A guest's namespace and a host's, joined by a veth pair; ``tap`` is what the hypervisor opens."""

    def __init__(self, stack: contextlib.ExitStack, tag: str) -> None:
        mark = f"pwt-{os.getpid()}-{tag}"
        self.guest = TestNetns(f"{mark}g")
        stack.callback(self.guest.close)
        self.host = TestNetns(f"{mark}h")
        stack.callback(self.host.close)
        self.tap = _TAP
        _ip(
            self.host,
            f"link add {_HOST} address {_HOST_MAC} type veth peer name {_DEVICE} netns {self.guest.name}",
            f"link set {_HOST} addrgenmode none",
            f"link set {_HOST} up",
        )
        _ip(self.guest, f"link set {_DEVICE} addrgenmode none", f"link set {_DEVICE} up")


def microvm(rounds: int, milliseconds: int, attaches: int, many: int = _MANY) -> Part:
    """All of it, contenders in turn."""
    with contextlib.ExitStack() as stack:
        program = stack.enter_context(compiled("taps", "-pthread"))
        places = {name: make(stack) for name, make in _CONTENDERS.items()}
        series: list[Series] = []
        goals: list[Goal] = []
        for way, of in (("out", "from the guest"), ("in", "to the guest")):
            for size in ("small", "large"):
                found = {
                    figure: {name: list[float]() for name in places} for figure in ("frames", "gbits", "cpu")
                }
                for turn in range(rounds):
                    for name in turned(tuple(places), turn):
                        said = _run(program, places[name], way, size, milliseconds)
                        for figure, samples in found.items():
                            samples[name].append(float(said[figure]))
                how = f"bench/taps.c, {milliseconds} ms a round, {_SIZES[size]}, a CPU for each end"
                if size == "small":
                    series.append(Series(f"Frames {of}", "frames/s", found["frames"], "more", how, TCFILTER))
                else:
                    speed = Series(f"Super-packets {of}", "Gb/s", found["gbits"], "more", how, TCFILTER)
                    cost = Series(f"CPU {of}", "CPU s per Gb", found["cpu"], "less", how, TCFILTER)
                    series += [speed, cost]
                    goals += _goals(of, speed, cost, TCFILTER)
                    if way == "out":  # to the guest it is the same program
                        goals += _goals(f"{of} by --join peer", speed, cost, PEER)
        attach, again = _attaching(stack, attaches, many)
        series += [attach]
        median = attach.spread("first taps").median
        goals.append(Goal("attach of a tap, made to joined, in under 10 ms", median < 10, f"{median:.2f} ms"))
        goals.append(at_most(f"the same with {many:,} taps there", attach, again, "first taps", 1.3))
    return Part("microvm", series, goals)


def _goals(of: str, speed: Series, cost: Series, ours: str) -> Iterator[Goal]:
    yield at_least(f"gigabits {of}, against macvtap", speed, ours, MACVTAP, 1.0)
    for theirs in (MIRRED, BRIDGE):
        yield at_most(f"CPU per gigabit {of}, against {theirs}", cost, ours, theirs, 1.0)


def quick() -> Part:
    """Whether it works."""
    return microvm(1, 100, 2, 3)


_SIZES = {"small": "UDP datagrams of 1,400 bytes", "large": "TCP super-packets of 60,000 bytes, uncut"}


def _run(program: str, place: Place, way: str, size: str, milliseconds: int) -> dict[str, float]:
    ends = [place.guest.path, place.tap, place.host.path, _HOST]
    return answer([program, *ends, way, size, str(milliseconds), *CPUS])


def _tcfilter(stack: contextlib.ExitStack, join: str = "bpf") -> Place:
    place = Place(stack, join)
    with _sandbox(place.guest) as inside, contextlib.closing(taps.Joiner()) as joiner:
        _attach(inside, _TAP, joiner, join)
    return place


def _mirred(stack: contextlib.ExitStack) -> Place:
    place = _tapped(stack, "mi")
    for one, other in ((_DEVICE, _TAP), (_TAP, _DEVICE)):
        place.guest.run(["tc", "qdisc", "add", "dev", one, "ingress"])
        match = ["protocol", "all", "u32", "match", "u32", "0", "0"]
        action = ["action", "mirred", "egress", "redirect", "dev", other]
        place.guest.run(["tc", "filter", "add", "dev", one, "parent", "ffff:", *match, *action])
    return place


def _bridge(stack: contextlib.ExitStack) -> Place:
    place = _tapped(stack, "br")
    _ip(
        place.guest,
        "link add br0 type bridge mcast_snooping 0",
        "link set br0 addrgenmode none",
        "link set br0 up",
    )
    _ip(place.guest, f"link set {_DEVICE} master br0", f"link set {_TAP} master br0")
    return place


def _macvtap(stack: contextlib.ExitStack) -> Place:
    place = Place(stack, "mv")
    _ip(
        place.guest,
        f"link add link {_DEVICE} name {_TAP} address {_GUEST_MAC} type macvtap mode bridge",
        f"link set {_TAP} addrgenmode none up",
    )
    index = json.loads(place.guest.run(["ip", "-j", "link", "show", _TAP]).stdout)[0]["ifindex"]
    shown = ["ip", "netns", "exec", place.guest.name, "cat", f"/sys/class/net/{_TAP}/tap{index}/dev"]
    major, minor = place.host.run(shown).stdout.strip().split(":")
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=f"pwt-{os.getpid()}-"))
    node = Path(folder, f"tap{index}")
    os.mknod(node, 0o600 | 0o020000, os.makedev(int(major), int(minor)))
    place.tap = str(node)
    return place


_CONTENDERS: dict[str, Callable[[contextlib.ExitStack], Place]] = {
    TCFILTER: _tcfilter,
    PEER: partial(_tcfilter, join="peer"),
    MIRRED: _mirred,
    MACVTAP: _macvtap,
    BRIDGE: _bridge,
}


def _tapped(stack: contextlib.ExitStack, tag: str) -> Place:
    place = Place(stack, tag)
    with _sandbox(place.guest) as inside:
        taps.create(inside, CreateTap(tap=_TAP, mtu=1500, sandbox=inside.ref(netns.boot_id())))
    return place


def _attaching(stack: contextlib.ExitStack, attaches: int, many: int) -> tuple[Series, str]:
    """Milliseconds from nothing to joined, first and with ``many`` taps in the host's other namespaces."""
    later = f"with {many:,} taps"
    samples: dict[str, list[float]] = {"first taps": [], later: []}
    joiner = stack.enter_context(contextlib.closing(taps.Joiner()))  # as a daemon has it
    with _sandbox(Place(stack, "a").guest) as inside:
        for number in range(attaches):
            samples["first taps"].append(_timed(inside, f"t{number}", joiner))
    with _sandbox(Place(stack, "b").guest) as crowded:
        for number in range(many):
            taps.create(crowded, CreateTap(tap=f"m{number}", mtu=1500, sandbox=crowded.ref(netns.boot_id())))
        with _sandbox(Place(stack, "c").guest) as inside:
            for number in range(attaches):
                samples[later].append(_timed(inside, f"t{number}", joiner))
    how = "CreateTap and JoinLinks of node/taps.py, a tap after the other"
    return Series("Attach", "ms", samples, "less", how, "first taps"), later


def _timed(inside: Sandbox, name: str, joiner: taps.Joiner) -> float:
    begun = time.perf_counter()
    _attach(inside, name, joiner)
    took = (time.perf_counter() - begun) * 1e3
    taps.delete(DeleteTap(tap=name, sandbox=inside.ref(netns.boot_id())))
    return took


def _attach(inside: Sandbox, name: str, joiner: taps.Joiner, join: str = "bpf") -> None:
    ref: NetnsRef = inside.ref(netns.boot_id())
    taps.create(inside, CreateTap(tap=name, mtu=1500, sandbox=ref))
    taps.join(inside, JoinLinks(device=_DEVICE, tap=name, join=join), joiner)


@contextlib.contextmanager
def _sandbox(ns: TestNetns) -> Iterator[Sandbox]:
    fd = os.open(ns.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with Sandbox(fd, ns.path) as inside:
            yield inside
    finally:
        os.close(fd)


def _ip(ns: TestNetns, *commands: str) -> None:
    ns.run(["ip", "-batch", "-"], input="".join(f"{command}\n" for command in commands))
