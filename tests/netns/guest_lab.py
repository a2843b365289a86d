"""A stand-in for a guest: a namespace whose card is what a hypervisor would show a guest of a port's tap.

Its card is a tap too, and a thread takes each frame with its virtio-net header from one to the other, as a
hypervisor does between a tap and a guest's ring. So the guest's stack is the kernel's own, offloads and all.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

from portwright.kernel import macvtap, netns, tap
from portwright.model.port import Port
from tests.deadline import wait_until
from tests.fix_daemon import Daemon, Networks, Sandbox, SandboxFactory
from tests.fix_netns import NetnsFactory, TestNetns

_TUNSETOFFLOAD = 0x400454D0
_OFFLOADS = 0x1 | 0x2 | 0x4  # checksum, TSO of IPv4, of IPv6 (linux/if_tun.h)
_LARGEST = 65_562  # a frame of 64 KiB, Ethernet and the header
#: linux/sockios.h, ethtool.h: SIOCETHTOOL; ETHTOOL_STSO, ETHTOOL_STXCSUM
_ETHTOOL, _SET = 0x8946, {"tso": 0x1F, "checksum": 0x17}


@contextmanager
def guest(box: TestNetns, inside: TestNetns, port: Port) -> Iterator[None]:
    """``inside`` is the guest of the port in ``box``, with its MAC, MTU, addresses and routes."""
    outer = _outer(box, port)
    try:
        with _opened(inside) as fd:
            tap.create(fd, "eth0")
            inner = tap.open_queue(fd, "eth0")
        try:
            _configure(inside, port)
            with _pumped(outer, inner):
                wait_until(partial(_transmits, inside), why="the guest's card to transmit")
                yield
        finally:
            os.close(inner)
            inside.run(["ip", "link", "del", "eth0"], check=False)
    finally:
        os.close(outer)


@contextmanager
def guest_on(
    sandboxes: SandboxFactory, netns_factory: NetnsFactory, model: str, **options: object
) -> Iterator[Sandbox]:
    """A port of the model in a namespace; ``ns`` is its guest."""
    box, inside = sandboxes(model=model, **options), netns_factory()
    with guest(box.ns, inside, box.port):
        yield Sandbox(inside, box.port)


@contextmanager
def guests_for_sandboxes(
    daemon: Daemon, netns_factory: NetnsFactory, networks: Networks, model: str, **always: object
) -> Iterator[SandboxFactory]:
    """As fix_daemon's ``sandboxes``, but each is the guest of a port of the model, made with ``always``."""
    with ExitStack() as guests:

        def make(network: str = "n1", **options: object) -> Sandbox:
            networks(network)
            box, inside = netns_factory(), netns_factory()
            options = {"name": box.name, "model": model, **always, **options}
            with daemon.client() as client:
                port = client.port_create(network, box.path, **options)  # type: ignore[arg-type]
            guests.enter_context(guest(box, inside, port))
            return Sandbox(inside, port)

        yield make


def switch_off(ns: TestNetns, name: str, offload: str) -> None:
    """``ethtool -K NAME tso off``, or ``tx off`` for "checksum"."""
    value = (ctypes.c_uint32 * 2)(_SET[offload], 0)  # struct ethtool_value
    with ns.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, _ETHTOOL, struct.pack("=16sQ16x", name.encode(), ctypes.addressof(value)))


def _outer(box: TestNetns, port: Port) -> int:
    """A queue of what the port's hypervisor opens."""
    if port.model == "macvtap":
        return macvtap.open_queues(box.fd, port.tap, 1)[0]
    home = netns.find_by_cookie(port.host.cookie) if port.model == "tap" else os.dup(box.fd)
    assert home is not None
    try:
        return tap.open_queue(home, port.tap, multi_queue=port.queues > 1)
    finally:
        os.close(home)


@contextmanager
def _opened(ns: TestNetns) -> Iterator[int]:
    fd = os.open(ns.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _configure(inside: TestNetns, port: Port) -> None:
    lines = [f"link set eth0 address {port.mac} mtu {port.mtu} up"]
    for address in port.addresses:
        bits, more = (128, "nodad") if ":" in address.address else (32, "")
        lines.append(f"addr add {address.address}/{bits} dev eth0 {more}")
    for address in port.addresses:
        lines.append(f"route add default via {address.gateway} dev eth0 onlink")
    inside.run(["ip", "-batch", "-"], input="".join(f"{line}\n" for line in lines))


def _transmits(inside: TestNetns) -> bool:
    return "LOWER_UP" in inside.run(["ip", "-o", "link", "show", "eth0"]).stdout


@contextmanager
def _pumped(one: int, other: int) -> Iterator[None]:
    stop, stopped = os.pipe()
    for fd in (one, other):
        fcntl.ioctl(fd, _TUNSETOFFLOAD, _OFFLOADS)
    thread = threading.Thread(target=_pump, args=(one, other, stop))
    thread.start()
    try:
        yield
    finally:
        os.close(stopped)
        thread.join()
        os.close(stop)


def _pump(one: int, other: int, stop: int) -> None:
    to = {one: other, other: one}
    while True:
        ready, _, _ = select.select([one, other, stop], [], [])
        if stop in ready:
            return
        for fd in ready:
            with suppress(OSError):  # a device that is down takes nothing
                os.write(to[fd], os.read(fd, _LARGEST))


@contextmanager
def plugged(host: TestNetns, name: str, inside: TestNetns, *commands: str) -> Iterator[None]:
    """``inside`` is a guest whose hypervisor holds the tap ``name``; ``commands`` of ip set its card."""
    with _opened(host) as fd:
        outer = tap.open_queue(fd, name)
    try:
        with _opened(inside) as fd:
            tap.create(fd, "eth0")
            inner = tap.open_queue(fd, "eth0")
        try:
            inside.run(["ip", "-batch", "-"], input="".join(f"{command}\n" for command in commands))
            with _pumped(outer, inner):
                wait_until(partial(_transmits, inside), why="the guest's card to transmit")
                yield
        finally:
            os.close(inner)
            inside.run(["ip", "link", "del", "eth0"], check=False)
    finally:
        os.close(outer)
