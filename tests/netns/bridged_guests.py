"""Stand-in guests on a bridge: with a tap of the host on it, and as Kata 1.x has them."""

from __future__ import annotations

from contextlib import ExitStack

from portwright.kernel import tap
from tests.deadline import wait_until
from tests.fix_netns import TestNetns
from tests.netns.bridge_lab import BRIDGE, HOST4, HOST6, ip
from tests.netns.guest_lab import plugged


class Guest:
    """A guest on the bridge: its namespace, its tap, its addresses."""

    def __init__(self, ns: TestNetns, host: TestNetns, number: int, stack: ExitStack) -> None:
        """Its hypervisor runs until the end of ``stack``."""
        self.ns, self.link, self.mac = ns, f"tap{number}lab", f"02:00:00:00:88:{number}"
        self.ip4, self.ip6 = f"10.88.0.{number}", f"fd88::{number}"
        tap.create(host.fd, self.link)
        ip(host, f"link set {self.link} master {BRIDGE} up")
        card = (
            f"link set eth0 address {self.mac} up",
            f"addr add {self.ip4}/24 dev eth0",
            f"addr add {self.ip6}/64 dev eth0 nodad",
            f"route add default via {HOST4}",
            f"route add default via {HOST6}",
        )
        stack.enter_context(plugged(host, self.link, ns, *card))

    def ping(self, address: str) -> bool:
        """Whether an echo request has its answer within a second."""
        return self.ns.run(["ping", "-n", "-c1", "-W1", address], check=False).returncode == 0


class Kata:
    """A guest as Kata 1.x has it: a bridge in the sandbox's namespace, with its device and a tap on it."""

    def __init__(self, box: TestNetns, ns: TestNetns, host: TestNetns, number: int, stack: ExitStack) -> None:
        """``ns`` is the guest in ``box``, until the end of ``stack``."""
        self.box, self.ns = box, ns
        self.link, self.mac = f"veth{number}lab", f"02:00:00:00:88:{number}"
        self.ip4, self.ip6 = f"10.88.0.{number}", f"fd88::{number}"
        ip(
            host,
            f"link add {self.link} type veth peer name eth0 netns {box.name}",
            f"link set {self.link} master {BRIDGE} up",
        )
        tap.create(box.fd, "tap0_kata")
        ip(
            box,
            "link add br0_kata type bridge mcast_snooping 0",
            *(f"link set {name} master br0_kata up" for name in ("eth0", "tap0_kata")),
            "link set br0_kata up",
        )
        card = (
            f"link set eth0 address {self.mac} up",
            f"addr add {self.ip4}/24 dev eth0",
            f"addr add {self.ip6}/64 dev eth0 nodad",
        )
        stack.enter_context(plugged(box, "tap0_kata", ns, *card))

    def ping(self, address: str) -> bool:
        """Whether an echo request has its answer within a second."""
        return self.ns.run(["ping", "-n", "-c1", "-W1", address], check=False).returncode == 0


def heard(*guests: Guest | Kata) -> None:
    """The host has heard of them. A port that comes may change a bridge's MAC, and the host forgets them."""
    for guest in guests:
        wait_until(lambda guest=guest: guest.ping(HOST4) and guest.ping(HOST6), why="the bridge to forward")  # type: ignore[misc]  # bound at once
