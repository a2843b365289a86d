"""What tests of policy on real packets share: a manifest, listeners, connections and their verdicts."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager

from tests.deadline import wait_until
from tests.fix_daemon import Daemon, Sandbox
from tests.fix_netns import TestNetns

#: Pods with app=web take TCP 80 from app=client, and nothing else.
WEB = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web}
spec:
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Ingress]
  ingress:
  - from: [{podSelector: {matchLabels: {app: client}}}]
    ports: [{port: 80}]
"""


@contextmanager
def listening(ns: TestNetns, port: int) -> Iterator[socket.socket]:
    """A TCP listener in a namespace, both families, that accepts by the kernel alone (its backlog)."""
    with ns.entered():
        sock = socket.socket(socket.AF_INET6)
    with closing(sock):
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("::", port))
        sock.listen(64)
        yield sock


def connect(ns: TestNetns, address: str, port: int, timeout: float = 3) -> socket.socket:
    """A TCP connection from inside ``ns``; raises OSError."""
    with ns.entered():
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    sock.settimeout(timeout)
    try:
        sock.connect((address, port))
    except OSError:
        sock.close()
        raise
    return sock


def connected(sock: socket.socket) -> bool:
    """Whether a TCP connection is established."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == 1


class Probe:
    """Connections between sandboxes, judged by drop counters and not by time-outs."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def denied(self) -> int:
        """Packets dropped by policy so far, at every port."""
        with self._daemon.client() as client:
            return sum(
                d.packets for d in client.drops() if d.reason in ("policy", "not_ready", "fragment_order")
            )

    def reaches(self, source: Sandbox, address: str, port: int, *, source_port: int = 0) -> bool:
        """Whether a TCP connection is made; a denied SYN shows at once in the counters."""
        before = self.denied()
        with source.ns.entered():
            sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        with closing(sock):
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("", source_port))
            sock.connect_ex((address, port))
            # Most often at once, for a veth's way is synchronous; later where ksoftirqd has taken over.
            wait_until(
                lambda: connected(sock) or self.denied() > before, why="a SYN to be judged and answered"
            )
            is_connected, is_denied = connected(sock), self.denied() > before
        assert is_connected != is_denied, f"connected {is_connected}, denied {is_denied}"
        return is_connected
