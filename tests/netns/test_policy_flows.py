"""What the data path remembers of connections: whose they are, when they end, and what if it is full."""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from portwright.dataplane.abi import PwPolicyConst, PwPort
from portwright.kernel.bpf import Map
from tests.deadline import wait_until
from tests.fix_daemon import Daemon, Sandbox, SandboxFactory
from tests.netns.policy_lab import WEB, Probe, connect, listening

pytestmark = pytest.mark.netns


class Table:
    """The maps of the daemon's data path that flows are kept in."""

    def __init__(self, daemon: Daemon) -> None:
        pins = next(Path(daemon.run_dir, "bpf").glob("*/maps"))
        self.conns, self.ports = Map.from_pin(pins / "pw_conns"), Map.from_pin(pins / "pw_ports")

    def close(self) -> None:
        """Let go of both."""
        self.conns.close()
        self.ports.close()

    def port(self, box: Sandbox) -> tuple[bytes, PwPort]:
        """Key and value of a port's entry."""
        key = box.port.rep_ifindex.to_bytes(4, sys.byteorder)
        raw = self.ports.lookup(key)
        assert raw is not None
        return key, PwPort.unpack(raw)

    def flows(self, box: Sandbox) -> int:
        """How many flows count for a port."""
        return self.port(box)[1].flows

    def entries(self) -> int:
        """How many flows there are."""
        return len(list(self.conns.keys()))


@pytest.fixture
def table(daemon: Daemon, sandboxes: SandboxFactory) -> Iterator[Table]:
    """Of a daemon that has a port."""
    sandboxes()
    with closing(Table(daemon)) as made:
        yield made


def _reset(sock: socket.socket) -> None:
    """Close with a RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@pytest.mark.parametrize("policy", [False, True])
def test_a_flow_counts_for_its_opener_until_it_ends(
    daemon: Daemon, table: Table, sandboxes: SandboxFactory, policy: bool
) -> None:
    """Each connection is one entry, which counts for the port that opened it, with or without a policy; ten
    seconds after it was reset the kernel has forgotten it, and the port has its place back."""
    web, client = (sandboxes(labels={"app": app}) for app in ("web", "client"))
    with daemon.client() as api:
        if policy:
            api.policy_apply([("web.yaml", WEB)])
    with listening(web.ns, 80):
        held = [connect(client.ns, web.ip4, 80) for _ in range(5)]
        assert (table.flows(client), table.flows(web), table.entries()) == (5, 0, 5)
        for sock in held:
            _reset(sock)
    daemon.kill()  # it has no part in it
    wait_until(lambda: table.entries() == 0, 20, "the flows to be forgotten")
    assert (table.flows(client), table.flows(web)) == (0, 0)


def test_a_port_that_has_its_share_opens_no_more(
    daemon: Daemon, table: Table, sandboxes: SandboxFactory
) -> None:
    """Under a policy its next flow is refused and counted, and others' are not; without one it passes."""
    web, client, other = (sandboxes(labels={"app": app}) for app in ("web", "client", "client"))
    key, value = table.port(client)
    table.ports.update(key, value._replace(flows=PwPolicyConst.PORT_FLOWS).pack())
    with listening(web.ns, 80), daemon.client() as api:
        connect(client.ns, web.ip4, 80).close()
        api.policy_apply([("web.yaml", WEB)])
        with pytest.raises(TimeoutError):
            connect(client.ns, web.ip6, 80, timeout=0.3)
        assert "flow_table" in {d.reason for d in api.drops(client.port.port_id)}
        assert Probe(daemon).reaches(other, web.ip6, 80)
