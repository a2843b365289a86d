"""What the data path remembers of connections: whose they are, when they end, and what if it is full."""

from __future__ import annotations

import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from portwright.dataplane.abi import PwConn, PwConnFlag, PwPolicyConst, PwPort
from portwright.kernel.bpf import Map
from tests.deadline import wait_until
from tests.fix_daemon import Daemon, Sandbox, SandboxFactory
from tests.netns.policy_lab import WEB, Probe, connect, listening

pytestmark = pytest.mark.netns

#: Seconds (pw_idle_limit in dataplane/flow.h), and those in which every flow is looked at once (PW_TURN).
ENDED_IS_REMEMBERED, TURN = 10, 6.4
#: app=web opens nothing.
OPEN = WEB.replace("name: web", "name: open").replace(
    "[{port: 80}]", "[{port: 1, endPort: 65535, protocol: UDP}]"
)
QUIET = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: quiet}
spec:
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Egress]
"""


class Table:
    """The maps of the daemon's data path that flows are kept in."""

    def __init__(self, daemon: Daemon) -> None:
        pins = next(Path(daemon.run_dir, "bpf").glob("*/maps"))
        self.conns, self.ports = Map.from_pin(pins / "pw_conns"), Map.from_pin(pins / "pw_ports")
        self.ager = Map.from_pin(pins / "pw_ager")

    def close(self) -> None:
        """Let go of them."""
        for each in (self.conns, self.ports, self.ager):
            each.close()

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

    def tickets(self) -> int:
        """How many flows, known or forgotten since, are waiting to be looked at."""
        raw = self.ager.lookup(bytes(4))
        assert raw is not None
        return int.from_bytes(raw[20:24], sys.byteorder)  # behind the timer, and whether it runs

    def grow_old(self) -> None:
        """Make it seem that no flow had a packet since the machine was started."""
        self.conns.update_batch(
            (key, PwConn.unpack(raw)._replace(last_ns=0).pack()) for key, raw in self.conns.items()
        )


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
    wait_until(lambda: table.entries() == 0, ENDED_IS_REMEMBERED + 2 * TURN, "the flows to be forgotten")
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


@pytest.mark.slow
def test_ports_used_again_are_a_new_flow(daemon: Daemon, sandboxes: SandboxFactory) -> None:
    """A connection from the ports of one that was reset is not forgotten with it: it may be idle for longer
    than an ended flow is remembered, and the answering side, which may open nothing, still answers."""
    web, client = (sandboxes(labels={"app": app}) for app in ("web", "client"))
    with listening(web.ns, 80) as listener, daemon.client() as api:
        api.policy_apply([("web.yaml", WEB), ("quiet.yaml", QUIET)])
        first = connect(client.ns, web.ip4, 80)
        name = first.getsockname()
        accepted, _ = listener.accept()
        _reset(first)
        accepted.close()
        with client.ns.entered():
            again = socket.socket()
        with closing(again):
            again.settimeout(3)
            again.bind(name)
            again.connect((web.ip4, 80))
            accepted, _ = listener.accept()
            with closing(accepted):
                ended = time.monotonic() + 2 + ENDED_IS_REMEMBERED
                wait_until(lambda: time.monotonic() > ended, 30, "an ended flow to be forgotten")
                accepted.send(b"late")
                assert again.recv(16) == b"late"


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True])
def test_a_burst_of_flows_is_known_and_forgotten(
    daemon: Daemon, table: Table, sandboxes: SandboxFactory, again: bool
) -> None:
    """Twenty thousand flows as fast as a process can open them: none is refused, each has its ticket, and
    once idle they go within a turn, as do those of a data path that was at rest before."""
    web, client = (sandboxes(labels={"app": app}) for app in ("web", "client"))
    with (
        daemon.client() as api,
        client.ns.entered(),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
    ):
        api.policy_apply([("web.yaml", WEB), ("open.yaml", OPEN)])
        for number in range(1, 3 if again else 2):
            for port in range(1_001, 21_001):
                sock.sendto(b"x", (web.ip4, port))
            assert (table.flows(client), table.entries(), table.tickets()) == (20_000, 20_000, 20_000)
            assert "flow_table" not in {d.reason for d in api.drops(client.port.port_id)}, number
            table.grow_old()
            wait_until(lambda: table.entries() == 0, 3 * TURN, "the flows to be forgotten")
            wait_until(
                lambda: (table.flows(client), table.tickets()) == (0, 0), why="their tickets to be gone"
            )


@pytest.mark.parametrize("gone", [False, True], ids=["policies change", "policies go"])
def test_the_end_of_a_flow_is_seen_after_a_change(
    daemon: Daemon, table: Table, sandboxes: SandboxFactory, gone: bool
) -> None:
    """A connection of which the first packet after a change of policy is its RST has ended: it is not kept
    for the day for which a living one may be idle."""
    web, client = (sandboxes(labels={"app": app}) for app in ("web", "client"))
    with listening(web.ns, 80), daemon.client() as api:
        api.policy_apply([("web.yaml", WEB)])
        sock = connect(client.ns, web.ip4, 80)
        if gone:
            api.policy_delete(["web.yaml"])
        else:
            api.policy_apply([("quiet.yaml", QUIET)])
        _reset(sock)
        flags = [PwConn.unpack(raw).flags for _, raw in table.conns.items()]
    assert flags
    assert all(each & PwConnFlag.CF_RESET and each & PwConnFlag.CF_REPLIED for each in flags)
