"""Port mappings and masquerading with real packets: client - host - two sandboxes.

The host's end of each sandbox is like a representor: named ``pw…``, without an address, a
host route to the sandbox and a permanent neighbour; the sandbox's gateway is 169.254.1.1 and
fe80::1, which no device holds. Nothing but the routes and nftables moves the packets.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from portwright.kernel.netns import entered, open_netns
from portwright.kernel.nft import Nft
from portwright.model.network import GATEWAY4, GATEWAY6, GATEWAY_MAC
from portwright.model.port import PortMapping
from portwright.plan import nat, publish

pytestmark = pytest.mark.netns

TIMEOUT = 5.0
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
FAMILIES = pytest.mark.parametrize("family", [4, 6])
PROTOCOLS = pytest.mark.parametrize("proto", ["tcp", "udp"])


class Space:
    """A named network namespace that this test made."""

    def __init__(self, role: str) -> None:
        """Make it."""
        self.name = f"nat{os.getpid()}{role}{uuid.uuid4().hex[:6]}"
        subprocess.run(["ip", "netns", "add", self.name], check=True)
        self.fd = open_netns(f"/run/netns/{self.name}")

    def ip(self, *commands: str) -> None:
        """Run ``ip`` commands here, in one process."""
        subprocess.run(
            ["ip", "-n", self.name, "-batch", "-"], input="\n".join(commands), text=True, check=True
        )

    def sysctl(self, path: str, value: str) -> None:
        """Set one sysctl here."""
        with entered(self.fd):
            Path("/proc/sys", path).write_text(value)

    def socket(self, family: int, proto: str) -> socket.socket:
        """Make a socket that belongs here, with a timeout."""
        kind = socket.SOCK_STREAM if proto == "tcp" else socket.SOCK_DGRAM
        with entered(self.fd):
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

    def remove(self) -> None:
        """Remove it with all that is in it."""
        os.close(self.fd)
        subprocess.run(["ip", "netns", "del", self.name], check=True)


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
        stack.callback(space.remove)
        space.sysctl("net/ipv6/conf/default/accept_dad", "0")
        space.ip("link set lo up")
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
            f"addr add {address[4]}/32 dev eth0", f"addr add {address[6]}/128 dev eth0 nodad", "link set eth0 up",
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
                self.host.ip(f"route append {route}")
                self.local_routes.append(route)

    def purge(self, purges: list[publish.Purge]) -> int:
        """Run purges by conntrack(8) and return how many entries went."""
        count = 0
        for p in purges:
            words = [
                "conntrack",
                "-D",
                "-f",
                f"ipv{p.family}",
                "-p",
                p.proto,
                "--dport",
                str(p.orig_dst_port),
            ]
            for option, value in (
                ("-d", p.orig_dst),
                ("-r", p.reply_src),
                ("--reply-port-src", p.reply_src_port),
            ):
                words += [option, str(value)] if value is not None else []
            done = subprocess.run(
                ["ip", "netns", "exec", self.host.name, *words], check=False, capture_output=True, text=True
            )
            count += len(done.stdout.splitlines())
        return count

    def reset(self) -> None:
        """Back to the beginning: the base table, no mappings, no tracked connections, no local routes."""
        self.nft.run(nat.replace_table(self.instance, [], *SUBNETS))
        subprocess.run(
            ["ip", "netns", "exec", self.host.name, "conntrack", "-F"], check=True, capture_output=True
        )
        self.host.ip(*(f"route del {route}" for route in self.local_routes))
        self.local_routes.clear()


@pytest.fixture(scope="module")
def shared_lab() -> Iterator[Lab]:
    """One lab for all tests that put everything back."""
    with contextlib.ExitStack() as stack:
        yield Lab(stack)


@pytest.fixture
def lab(shared_lab: Lab) -> Lab:
    """Hand out the lab as it was new."""
    shared_lab.reset()
    return shared_lab


@pytest.fixture
def own_lab() -> Iterator[Lab]:
    """Build a lab that the test may damage."""
    with contextlib.ExitStack() as stack:
        yield Lab(stack)


def until(holds: Callable[[], bool], why: str) -> None:
    """Poll until ``holds()``, at most TIMEOUT seconds."""
    deadline = time.monotonic() + TIMEOUT
    pause = threading.Event()
    while not holds():
        assert time.monotonic() < deadline, why
        pause.wait(0.005)


def mapping(port: int = 8080, proto: str = "tcp", host_ip: str = "") -> PortMapping:
    """Map the host's ``port`` to the sandbox's port 80."""
    return PortMapping(host_port=port, container_port=80, protocol=proto, host_ip=host_ip)


@FAMILIES
@PROTOCOLS
def test_from_outside(lab: Lab, family: int, proto: str) -> None:
    """A client outside reaches the sandbox by any of the host's addresses, and the sandbox sees who it is."""
    lab.publish(A, mapping(proto=proto))
    for address in (HOST[family], HOST2[family]):
        assert lab.client.ask(proto, address, 8080) == ("A", CLIENT[family])


@FAMILIES
@PROTOCOLS
def test_from_the_host_by_its_own_address(lab: Lab, family: int, proto: str) -> None:
    """A process of the host reaches the sandbox by the host's own address, untranslated."""
    lab.publish(A, mapping(proto=proto))
    assert lab.host.ask(proto, HOST[family], 8080) == ("A", HOST[family])


@FAMILIES
@PROTOCOLS
def test_from_the_host_by_loopback(lab: Lab, family: int, proto: str) -> None:
    """127.0.0.1 and [::1] of the host reach the sandbox, which sees the address that stands for the host's loopback."""
    lab.publish(A, mapping(proto=proto), rep=lab.reps["a"])
    for _ in range(2):
        assert lab.host.ask(proto, LOOPBACK[family], 8080) == ("A", LOOPBACK_SEEN[family])


@FAMILIES
def test_loopback_of_two_sandboxes_and_of_the_host(lab: Lab, family: int) -> None:
    """Loopback mappings of two ports work beside each other, and the host's own loopback goes on working."""
    lab.publish(A, mapping(8080), rep=lab.reps["a"])
    lab.publish(B, mapping(8081, host_ip=LOOPBACK[4]), mapping(8081, host_ip=LOOPBACK[6]), rep=lab.reps["b"])
    assert lab.host.ask("tcp", LOOPBACK[family], 8080)[0] == "A"
    assert lab.host.ask("tcp", LOOPBACK[family], 8081)[0] == "B"
    with pytest.raises(ConnectionRefusedError):
        lab.client.ask("tcp", HOST[family], 8081)
    with lab.host.socket(family, "tcp") as server:
        server.bind((LOOPBACK[family], 0))
        server.listen()
        with lab.host.socket(family, "tcp") as client:
            client.connect((LOOPBACK[family], server.getsockname()[1]))
            accepted, peer = server.accept()
            accepted.close()
            assert peer[0] == LOOPBACK[family]


@FAMILIES
def test_loopback_without_any_host_address(own_lab: Lab, family: int) -> None:
    """The loopback mapping works on a host that has no address but its loopback: a laptop without a link."""
    own_lab.publish(A, mapping(), rep=own_lab.reps["a"])
    own_lab.host.ip("link del up0")
    assert own_lab.host.ask("tcp", LOOPBACK[family], 8080) == ("A", LOOPBACK_SEEN[family])


@FAMILIES
@PROTOCOLS
def test_hairpin(lab: Lab, family: int, proto: str) -> None:
    """A sandbox reaches its own published port by a host address, and sees that address as the peer."""
    lab.publish(A, mapping(proto=proto))
    for address in (HOST[family], HOST2[family]):
        assert lab.a.ask(proto, address, 8080) == ("A", address)


@FAMILIES
@PROTOCOLS
def test_from_one_sandbox_to_another_by_the_host(lab: Lab, family: int, proto: str) -> None:
    """A reaches B by a host port, and B sees A's own address, though A's subnet is masqueraded."""
    lab.publish(B, mapping(proto=proto))
    assert lab.a.ask(proto, HOST[family], 8080) == ("B", A[family])


@FAMILIES
def test_host_ip_restricts(lab: Lab, family: int) -> None:
    """A mapping bound to one host address does not answer on another; two may share the port number."""
    lab.publish(A, mapping(host_ip=HOST[family]))
    assert lab.client.ask("tcp", HOST[family], 8080)[0] == "A"
    with pytest.raises(ConnectionRefusedError):
        lab.client.ask("tcp", HOST2[family], 8080)
    with pytest.raises(ConnectionRefusedError):
        lab.host.ask("tcp", LOOPBACK[family], 8080)
    lab.publish(B, mapping(host_ip=HOST2[family]))
    assert lab.client.ask("tcp", HOST[family], 8080)[0] == "A"
    assert lab.client.ask("tcp", HOST2[family], 8080)[0] == "B"


@FAMILIES
@PROTOCOLS
def test_refused_after_delete(lab: Lab, family: int, proto: str) -> None:
    """After the mapping is gone the host refuses: at once, also on a flow that worked a moment ago."""
    lab.publish(A, mapping(proto=proto))
    assert lab.client.ask(proto, HOST[family], 8080, source_port=40001)[0] == "A"
    lab.publish(A, mapping(proto=proto), added=False)
    with pytest.raises(ConnectionRefusedError):
        lab.client.ask(proto, HOST[family], 8080, source_port=40001)
    lab.publish(A, mapping(proto=proto), added=False)  # once more is no error


@FAMILIES
def test_live_connection_is_reset_by_delete(lab: Lab, family: int) -> None:
    """A TCP connection that is open when its mapping goes is reset, not left hanging."""
    lab.publish(A, mapping())
    with lab.client.socket(family, "tcp") as sock:
        sock.connect((HOST[family], 8080))
        lab.publish(A, mapping(), added=False)
        with pytest.raises(ConnectionResetError):
            until(lambda: sock.send(b"?") == 0, "no reset")


@FAMILIES
def test_udp_follows_the_mapping_to_a_new_target(lab: Lab, family: int) -> None:
    """A UDP client that keeps its source port reaches the second sandbox, not the first one's ghost."""
    lab.publish(A, mapping(proto="udp"))
    assert lab.client.ask("udp", HOST[family], 8080, source_port=40002)[0] == "A"
    lab.nft.run(nat.port_elements_delete(lab.instance, [mapping(proto="udp")], A.values()))
    lab.nft.run(nat.port_elements_add(lab.instance, [mapping(proto="udp")], B.values()))
    assert lab.client.ask("udp", HOST[family], 8080, source_port=40002)[0] == "A"  # why a purge is needed
    assert lab.purge(publish.purges([mapping(proto="udp")], B.values(), added=True)) == 1
    assert lab.client.ask("udp", HOST[family], 8080, source_port=40002)[0] == "B"


@FAMILIES
def test_udp_entry_from_before_the_mapping(lab: Lab, family: int) -> None:
    """A client that sent before the port was published gets through once it is."""
    with pytest.raises(ConnectionRefusedError):
        lab.client.ask("udp", HOST[family], 8080, source_port=40003)
    lab.publish(A, mapping(proto="udp"))
    assert lab.client.ask("udp", HOST[family], 8080, source_port=40003)[0] == "A"


@FAMILIES
@PROTOCOLS
def test_masquerade(lab: Lab, family: int, proto: str) -> None:
    """A masqueraded subnet leaves with the host's address, another with its own, and between ours nothing changes."""
    name, seen = lab.a.ask(proto, CLIENT[family], 80)
    assert (name, seen in (HOST[family], HOST2[family])) == ("client", True)
    assert lab.b.ask(proto, CLIENT[family], 80) == ("client", B[family])
    assert lab.a.ask(proto, B[family], 80) == ("B", A[family])
    assert lab.b.ask(proto, A[family], 80) == ("A", B[family])


def test_masquerade_leaves_link_local_alone(lab: Lab) -> None:
    """Traffic to a link-local destination keeps its source."""
    assert lab.a.ask("tcp", "169.254.77.77", 80) == ("client", A[4])


def test_subnets_change_while_running(lab: Lab) -> None:
    """Declaring other subnets takes effect with the next connection."""
    lab.nft.run(nat.subnets(lab.instance, ["10.88.0.0/16"], ["10.89.0.0/16"]))
    assert lab.a.ask("tcp", CLIENT[4], 80) == ("client", A[4])
    assert lab.b.ask("tcp", CLIENT[4], 80) == ("client", HOST[4])


def test_a_sandbox_cannot_reach_the_hosts_loopback(lab: Lab) -> None:
    """route_localnet on a representor does not let the sandbox send to the host's 127.0.0.1 (CVE-2020-8558)."""
    lab.publish(A, mapping(), rep=lab.reps["a"])
    with lab.host.socket(4, "udp") as victim:
        victim.bind(("127.0.0.1", 0))
        victim.setblocking(False)
        scapy = pytest.importorskip("scapy.all")
        frame = (
            scapy.Ether(dst=GATEWAY_MAC, src="02:00:00:00:00:0a")
            / scapy.IP(src=A[4], dst="127.0.0.1")
            / scapy.UDP(sport=9999, dport=victim.getsockname()[1])
        )
        _send_frame(lab, bytes(frame))
        until(lambda: _dropped(lab, "loopback destination") == 1, "the guard saw nothing")
        with pytest.raises(BlockingIOError):
            victim.recv(100)


def test_a_sandbox_cannot_reach_the_hosts_loopback6(lab: Lab) -> None:
    """The local route for ::1 on a representor lets nothing in: the kernel refuses ::1 on the wire."""
    lab.publish(A, mapping(), rep=lab.reps["a"])
    refused = _header_errors(lab)
    with lab.host.socket(6, "udp") as victim:
        victim.bind(("::1", 0))
        victim.setblocking(False)
        scapy = pytest.importorskip("scapy.all")
        frame = (
            scapy.Ether(dst=GATEWAY_MAC, src="02:00:00:00:00:0a")
            / scapy.IPv6(src=A[6], dst="::1")
            / scapy.UDP(sport=9999, dport=victim.getsockname()[1])
        )
        _send_frame(lab, bytes(frame))
        until(lambda: _header_errors(lab) > refused, "the kernel did not refuse it")
        with pytest.raises(BlockingIOError):
            victim.recv(100)


def test_sctp_is_translated(lab: Lab) -> None:
    """An SCTP INIT to the host port arrives at the sandbox's port, for SCTP has a header like the others'."""
    sctp = pytest.importorskip("scapy.layers.sctp")
    lab.publish(A, mapping(proto="sctp"))
    init = sctp.SCTP(sport=5000, dport=8080) / sctp.SCTPChunkInit(
        init_tag=1, a_rwnd=65535, n_out_streams=1, n_in_streams=1, init_tsn=1
    )
    with entered(lab.a.fd):
        listener = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_SCTP)
    with entered(lab.client.fd):
        sender = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_SCTP)
    with listener, sender:
        listener.settimeout(TIMEOUT)
        sender.sendto(bytes(init), (HOST[4], 0))
        packet, peer = listener.recvfrom(2000)
    assert peer[0] == CLIENT[4]
    assert struct.unpack_from("!HH", packet, 20) == (5000, 80)


def _send_frame(lab: Lab, frame: bytes) -> None:
    """Send one Ethernet frame from sandbox A, past its routes."""
    with entered(lab.a.fd):
        packet = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        with packet:
            packet.bind(("eth0", 0))
            packet.send(frame)


def _header_errors(lab: Lab) -> int:
    """Read Ip6InHdrErrors of the host's namespace."""
    with entered(lab.host.fd):
        lines = Path("/proc/thread-self/net/snmp6").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Ip6InHdrErrors"))


def _dropped(lab: Lab, rule: str) -> int:
    """Read the packet counter of one rule of the chain ``guard``."""
    for entry in lab.nft.run_json(f"list chain inet {nat.table_name(lab.instance)} guard"):
        body = entry.get("rule")
        if isinstance(body, dict) and body.get("comment") == rule:
            return next(int(part["counter"]["packets"]) for part in body["expr"] if "counter" in part)
    raise AssertionError(rule)
