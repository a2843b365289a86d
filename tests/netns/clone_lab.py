"""Guests that were one: namespaces with the same MAC and addresses, each behind a port of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager

import msgspec

from portwright.dataplane import values
from portwright.kernel import netns
from portwright.kernel.bpf import Map
from portwright.model.port import Port, PortAddress
from portwright.node.clones import MAP
from tests.faults.audit import pins
from tests.fix_daemon import Daemon, Sandbox
from tests.fix_netns import TestNetns
from tests.netns.guest_lab import guest

MAC = "02:00:00:00:00:05"
#: Of no network here: what the guest had where it was frozen.
INNER4, INNER6 = "198.51.100.2", "2001:db8:5::2"
INNER = (INNER4, INNER6)
CLONE = {"model": "tcfilter", "mac": MAC, "inner_addresses": INNER}


def frozen(port: Port) -> Port:
    """The port as its guest knows it: by the inner addresses."""
    gateways = {":" in a.address: a.gateway for a in port.addresses}
    inner = tuple(PortAddress(address=a, gateway=gateways[":" in a]) for a in port.inner_addresses)
    return msgspec.structs.replace(port, addresses=inner)


@contextmanager
def clones(
    daemon: Daemon, make: Callable[[], TestNetns], count: int, network: str = "n1", **options: object
) -> Iterator[list[Sandbox]]:
    """That many, running; ``ns`` of each is the guest, ``port`` is its port, with addresses of its own."""
    with ExitStack() as running:
        found = []
        for number in range(count):
            box, inside = make(), make()
            with daemon.client() as client:
                wanted = {"name": f"clone{number}", **CLONE, **options}
                port = client.port_create(network, box.path, **wanted)  # type: ignore[arg-type]
            running.enter_context(guest(box, inside, frozen(port)))
            found.append(Sandbox(inside, port))
        yield found


@contextmanager
def table(daemon: Daemon) -> Iterator[Map]:
    """The map of clones in the daemon's own namespace, by its pin. The daemon runs."""
    with closing(Map.from_pin(pins(daemon) / f"{netns.cookie(daemon.host.fd):x}" / "maps" / MAP)) as found:
        yield found


def entries(daemon: Daemon) -> dict[int, str]:
    """The port of each number in it."""
    with table(daemon) as found:
        return {int.from_bytes(key, sys.byteorder): values.port_text(value) for key, value in found.items()}
