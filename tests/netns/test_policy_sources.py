"""Calico's rules that ask for the sender's port, on real packets."""

from __future__ import annotations

import select
import socket
from contextlib import closing

import pytest

from tests.deadline import wait_readable, wait_until
from tests.fix_daemon import Daemon, SandboxFactory
from tests.netns.policy_lab import Probe, listening

pytestmark = pytest.mark.netns

#: To app=web by TCP from these source ports alone; from app=shy by UDP from none but these.
ASKING = """
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: asking}
spec:
  selector: app == 'web'
  ingress:
  - {action: Allow, protocol: TCP, source: {ports: ["1000:1999", 3000]}}
  - {action: Allow, protocol: UDP}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: shy}
spec:
  selector: app == 'shy'
  egress:
  - {action: Deny, protocol: UDP, source: {notPorts: [5000]}}
  - {action: Allow}
"""
QUIET = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: quiet}
spec: {podSelector: {matchLabels: {app: nobody}}}
"""


@pytest.mark.parametrize("family", [4, 6])
def test_the_senders_port_decides(daemon: Daemon, sandboxes: SandboxFactory, family: int) -> None:
    """From both sides of each bound; and as the answers' destination it is still the sender's, so that a
    connection goes on when its server is the first to speak after a change of policy."""
    web, client = (sandboxes(labels={"app": app}) for app in ("web", "client"))
    kind, address = (socket.AF_INET, web.ip4) if family == 4 else (socket.AF_INET6, web.ip6)
    probe = Probe(daemon)
    with daemon.client() as api, listening(web.ns, 80) as server:
        api.policy_apply([("asking.yaml", ASKING)])
        reached = [
            port
            for port in (999, 1000, 1999, 2000, 2999, 3000, 3001)
            if probe.reaches(client, address, 80, source_port=port)
        ]
        assert reached == [1000, 1999, 3000]
        with client.ns.entered():
            near = socket.socket(kind)
        with closing(near):
            near.bind(("", 1234))
            near.settimeout(5)
            near.connect((address, 80))
            while (far := server.accept())[1][1] != 1234:
                far[0].close()
            with closing(far[0]):
                api.policy_apply([("quiet.yaml", QUIET)])
                far[0].send(b"x")
                wait_readable(near.fileno(), why="what the server says first")


@pytest.mark.parametrize("family", [4, 6])
def test_the_own_port_decides(daemon: Daemon, sandboxes: SandboxFactory, family: int) -> None:
    """A rule of what may leave, of all ports but one: UDP from that one arrives, others are dropped."""
    web, shy = (sandboxes(labels={"app": app}) for app in ("web", "shy"))
    kind, address = (socket.AF_INET, web.ip4) if family == 4 else (socket.AF_INET6, web.ip6)
    probe = Probe(daemon)
    with daemon.client() as api:
        api.policy_apply([("asking.yaml", ASKING)])
    with web.ns.entered():
        server = socket.socket(kind, socket.SOCK_DGRAM)
    with closing(server):
        server.bind((address, 53))
        said = 0
        for port in (5000, 4999, 5001):
            with shy.ns.entered():
                sock = socket.socket(kind, socket.SOCK_DGRAM)
            with closing(sock):
                sock.bind(("", port))
                sock.sendto(b"x", (address, 53))
            if port == 5000:
                wait_readable(server.fileno(), why="a datagram of the one port")
                assert server.recv(10) == b"x"
            else:
                said += 1
            _wait_for(probe, said)
            assert not select.select([server], [], [], 0)[0]


def _wait_for(probe: Probe, said: int) -> None:
    """Returns when as many packets have been dropped; fails for more."""
    wait_until(lambda: probe.denied() >= said, why="datagrams to be dropped")
    assert probe.denied() == said
