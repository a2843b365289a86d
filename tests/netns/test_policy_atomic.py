"""No packet sees half a policy: generations that each deny a flow, at opposite ends, changed under way."""

from __future__ import annotations

import socket
import subprocess
import sys
from contextlib import closing

import pytest

from tests.fix_daemon import Daemon, SandboxFactory

pytestmark = pytest.mark.netns

UPDATES = 100
_POLICY = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: p}}
spec:
  podSelector: {{matchLabels: {{app: {app}}}}}
  policyTypes: [{direction}]
"""
_FLOOD = """
import socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
while True:
    for port in range(2000, 2064):
        sock.sendto(b"x", (sys.argv[1], port))
"""


@pytest.mark.slow
def test_no_packet_is_judged_by_two_generations(daemon: Daemon, sandboxes: SandboxFactory) -> None:
    """One policy denies all that the sender opens, the next all that is opened to the receiver. Under either
    nothing arrives; a packet with the sender's part of one and the receiver's of the other would."""
    sender, receiver = (sandboxes(labels={"app": app}) for app in ("sender", "receiver"))
    first = _POLICY.format(app="sender", direction="Egress")
    second = _POLICY.format(app="receiver", direction="Ingress")
    with receiver.ns.entered():
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, 0x0008)
    with closing(sock), daemon.client() as api:
        api.policy_apply([("p.yaml", first)])
        sock.bind(("eth0", 0x0800))
        with sender.ns.entered():
            flood = subprocess.Popen([sys.executable, "-c", _FLOOD, receiver.ip4])
        try:
            for _ in range(UPDATES // 2):
                api.policy_apply([("p.yaml", second)])
                api.policy_apply([("p.yaml", first)])
        finally:
            flood.kill()
            flood.wait()
        denied = {d.port_id: d.packets for d in api.drops() if d.reason == "policy"}
        with pytest.raises(BlockingIOError):
            raise AssertionError(f"a packet arrived: {sock.recv(2048)!r}")
    assert min(denied[sender.port.port_id], denied[receiver.port.port_id]) > 1000
