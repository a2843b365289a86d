"""A client, a host and two sandboxes in namespaces, for tests of NAT with real packets.

The host's end of each sandbox is like a representor: named ``pw…``, without an address, a
host route to the sandbox and a permanent neighbour; the sandbox's gateway is 169.254.1.1 and
fe80::1, which no device holds. Nothing but the routes and nftables moves the packets.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import msgspec

from portwright.kernel import conntrack
from portwright.kernel.nft import Nft
from portwright.model.network import GATEWAY4, GATEWAY6, GATEWAY_MAC
from portwright.model.port import PortMapping
from portwright.plan import nat, publish
from portwright.plan.publish import Purge
from tests.deadline import PATIENCE
from tests.fix_netns import TestNetns

TIMEOUT = 5.0 * PATIENCE  # seconds; only a failure takes that long
CLIENT = {4: "10.9.0.2", 6: "fd09::2"}
HOST = {4: "10.9.0.1", 6: "fd09::1"}
HOST2 = {4: "10.9.0.3", 6: "fd09::3"}
A = {4: "10.88.0.2", 6: "fd88::2"}
B = {4: "10.89.0.2", 6: "fd89::2"}
LOOPBACK = {4: "127.0.0.1", 6: "::1"}
GATEWAY = {4: GATEWAY4, 6: GATEWAY6}
LOOPBACK_SEEN = {4: nat.LOOPBACK_SOURCE4, 6: nat.LOOPBACK_SOURCE6}
#: Ours, and those of ours that are masqueraded: A's are, B's are not.
SUBNETS = (["10.89.0.0/16", "fd89::/64"], ["10.88.0.0/16", "fd88::/64"])


def mapping(port: int = 8080, proto: str = "tcp", host_ip: str = "") -> PortMapping:
    """Map the host's ``port`` to the sandbox's port 80."""
    return PortMapping(host_port=port, container_port=80, protocol=proto, host_ip=host_ip)


class Space(TestNetns):
    """A network namespace with what these tests do in one."""

    __test__ = False

    def __init__(self, role: str) -> None:
        super().__init__(f"pwt-{os.getpid()}-{role}{uuid.uuid4().hex[:6]}")

    def ip(self, *commands: str) -> None:
        """Run ``ip`` commands here, in one process."""
        self.run(["ip", "-batch", "-"], input="\n".join(commands))

    def sysctl(self, path: str, value: str) -> None:
        """Set one sysctl here."""
        with self.entered():
            Path("/proc/sys", path).write_text(value)

    def socket(self, family: int, proto: str) -> socket.socket:
        """Make a socket that belongs here, with a timeout."""
        kind = socket.SOCK_STREAM if proto == "tcp" else socket.SOCK_DGRAM
        with self.entered():
            sock = socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.settimeout(TIMEOUT)
        return sock

    def ask(self, proto: str, address: str, port: int, *, source_port: int = 0) -> tuple[str, str]:
        """Connect from here and return what the answering server said: (its name, whom it saw)."""
        family = 6 if ":" in address else 4
        with self.socket(family, proto) as sock:
            if source_port:
                sock.bind(("", source_port))
            sock.connect((address, port))
            sock.send(b"?")
            name, peer = sock.recv(200).decode().split()
        return name, peer


class Servers:
    """One thread that answers each TCP connection and UDP packet with ``<name> <peer address>``."""

    def __init__(self) -> None:
        """Start with nothing to serve."""
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._serve)

    def add(self, space: Space, name: str, port: int) -> None:
        """Serve TCP and UDP, IPv4 and IPv6, on ``port`` in ``space``. Before :meth:`start`."""
        for family in (4, 6):
            for proto in ("tcp", "udp"):
                sock = space.socket(family, proto)
                if family == 6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind(("", port))
                if proto == "tcp":
                    sock.listen()
                sock.setblocking(False)
                self._selector.register(sock, selectors.EVENT_READ, (name, proto))

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    return
                assert isinstance(key.fileobj, socket.socket)
                with contextlib.suppress(OSError):  # a client that is gone again
                    self._answer(key.fileobj, *key.data)

    def _answer(self, sock: socket.socket, name: str, kind: str) -> None:
        if kind == "tcp":
            connection, _ = sock.accept()
            self._selector.register(connection, selectors.EVENT_READ, (name, "connection"))
        elif kind == "connection":
            self._selector.unregister(sock)
            with sock:
                sock.recv(10)
                sock.send(f"{name} {sock.getpeername()[0]}".encode())
        else:
            _, peer = sock.recvfrom(100)
            sock.sendto(f"{name} {peer[0]}".encode(), peer)

    def close(self) -> None:
        """Stop, and close every socket."""
        self._wake.send(b".")
        self._thread.join(TIMEOUT)
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
        self._wake.close()
        self._selector.close()


class Lab:
    """The four namespaces, their servers and an nft context in the host's."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        """Build it; ``stack`` takes it down again."""
        self.client, self.host, self.a, self.b = (self._space(stack, role) for role in "chab")
        self.reps = {role: "pw" + uuid.uuid4().hex[:8] for role in "ab"}
        self.local_routes: list[str] = []
        self.instance = f"t{os.getpid()}"
        self._uplink()
        self._sandbox(self.a, "a", A)
        self._sandbox(self.b, "b", B)
        servers = Servers()
        for space, name in ((self.a, "A"), (self.b, "B"), (self.client, "client")):
            servers.add(space, name, 80)
        servers.start()
        stack.callback(servers.close)
        self.nft = stack.enter_context(Nft(self.host.fd))
        self.nft.run(nat.base_table(self.instance))
        self.nft.run(nat.subnets(self.instance, *SUBNETS))

    @staticmethod
    def _space(stack: contextlib.ExitStack, role: str) -> Space:
        space = Space(role)
        stack.callback(space.close)
        space.sysctl("net/ipv6/conf/default/accept_dad", "0")
        return space

    def _uplink(self) -> None:
        host, client = self.host, self.client
        host.ip(f"link add up0 type veth peer name eth0 netns {client.name}")
        host.ip(
            *(f"addr add {a[4]}/24 dev up0" for a in (HOST, HOST2)),
            *(f"addr add {a[6]}/64 dev up0 nodad" for a in (HOST, HOST2)),
            "link set up0 up",
            "route add 169.254.77.77/32 dev up0",
        )
        client.ip(
            f"addr add {CLIENT[4]}/24 dev eth0", f"addr add {CLIENT[6]}/64 dev eth0 nodad",
            "addr add 169.254.77.77/32 dev eth0", "link set eth0 up",
            *(f"route add {net} via {HOST[4]}" for net in ("10.88.0.0/16", "10.89.0.0/16")),
            *(f"route add {net} via {HOST[6]}" for net in ("fd88::/64", "fd89::/64")),
        )  # fmt: skip
        host.sysctl("net/ipv4/ip_forward", "1")
        host.sysctl("net/ipv6/conf/all/forwarding", "1")

    def _sandbox(self, space: Space, role: str, address: dict[int, str]) -> None:
        rep, mac = self.reps[role], "02:00:00:00:00:0" + role
        self.host.ip(
            f"link add {rep} address {GATEWAY_MAC} type veth peer name eth0 address {mac} netns {space.name}"
        )
        self.host.ip(
            f"link set {rep} addrgenmode none up",
            f"route add {address[4]}/32 dev {rep}", f"route add {address[6]}/128 dev {rep}",
            f"neigh replace {address[4]} lladdr {mac} dev {rep} nud permanent",
            f"neigh replace {address[6]} lladdr {mac} dev {rep} nud permanent",
        )  # fmt: skip
        space.ip(
            f"addr add {address[4]}/32 dev eth0", f"addr add {address[6]}/128 dev eth0 nodad",
            "link set eth0 up",
            *(f"neigh replace {gw} lladdr {GATEWAY_MAC} dev eth0 nud permanent" for gw in GATEWAY.values()),
            f"route add {GATEWAY4} dev eth0", f"route add default via {GATEWAY4} dev eth0",
            f"route add ::/0 via {GATEWAY6} dev eth0",
        )  # fmt: skip

    def publish(
        self, target: dict[int, str], *mappings: PortMapping, rep: str | None = None, added: bool = True
    ) -> None:
        """Publish (or take back) as the daemon would: elements, then conntrack, then the loopback."""
        addresses = list(target.values())
        render: Callable[..., str] = nat.port_elements_add if added else nat.port_elements_delete
        self.nft.run(render(self.instance, mappings, addresses))
        self.purge(publish.purges(mappings, addresses, added=added))
        if rep is not None:
            access = publish.loopback_access(rep, mappings, addresses)
            for path, value in access.sysctls:
                self.host.sysctl(path, value)
            for dst, table, metric in access.local_routes:
                route = f"local {dst} dev {rep} table {table} metric {metric}"
                self.host.ip(f"route add {route}")
                self.local_routes.append(route)

    def purge(self, purges: list[Purge]) -> int:
        """Issue purges and return how many entries went."""
        return conntrack.purge(
            self.host.fd, *(conntrack.Entries(**msgspec.structs.asdict(p)) for p in purges)
        )

    def reset(self) -> None:
        """Back to the beginning: the base table, no mappings, no tracked connections, no local routes."""
        self.nft.run(nat.replace_table(self.instance, [], *SUBNETS))
        self.host.run(["conntrack", "-F"])
        self.host.ip(*(f"route del {route}" for route in self.local_routes))
        self.local_routes.clear()
