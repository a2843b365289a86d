"""Calico's host endpoints on real packets: a daemon's own namespace, its uplink, and a world behind it."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from portwright.api.errors import ConnectionLost
from portwright.kernel import conntrack
from portwright.kernel.nft import Nft
from portwright.model.errors import InvalidInput, KernelFailed
from portwright.model.port import PortMapping
from portwright.node.paths import Paths
from portwright.plan.hosts import hosts_table
from tests.deadline import wait_readable, wait_until
from tests.fix_daemon import HOST4, HOST6, WORLD4, WORLD6, Daemon, SandboxFactory
from tests.fix_netns import TestNetns
from tests.netns.policy_lab import Probe, connect, connected, listening

pytestmark = pytest.mark.netns

PROJECT = Path(__file__).resolve().parents[2]

BOTH = pytest.mark.parametrize("family", [4, 6])


def host(**spec: str) -> str:
    """A HostEndpoint of this node, role=host; its interface is ``up0`` unless something else is given."""
    fields = {"interfaceName": "up0"} | {key: value for key, value in spec.items() if value}
    if spec.get("interfaceName") == "":
        del fields["interfaceName"]
    lines = "".join(f"\n  {key}: {value}" for key, value in fields.items())
    return f"""
apiVersion: projectcalico.org/v3
kind: HostEndpoint
metadata: {{name: uplink, labels: {{role: host}}}}
spec:
  node: {socket.gethostname()}{lines}
"""


def policy(name: str, body: str, *, on_change: str = "recheck", flags: str = "") -> str:
    """A GlobalNetworkPolicy for role=host; ``flags`` are fields of its spec."""
    inner = "".join(f"\n  {line}" for line in [*flags.split("|"), *body.strip("\n").splitlines()] if line)
    return f"""
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {{name: {name}, annotations: {{portwright.dev/on-change: {on_change}}}}}
spec:
  selector: role == 'host'{inner}
"""


FORWARD = "applyOnForward: true"
PRE_DNAT = "applyOnForward: true|preDNAT: true"
UNTRACKED = "applyOnForward: true|doNotTrack: true"
#: Nothing in, nothing out.
DENY_ALL = policy("deny-all", "types: [Ingress, Egress]")


class HostProbe:
    """Connections judged by the host endpoints' counters and not by time-outs."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def drops(self) -> dict[tuple[str, str, str, str], int]:
        """Packets by (port, direction, reason, rule), of host endpoints.

        But for those of no connection: a test's last connection ends when it likes.
        """
        with self._daemon.client() as client:
            return {
                (d.port_id, d.direction, d.reason, d.rule): d.packets
                for d in client.drops()
                if d.port_id.startswith("host:") and d.rule != "ct-state-invalid"
            }

    def denied(self) -> int:
        """All of them."""
        return sum(self.drops().values())

    def reaches(self, source: TestNetns, address: str, port: int) -> bool:
        """Whether a TCP connection is made; a denied SYN shows in the counters, or at its sender."""
        before = self.denied()
        with source.entered():
            sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        with closing(sock):
            # Gone with one RST: no FIN and its answer, which a later change would have to judge.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.setblocking(False)
            sock.connect_ex((address, port))
            wait_until(lambda: connected(sock) or self.denied() > before, why="a SYN to be judged")
            is_connected, is_denied = connected(sock), self.denied() > before
        assert is_connected != is_denied, f"connected {is_connected}, denied {is_denied}"
        return is_connected

    def answers(self, source: TestNetns, address: str, port: int, server: socket.socket) -> bool:
        """Whether a UDP datagram arrives at ``server`` and its answer comes back."""
        before = self.denied()
        with source.entered():
            sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        with closing(sock):
            sock.setblocking(False)
            try:
                sock.sendto(b"question", (address, port))
            except PermissionError:  # an output hook says so to who sends
                assert self.denied() > before
                return False
            if not _comes(server, lambda: self.denied() > before):
                return False
            _, client = server.recvfrom(64)
            try:
                server.sendto(b"answer", client)
            except PermissionError:
                assert self.denied() > before
                return False
            return _comes(sock, lambda: self.denied() > before)


def _comes(sock: socket.socket, dropped: Callable[[], bool]) -> bool:
    def there() -> bool:
        try:
            return bool(sock.recv(64, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return False

    wait_until(lambda: there() or dropped(), why="a datagram to be judged")
    return there()


def datagrams(ns: TestNetns, port: int) -> socket.socket:
    """A UDP socket of both families that waits for nothing."""
    with ns.entered():
        sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(("::", port))
    sock.setblocking(False)
    return sock


def ends(family: int) -> tuple[str, str]:
    """(the host's address, the world's)."""
    return (HOST4, WORLD4) if family == 4 else (HOST6, WORLD6)


@BOTH
def test_local_processes_are_reached_as_allowed(daemon: Daemon, world: TestNetns, family: int) -> None:
    """An endpoint with a policy for port 80 takes that from outside and nothing else, sends nothing itself,
    and answers; deleting it gives everything back."""
    mine, theirs = ends(family)
    probe = HostProbe(daemon)
    allow = policy(
        "web", "types: [Ingress]\ningress: [{action: Allow, protocol: TCP, destination: {ports: [80]}}]"
    )
    with (
        listening(daemon.host, 80),
        listening(daemon.host, 81),
        listening(world, 80),
        daemon.client() as api,
    ):

        def table() -> tuple[bool, bool, bool]:
            return (
                probe.reaches(world, mine, 80),
                probe.reaches(world, mine, 81),
                probe.reaches(daemon.host, theirs, 80),
            )

        assert table() == (True, True, True)
        api.policy_apply([("h.yaml", host() + allow)])
        assert table() == (True, False, False)
        assert api.policy_list().hosts == ("uplink: up0",)
        found = {(key[1], key[2], key[3]) for key in probe.drops()}
        assert found == {
            ("ingress", "host-local", "tier-default default ingress"),
            ("egress", "host-local", "host-default"),
        }
        api.policy_delete(["h.yaml"])
        assert probe.drops() == {}
        assert table() == (True, True, True)
        assert "hosts" not in daemon.host.run(["nft", "list", "tables"]).stdout


@BOTH
def test_failsafes_stay_open(daemon: Daemon, world: TestNetns, family: int) -> None:
    """Under a denial of everything ssh comes in, a question to DNS goes out, both are answered; neighbours
    are found; so it is with an untracked and a pre-DNAT denial of everything."""
    mine, theirs = ends(family)
    probe = HostProbe(daemon)
    everything = "types: [Ingress]\ningress: [{action: Deny}]"
    both = "types: [Ingress, Egress]\ningress: [{action: Deny}]\negress: [{action: Deny}]"
    manifests = (
        host() + DENY_ALL + policy("raw", both, flags=UNTRACKED) + policy("pre", everything, flags=PRE_DNAT)
    )
    with (
        listening(daemon.host, 22),
        listening(daemon.host, 23),
        closing(datagrams(world, 53)) as resolver,
        closing(datagrams(world, 54)) as other,
        daemon.client() as api,
    ):
        api.policy_apply([("h.yaml", manifests)])
        for ns in (daemon.host, world):  # neighbours have to be found anew
            ns.run(["ip", "neigh", "flush", "all"])
        assert probe.reaches(world, mine, 22)
        assert not probe.reaches(world, mine, 23)
        assert probe.answers(daemon.host, theirs, 53, resolver)
        assert not probe.answers(daemon.host, theirs, 54, other)
        assert {key[2] for key in probe.drops()} == {"host-untracked"}


@BOTH
def test_what_is_forwarded_obeys_apply_on_forward_alone(
    daemon: Daemon, world: TestNetns, sandboxes: SandboxFactory, family: int
) -> None:
    """A sandbox's way out through a host endpoint is open until a policy with applyOnForward selects it in
    that direction; then that policy's rules count."""
    _, theirs = ends(family)
    probe = HostProbe(daemon)
    box = sandboxes(labels={"app": "box"})
    web = "types: [Egress]\negress: [{action: Allow, protocol: TCP, destination: {ports: [80]}}]"
    with listening(world, 80), listening(world, 81), daemon.client() as api:

        def table() -> tuple[bool, bool]:
            return probe.reaches(box.ns, theirs, 80), probe.reaches(box.ns, theirs, 81)

        api.policy_apply([("h.yaml", host() + DENY_ALL)])
        assert table() == (True, True)
        api.policy_apply([("h.yaml", host() + policy("web", web))])
        assert table() == (True, True)
        api.policy_apply([("h.yaml", host() + policy("web", web, flags=FORWARD))])
        assert table() == (True, False)
        assert {key[1:3] for key in probe.drops()} == {("egress", "host-forward")}
        told = {port: api.why(box.port.port_id, theirs, dport=port) for port in (80, 81)}
        assert {port: why.verdict for port, why in told.items()} == {80: "allowed", 81: "refused"}
        said = {port: [s.text for s in w.steps if s.step == "host endpoint"] for port, w in told.items()}
        assert said[80][0].startswith(
            "uplink: allowed in forward by GlobalNetworkPolicy web egress[0] h.yaml:"
        )
        assert said[81] == ["uplink: denied in forward by tier-default default"]
        closed = policy("closed", "types: [Ingress]", flags=FORWARD)
        api.policy_apply([("h.yaml", host() + closed)])
        assert api.why(theirs, box.port.port_id, dport=80).verdict == "refused"
        assert api.why(box.port.port_id, theirs, dport=80).verdict == "allowed"


@BOTH
def test_before_dnat_the_host_port_counts(
    daemon: Daemon, world: TestNetns, sandboxes: SandboxFactory, family: int
) -> None:
    """A published port is denied by its number on the host, to a client by its own address."""
    mine, theirs = ends(family)
    probe = HostProbe(daemon)
    web = sandboxes(
        port_mappings=[PortMapping(host_port=p, container_port=80) for p in (8080, 8081)],
    )
    net = theirs + ("/32" if family == 4 else "/128")
    other = "198.51.100.0/24" if family == 4 else "2001:db8:1::/64"
    rules = (
        "types: [Ingress]\n"
        "ingress:\n"
        f"- {{action: Deny, protocol: TCP, source: {{nets: ['{net}']}}, destination: {{ports: [8080]}}}}\n"
        f"- {{action: Deny, protocol: TCP, source: {{nets: ['{other}']}}, destination: {{ports: [8081]}}}}\n"
        "- {action: Deny, protocol: TCP, destination: {ports: [80]}}"
    )
    with listening(web.ns, 80), daemon.client() as api:
        api.policy_apply([("h.yaml", host() + policy("pre", rules, flags=PRE_DNAT))])
        assert not probe.reaches(world, mine, 8080)
        assert probe.reaches(world, mine, 8081)
        assert list(probe.drops()) == [
            ("host:up0", "ingress", "host-pre-dnat", "GlobalNetworkPolicy pre ingress[0]")
        ]


@BOTH
def test_an_allow_before_dnat_is_the_ingress_sides_last_word(
    daemon: Daemon, world: TestNetns, sandboxes: SandboxFactory, family: int
) -> None:
    """As in Calico: it opens what the default of local processes, or a forward policy, would deny, by the
    port of before the translation."""
    mine, _ = ends(family)
    probe = HostProbe(daemon)
    web = sandboxes(
        port_mappings=[PortMapping(host_port=p, container_port=80) for p in (8080, 8081)],
    )
    pre = "types: [Ingress]\ningress: [{action: Allow, protocol: TCP, destination: {ports: [8080, 90]}}]"
    closed = policy("closed", "types: [Ingress]", flags=FORWARD)
    with (
        listening(web.ns, 80),
        listening(daemon.host, 90),
        listening(daemon.host, 91),
        daemon.client() as api,
    ):
        api.policy_apply([("h.yaml", host() + policy("pre", pre, flags=PRE_DNAT) + closed)])
        assert [probe.reaches(world, mine, port) for port in (8080, 8081, 90, 91)] == [
            True,
            False,
            True,
            False,
        ]


def forgotten(ns: TestNetns, address: str, port: int) -> int:
    """How many UDP entries to this address and port conntrack had; it has none then."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with ns.entered():
        return conntrack.purge(None, conntrack.Entries("udp", family, orig_dst=address, orig_dst_port=port))


@BOTH
def test_untracked_policy_passes_without_conntrack(daemon: Daemon, world: TestNetns, family: int) -> None:
    """What it allows in both directions passes, past a local denial of everything, and nobody tracks it; with
    one direction alone the answer is lost; what it denies is dropped before all."""
    mine, _ = ends(family)
    probe = HostProbe(daemon)
    ingress = (
        "ingress: [{action: Allow, protocol: UDP, destination: {ports: [9000]}}, "
        "{action: Deny, protocol: UDP, destination: {ports: [9001]}}]"
    )
    egress = "egress: [{action: Allow, protocol: UDP, source: {ports: [9000]}}]"
    untracked = {
        "both": policy("raw", f"types: [Ingress, Egress]\n{ingress}\n{egress}", flags=UNTRACKED),
        "one": policy("raw", f"types: [Ingress]\n{ingress}", flags=UNTRACKED),
    }
    with (
        closing(datagrams(daemon.host, 9000)) as one,
        closing(datagrams(daemon.host, 9001)) as other,
        daemon.client() as api,
    ):
        api.policy_apply([("h.yaml", host() + DENY_ALL + untracked["both"])])
        assert probe.answers(world, mine, 9000, one)
        assert forgotten(daemon.host, mine, 9000) == 0
        assert not probe.answers(world, mine, 9001, other)
        assert [key[2:] for key in probe.drops()] == [
            ("host-untracked", "GlobalNetworkPolicy raw ingress[1]")
        ]
        api.policy_apply([("h.yaml", host() + DENY_ALL + untracked["one"])])
        assert not probe.answers(world, mine, 9000, one)
        tracked = policy("in", f"types: [Ingress]\n{ingress}")
        api.policy_apply([("h.yaml", host() + tracked)])
        assert probe.answers(world, mine, 9000, one)
        assert forgotten(daemon.host, mine, 9000) == 1


@BOTH
def test_errors_about_a_connection_come_back(daemon: Daemon, world: TestNetns, family: int) -> None:
    """An ICMP error about a datagram that a policy let out passes a denial of all that comes in."""
    _, theirs = ends(family)
    out = "types: [Ingress, Egress]\negress: [{action: Allow, protocol: UDP, destination: {ports: [9]}}]"
    with daemon.client() as api:
        api.policy_apply([("h.yaml", host() + policy("out", out))])
    with daemon.host.entered():
        sock = socket.socket(socket.AF_INET6 if family == 6 else socket.AF_INET, socket.SOCK_DGRAM)
    with closing(sock):
        sock.settimeout(5)
        sock.connect((theirs, 9))
        sock.send(b"anybody?")
        with pytest.raises(ConnectionRefusedError):
            sock.recv(1)
    assert HostProbe(daemon).drops() == {}


def test_somebody_elses_notrack_opens_nothing(daemon: Daemon, world: TestNetns) -> None:
    """A packet that a rule of the user's keeps from conntrack is judged as any other, not taken for one that
    an untracked policy allowed."""
    probe = HostProbe(daemon)
    allow = "[{action: Allow, protocol: UDP, destination: {ports: [9000]}}]"
    raw = policy("raw", f"types: [Ingress, Egress]\ningress: {allow}", flags=UNTRACKED)
    raw_chain = "chain raw { type filter hook prerouting priority -300; udp dport 9002 notrack; }"
    script = f"table inet mine {{ {raw_chain}; }}"
    daemon.host.run(["nft", "-f", "-"], input=script)
    with closing(datagrams(daemon.host, 9002)) as server, daemon.client() as api:
        api.policy_apply([("h.yaml", host() + DENY_ALL + raw)])
        assert not probe.answers(world, HOST4, 9002, server)
        assert "udp dport 9002 notrack" in daemon.host.run(["nft", "list", "table", "inet", "mine"]).stdout


@BOTH
@pytest.mark.parametrize("direction", ["Ingress", "Egress"])
@pytest.mark.parametrize("on_change", ["recheck", "keep", "reset"])
def test_open_connections_after_a_change(
    daemon: Daemon, world: TestNetns, on_change: str, direction: str, family: int
) -> None:
    """What was open before the denial is judged again, kept, or told that it ended; new ones are denied. It
    is the opener's direction that counts."""
    mine, theirs = ends(family)
    source, server, address = (world, daemon.host, mine)
    if direction == "Egress":
        source, server, address = (daemon.host, world, theirs)
    probe = HostProbe(daemon)
    every = "types: [Ingress, Egress]\ningress: [{action: Allow}]\negress: [{action: Allow}]"
    closed = every.replace(f"{direction.lower()}: [{{action: Allow", f"{direction.lower()}: [{{action: Deny")
    with listening(server, 80) as listener, daemon.client() as api:
        api.policy_apply([("h.yaml", host() + policy("it", every))])
        with closing(connect(source, address, 80)) as one, closing(listener.accept()[0]) as other:
            api.policy_apply([("h.yaml", host() + policy("it", closed, on_change=on_change))])
            assert not probe.reaches(source, address, 80)
            before = probe.denied()
            one.send(b"x")
            if on_change == "keep":
                wait_readable(other.fileno(), why="a byte of a connection that is kept")
                assert probe.denied() == before
                return
            wait_until(lambda: probe.denied() > before, why="a byte to be refused")
            if on_change == "reset":
                with pytest.raises(ConnectionResetError):
                    one.recv(1)
                other.settimeout(5)
                other.send(b"x")  # to which the opener's host answers that there is nothing
                with pytest.raises(ConnectionResetError):
                    other.recv(1)
            else:
                other.setblocking(False)
                with pytest.raises(BlockingIOError):
                    other.recv(1)


def test_an_interface_is_bound_from_its_first_packet(
    daemon: Daemon, netns_factory: Callable[[], TestNetns]
) -> None:
    """One that was named before there was it."""
    probe = HostProbe(daemon)
    other = netns_factory()
    with listening(daemon.host, 80), daemon.client() as api:
        api.policy_apply([("h.yaml", host(interfaceName="late0") + DENY_ALL)])
        daemon.host.run(
            ["ip", "link", "add", "late0", "type", "veth", "peer", "name", "l0", "netns", other.name]
        )
        for ns, dev, address in ((daemon.host, "late0", "203.0.113.1/24"), (other, "l0", "203.0.113.2/24")):
            ns.run(["ip", "addr", "add", address, "dev", dev])
            ns.run(["ip", "link", "set", dev, "up"])
        assert not probe.reaches(other, "203.0.113.1", 80)


def test_it_outlives_the_daemon(daemon: Daemon, world: TestNetns) -> None:
    """While the daemon is away and after its next start the rules are in force; a start after the record was
    changed meanwhile puts the record's in force; nobody else's table is touched."""
    probe = HostProbe(daemon)
    script = "table inet portwright_hosts_not { chain c { type filter hook input priority 5; counter; }; }"
    daemon.host.run(["nft", "-f", "-"], input=script)
    with listening(daemon.host, 80):
        with daemon.client() as api:
            api.policy_apply([("h.yaml", host() + DENY_ALL)])
        assert not probe.reaches(world, HOST4, 80)
        daemon.kill()
        with pytest.raises(TimeoutError):
            connect(world, HOST4, 80, timeout=0.3)
        daemon.start()
        assert sum(probe.drops().values()) >= 2, "the counters begin anew"
        assert not probe.reaches(world, HOST6, 80)
        daemon.kill()
        daemon.host.run(["nft", "flush", "ruleset"])
        daemon.host.run(["nft", "-f", "-"], input=script)
        daemon.start()
        assert not probe.reaches(world, HOST4, 80)
        with daemon.client() as api:
            api.policy_delete(["h.yaml"])
        assert probe.reaches(world, HOST4, 80)
    assert daemon.host.run(["nft", "list", "tables"]).stdout.splitlines() == [
        "table inet portwright_hosts_not"
    ]


def test_a_firewall_that_is_reloaded_opens_nothing(daemon: Daemon, world: TestNetns) -> None:
    """``nft flush ruleset`` takes our table too: it is back at once, and an alarm says so."""
    probe = HostProbe(daemon)
    with listening(daemon.host, 80), daemon.client() as api:
        api.policy_apply([("h.yaml", host() + DENY_ALL)])
        assert api.node_status().alarms == ()
        for number in range(1, 3):
            daemon.host.run(["nft", "flush", "ruleset"])
            wait_until(lambda n=number: len(api.node_status().alarms) == n, why="the alarm")  # type: ignore[misc]
            assert not probe.reaches(world, HOST4, 80)
        assert api.node_status().ready


@pytest.mark.parametrize(
    ("place", "removes", "is_done"),
    [
        ("hosts:recorded", False, False),
        ("hosts:installed", False, False),
        ("policy:hosts", False, False),
        ("policy:recorded", False, True),
        ("hosts:removed", True, False),
        ("policy:recorded", True, True),
    ],
)
def test_killed_anywhere_it_is_old_or_new(
    daemon: Daemon, world: TestNetns, place: str, removes: bool, is_done: bool
) -> None:
    """A daemon that is killed in the middle of a change, and again as it starts, has what is on record after
    its next start."""
    probe = HostProbe(daemon)
    if removes:
        with daemon.client() as api:
            api.policy_apply([("h.yaml", host() + DENY_ALL)])
    daemon.kill()
    daemon.start(PORTWRIGHT_DIE_AT=place)
    with daemon.client() as api:
        change = partial(api.policy_apply, [("h.yaml", host() + DENY_ALL)])
        if removes:
            change = partial(api.policy_delete, ["h.yaml"])
        with pytest.raises(ConnectionLost):
            change()
    assert daemon.wait() == -9
    is_there = removes is not is_done
    if is_there:
        daemon.launch(PORTWRIGHT_DIE_AT="recover-hosts:installed")
        assert daemon.wait() == -9
    daemon.start()
    with listening(daemon.host, 80), daemon.client() as api:
        assert bool(api.policy_list().files) is is_there
        assert bool(api.policy_list().hosts) is is_there
        assert probe.reaches(world, HOST4, 80) is not is_there
    assert ("portwright-hosts" in daemon.host.run(["nft", "list", "tables"]).stdout) is is_there


def test_what_the_kernel_refuses_changes_nothing(
    daemon: Daemon, world: TestNetns, sandboxes: SandboxFactory
) -> None:
    """Where the table is somebody else's own, `apply` fails: record, workloads' policy and the host are as
    they were; a restart tells."""
    web, client = (sandboxes(labels={"app": app}) for app in ("web", "client"))
    quiet = """
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: quiet}
spec: {podSelector: {matchLabels: {app: web}}}
"""
    probe = HostProbe(daemon)
    name = hosts_table(Paths(daemon.run_dir, daemon.state_dir).instance)
    with daemon.host.entered():
        owner = Nft()
    with owner, listening(daemon.host, 80), listening(web.ns, 80), daemon.client() as api:
        owner.run(f"add table inet {name} {{ flags owner; }}")
        with pytest.raises(KernelFailed):
            api.policy_apply([("h.yaml", host() + DENY_ALL + quiet)])
        assert api.policy_list().files == ()
        assert probe.reaches(world, HOST4, 80)
        assert Probe(daemon).reaches(client, web.ip4, 80)
        assert api.node_status().ready


def test_an_endpoint_follows_its_address(daemon: Daemon, world: TestNetns) -> None:
    """One without an interface's name is the interface that has its address, now and after a move."""
    probe = HostProbe(daemon)
    with daemon.client() as api, listening(daemon.host, 80):
        api.policy_apply([("h.yaml", host(interfaceName="", expectedIPs="[203.0.113.9]"))])
        assert api.policy_list().hosts == ("uplink: no interface",)
        assert probe.reaches(world, HOST4, 80)
        daemon.host.run(["ip", "addr", "add", "203.0.113.9/32", "dev", "up0"])
        wait_until(lambda: api.policy_list().hosts == ("uplink: up0",), why="the endpoint to be bound")
        assert not probe.reaches(world, HOST4, 80)
        daemon.host.run(["ip", "addr", "del", "203.0.113.9/32", "dev", "up0"])
        wait_until(lambda: api.policy_list().hosts == ("uplink: no interface",), why="it to be free")
        assert probe.reaches(world, HOST4, 80)


def test_every_interface_but_the_loopback_and_ports(
    daemon: Daemon, world: TestNetns, sandboxes: SandboxFactory
) -> None:
    """An endpoint of "*" is the uplink, and neither the loopback nor a port's representor: a sandbox reaches
    the host, and the host the sandbox."""
    probe = HostProbe(daemon)
    box = sandboxes()
    with listening(daemon.host, 80), listening(box.ns, 80), daemon.client() as api:
        api.policy_apply([("h.yaml", host(interfaceName="'*'") + DENY_ALL)])
        assert not probe.reaches(world, HOST4, 80)
        assert probe.reaches(daemon.host, "127.0.0.1", 80)
        assert probe.reaches(daemon.host, HOST4, 80)
        assert probe.reaches(daemon.host, box.ip4, 80)
        assert probe.reaches(box.ns, HOST4, 80)


def test_a_port_that_comes_is_a_peer_at_once(
    daemon: Daemon, world: TestNetns, sandboxes: SandboxFactory
) -> None:
    """A rule of a host endpoint that selects workloads has the addresses of those that come and go."""
    probe = HostProbe(daemon)
    rule = (
        "types: [Ingress]\ningress: [{action: Deny, destination: {selector: app == 'web'}}, {action: Allow}]"
    )
    mapping = PortMapping(host_port=8080, container_port=80)
    with daemon.client() as api:
        api.policy_apply([("h.yaml", host() + policy("web", rule, flags=FORWARD))])
        web = sandboxes(labels={"app": "web"}, port_mappings=[mapping])
        with listening(web.ns, 80):
            assert not probe.reaches(world, HOST4, 8080)
            api.port_set(web.port.port_id, labels={"app": "other"})
            assert probe.reaches(world, HOST4, 8080)


def test_the_command_line_says_who_and_what(daemon: Daemon, world: TestNetns) -> None:
    """``policy list`` has the endpoints and the failsafe ports, ``drops`` what was dropped by which rule,
    ``node status`` the node's name, ``doctor`` a finding; a dry run changes nothing."""
    probe = HostProbe(daemon)
    with listening(daemon.host, 80), daemon.client() as api:
        api.policy_apply([("h.yaml", host() + DENY_ALL)], dry_run=True)
        assert probe.reaches(world, HOST4, 80)
        api.policy_apply([("h.yaml", host() + DENY_ALL)])
        assert not probe.reaches(world, HOST4, 80)
    listed = daemon.cli("policy", "list").stdout
    assert "uplink: up0" in listed
    assert "in tcp 22 179" in listed
    rows = [line.split() for line in daemon.cli("drops").stdout.splitlines() if "tier-default" in line]
    said = ["host:up0", "uplink", "ingress", "host-local", "tier-default", "default", "ingress"]
    assert said in [[*row[:4], *row[6:]] for row in rows]
    assert socket.gethostname() in daemon.cli("node", "status").stdout
    assert "host endpoints: uplink: up0" in daemon.cli("doctor", check=False).stdout


def test_the_documented_example(daemon: Daemon, world: TestNetns, sandboxes: SandboxFactory) -> None:
    """docs/policy.md: 443, pings and ssh come in, what the host opens passes, a published port is closed."""
    _, _, section = (PROJECT / "docs" / "policy.md").read_text().partition("## The host's own interfaces")
    example = section.partition("```yaml")[2].partition("```")[0]
    example = example.replace("node: web1", f"node: {socket.gethostname()}").replace("eth0,", "up0,")
    probe = HostProbe(daemon)
    ports = [PortMapping(host_port=port, container_port=80) for port in (8080, 8081)]
    web = sandboxes(port_mappings=ports)
    with contextlib.ExitStack() as stack:
        for ns, port in ((daemon.host, 443), (daemon.host, 22), (daemon.host, 80), (web.ns, 80), (world, 80)):
            stack.enter_context(listening(ns, port))
        api = stack.enter_context(daemon.client())
        api.policy_apply([("example.yaml", example)])
        for mine, theirs in (ends(4), ends(6)):
            assert [probe.reaches(world, mine, port) for port in (443, 22, 80)] == [True, True, False]
            assert probe.reaches(daemon.host, theirs, 80)
            assert [probe.reaches(world, mine, port) for port in (8080, 8081)] == [False, True]
            assert world.run(["ping", "-n", "-c", "1", "-W", "2", mine], check=False).returncode == 0


def test_another_nodes_endpoint_is_a_peer_only(daemon: Daemon, world: TestNetns) -> None:
    """It binds nothing here; where there are only such, a warning says what this node is called."""
    elsewhere = host().replace(f"node: {socket.gethostname()}", "node: elsewhere")
    with listening(daemon.host, 80), daemon.client() as api:
        state = api.policy_apply([("h.yaml", elsewhere + DENY_ALL)])
        assert [warning.code for warning in state.warnings] == ["host-endpoints-elsewhere"]
        assert socket.gethostname() in state.warnings[0].text
        assert HostProbe(daemon).reaches(world, HOST4, 80)
        assert api.policy_list().hosts == ()


@pytest.mark.parametrize("name", ["'eth*'", "'a\"b'", "'a;b'", "'}'", "lo", "pw0123abcd"])
def test_names_that_are_no_interface_of_the_hosts(daemon: Daemon, name: str) -> None:
    """Patterns, what nft would read otherwise, the loopback and ports' devices are refused with the field."""
    with daemon.client() as api:
        with pytest.raises(InvalidInput, match=r"HostEndpoint uplink.*interfaceName"):
            api.policy_apply([("h.yaml", host(interfaceName=name))])
        assert api.policy_list().files == ()


def test_domains_are_refused(daemon: Daemon) -> None:
    """A host endpoint's policy can't ask for names, and says where it does."""
    rules = "types: [Egress]\negress: [{action: Allow, destination: {domains: [example.com]}}]"
    with daemon.client() as api, pytest.raises(InvalidInput, match=r"names.*domains.*example\.com"):
        api.policy_apply([("h.yaml", host() + policy("names", rules))])
