"""Name servers for tests: dnsmasq, which is real, and one that says whatever a test wants said."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing

import dns.message
import dns.query
import dns.rdatatype
import dns.rrset

from tests.deadline import PATIENCE, wait_until
from tests.fix_daemon import WORLD4, WORLD6, Daemon, Sandbox, SandboxFactory
from tests.fix_netns import TestNetns

#: Ports app=client may ask the world's name server, reach two names, and nothing else.
NAMES = """
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: names}
spec:
  tier: Admin
  priority: 1
  subject: {pods: {namespaceSelector: {}, podSelector: {matchLabels: {app: client}}}}
  egress:
  - action: Accept
    to: [{networks: [192.0.2.1/32, "2001:db8::1/128"]}]
    protocols: [{udp: {destinationPort: {number: 53}}}, {tcp: {destinationPort: {number: 53}}}]
  - action: Accept
    to: [{domainNames: [www.shop.example, "*.cdn.example"]}]
    protocols: [{tcp: {destinationPort: {number: 80}}}]
  - action: Deny
    to: [{networks: [0.0.0.0/0, "::/0"]}]
"""


def address(number: int, family: int = 4) -> str:
    """An address of the world's, beside its name server's: hosts that names stand for."""
    return f"198.51.100.{number}" if family == 4 else f"2001:db8:f::{number}"


def give_addresses(world: TestNetns, *numbers: int) -> None:
    """The world has these addresses, of both families, and answers there."""
    for number in numbers:
        world.run(["ip", "addr", "add", f"{address(number)}/32", "dev", "lo"])
        world.run(["ip", "addr", "add", f"{address(number, 6)}/128", "dev", "lo", "nodad"])


@contextlib.contextmanager
def dnsmasq(
    ns: TestNetns, *records: str, listen: tuple[str, ...] = (WORLD4, WORLD6), everywhere: bool = False
) -> Iterator[None]:
    """Debian's dnsmasq with these records (its own options, like ``host-record=name,address,ttl``).

    ``everywhere``: its sockets are bound to no address, as by default.
    """
    command = ["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts"]
    command += ["--no-daemon", "--user=root", "--pid-file="] + ["--bind-interfaces"] * (not everywhere)
    command += [f"--listen-address={one}" for one in listen] + [f"--{record}" for record in records]
    with ns.entered():
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: _listens(ns, listen[0], server), 10, "dnsmasq to listen")
        yield
    finally:
        server.terminate()
        server.communicate(timeout=10 * PATIENCE)


def _listens(ns: TestNetns, where: str, server: subprocess.Popen[bytes]) -> bool:
    if server.poll() is not None:
        raise AssertionError(f"dnsmasq ended: {server.communicate()[0].decode()}")
    with ns.entered():
        sock = socket.socket(socket.AF_INET6 if ":" in where else socket.AF_INET)
    with closing(sock):
        return sock.connect_ex((where, 53)) == 0


def ask(
    box: Sandbox,
    name: str,
    kind: str = "A",
    *,
    resolver: str = WORLD4,
    tcp: bool = False,
    timeout: float = 5,
) -> dns.message.Message:
    """A look-up from inside a sandbox, as a stub resolver makes it. Raises dns.exception.Timeout."""
    query, timeout = dns.message.make_query(name, kind), timeout * PATIENCE
    family = socket.AF_INET6 if ":" in resolver else socket.AF_INET
    with box.ns.entered():
        sock = socket.socket(family, socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM)
    with closing(sock):
        sock.settimeout(timeout)
        if tcp:
            sock.connect((resolver, 53))
            sock.setblocking(False)
            return dns.query.tcp(query, resolver, timeout, sock=sock)
        sock.setblocking(False)
        return dns.query.udp(query, resolver, timeout, sock=sock)


def under_policy(daemon: Daemon, sandboxes: SandboxFactory, policy: str = NAMES, **labels: str) -> Sandbox:
    """A sandbox with app=client and these labels, once the policy is in force."""
    with daemon.client() as api:
        api.policy_apply([("names.yaml", policy)])
    return sandboxes(labels={"app": "client", **labels})


def denied(daemon: Daemon, box: Sandbox) -> int:
    """Packets of the sandbox that policy dropped."""
    with daemon.client() as api:
        return sum(d.packets for d in api.drops(box.port.port_id) if d.reason == "policy")


def reaches(daemon: Daemon, box: Sandbox, where: str, port: int = 80) -> bool:
    """Whether a connection out of the sandbox comes about: by its drop counter, and not by time-outs."""
    before = denied(daemon, box)
    with box.ns.entered():
        sock = socket.socket(socket.AF_INET6 if ":" in where else socket.AF_INET)
    with closing(sock):
        sock.setblocking(False)
        sock.connect_ex((where, port))

        def connected() -> bool:
            return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == 1

        wait_until(lambda: connected() or denied(daemon, box) > before, 5, f"{where}, or its denial")
        return connected()


def look_ups(daemon: Daemon) -> str:
    """What doctor says of them."""
    with daemon.client() as api:
        return next(c.detail for c in api.doctor().checks if c.name == "look-ups of domain names")


def said(answer: dns.message.Message) -> list[str]:
    """The addresses in an answer."""
    return sorted(
        record.address
        for rrset in answer.answer
        if rrset.rdtype in (dns.rdatatype.A, dns.rdatatype.AAAA)
        for record in rrset
    )


def nothing_is_steered(host: TestNetns) -> None:
    """Neither chains nor routing rules nor routes are left of it."""
    assert "steer" not in host.run(["nft", "list", "ruleset"]).stdout
    for family in ("-4", "-6"):
        assert "fwmark" not in host.run(["ip", family, "rule", "show"]).stdout
        everything = host.run(["ip", family, "route", "show", "table", "all"]).stdout
        assert "local default" not in everything


class Liar:
    """A name server that answers each query with what ``say`` makes of it: any bytes, any number."""

    def __init__(self, ns: TestNetns, where: str, say: Callable[[bytes], list[bytes]]) -> None:
        with ns.entered():
            self._sock = socket.socket(socket.AF_INET6 if ":" in where else socket.AF_INET, socket.SOCK_DGRAM)
        self._sock.bind((where, 53))
        self._say = say
        self.asked: list[bytes] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            wire, whom = self._sock.recvfrom(65535)
            if not wire:  # of close()
                return
            self.asked.append(wire)
            for answer in self._say(wire):
                self._sock.sendto(answer, whom)

    def close(self) -> None:
        """End it."""
        where = self._sock.getsockname()
        self._sock.sendto(b"", where)
        self._thread.join()
        self._sock.close()


@contextlib.contextmanager
def lying(ns: TestNetns, say: Callable[[bytes], list[bytes]], where: str = WORLD4) -> Iterator[Liar]:
    """A liar, ended at the end."""
    with closing(Liar(ns, where, say)) as made:
        yield made


def answer_to(wire: bytes, *records: str) -> bytes:
    """A proper answer to a query, with these records as zone files have them."""
    query = dns.message.from_wire(wire)
    response = dns.message.make_response(query)
    for record in records:
        name, ttl, kind, data = record.split(" ", 3)
        response.answer.append(dns.rrset.from_text(name, int(ttl), "IN", kind, data))
    return response.to_wire(max_size=65535)
