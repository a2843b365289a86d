"""Policy on real packets: manifests applied to a running daemon, connections tried between real sandboxes."""

from __future__ import annotations

import socket
import struct
from contextlib import closing

import pytest

from portwright.model.errors import InvalidInput
from portwright.model.port import PortMapping
from tests.deadline import wait_until
from tests.fix_daemon import HOST4, WORLD4, WORLD6, Daemon, SandboxFactory
from tests.fix_netns import TestNetns
from tests.netns.policy_lab import WEB, Probe, connect, connected, listening
from tests.netns.representor import following

pytestmark = pytest.mark.netns

DENY_EGRESS = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: quiet}
spec:
  podSelector: {matchLabels: {app: client}}
  policyTypes: [Egress]
"""


def test_a_policy_decides_who_connects(daemon: Daemon, sandboxes: SandboxFactory) -> None:
    """A NetworkPolicy for app=web lets app=client in on port 80 and nobody else, in both families; the rest
    is as before; and deleting it opens all again."""
    web, client, other = (sandboxes(labels={"app": app}) for app in ("web", "client", "other"))
    probe = Probe(daemon)
    with listening(web.ns, 80), listening(web.ns, 81), listening(other.ns, 80), daemon.client() as api:

        def table() -> dict[str, bool]:
            return {
                f"{name}->{to}:{port}/{4 if '.' in address else 6}": probe.reaches(source, address, port)
                for name, source, to, target, port in (
                    ("client", client, "web", web, 80),
                    ("client", client, "web", web, 81),
                    ("other", other, "web", web, 80),
                    ("client", client, "other", other, 80),
                    ("web", web, "other", other, 80),
                )
                for address in (target.ip4, target.ip6)
            }

        everything = table()
        assert set(everything.values()) == {True}
        state = api.policy_apply([("web.yaml", WEB)])
        assert state.policies == ("NetworkPolicy default/web",)
        allowed = {key for key, ok in table().items() if ok}
        assert {key.partition("/")[0] for key in allowed} == {
            "client->web:80",
            "client->other:80",
            "web->other:80",
        }
        assert len(allowed) == 6
        assert web.ping(WORLD4)
        assert web.ping(WORLD6)
        assert not client.ping(web.ip4)
        api.policy_delete(["web.yaml"])
        assert table() == everything


def test_an_open_flow_obeys_a_new_policy(daemon: Daemon, sandboxes: SandboxFactory) -> None:
    """A connection from before goes on where the policy allows it, also when the server speaks first; and
    stops where it does not."""
    web, client, other = (sandboxes(labels={"app": app}) for app in ("web", "client", "other"))
    with listening(web.ns, 80) as server, daemon.client() as api:
        held = []
        for source in (client, other):
            near = connect(source.ns, web.ip4, 80)
            far, _ = server.accept()
            held.append((near, far))
        api.policy_apply([("web.yaml", WEB)])
        try:
            (near, far), (stopped, deaf) = held
            far.sendall(b"hello")
            assert near.recv(10) == b"hello"
            near.sendall(b"again")
            assert far.recv(10) == b"again"
            stopped.settimeout(0.5)
            deaf.settimeout(0.5)
            before = Probe(daemon).denied()
            stopped.sendall(b"x")
            with pytest.raises(TimeoutError):
                deaf.recv(1)
            assert Probe(daemon).denied() > before
        finally:
            for pair in held:
                for sock in pair:
                    sock.close()


def test_a_new_port_is_bound_at_once(daemon: Daemon, sandboxes: SandboxFactory) -> None:
    """A port made after the policy obeys it from its first packet, and so it does without its daemon."""
    with daemon.client() as api:
        api.policy_apply([("q.yaml", DENY_EGRESS)])
    client, other = sandboxes(labels={"app": "client"}), sandboxes()
    probe = Probe(daemon)
    with listening(other.ns, 80), listening(client.ns, 80):
        assert not probe.reaches(client, other.ip4, 80)
        assert not client.ping(WORLD4)
        assert probe.reaches(other, client.ip4, 80)
        daemon.kill()
        assert not client.ping(other.ip4)
        daemon.start()
        assert not probe.reaches(client, other.ip6, 80)
        assert probe.reaches(other, client.ip6, 80)


def test_a_changed_label_counts_at_once(daemon: Daemon, sandboxes: SandboxFactory) -> None:
    """A port that gets the label which a rule asks for is let in, and one that loses it is not."""
    web, other = sandboxes(labels={"app": "web"}), sandboxes(labels={"app": "other"})
    probe = Probe(daemon)
    with listening(web.ns, 80), daemon.client() as api:
        api.policy_apply([("web.yaml", WEB)])
        for app, allowed in (("client", True), ("other", False)):
            api.port_set(other.port.port_id, labels={"app": app})
            assert probe.reaches(other, web.ip4, 80) is allowed


def test_why_names_what_lacked(daemon: Daemon, sandboxes: SandboxFactory) -> None:
    """`why` says which policy selected, which rule nearly matched and what it lacked, and how to mend it; and
    the drop's event names what decided. Neither opens the way."""
    web, other = sandboxes(labels={"app": "web"}), sandboxes(labels={"app": "other"})
    probe = Probe(daemon)
    with listening(web.ns, 80), daemon.client() as api:
        api.policy_apply([("web.yaml", WEB)])
        told = api.why(other.port.port_id, web.port.port_id, dport=80)
        said = "\n".join(step.text for step in told.steps if step.step == "policy")
        assert told.verdict == "refused"
        assert "web.yaml:" in said
        assert "needs app=client" in said or "app" in said
        with following(daemon, web) as follower:
            assert not probe.reaches(other, web.ip4, 80)
        rules = {event.rule for event in follower.of("policy")}
        assert rules == {"policy: tier-default default ingress"}
        assert api.why(other.port.port_id, web.port.port_id, dport=80).verdict == "refused"
        assert api.why(web.port.port_id, other.port.port_id, dport=80).verdict == "allowed"


def test_what_is_wrong_changes_nothing(daemon: Daemon, sandboxes: SandboxFactory) -> None:
    """A manifest with a mistake is refused with its file, line and field; what was in force stays."""
    web, other = sandboxes(labels={"app": "web"}), sandboxes()
    probe = Probe(daemon)
    with listening(web.ns, 80), daemon.client() as api:
        before = api.policy_apply([("web.yaml", WEB)])
        wrong = WEB.replace("name: web", "name: more").replace("ports:", "prots:")
        with pytest.raises(InvalidInput, match=r"more\.yaml:\d+.*prots"):
            api.policy_apply([("more.yaml", wrong), ("q.yaml", DENY_EGRESS)])
        assert api.policy_list() == before
        assert not probe.reaches(other, web.ip4, 80)


def test_what_may_answer_may_not_open(daemon: Daemon, sandboxes: SandboxFactory) -> None:
    """A pod that may open nothing can't use the pair of ports of a connection to it to open one."""
    quiet, other = sandboxes(labels={"app": "client"}), sandboxes()
    probe = Probe(daemon)
    with daemon.client() as api:
        api.policy_apply([("q.yaml", DENY_EGRESS)])
    with listening(quiet.ns, 80) as server:
        near = connect(other.ns, quiet.ip4, 80)
        far, _ = server.accept()
        port = near.getsockname()[1]
        far.sendall(b"hello")
        assert near.recv(10) == b"hello"
        # Both ends are gone from the kernels, at once; the flow's entry is there yet.
        for sock in (near, far):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
    with listening(other.ns, port), quiet.ns.entered():
        sock = socket.socket()
    before = probe.denied()
    with closing(sock), listening(other.ns, port):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((quiet.ip4, 80))
        sock.setblocking(False)
        sock.connect_ex((other.ip4, port))
        wait_until(lambda: probe.denied() > before, why="the SYN to be refused")
        assert not connected(sock)


@pytest.mark.parametrize("allowed", ["192.0.2.0/24", "198.51.100.0/24"])
def test_a_port_mapping_shows_policy_the_true_client(
    daemon: Daemon, world: TestNetns, sandboxes: SandboxFactory, allowed: str
) -> None:
    """From outside through a published port: the client's own address and the sandbox's own port count."""
    mapping = PortMapping(host_port=8080, container_port=80)
    web = sandboxes(labels={"app": "web"}, port_mappings=[mapping])
    outside = WEB.replace("podSelector: {matchLabels: {app: client}}", f"ipBlock: {{cidr: {allowed}}}")
    with daemon.client() as api:
        api.policy_apply([("web.yaml", outside)])
    before = Probe(daemon).denied()
    with listening(web.ns, 80):
        if allowed == "192.0.2.0/24":
            connect(world, HOST4, 8080).close()
            assert Probe(daemon).denied() == before
        else:
            with pytest.raises(TimeoutError):
                connect(world, HOST4, 8080, timeout=0.3)
            assert Probe(daemon).denied() > before


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("port", [80, 81])
def test_fragments_go_the_way_of_their_datagram(
    daemon: Daemon, sandboxes: SandboxFactory, port: int, family: int
) -> None:
    """A UDP datagram of several fragments passes whole by a rule for its port, or not at all."""
    web, client = (sandboxes(labels={"app": app}) for app in ("web", "client"))
    udp = WEB.replace("ports: [{port: 80}]", "ports: [{port: 80, protocol: UDP}]")
    with daemon.client() as api:
        api.policy_apply([("web.yaml", udp)])
    probe = Probe(daemon)
    kind, address = (socket.AF_INET, web.ip4) if family == 4 else (socket.AF_INET6, web.ip6)
    with web.ns.entered():
        server = socket.socket(kind, socket.SOCK_DGRAM)
    with client.ns.entered():
        sender = socket.socket(kind, socket.SOCK_DGRAM)
    with closing(server), closing(sender):
        server.settimeout(5)
        server.bind((address, port))
        before = probe.denied()
        sender.sendto(bytes(4000), (address, port))
        if port == 80:
            assert len(server.recv(5000)) == 4000
            assert probe.denied() == before
        else:
            wait_until(lambda: probe.denied() > before, why="the datagram to be refused")
            server.setblocking(False)
            with pytest.raises(BlockingIOError):
                server.recv(5000)
