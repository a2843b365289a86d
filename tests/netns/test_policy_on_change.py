"""What a change of policy means for connections that are open, as its annotation says; and rules that log."""

from __future__ import annotations

import select
import socket
import subprocess
from contextlib import closing

import pytest

from portwright.model.port import PortMapping
from tests.deadline import wait_readable, wait_until
from tests.fix_daemon import HOST4, HOST6, PORTWRIGHT, WORLD4, WORLD6, Daemon, SandboxFactory
from tests.fix_netns import TestNetns
from tests.netns.policy_lab import Probe, connect, listening
from tests.netns.representor import following, stats

pytestmark = pytest.mark.netns

#: Nobody opens a connection to app=web, or app=client none, and what is open ends as the annotation says.
CLOSED = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: closed, annotations: {{portwright.dev/on-change: {on_change}}}}}
spec:
  podSelector: {{matchLabels: {{app: {app}}}}}
  policyTypes: [{direction}]
"""
INGRESS, EGRESS = ("web", "Ingress"), ("client", "Egress")
WAYS = ("from_port", "to_port")


def closed(on_change: str, who: tuple[str, str] = INGRESS) -> list[tuple[str, str]]:
    """The manifest file."""
    app, direction = who
    return [("closed.yaml", CLOSED.format(on_change=on_change, app=app, direction=direction))]


def accepted(listener: socket.socket) -> socket.socket:
    """The listener's end of the connection that was just made."""
    made, _ = listener.accept()
    made.settimeout(3)
    return made


def carry(source: socket.socket, target: socket.socket) -> None:
    """A byte arrives."""
    source.send(b"x")
    wait_readable(target.fileno(), why="a byte of an open connection")
    assert target.recv(16) == b"x"


def is_refused(daemon: Daemon, source: socket.socket, target: socket.socket) -> None:
    """A byte is dropped by policy, and none arrives."""
    probe = Probe(daemon)
    before = probe.denied()
    source.send(b"x")
    wait_until(lambda: probe.denied() > before, why="a byte to be refused")
    assert not select.select([target], [], [], 0)[0]


@pytest.mark.parametrize("who", [INGRESS, EGRESS], ids=["ingress", "egress"])
@pytest.mark.parametrize("family", [4, 6])
def test_keep_leaves_open_connections_alone(
    daemon: Daemon, sandboxes: SandboxFactory, who: tuple[str, str], family: int
) -> None:
    """Both ways, over several changes, but new ones are refused; and with the next policy, which rechecks,
    the old connection ends too."""
    web, client = (sandboxes(labels={"app": app}) for app in ("web", "client"))
    address = web.ip4 if family == 4 else web.ip6
    with (
        listening(web.ns, 80) as listener,
        daemon.client() as api,
        closing(connect(client.ns, address, 80)) as one,
        closing(accepted(listener)) as other,
    ):
        for number in range(3):
            api.policy_apply([*closed("keep", who), (f"{number}.yaml", "")])
            carry(one, other)
            carry(other, one)
            assert not Probe(daemon).reaches(client, address, 80)
        api.policy_apply(closed("recheck", who))
        is_refused(daemon, one, other)


@pytest.mark.parametrize("who", [INGRESS, EGRESS], ids=["ingress", "egress"])
@pytest.mark.parametrize("family", [4, 6])
def test_reset_tells_both_ends(
    daemon: Daemon, sandboxes: SandboxFactory, who: tuple[str, str], family: int
) -> None:
    """Each end's next packet, data of several segments too, is answered with a RST that its kernel takes."""
    web, client = (sandboxes(labels={"app": app}) for app in ("web", "client"))
    address = web.ip4 if family == 4 else web.ip6
    with listening(web.ns, 80) as listener, daemon.client() as api:
        with closing(connect(client.ns, address, 80)) as one, closing(accepted(listener)) as other:
            carry(one, other)
            api.policy_apply(closed("reset", who))
            one.send(bytes(20_000))
            with pytest.raises(ConnectionResetError):
                one.recv(1)
            other.send(b"x")
            with pytest.raises(ConnectionResetError):
                other.recv(1)
        assert not Probe(daemon).reaches(client, address, 80)
        dropped = {(d.port_id, d.direction) for d in api.drops() if d.reason == "policy"}
        guilty, way = (web, "to_port") if who == INGRESS else (client, "from_port")
        assert (guilty.port.port_id, way) in dropped


@pytest.mark.parametrize("who", [INGRESS, EGRESS], ids=["ingress", "egress"])
@pytest.mark.parametrize("family", [4, 6])
def test_a_packet_that_is_reset_is_counted_once(
    daemon: Daemon, sandboxes: SandboxFactory, who: tuple[str, str], family: int
) -> None:
    """Its sender sent it, if it was the receiver who refused it, and got the RST; the receiver nothing."""
    web, client = (sandboxes(labels={"app": app}) for app in ("web", "client"))
    address = web.ip4 if family == 4 else web.ip6
    sent = (1 if who == INGRESS else 0, 1)

    def counted() -> list[tuple[int, ...]]:
        with (
            listening(web.ns, 80) as listener,
            closing(connect(client.ns, address, 80)) as one,
            closing(accepted(listener)) as other,
        ):
            carry(one, other)
            carry(other, one)
            api.policy_apply(closed("reset", who))
            before = [stats(daemon, box) for box in (client, web)]
            one.send(b"x")
            with pytest.raises(ConnectionResetError):
                one.recv(1)
            after = [stats(daemon, box) for box in (client, web)]
        api.policy_delete(["closed.yaml"])
        return [
            tuple(getattr(now, way).total.packets - getattr(was, way).total.packets for way in WAYS)
            for was, now in zip(before, after, strict=True)
        ]

    with daemon.client() as api:
        # The sandbox's kernel says things of its own too (MLD, router solicitations), which only adds.
        wait_until(lambda: counted() == [sent, (0, 0)], 10, f"{sent} to be counted")


@pytest.mark.parametrize("family", [4, 6])
def test_reset_tells_the_world(
    daemon: Daemon, world: TestNetns, sandboxes: SandboxFactory, family: int
) -> None:
    """Behind a published port, and in a connection to outside, where the host translates addresses."""
    web = sandboxes(labels={"app": "web"}, port_mappings=(PortMapping(host_port=8080, container_port=80),))
    client = sandboxes(labels={"app": "client"})
    host, outside = (HOST4, WORLD4) if family == 4 else (HOST6, WORLD6)
    with (
        listening(web.ns, 80) as inside,
        listening(world, 90) as beyond,
        daemon.client() as api,
        closing(connect(world, host, 8080)) as guest,
        closing(accepted(inside)),
        closing(connect(client.ns, outside, 90)) as leaving,
        closing(accepted(beyond)) as reached,
    ):
        second = closed("reset", EGRESS)[0][1].replace("name: closed", "name: second")
        api.policy_apply([*closed("reset"), ("second.yaml", second)])
        for end in (guest, leaving, reached):
            end.send(b"x")
            with pytest.raises(ConnectionResetError):
                end.recv(1)


def test_a_rule_that_logs_is_heard_and_decides_nothing(daemon: Daemon, sandboxes: SandboxFactory) -> None:
    """The first packet of each connection that it matches is reported once, with the rule that let it pass;
    it counts as no drop."""
    web, client = (sandboxes(labels={"app": app}) for app in ("web", "client"))
    rules = """
apiVersion: projectcalico.org/v3
kind: NetworkPolicy
metadata: {name: noted, namespace: default}
spec:
  selector: app == 'web'
  ingress:
  - {action: Log, protocol: TCP, destination: {ports: [80]}}
  - {action: Allow}
"""
    with (
        listening(web.ns, 80),
        listening(web.ns, 81),
        daemon.client() as api,
        following(daemon, client) as follower,
    ):
        api.policy_apply([("log.yaml", rules)])
        for port in (81, 80):
            assert Probe(daemon).reaches(client, web.ip4, port)
        wait_until(lambda: follower.of("logged"), why="the event")
        assert not [d for d in api.drops() if d.reason == "logged"]
    (event,) = follower.of("logged")
    assert event.rule == "policy: CalicoNetworkPolicy default/noted ingress[1]"
    assert f"{web.ip4}.80 tcp" in event.summary


def test_what_passes_is_shown_on_request_only(daemon: Daemon) -> None:
    """The command line refuses ``--logged`` where it would say nothing."""
    command = [str(PORTWRIGHT), "--run-dir", str(daemon.run_dir), "drops", "--logged"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "--follow" in done.stderr
